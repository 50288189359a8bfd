"""Numbers of runs whose answers are captions, from what the instrument `captions` saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from maple_trl.metrics.accuracy import fusion_gain
from maple_trl.metrics.gaps import tag_disparity
from maple_trl.modalities import ModalityTag


Result = Mapping[str, Any]


def caption_fusion_gain(result: Result) -> float:
    """
    Return the share of clips that are told better from several signals than from the best one (MAPLE, C.3).

    A clip's score under an input is the mean over its captions, as `maple-trl eval` has it.
    """
    return fusion_gain(_by_tag(_scores(result).mean(axis=2)))


def caption_fusion_gain_of_answers(result: Result) -> float:
    """Return the same where a sample is one caption of each input: the first of each, the second, and so on."""
    scores = _scores(result)
    return fusion_gain(_by_tag(scores.transpose(0, 2, 1).reshape(-1, scores.shape[1])))


def caption_disparity(result: Result) -> float:
    """Return the mean difference between the judge's scores of two tags (MAPLE, Fig. 5)."""
    judge = {tag.value: result["captions"]["judge"][tag.value] for tag in ModalityTag}
    return float(tag_disparity(judge)[np.triu_indices(len(ModalityTag), 1)].mean())


def _scores(result: Result) -> np.ndarray:
    return np.array(result["captions"]["scores"], dtype=float)


def _by_tag(scores: np.ndarray) -> dict[str, np.ndarray]:
    return {tag.value: scores[:, i] for i, tag in enumerate(ModalityTag)}


METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (caption_fusion_gain, caption_fusion_gain_of_answers, caption_disparity)
}
for _function in METRICS.values():
    _function.needs = ("captions",)  # type: ignore[attr-defined]
