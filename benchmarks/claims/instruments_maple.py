"""The instrument of MAPLE's claims: the policy gradient at frozen points of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maple_trl.algorithms import GradientSample, group_advantages
from maple_trl.evaluation.sampled import choose_questions
from maple_trl.modalities import ModalityTag
from maple_trl.trainers.common.rollout import InFlight, Round


SHORT = 20
"""Steps below which a run is no evidence, and is looked at for as short as can be."""


@dataclass(frozen=True)
class Scheme:
    """
    How an optimizer step's gradient is made of prompts.

    Attributes:
        access: what a row is fed.
        stratified: whether a rollout is of one tag.
        scope: of the advantages, as in `maple_trl.algorithms.advantages`.
    """

    access: str
    stratified: bool
    scope: str


SCHEMES = {
    "mupo": Scheme("all", False, "group"),
    "mupo_batch": Scheme("all", False, "batch"),
    "inputs": Scheme("required", False, "group"),
    "inputs_tag": Scheme("required", False, "tag"),
    "inputs_whitened": Scheme("required", False, "tag_whitened"),
    "inputs_batch": Scheme("required", False, "batch"),
    "stratified": Scheme("required", True, "group"),
    "mapo": Scheme("required", True, "tag"),
    "stratified_whitened": Scheme("required", True, "tag_whitened"),
}
"""MUPO, and MAPO by its causes: its inputs alone, then in batches of one tag, then scaled within tags; and the other scopes."""
CENTRED = ("group", "tag")
"""Scopes whose advantages have the mean 0 within a prompt."""
TAG_NUMBERS = {tag.value: number for number, tag in enumerate(ModalityTag)}
HALVED = ("mupo", "mapo")
"""Schemes that are also measured on two halves of their own prompts, which differ by chance alone."""


@dataclass
class Pool:
    """
    Prompts with one rollout each at fixed weights, fed in one way, and what their completions would pull at.

    Attributes:
        tags: of each prompt.
        rewards: of shape (prompts, completions).
        tokens: of all completions of a prompt, shape (prompts,).
        centred, plain: sums over a prompt's completions of the gradient of their log-probability, weighted by the reward less
            the prompt's mean, and not weighted; of shape (prompts, coordinates).
    """

    tags: list[str]
    rewards: Tensor
    tokens: Tensor
    centred: Tensor
    plain: Tensor

    def part(self, numbers: Sequence[int]) -> Pool:
        """Return some of the prompts."""
        chosen = list(numbers)
        tensors = (self.rewards, self.tokens, self.centred, self.plain)
        return Pool([self.tags[i] for i in chosen], *(tensor[chosen] for tensor in tensors))

    def gradients(self, rollout: Sequence[int], per_step: int, scope: str) -> Tensor:
        """
        Return the gradients of the optimizer steps over a rollout of these prompts, in order, with the token-level mean.

        Within a prompt an advantage is a factor times the centred reward, plus a shift, whatever the scope.
        """
        numbers = list(rollout)
        rewards = self.rewards[numbers].double()
        prompts, size = rewards.shape
        groups = torch.arange(prompts).repeat_interleave(size)
        tags = torch.tensor([TAG_NUMBERS[self.tags[i]] for i in numbers]).repeat_interleave(size)
        advantages = group_advantages(rewards.flatten(), groups, tags, scope).view(prompts, size).double()
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        squares = centred.square().sum(dim=1)
        factors = torch.where(squares > 1e-12, (advantages * centred).sum(dim=1) / squares.clamp(min=1e-12), 0.0)
        pulled = factors.float()[:, None] * self.centred[numbers]
        if scope not in CENTRED:
            pulled += advantages.mean(dim=1).float()[:, None] * self.plain[numbers]
        steps = pulled.unflatten(0, (-1, per_step)).sum(dim=1)
        return -steps / self.tokens[numbers].unflatten(0, (-1, per_step)).sum(dim=1, keepdim=True)


def moments(
    pool: Pool, scheme: Scheme, per_rollout: int, per_step: int, draws: int, seed: int = 0
) -> dict[str, float | None]:
    """
    Estimate the spread of a scheme's gradients over optimizer steps, at the weights at which the pool was made.

    `E|g|^2` is the mean over steps of rollouts that are drawn from the pool, in each of which every prompt is another; `|E g|^2` is
    the product of the mean gradients of two halves of the pool, which share no prompt and so no error. Both are without bias, and
    so is their difference, the variance, however few the prompts are.

    Args:
        per_rollout, per_step: prompts.
        draws: rollouts, from either half.

    Returns:
        `variance` is `E|g - E g|^2`, `within` that around the mean of the step's tag, `between` the rest, which stratified steps
        alone have; `noise` is the variance over `|E g|^2`, if that is not lost in its error. `norm` and `norm_variance` are of
        `|g|`; `relative_norm_variance` is that over `E|g|^2`, if any prompt has a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    strata = sorted(set(pool.tags)) if scheme.stratified else [""]
    drawn = [
        _steps(pool, name, scheme.scope, per_rollout, per_step, -(-draws // len(strata)), generator) for name in strata
    ]
    norms = torch.cat([steps.square().sum(dim=1) for halves in drawn for steps in halves]).sqrt()
    means = torch.stack([torch.stack([steps.mean(dim=0) for steps in halves]) for halves in drawn])  # strata, halves
    of_mean = float(means[:, 0].mean(dim=0) @ means[:, 1].mean(dim=0))
    of_tags = float((means[:, 0] * means[:, 1]).sum(dim=1).mean())
    mean_square = float(norms.square().mean())
    return {
        "variance": mean_square - of_mean,
        "within": mean_square - of_tags,
        "between": of_tags - of_mean,
        "mean_square": mean_square,
        "noise": (mean_square - of_mean) / of_mean if of_mean > 0 else None,
        "norm": float(norms.mean()),
        "norm_variance": float(norms.var()),
        "relative_norm_variance": float(norms.var()) / mean_square if mean_square else None,
    }


def _steps(
    pool: Pool, tag: str, scope: str, per_rollout: int, per_step: int, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the gradients of steps over rollouts that are drawn from two halves of a tag's prompts; of all without a tag."""
    numbers = [i for i, own in enumerate(pool.tags) if tag in ("", own)]
    order = [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]
    found = []
    for half in (order[::2], order[1::2]):
        if len(half) < per_rollout:
            whose = f" of tag {tag}" if tag else ""
            raise ValueError(f"a rollout takes {per_rollout} prompts{whose}, but half of the pool has {len(half)}")
        rollouts = [torch.randperm(len(half), generator=generator)[:per_rollout].tolist() for _ in range(draws)]
        found.append(torch.cat([pool.gradients([half[i] for i in drawn], per_step, scope) for drawn in rollouts]))
    return found


class Gradient:
    """
    The gradient's variance under each of [`SCHEMES`], at the same weights and, where they are fed alike, on the same completions.

    Measured at the weights that a run has ended with: the policy is frozen, each of `PER_TAG` prompts of each tag gets one rollout
    with the run's own generation, rewards and passes, fed its tag's signals and fed all. From their gradients (the trainer's probe: a
    fixed random sample of coordinates) optimizer steps are put together, of whole prompts, as the trainer's are but those of text
    alone, which TRL deals out over the steps of a rollout. `own` is the scheme that the run trains by.
    """

    VERSION = 1
    PER_TAG, COORDINATES, DRAWS = 64, 16384, 112

    def __init__(self, trainer: Any, measure: Any, cost: Any):
        self._trainer = trainer

    def result(self) -> dict[str, Any]:
        return self.look()

    def look(self) -> dict[str, Any]:
        """Measure at the weights of now."""
        args = self._trainer.args
        per_rollout = args.generation_batch_size // self._trainer.num_generations
        per_step = per_rollout * args.gradient_accumulation_steps // args.steps_per_generation
        per_tag, draws = self.PER_TAG, self.DRAWS
        if args.max_steps < SHORT:  # few prompts, and steps of one
            per_tag, draws, per_rollout, per_step = 8, draws // 16, 2, 1
        rows = choose_questions(list(self._trainer.train_dataset), per_tag, args.seed)
        pools = {access: self._pool(rows, access) for access in ("required", "all")}
        sizes = (per_rollout, per_step, draws)
        found = {name: moments(pools[one.access], one, *sizes) for name, one in SCHEMES.items()}
        own = Scheme(args.modality_access, args.batching == "stratified", args.advantage_scope)
        names = [name for name, one in SCHEMES.items() if one == own]
        if names:
            found["own"] = found[names[0]]
        for name in HALVED:
            pool = pools[SCHEMES[name].access]
            for part, first in (("first", 0), ("second", 1)):
                half = pool.part(range(first, len(pool.tags), 2))
                found[f"{name}_{part}_half"] = moments(half, SCHEMES[name], *sizes)
        return found

    def _pool(self, rows: Sequence[Mapping[str, Any]], access: str) -> Pool:
        trainer, size = self._trainer, self._trainer.num_generations
        sample = GradientSample(trainer.model.named_parameters(), self.COORDINATES, trainer.args.seed)
        per_chunk = max(1, trainer.args.per_device_eval_batch_size // size)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        with frozen(trainer, access):
            for start in range(0, len(rows), per_chunk):
                chunk = [dict(row) for row in rows[start : start + per_chunk] for _ in range(size)]
                parts += pulls(trainer, trainer._roll_out(*trainer._encoded(chunk)), sample)
        rewards, tokens, centred, plain = (torch.stack(values) for values in zip(*parts, strict=True))
        return Pool([str(ModalityTag.parse(row["tag"])) for row in rows], rewards, tokens, centred, plain)


def pulls(trainer: Any, made: Round, sample: GradientSample) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield of each prompt of a round what a [`Pool`] holds of it: rewards, tokens, and gradients, which are left unset."""
    size = made.rollout.group_size

    def read(total: Tensor, again: bool = False) -> Tensor:
        total.backward(retain_graph=again)
        found = sample().clone()
        trainer.model.zero_grad(set_to_none=True)
        return found

    for start in range(0, made.batch.rows, size):
        batch = made.batch.take(range(start, start + size))
        rewards = made.rollout.rewards[start : start + size]
        mask = batch["completion_mask"]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attended = torch.cat([batch["prompt_mask"], mask], dim=1)
        with trainer._in_flight(InFlight(batch.prompts)):
            logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, mask.size(1))
        of_rows = (logps * mask).sum(dim=1)
        centred = read(((rewards - rewards.mean()) * of_rows).sum(), again=True)
        yield rewards, mask.sum(), centred, read(of_rows.sum())


@contextmanager
def frozen(trainer: Any, access: str) -> Iterator[None]:
    """Let a trainer's policy be asked without a trace in the run: fed in a given way, with a random stream of its own."""
    builder, training = trainer.prompt_builder, trainer.model.training
    usual, builder.modality_access = builder.modality_access, access
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed)
        trainer.model.eval()
        try:
            yield
        finally:
            builder.modality_access = usual
            trainer.model.train(training)
            trainer._metrics["eval"].clear()
            trainer._means["eval"].take()


INSTRUMENTS: dict[str, type] = {"gradient": Gradient}
"""By the names that runs ask for them by."""
