"""Paired test of two runs for `evaluate.load`. One import per line: `evaluate` reads them so."""

import dataclasses
from typing import Any

import datasets
import evaluate

from maple_trl.metrics.significance import compare_runs


_DESCRIPTION = "Whether two runs differ on the same questions: exact McNemar test, or a sign-flip permutation test."
_CITATION = "McNemar, Note on the sampling error of the difference between correlated proportions, 1947"
_INPUTS = """
Args:
    predictions1: the first run's score of each question.
    predictions2: the second run's, in the same order.
    test (`str`): "auto" (McNemar's for scores of 0 and 1; default), "mcnemar" or "permutation".
    confidence (`float`): of the interval of the difference. 0.95 by default.
    resamples (`int`), seed (`int`): of the bootstrap and of the permutations. 10000 and 0 by default.
    clusters (`list`): the clip of each question, None where it has none: signs then are flipped, and the interval made, by clip. None by
        default.
Returns:
    `difference` (second minus first), `low`, `high`, `p_value`, `test`, `exact`, `better`, `worse`, `count`
    and `clips`.
"""


class PairedComparison(evaluate.Comparison):
    """See [`compare_runs`]."""

    def _info(self) -> evaluate.ComparisonInfo:
        return evaluate.ComparisonInfo(
            module_type="comparison",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions1": datasets.Value("float64"), "predictions2": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions1: list[float], predictions2: list[float], **options: Any) -> dict[str, Any]:
        return dataclasses.asdict(compare_runs(predictions1, predictions2, **options))
