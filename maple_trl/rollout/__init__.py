"""Engines that sample completions: what TRL's options `use_vllm` and `vllm_mode` choose between."""

from maple_trl.rollout.engine import RolloutEngine
from maple_trl.rollout.transformers_engine import TransformersEngine


__all__ = ["RolloutEngine", "TransformersEngine"]
