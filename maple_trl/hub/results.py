"""What was measured of a model, as its card tells it: accuracies by tag with intervals, and the modality gap."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from scipy.stats import binomtest

from maple_trl.hub.names import published_name
from maple_trl.metrics.gaps import modality_gap
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.modalities import ModalityTag
from maple_trl.records.run_folder import holds_evaluation


_CONFIDENCE = 0.95
_WHOLE = {"top_p": 1, "top_k": 0, "min_p": 0}
"""Options of sampling that cut the distribution, with the values that leave it whole."""


class ResultsError(ValueError):
    """There is no finished evaluation in a folder, or it is damaged."""


@dataclass(frozen=True)
class Accuracy:
    """An accuracy as a fraction, its interval, and how many questions (and clips, where they are named) stand behind it."""

    tag: str
    value: float
    low: float | None
    high: float | None
    questions: int
    clips: int | None = None


@dataclass(frozen=True)
class Measured:
    """
    One table of a card.

    Attributes:
        title: what was asked.
        dataset: its public name, a Hub id or `builtin:NAME`; `None` where it has none.
        split: of it.
        accuracies: by tag, and of all questions under `all`.
        gap: mean modality gap, with its interval where there is one; `None` where it is undefined.
        how: how it was asked, in words.
    """

    title: str
    dataset: str | None
    split: str | None
    accuracies: tuple[Accuracy, ...]
    gap: tuple[float, float | None, float | None] | None
    how: str

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Measured:
        """Return what was kept as JSON."""
        gap = kept["gap"] and tuple(kept["gap"])
        return cls(**{**kept, "accuracies": tuple(Accuracy(**one) for one in kept["accuracies"]), "gap": gap})

    def eval_results(self, task: str) -> list[EvalResult]:
        """Return the same as the Hub's `model-index` takes it."""
        name = self.dataset or "a local set"
        about = {
            "task_type": task,
            "dataset_type": name.removeprefix("builtin:").replace(" ", "-"),
            "dataset_name": f"{name} ({self.title})",
            "dataset_split": self.split,
        }
        found = [
            EvalResult(
                **about,
                metric_type="accuracy",
                metric_name="accuracy" if one.tag == "all" else f"accuracy {one.tag}",
                metric_value=round(one.value, 4),
            )
            for one in self.accuracies
        ]
        if self.gap is not None:
            gap = {"metric_type": "modality_gap", "metric_name": "modality gap (mean)"}
            found.append(EvalResult(**about, **gap, metric_value=round(self.gap[0], 4)))
        return found


def find_results(folder: str | os.PathLike[str], dataset: str | None = None) -> list[Measured]:
    """
    Return what was measured of the model in the folder of a run: evaluations in folders within it, and its own summary.

    An evaluation of another model, the base model for one, is left out.

    Args:
        folder: of the run.
        dataset: the run's, where it is known by more than the name in its summary, which may be a relative path.
    """
    folder = Path(folder)
    found = []
    for inner in sorted(path for path in folder.glob("*") if path.is_dir()):
        if holds_evaluation(inner) and (inner / "result.json").is_file() and _is_of(inner, folder):
            found += read_evaluation(inner)
    return found + _of_summary(folder / "summary.json", dataset)


def read_evaluation(folder: str | os.PathLike[str]) -> list[Measured]:
    """
    Read the folder of a finished evaluation: a table for each access.

    Raises:
        ResultsError: when there is none.
    """
    path = Path(folder, "result.json")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        data, asking = result["data"], result["asking"]
        named = published_name(data.get("name"))
        title = data.get("benchmark") or (named or "a local set").removeprefix("builtin:")
        each = "" if asking["samples"] == 1 else f", {asking['samples']} to each question"
        how = f"{each}, seed {asking['seed']}, intervals of {result['confidence']:.0%}"
        tables = []
        for access, found in result["accesses"].items():
            accuracies = _accuracies(found["accuracy"])
            if accuracies:
                fed = "the signals of its tag" if access == "required" else access
                told = f"fed {fed}, {_drawn(asking, found['completions'])}{how}"
                gap = _gap(found["modality_gap"]["sample"])
                tables.append(Measured(f"{title}, {access}", named, data.get("split"), accuracies, gap, told))
        return tables
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"{folder} holds no finished evaluation that can be read ({type(error).__name__}: {error}); give the same "
            "`maple-trl eval` command again to finish it"
        ) from error


