"""The gradients of fresh and of replayed completions' loss apart (AVATAR eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


TERMS = ("on", "off")


class TermGradients:
    """
    Gradients of J_on (fresh completions) and J_off (replayed ones), summed over an optimizer step's micro-batches.

    A loss depends on the log-probabilities row by row, so each row's share of the gradient follows from the loss's
    derivatives by its own log-probabilities. The graph of the loss is kept and no `.grad` is touched: the backward pass that
    trains finds everything as it would have without this. What the loss adds beside the log-probabilities (an entropy
    bonus, a router's auxiliary loss) belongs to neither term.

    Args:
        parameters (`Sequence[nn.Parameter]`): those that are trained, each whole on this rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.sums: dict[str, list[Tensor | None]] = {term: [None] * len(self.parameters) for term in TERMS}

    def add(self, loss: Tensor, logps_NT: Tensor, replayed_N: Tensor) -> None:
        """
        Add the gradients of a micro-batch's loss, before its backward pass.

        Args:
            loss (`Tensor`): with the graph that it came from.
            logps_NT (`Tensor` of shape (N, T)): that the loss was computed from, of the same graph.
            replayed_N (`Tensor` of shape (N,)): whether each row is replayed, bool.
        """
        (weights_NT,) = torch.autograd.grad(loss, logps_NT, retain_graph=True)
        for term, rows_N in zip(TERMS, (~replayed_N, replayed_N), strict=True):
            if not rows_N.any():
                continue
            found = torch.autograd.grad(
                logps_NT, self.parameters, weights_NT * rows_N[:, None], retain_graph=True, allow_unused=True
            )
            sums = self.sums[term]
            for i, gradient in enumerate(found):
                if gradient is not None:
                    sums[i] = gradient if sums[i] is None else sums[i] + gradient

    def metrics(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """
        Return the norms of both gradients before clipping, and the cosine of their angle; a collective call.

        The keys are `replay/gradient_on`, `replay/gradient_off` and, where neither is 0, `replay/gradient_cosine`.

        Args:
            mean (`Callable`): the mean of a tensor over the ranks.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.parameters[0].device)
        for parameter, *gradients in zip(self.parameters, *(self.sums[term] for term in TERMS), strict=True):
            on, off = (
                mean(torch.zeros_like(parameter) if gradient is None else gradient).double() for gradient in gradients
            )
            sums += torch.stack([on.square().sum(), off.square().sum(), (on * off).sum()])
        *squares, product = sums.tolist()
        norms = {term: square**0.5 for term, square in zip(TERMS, squares, strict=True)}
        metrics = {f"replay/gradient_{term}": norm for term, norm in norms.items()}
        if all(norms.values()):
            metrics["replay/gradient_cosine"] = product / (norms["on"] * norms["off"])
        return metrics
