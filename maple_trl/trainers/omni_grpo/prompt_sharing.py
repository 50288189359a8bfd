"""Whether completions share their prompt's pass: both ways are compared before the first rollout."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial

from accelerate.utils import gather_object
from torch import nn

from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.families import unwrap
from maple_trl.omni.prefix.packed_attention import install, why_not_trained
from maple_trl.omni.prefix.sharing import Comparison
from maple_trl.omni.serving import serve_media


logger = logging.getLogger(__name__)


class SharingMixin:
    """Finds out for [`~maple_trl.OmniGRPOTrainer`] whether a prompt can pass the model once for all of its completions."""

    _sharing: bool | None = False  # None: to be found out
    _unshared: str | None = None  # why prompts are not shared, where they were to be

    def _agree_on_sharing(self) -> None:
        """Find out whether completions share their prompts, unless that is known; a collective call."""
        if self._sharing is None:
            self._sharing = self._try_sharing(self._probe_prompt())

    def _probe_prompt(self) -> EncodedPrompt:
        """Return what to compare on: the same on all ranks, and short however long the run's prompts are."""
        return self.prompt_builder.probe()

    def _try_sharing(self, prompt: EncodedPrompt) -> bool:
        """
        Return whether completions can share their prompts, after all ranks have compared both ways on a prompt.

        Raises:
            ValueError: when they cannot and `shared_prefix` is `"on"`.
        """
        level = logging.INFO if self.accelerator.is_main_process else logging.DEBUG
        kinds = ", ".join((*prompt.kinds, "text"))
        told = f"a prompt of {len(prompt)} tokens ({kinds}) passed once for two completions, and once for each"
        logger.log(level, "shared_prefix=%r: comparing %s", self.args.shared_prefix, told)
        began = time.perf_counter()
        reason = self._why_apart(prompt)
        seconds = time.perf_counter() - began
        if reason is None:
            logger.log(level, "Both ways agree, which took %.1f s to find: completions share their prompt", seconds)
        elif self.args.shared_prefix == "on":
            raise ValueError(f"shared_prefix='on', but prompts cannot be shared: {reason}")
        else:
            logger.warning("Each completion passes its prompt on its own (shared_prefix='auto'): %s", reason)
            self._unshared = reason
            return False
        if self.aux_loss_enabled:
            logger.warning(
                "Training passes a prompt once per completion (shared_prefix): the loss that balances the experts counts it so. "
                "router_aux_loss_coef=0 lets completions share it."
            )
        if self.args.per_device_train_batch_size % self.args.num_generations:
            logger.warning(
                "per_device_train_batch_size (%d) is not a multiple of num_generations (%d): a prompt is passed once for each "
                "micro-batch that holds some of its completions",
                self.args.per_device_train_batch_size,
                self.args.num_generations,
            )
        return True

    def _why_apart(self, prompt: EncodedPrompt) -> str | None:
        """Return what keeps completions from sharing their prompt on any rank, `None` if nothing; a collective call."""
        models = [unwrap(self.accelerator.unwrap_model(m)) for m in (self.model, self.ref_model) if m is not None]
        reasons = gather_object([next(filter(None, map(self._why_not_packed, models)), None)])
        if any(reasons):
            return next(filter(None, reasons))
        comparison = Comparison(
            self.model,
            self.family.core(self.accelerator.unwrap_model(self.model)),
            prompt,
            # Nothing is kept of clips that no row has.
            partial(serve_media, self.family, touch=self._touched),
            self.family.suppressed_ids,
            self._packed_attention,
        )
        differences, failure = self._measure(comparison.difference)
        if failure or all(value <= comparison.least_tolerance for value in differences):
            return failure
        tolerances, failure = self._measure(comparison.tolerance)
        errors = [value / tolerance for value, tolerance in zip(differences, tolerances, strict=True)]
        if failure or all(error <= 1 for error in errors):
            return failure
        error = next((error for error in errors if math.isnan(error)), max(errors))
        return f"log-probabilities differ {error:.1f} times as much as rounding explains"

    def _why_not_packed(self, model: nn.Module) -> str | None:
        """Return why a model cannot be trained on packed rows, before it is tried."""
        if not install(model):
            return (
                "the language model's attention is not sdpa, flex_attention or FlashAttention over whole sequences or windows "
                "of them (FlashAttention: where tokens of a picture do not see each other both ways)"
            )
        attention = self._packed_attention or model.config.get_text_config()._attn_implementation
        return why_not_trained(attention, self.accelerator.device)

    @property
    def _packed_attention(self) -> str | None:
        """What computes attention in packed rows; `None` for what the model uses."""
        return None if self.args.packed_attention == "model" else self.args.packed_attention

    def _measure(self, measure: Callable[[], float]) -> tuple[list[float], str | None]:
        """Return what each rank measures, and how one failed, if any did; a collective call."""
        try:
            mine: float | str = measure()
        except RuntimeError as failure:  # a kernel does not take what it is given, or does not compile
            logger.debug("Comparing shared prompts failed", exc_info=True)
            first_line = str(failure).split("\n", 1)[0]
            mine = f"comparing both ways ended with {type(failure).__name__}: {first_line}"
        found = gather_object([mine])
        failure = next((value for value in found if isinstance(value, str)), None)
        return [math.nan if isinstance(value, str) else value for value in found], failure