def _drawn(asking: Mapping[str, Any], completions: Mapping[str, Any]) -> str:
    """
    Say how answers were drawn.

    `generation` of a result does not tell: here the evaluator's own sampler draws and `generate` never samples, and of a server
    it holds the fields of a request.

    Args:
        asking: options of [`~maple_trl.evaluation.options.EvalOptions`].
        completions: counts of an access, of notes too: a server's model may not take a field.
    """
    left = [name for name in ("temperature", *_WHOLE) if completions.get(f"note:model-default-{name}")]
    if asking["temperature"] == 0 and "temperature" not in left:
        return "greedy answers"
    cuts = [name for name, whole in _WHOLE.items() if asking[name] != whole]
    told = [f"{name} {asking[name]:g}" for name in ("temperature", *cuts) if name not in left]
    told += [f"the model's own {' and '.join(left)}"] if left else []
    return f"sampled answers ({', '.join(told)})"


def _is_of(evaluation: Path, folder: Path) -> bool:
    """Return whether an evaluation is of the model in a folder: it, or the adapter, was named by that path."""
    try:
        model = json.loads((evaluation / "result.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    adapter = (model.get("adapter") or {}).get("name")
    return any(name and os.path.realpath(name) == os.path.realpath(folder) for name in (model.get("name"), adapter))


def _accuracies(found: Mapping[str, Any]) -> tuple[Accuracy, ...]:
    if "per_tag" not in found:
        return ()
    rows = [(tag, found["per_tag"][tag]) for tag in map(str, ModalityTag) if tag in found["per_tag"]]
    rows.append(("all", found["sample_mean"]))
    return tuple(
        Accuracy(tag, one["value"], one["low"], one["high"], one["count"], one.get("clips")) for tag, one in rows
    )


def _gap(found: Mapping[str, Any]) -> tuple[float, float | None, float | None] | None:
    mean = found.get("mean")
    return None if mean is None else (mean["value"], mean["low"], mean["high"])


def _of_summary(path: Path, known_as: str | None) -> list[Measured]:
    """Read the accuracies that a job sampled after training."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        accuracy, questions = summary["after"], summary["questions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not accuracy:
        return []
    rows = [tag for tag in (*map(str, ModalityTag), "all") if tag in accuracy and questions.get(tag)]
    accuracies = tuple(_wilson(tag, accuracy[tag], questions[tag]) for tag in rows)
    dataset = published_name(known_as or summary.get("dataset"))
    title = (dataset or "a local set").removeprefix("builtin:")
    how = "one answer to each question, drawn as the run's options say; Wilson intervals of 95%, which take questions for independent"
    return [Measured(f"{title}, after training", dataset, None, accuracies, _plain_gap(accuracies), how)]


def _wilson(tag: str, value: float, questions: int) -> Accuracy:
    interval = binomtest(round(value * questions), questions).proportion_ci(_CONFIDENCE, method="wilson")
    return Accuracy(tag, value, float(interval.low), float(interval.high), questions)


def _plain_gap(accuracies: Iterable[Accuracy]) -> tuple[float, None, None] | None:
    by_tag = {one.tag: one for one in accuracies if one.tag != "all"}
    values = {tag: one.value for tag, one in by_tag.items()}
    try:
        gap = modality_gap(values, {tag: one.questions for tag, one in by_tag.items()})
    except UndefinedMetricError:
        return None
    return (gap.mean, None, None) if math.isfinite(gap.mean) else None
