"""Fusion gain for `evaluate.load`. One import per line: `evaluate` reads them so."""

from typing import Any

import datasets
import evaluate

from maple_trl.metrics.accuracy import fused_samples
from maple_trl.metrics.intervals import bootstrap_mean
from maple_trl.modalities import ModalityTag


_DESCRIPTION = "Share of samples that score more with several modalities than with the best single one."
_CITATION = "MAPLE, arXiv 2602.11596, C.3"
_INPUTS = """
Args:
    predictions: a score for each sample under each of the seven inputs, in any order.
    samples: the name of the sample of each score.
    tags: the modalities that it was given (V, A, S, VA, VS, AS, VAS in any order and case).
    confidence (`float`): of the interval. 0.95 by default.
    resamples (`int`), seed (`int`): of the bootstrap. 2000 and 0 by default.
    clusters (`list`): the clip of each prediction, None where it has none: intervals then are over clips. None by default.
Returns:
    `fusion_gain`, `fusion_gain_low` and `fusion_gain_high` as fractions, and `samples`, their number; with clusters
    `clips`, theirs.
"""


class FusionGain(evaluate.Metric):
    """See [`fused_samples`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "samples": datasets.Value("string"),
                    "tags": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions: list[float], samples: list[str], tags: list[str], clusters: Any = None, **options: Any
    ) -> dict[str, Any]:
        scores: dict[str, dict[ModalityTag, float]] = {}
        clips: dict[str, str | None] = {}
        for sample, clip in zip(samples, [None] * len(samples) if clusters is None else clusters, strict=True):
            if clips.setdefault(sample, clip) != clip:
                raise ValueError(f"Sample {sample!r} is of two clips, {clips[sample]!r} and {clip!r}")
        for score, sample, tag in zip(predictions, samples, tags, strict=True):
            by_tag = scores.setdefault(sample, {})
            parsed = ModalityTag.parse(tag)
            if parsed in by_tag:
                raise ValueError(f"Sample {sample!r} has two scores with the input {parsed}; it must have one")
            by_tag[parsed] = score
        for sample, by_tag in scores.items():
            missing = [str(tag) for tag in ModalityTag if tag not in by_tag]
            if missing:
                raise ValueError(
                    f"Sample {sample!r} has no score with the input {', '.join(missing)}; it needs all seven"
                )
        fused = fused_samples({tag: [by_tag[tag] for by_tag in scores.values()] for tag in ModalityTag})
        estimate = bootstrap_mean(fused, **options, clusters=[clips[sample] for sample in scores])
        result = {**estimate.as_columns("fusion_gain"), "samples": estimate.count}
        return result if estimate.clips is None else {**result, "clips": estimate.clips}
