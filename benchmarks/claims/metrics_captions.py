"""Numbers of runs whose answers are captions of whole clips: seven rows each, asked with the signals of their tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metrics_maple import disparity

from maple_trl.metrics.accuracy import fusion_gain
from maple_trl.modalities import ModalityTag


Result = Mapping[str, Any]


def caption_fusion_gain(result: Result) -> float:
    """
    Return the share of clips that are told better from several signals than from the best one (MAPLE, C.3).

    A clip's score under an input is the mean over its captions, as `maple-trl eval` has it.
    """
    by_clip: dict[str, dict[str, float]] = {}
    for name, tag, total in result["after"]["required"]["questions"]:
        by_clip.setdefault(name.removesuffix(f"-{tag}"), {})[tag] = total
    whole = [scores for scores in by_clip.values() if len(scores) == len(ModalityTag)]
    if not whole:
        raise ValueError(f"none of {len(by_clip)} clips was asked with all seven inputs; the fusion gain needs them")
    names = [tag.value for tag in ModalityTag]
    return fusion_gain({name: [scores[name] for scores in whole] for name in names})


def caption_disparity(result: Result) -> float:
    """Return the mean difference between the judge's scores of two tags (MAPLE, Fig. 5)."""
    return disparity(result, "required")


METRICS: dict[str, Callable[..., float]] = {
    "caption_fusion_gain": caption_fusion_gain,
    "caption_disparity": caption_disparity,
}
for _function in METRICS.values():
    _function.needs = ("after",)  # type: ignore[attr-defined]
