"""Modality gap for `evaluate.load`. One import per line: `evaluate` reads them so."""

from typing import Any

import datasets
import evaluate

from maple_trl.metrics.gaps import modality_gap_intervals


_DESCRIPTION = "Relative differences between the accuracies on questions of one, two and three modalities."
_CITATION = "MAPLE, arXiv 2602.11596, C.1"
_INPUTS = """
Args:
    predictions: the score of each question in [0, 1]; NaN for one that could not be scored.
    tags: the tag of each question (V, A, S, VA, VS, AS, VAS in any order and case).
    weighting (`str`): "sample" (a tag counts by its questions, as in the paper's Table 1; default) or "tag".
    confidence (`float`): of the intervals. 0.95 by default.
    resamples (`int`), seed (`int`): of the bootstrap. 2000 and 0 by default.
    clusters (`list`): the clip of each question, None where it has none: intervals then are over clips. None by default.
Returns:
    `uni_bi`, `uni_tri`, `bi_tri` and `mean` as fractions, each with `_low` and `_high`; with clusters `clips`,
    their number.
"""


class ModalityGap(evaluate.Metric):
    """See [`modality_gap_intervals`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64"), "tags": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[float], tags: list[str], **options: Any) -> dict[str, Any]:
        gaps = modality_gap_intervals(predictions, tags, **options)
        result: dict[str, Any] = {}
        for name, estimate in gaps.items():
            result |= estimate.as_columns(name)
        clips = gaps["mean"].clips
        return result if clips is None else {**result, "clips": clips}
