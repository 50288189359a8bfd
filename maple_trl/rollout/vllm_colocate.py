"""vLLM in the process of the trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from trl.generation import vllm_generation

from maple_trl.rollout.engine import EngineError
from maple_trl.rollout.engine_inputs import engine_input, engine_output
from maple_trl.rollout.engine_models import MEDIA_PER_PROMPT, register, write_engine_folder
from maple_trl.rollout.engine_rows import EngineRow
from maple_trl.rollout.vllm_generation import OmniVLLMGeneration, Sampled
from maple_trl.rollout.weight_sums import WeightSums, sum_weights


class ColocatedGeneration(OmniVLLMGeneration):
    """
    Samples with an engine of this process, which computes where the trainer does.

    Args:
        engine_options: further arguments of vLLM's engine.
        kwargs: those of the base class.
    """

    def __init__(self, *args: Any, engine_options: dict[str, Any], **kwargs: Any):
        self.engine_options = engine_options
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over within the process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        register()
        with tempfile.TemporaryDirectory(prefix="maple-trl-engine-") as folder:
            write_engine_folder(self.plain_model, self.processing_class, Path(folder))
            with _engine_arguments(model=folder, **self._engine_arguments()):
                super()._init_vllm()
        self.processor = self.llm.llm_engine.input_processor.renderer.get_mm_processor()
        self.model_length = self.llm.llm_engine.model_config.max_model_len
        self._requests = 0

    def _engine_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "load_format": "dummy",  # the first sync brings the weights
            "dtype": str(self.dtype).removeprefix("torch."),
            "limit_mm_per_prompt": dict(MEDIA_PER_PROMPT),
            "mm_processor_cache_gb": 0,
        }
        if self.accelerator.device.type == "cpu":
            arguments |= {"enforce_eager": True, "skip_mm_profiling": True}
        return arguments | dict.fromkeys(self.known.switched_off, False) | self.engine_options

    # Weights

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        try:
            self._runner.reload_weights(weights_iterator=weights)
        except Exception as error:
            raise EngineError(
                f"vLLM could not take the weights ({type(error).__name__}: {error}), and is left with some of them"
            ) from error
        self.empty_caches()

    def empty_caches(self) -> None:
        """Empty what the engine keeps of prefixes and clips."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its cache of prefixes")
        self.llm.llm_engine.reset_encoder_cache()

    def _sums(self) -> WeightSums:
        return sum_weights(self.engine_model.named_parameters())

    @property
    def engine_model(self) -> nn.Module:
        """VLLM's model."""
        return self._runner.get_model()

    @property
    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner

    # Completions

    def _sample(self, rows: Sequence[EngineRow], counts: Sequence[int]) -> list[Sampled]:
        found = self._run(rows, counts)
        for i, sampled in enumerate(found):
            if sampled.failure is not None:
                (found[i],) = self._run([rows[i]], [counts[i]])
        return found

    def _run(self, rows: Sequence[EngineRow], counts: Sequence[int]) -> list[Sampled]:
        """Run some prompts through the engine; what it says of one is that one's failure."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        found: dict[str, Sampled] = {}
        waiting: list[str] = []
        for row, count in zip(rows, counts, strict=True):
            self._requests += 1
            name = f"maple-{self._requests}"
            waiting.append(name)
            params = SamplingParams(n=count, output_kind=RequestOutputKind.FINAL_ONLY, **self.sampling)
            try:
                engine.add_request(name, engine_input(self.processor, row), params)
            except Exception as error:
                found[name] = _failed(row, error)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        found[output.request_id] = Sampled(list(output.prompt_token_ids), *engine_output(output))
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise EngineError(f"vLLM's engine has died: {error}") from error
            engine.abort_request([name for name in waiting if name not in found])
            self.empty_caches()  # of what was noted for requests that were under way
            for name, row in zip(waiting, rows, strict=True):
                found.setdefault(name, _failed(row, error))
        return [found[name] for name in waiting]


def _failed(row: EngineRow, error: Exception) -> Sampled:
    return Sampled(row.token_ids, [], f"{type(error).__name__}: {error}")


@contextmanager
def _engine_arguments(**arguments: Any) -> Iterator[None]:
    """Let TRL make its engine with these arguments too, for which it has no place."""
    make = vllm_generation.LLM
    vllm_generation.LLM = lambda **given: make(**(given | arguments))
    try:
        yield
    finally:
        vllm_generation.LLM = make
