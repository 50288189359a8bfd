"""pass@k for `evaluate.load`. One import per line: `evaluate` reads them so."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from maple_trl.metrics.accuracy import pass_at_k_interval


_DESCRIPTION = "Unbiased pass@k from n samples per question, with an interval over questions or clips."
_CITATION = "Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374"
_INPUTS = """
Args:
    predictions: for each question, whether each of its samples is right.
    k (`int` or list of `int`): how many samples may be tried. 1 by default.
    confidence (`float`): of the interval. 0.95 by default.
    resamples (`int`), seed (`int`): of the bootstrap. 2000 and 0 by default.
    clusters (`list`): the clip of each question, None where it has none: intervals then are over clips. None by default.
Returns:
    `pass@k`, `pass@k_low` and `pass@k_high` as fractions for each k; with clusters `clips`, their number.
"""


class PassAtK(evaluate.Metric):
    """See [`pass_at_k_interval`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
        )

    def _compute(self, predictions: list[list[bool]], k: int | Sequence[int] = 1, **options: Any) -> dict[str, Any]:
        samples = [len(right) for right in predictions]
        right = [sum(right) for right in predictions]
        result: dict[str, Any] = {}
        for tries in k if isinstance(k, Sequence) else [k]:
            estimate = pass_at_k_interval(samples, right, tries, **options)
            result |= estimate.as_columns(f"pass@{tries}")
            if estimate.clips is not None:
                result["clips"] = estimate.clips
        return result
