"""What is logged of completions that another engine than the trainer has sampled."""

from __future__ import annotations

from torch import Tensor

from maple_trl.trainers.common.tag_metrics import TAGS


MOST_DIFFERENCE = 0.3
"""Mean difference in log-probability that rounding to bfloat16 can explain, with room."""


def ratio_metrics(summaries_N5: Tensor, tags_N: Tensor) -> dict[str, float]:
    """
    Name the importance ratios of a rollout's completions, per tag and over all.

    Args:
        summaries_N5 (`Tensor` of shape (N, 5)): as [`~maple_trl.algorithms.summarise_ratios`] returns them, of all ranks.
        tags_N (`Tensor` of shape (N,)): tags as numbers.

    Returns:
        `dict`: `tag/<TAG>/importance_ratio/<min, mean, max or clipped>`; the last is a share.
    """
    metrics = {}
    for name, chosen in (("all", tags_N >= 0), *((tag, tags_N == i) for i, tag in enumerate(TAGS))):
        counts, sums, least, most, clipped = summaries_N5[chosen].unbind(1)
        if not (count := float(counts.sum())):
            continue
        values = {
            "min": least.min(),
            "mean": sums.sum() / count,
            "max": most.max(),
            "clipped": clipped.sum() / count,
        }
        metrics |= {f"tag/{name}/importance_ratio/{key}": float(value) for key, value in values.items()}
    return metrics
