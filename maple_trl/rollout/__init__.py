"""Engines that sample completions: what TRL's options `use_vllm` and `vllm_mode` choose between."""

from maple_trl.rollout.engine import EngineError, RolloutEngine
from maple_trl.rollout.transformers_engine import TransformersEngine
from maple_trl.rollout.vllm_engine import VLLMEngine


__all__ = ["EngineError", "RolloutEngine", "TransformersEngine", "VLLMEngine"]
