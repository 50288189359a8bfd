"""What AVATAR's training passes show: how far replayed tokens are off-policy, and where in completions the signal is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maple_trl.algorithms import effective_share
from maple_trl.records.metrics_log import RATIO_EDGES


POINTS = 11
"""Positions in a completion, from its first token to its last, at which the signal is looked at."""
QUANTILES = (0.05, 0.5, 0.95)


@dataclass
class PassSums:
    """
    Importance ratios and training signal of the passes of an optimizer step.

    Attributes:
        log_ratios: of a replayed completion's tokens to the policy that wrote them, a tensor of shape (T,) each.
        profile (`Tensor` of shape (2, POINTS)): sum of the signal at each position in a completion, and the completions.
    """

    log_ratios: list[Tensor] = field(default_factory=list)
    profile: Tensor = field(default_factory=lambda: torch.zeros(2, POINTS, dtype=torch.float64))

    def add_log_ratios(self, log_ratios: Tensor) -> None:
        """Add the log-ratios of a replayed completion's tokens, shape (T,)."""
        self.log_ratios.append(log_ratios.float().cpu())

    def add_signal(self, signal_NT: Tensor, mask_NT: Tensor) -> None:
        """
        Add the size of the weight of each token in the policy gradient, |ratio x shaped advantage|.

        A token's position is x = t / (L - 1), as temporal advantage shaping counts it; the only token of a completion
        has none. Between two tokens the signal is interpolated, so that each completion counts at each point, however
        long it is.

        Args:
            signal_NT (`Tensor` of shape (N, T) or (N, 1)): that size for each token.
            mask_NT (`Tensor` of shape (N, T)): 1 for tokens that count, which come first in each row.
        """
        lengths_N = mask_NT.sum(dim=1).cpu()
        rows = lengths_N > 1
        signal_NT = signal_NT.cpu().expand_as(mask_NT)[rows].double()
        places_NP = torch.linspace(0, 1, POINTS, dtype=torch.float64) * (lengths_N[rows, None] - 1)
        left_NP = places_NP.floor()
        before_NP, after_NP = (signal_NT.gather(1, at.long()) for at in (left_NP, places_NP.ceil()))
        self.profile[0] += torch.lerp(before_NP, after_NP, places_NP - left_NP).sum(dim=0)
        self.profile[1] += len(places_NP)


def pass_metrics(found: Sequence[PassSums]) -> dict[str, float]:
    """
    Return metrics of the passes of all ranks together.

    `replay/ratio_p05`, `replay/ratio_p50`, `replay/ratio_p95` and `replay/ratio_max` are of the importance ratios of
    replayed tokens, `replay/effective_share` their effective sample size as a share of their number, and
    `replay/ratio_share/0` to `replay/ratio_share/10` the shares of them in the bins of
    [`~maple_trl.records.metrics_log.RATIO_EDGES`], a histogram.
    `loss_profile/0` to `loss_profile/10` are the mean size of the signal at the first token, after a tenth of the
    completion, and so on to its last token.
    """
    metrics = {}
    log_ratios = [values for part in found for values in part.log_ratios]
    if sum(map(len, log_ratios)):
        ratios = torch.cat(log_ratios).double().exp()
        metrics["replay/effective_share"] = effective_share(ratios)
        ordered = ratios.sort().values
        for share in QUANTILES:
            metrics[f"replay/ratio_p{round(100 * share):02d}"] = float(ordered[round(share * (len(ordered) - 1))])
        metrics["replay/ratio_max"] = float(ordered[-1])
        edges = torch.tensor(RATIO_EDGES, dtype=torch.float64)
        counts = torch.bincount(torch.bucketize(ordered, edges, right=True), minlength=len(edges) + 1)
        for i, count in enumerate(counts.tolist()):
            metrics[f"replay/ratio_share/{i}"] = count / len(ordered)
    sums, counts = sum(part.profile for part in found)
    for i in range(POINTS):
        if counts[i]:
            metrics[f"loss_profile/{i}"] = float(sums[i] / counts[i])
    return metrics
