"""TRL's vLLM generation, for prompts with media: what both of its modes have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object, is_peft_model, set_seed
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from maple_trl.omni.encoded import EncodedPrompt, unique_prompts
from maple_trl.omni.families.base import OmniFamily, unwrap
from maple_trl.rollout.engine import EngineError, WrongWeightsError
from maple_trl.rollout.engine_models import engine_model, engine_weights
from maple_trl.rollout.engine_rows import EngineRow
from maple_trl.rollout.merged_weights import merged_weights, tied_name
from maple_trl.rollout.sampling_options import vllm_options
from maple_trl.rollout.weight_sums import WeightSummer, WeightSums, compare_sums


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Sampled:
    """
    What became of a prompt.

    Attributes:
        token_ids: its tokens, as the engine read them.
        completions: tokens of each completion, and their log-probabilities.
        failure: why there are none.
    """

    token_ids: list[int]
    completions: list[tuple[list[int], list[float]]]
    failure: str | None = None


class MergingGeneration(VLLMGeneration):
    """TRL's, whose transfers of weights leave the weights under an adapter as they are."""

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if not is_peft_model(self.model):
            yield from super()._iter_named_params()
        elif self._dist.is_fsdp or self._dist.is_zero3:
            # Shards of a layer cannot be merged by themselves: TRL merges the whole model. It knows copies of modules of the
            # adapter "default" alone, and would send those of others under names that no engine has.
            inactive = {
                f"modules_to_save.{name}." for name in {*self.model.peft_config} - {*self.model.active_adapters}
            }
            for name, value in super()._iter_named_params():
                if not any(copy in name for copy in inactive):
                    yield name, value
        else:
            for name, value in merged_weights(self.model):
                yield self._fix_param_name_to_vllm(name), value


