"""Accuracy per modality tag for `evaluate.load`. One import per line: `evaluate` reads them so."""

from typing import Any

import datasets
import evaluate

from maple_trl.metrics.accuracy import tag_accuracies


_DESCRIPTION = "Accuracy per modality tag, over all questions and as the mean over tags, with intervals."
_CITATION = "MAPLE, arXiv 2602.11596"
_INPUTS = """
Args:
    predictions: the score of each question in [0, 1]; NaN for one that could not be scored.
    tags: the tag of each question (V, A, S, VA, VS, AS, VAS in any order and case), empty without one.
    confidence (`float`): of the intervals. 0.95 by default.
    resamples (`int`), seed (`int`): of the bootstrap. 2000 and 0 by default.
    clusters (`list`): the clip of each question, None where it has none: intervals then are over clips. None by default.
Returns:
    `sample_mean`, `tag_mean` (None without tags) and `tag/<TAG>`, each with `_low`, `_high`, `_count` and
    with clusters `_clips`; `missing`:
    tags without a scored question; `unscored`: questions left out, by tag.
"""


class TagAccuracy(evaluate.Metric):
    """See [`tag_accuracies`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64"), "tags": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[float], tags: list[str], **options: Any) -> dict[str, Any]:
        measured = tag_accuracies(predictions, tags, **options)
        estimates = {
            "sample_mean": measured.sample_mean,
            "tag_mean": measured.tag_mean,
            **{f"tag/{tag}": estimate for tag, estimate in measured.per_tag.items()},
        }
        result: dict[str, Any] = {}
        for name, estimate in estimates.items():
            if estimate is None:
                result[name] = None
                continue
            result |= {**estimate.as_columns(name), f"{name}_count": estimate.count}
            if estimate.clips is not None:
                result[f"{name}_clips"] = estimate.clips
        return {**result, "missing": list(measured.missing), "unscored": measured.unscored}