class OmniVLLMGeneration(MergingGeneration):
    """
    Samples completions of encoded prompts with vLLM.

    The engine is handed tokens, features and positions that the trainer has computed, and what it says of a prompt's tokens
    is compared. A prompt that it fails on is tried once more by itself.

    Args:
        family: of the model.
        ends: ids of tokens that end a completion.
        run_seed: that of the run.
        kwargs: those of TRL.

    Attributes:
        failed (`dict[int, str]`): rows of the last call that have no completion, and why.
    """

    def __init__(self, *args: Any, family: OmniFamily, ends: Sequence[int], run_seed: int, **kwargs: Any):
        self.family = family
        self.ends = list(ends)
        self.run_seed = run_seed
        self.failed: dict[int, str] = {}
        self.model_length: int | None = None  # tokens of prompt and completion that the engine takes
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        super()._init_vllm()
        set_seed(self.run_seed, device_specific=True)  # an engine seeds this process in its own way

    @property
    def engine_model(self) -> nn.Module | None:
        """VLLM's model, where it is in this process."""
        return None

    @property
    def plain_model(self) -> nn.Module:
        """The trained model without adapters and wrappers."""
        return unwrap(self.accelerator.unwrap_model(self.model))

    @property
    def known(self) -> Any:
        """How vLLM serves the family."""
        return engine_model(self.plain_model.config.model_type)

    # Weights

    def sync_weights(self) -> None:
        """
        Hand over the weights, empty what the engine keeps of former ones, and prove that it has them; a collective call.

        Raises:
            EngineError: on every rank, where the engine of one does not take them.
        """
        summer, named = WeightSummer(), self._iter_named_params()

        def passed_on() -> Iterator[tuple[str, Tensor]]:
            for name, value in named:
                summer.add(name, value, self.dtype)
                yield name, value

        def load() -> None:
            try:
                self._load(engine_weights(passed_on(), self.known, tied_name(self.plain_model)))
            finally:
                for _ in named:  # where it has failed: other ranks gather with this one
                    pass

        self._agreeing(load)
        self._agreeing(lambda: self._prove(summer.sums))

    @abstractmethod
    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand over weights, all of which every rank must take from the iterator, and empty caches."""

    def empty_caches(self) -> None:
        """Empty what an engine of this process keeps of prefixes and clips."""

    @abstractmethod
    def _sums(self) -> WeightSums | None:
        """Add up the weights that the engine of this rank has; `None` where it has none of its own."""

    def _prove(self, trained: WeightSums) -> None:
        found = self._sums()
        different = [] if found is None else compare_sums(trained, found)
        if different:
            raise EngineError(
                f"vLLM has other weights than the trainer in: {', '.join(different)}. Its completions "
                "would be another model's."
            )

    @property
    def dtype(self) -> torch.dtype:
        """What the engine computes in: as the trainer does under autocast, else as its weights are."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or next(self.plain_model.parameters()).dtype

    # Completions

    def generate(
        self,
        prompts: list[EncodedPrompt],
        images: None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """
        Sample a completion for each row of this rank, rows of a prompt sharing the object; a collective call.

        Returns:
            as TRL's: tokens of prompts and completions, and of each token its log-probability and its id.

        Raises:
            EngineError: on every rank, where the engine of one is lost, or has read other tokens than were trained on.
        """
        unique, order = unique_prompts(prompts)
        counts = [order.count(i) for i in range(len(unique))]
        with profiler or nullcontext():
            sampled = self._sample_anew(lambda: self._checked(unique, self._sample_fitting(unique, counts)))
        left = [iter(found.completions) for found in sampled]
        self.failed = {row: failure for row, i in enumerate(order) if (failure := sampled[i].failure) is not None}
        nothing = [self.ends[0] if self.ends else 0], [float("nan")]
        completions = [nothing if row in self.failed else next(left[i]) for row, i in enumerate(order)]
        ids = [list(tokens) for tokens, _ in completions]
        logprobs = [[[value] for value in values] for _, values in completions]
        return [sampled[i].token_ids for i in order], ids, logprobs, [[[token] for token in row] for row in ids]

    def _sample_fitting(self, prompts: Sequence[EncodedPrompt], counts: Sequence[int]) -> list[Sampled]:
        """Sample completions of the prompts that leave room for whole ones: an engine would cut them without a word."""
        found = {i: failure for i, prompt in enumerate(prompts) if (failure := self._too_long(prompt)) is not None}
        fitting = [i for i in range(len(prompts)) if i not in found]
        rows = [EngineRow.of(prompts[i], self.family) for i in fitting]
        found |= dict(zip(fitting, self._sample(rows, [counts[i] for i in fitting]), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _too_long(self, prompt: EncodedPrompt) -> Sampled | None:
        if self.model_length is None or len(prompt) + self.max_completion_length <= self.model_length:
            return None
        reason = f"{len(prompt)} tokens and a completion of {self.max_completion_length} do not fit into {self.model_length}"
        return Sampled(
            prompt.input_ids.tolist(), [], f"{reason} (vllm_max_model_length, or vllm-serve --max_model_length)"
        )

    @abstractmethod
    def _sample(self, rows: Sequence[EngineRow], counts: Sequence[int]) -> list[Sampled]:
        """Sample so many completions of each prompt of this rank."""

    def _checked(self, prompts: Sequence[EncodedPrompt], sampled: list[Sampled]) -> list[Sampled]:
        for prompt, found in zip(prompts, sampled, strict=True):
            if found.failure is None and found.token_ids != prompt.input_ids.tolist():
                raise EngineError(
                    f"vLLM has read {len(found.token_ids)} tokens of prompt {prompt.key} (tag {prompt.tag}), which are not the "
                    f"{len(prompt)} that it is trained on"
                )
        failures = [found.failure for found in sampled if found.failure is not None]
        if len(failures) == len(sampled) > 1:
            raise EngineError(f"vLLM has failed on each of {len(sampled)} prompts: {failures[0]}")
        return sampled

    def _sample_anew(self, sample: Callable[[], list[Sampled]]) -> list[Sampled]:
        """Sample, once more where an engine turns out to have other weights, which it is given."""
        try:
            return self._agreeing(sample)
        except WrongWeightsError:
            self.sync_weights()
            return self._agreeing(sample)

    def _agreeing(self, act: Callable[[], _Result]) -> _Result:
        """Do something on every rank; what it raises on one is raised on all, so that none waits for it."""
        result: list[_Result] = []
        problem: EngineError | None = None
        try:
            result.append(act())
        except EngineError as error:
            problem = error
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:  # the same one everywhere: what is done about it is a collective call, or ends the run
            raise next((p for p in problems if not isinstance(p, WrongWeightsError)), problems[0]) from problem
        return result[0]

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of vLLM's `SamplingParams`."""
        return {
            "repetition_penalty": self.repetition_penalty,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "max_tokens": self.max_completion_length,
            "logprobs": 0,
            **vllm_options(self.generation_kwargs, (), self.ends),
        }
