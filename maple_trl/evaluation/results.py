"""From the lines of an evaluation to its accuracies."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from maple_trl.evaluation.options import REQUIRED
from maple_trl.files import as_json
from maple_trl.metrics.accuracy import fused_samples, pass_at_k_interval, superset_scores, tag_accuracies
from maple_trl.metrics.gaps import WEIGHTINGS, modality_gap_intervals, tag_disparity
from maple_trl.metrics.intervals import UndefinedMetricError, bootstrap_mean
from maple_trl.modalities import STRATA, ModalityTag


# A medium's place in a prompt as plain text.
_MEDIUM = re.compile(r"\[(?:video|audio)\]")
# A sample counts as right for pass@k when its score is full, but for rounding.
_FULL = 1 - 1e-9
MEASURES = "measures"
"""Under which name a scoring function notes what it measured beside its score."""
_METRICS = ("ACC", "OBOA", "MAE", "RMSE", "answered", "F1", "exact", "WER", "rouge1", "rouge2", "rougeL", "judged")


@dataclass
class _Question:
    """A question under one access: the scores of its samples, why others have none, or why there are no samples."""

    row: int
    tag: str | None
    category: str | None
    clip: str | None
    status: str
    reason: str | None
    question: str | None = None
    fed: str | None = None
    prompt: str | None = None
    benchmark: str | None = None
    solution: str | None = None
    sound: tuple[float, float] | None = None
    scores: list[float] = field(default_factory=list)
    ungraded: list[str] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def mean(self) -> float:
        return math.fsum(self.scores) / len(self.scores) if self.scores else math.nan

    def mean_if(self, score: float) -> float:
        """Return the mean if every sample without a score, or the question without a sample, had this one."""
        missing = len(self.ungraded) or int(not self.scores)
        return (math.fsum(self.scores) + missing * score) / (len(self.scores) + missing)


def evaluation_results(
    lines: pa.Table,
    accesses: Sequence[str],
    samples: int,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Return what an evaluation found, as JSON values.

    A question's score is the mean of its samples, so that accuracy is pass@1 estimated from all of them (MAPLE,
    arXiv 2602.11596, 3.1). A question whose media are broken (`error`) or that could not be graded (`unscored`) is in no
    mean: it is counted, and `bounds` say what the accuracy would be if all such were wrong and if all were right. So are
    the samples of other questions that could not be graded: the mean of such a question is that of the samples that were. A
    question that lacks a signal of an access (`lacking`) does not belong to that access, nor to its bounds.

    Intervals rest on clips where the lines name them: an estimate says how many (`clips`) beside its questions (`count`).

    Args:
        lines: with the columns of [`~maple_trl.records.evaluations.LINES`].
        accesses: in the order to report them.
        samples: completions per question, for pass@k.
        confidence, resamples, seed: as in [`bootstrap_mean`].

    Returns:
        `accesses`: for each what [`_access_results`] gives; `superset_macro`, `over_inputs` and `fusion_gain`, which rest
        on several inputs of a question; `strata`: accuracies of inputs that are exactly what their question requires, more,
        or less; `errors`: every question that ended so, by name. A value that is undefined is `{"undefined": reason}`.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    by_access: dict[str, dict[int, _Question]] = {access: {} for access in accesses}
    completions: dict[str, Counter] = {access: Counter() for access in accesses}
    grades: dict[str, dict[str, list[float]]] = {access: defaultdict(list) for access in accesses}
    texts: dict[tuple[str, int], list[str]] = defaultdict(list)
    errors = []
    for line in lines.to_pylist():
        questions = by_access[line["access"]]
        question = questions.setdefault(
            line["row"],
            _Question(
                line["row"],
                line["tag"],
                line["category"],
                line.get("clip"),
                line["status"],
                line["reason"],
                line.get("question") or line["id"],
                line.get("fed") or _fed_before(line),
                line.get("prompt"),
                line.get("benchmark"),
                line["solution"],
                _sound(line),
            ),
        )
        if line["score"] is not None:
            question.status = "scored"
            question.scores.append(line["score"])
            for name, value in _measures(line["extra"]):
                question.measures[name].append(value)
        elif line["sample"] is not None:
            question.ungraded.append(line["reason"] or "")
        if line["sample"] is not None:
            _count_completion(completions[line["access"]], line)
            texts[line["access"], line["row"]].append(line["completion"])
            for name, value in _grades(line["extra"]):
                grades[line["access"]][name].append(value)
        elif line["status"] == "error":
            errors.append({name: line[name] for name in ("row", "id", "access", "reason", "path", "detail")})
    for (access, _), same in texts.items():
        # Of all questions: the server or the options sample nothing.
        completions[access]["questions_with_equal_samples"] += len(same) > 1 and len(set(same)) == 1
    return as_json(
        {
            "accesses": {
                access: _access_results(list(by_access[access].values()), samples, options)
                | {"completions": dict(sorted(completions[access].items()))}
                | {"grades": {name: math.fsum(v) / len(v) for name, v in sorted(grades[access].items())}}
                for access in accesses
            },
            "superset_macro": _or_reason(lambda: _superset_macro(by_access, options)),
            "over_inputs": _or_reason(lambda: _over_inputs(by_access, options)),
            "strata": _or_reason(lambda: _strata(by_access, options)),
            "fusion_gain": _or_reason(lambda: _fusion_gain(by_access, options)),
            "errors": sorted(errors, key=lambda error: (error["row"], accesses.index(error["access"]))),
        }
    )


def _fed_before(line: Mapping[str, Any]) -> str | None:
    """Return what was fed, for a line of a version that did not write it down."""
    return (
        line["access"] if line["access"] in list(ModalityTag) else line["tag"] if line["access"] == REQUIRED else None
    )


def _count_completion(counts: Counter, line: Mapping[str, Any]) -> None:
    counts["all"] += 1
    counts["cut"] += line["finish"] == "length"
    counts["without_answer"] += line["answer"] is None
    for column in ("completion_tokens", "image_tokens", "video_tokens", "audio_tokens", "subtitle_tokens"):
        if line.get(column) is not None:  # a server may count none, and an older table has no pictures
            counts[column.removeprefix("completion_")] += line[column]
    for note in line["notes"]:
        counts[f"note:{note}"] += 1


def _grades(extra: str | None) -> list[tuple[str, float]]:
    """Return the numbers in what the scoring function noted about a sample, e.g. `("errors", 0.8)` of a judge."""
    found = []
    for name, value in (json.loads(extra) if extra else {}).items():
        if name == MEASURES:
            continue
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            continue
        parts = value if isinstance(value, dict) else {name: value}
        found += [(part, float(v)) for part, v in parts.items() if isinstance(v, int | float) and math.isfinite(v)]
    return found


def _measures(extra: str | None) -> list[tuple[str, float]]:
    """Return what the scoring function measured about a sample beyond its score, by name."""
    noted = json.loads(extra).get(MEASURES) if extra else None
    return [(name, float(value)) for name, value in json.loads(noted).items()] if isinstance(noted, str) else []


def _sound(line: Mapping[str, Any]) -> tuple[float, float] | None:
    fed, source = line.get("audio_seconds"), line.get("audio_source_seconds")
    return None if fed is None or source is None else (fed, source)


def _access_results(questions: list[_Question], samples: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Compute the accuracies of one access.

    Returns:
        `accuracy` over all questions (`sample_mean`), as the plain mean over tags (`tag_mean`), by tag and by category;
        `metrics`, what benchmarks measure beyond it; `bounds`; `pass_at_k`; `modality_gap` by weighting; `tag_disparity`;
        `counts` of questions, over all and by tag; `reasons`, why questions have no score; `ungraded_samples`, samples
        without a score by reason, of scored questions too; `sound`, how much of it was fed.
    """
    belonging = [question for question in questions if question.status != "lacking"]
    scores = np.array([question.mean for question in belonging])
    tags = [question.tag for question in belonging]
    clips = [question.clip for question in belonging]
    return {
        "accuracy": _or_reason(lambda: _accuracy(belonging, scores, tags, clips, options)),
        "metrics": _metrics(belonging, options),
        "bounds": {
            "sample_mean": _bounds(belonging),
            "per_tag": {
                tag: _bounds([q for q in belonging if q.tag == tag]) for tag in map(str, ModalityTag) if tag in tags
            },
        },
        "pass_at_k": _pass_at_k(belonging, samples, options),
        "modality_gap": {
            weighting: _or_reason(
                lambda weighting=weighting: {
                    name: asdict(estimate)
                    for name, estimate in modality_gap_intervals(
                        scores, tags, weighting, **options, clusters=clips
                    ).items()
                }
            )
            for weighting in WEIGHTINGS
        },
        "tag_disparity": _or_reason(lambda: _disparity(scores, tags)),
        "counts": _counts(questions)
        | {"per_tag": {tag or "": _counts([q for q in questions if q.tag == tag]) for tag in _present(questions)}},
        "reasons": dict(sorted(Counter(q.reason for q in questions if q.status != "scored").items())),
        "ungraded_samples": dict(sorted(Counter(reason for q in questions for reason in q.ungraded).items())),
        "sound": _sound_fed(questions),
    }


def _sound_fed(questions: Iterable[_Question]) -> dict[str, float]:
    """Count questions with sound, those that were fed parts of it, and its seconds: fed, and left out."""
    heard = [question.sound for question in questions if question.sound is not None]
    fed, source = (math.fsum(seconds[i] for seconds in heard) for i in (0, 1))
    in_part = sum(source > fed for fed, source in heard)
    return {"questions": len(heard), "in_part": in_part, "seconds": fed, "left_out_seconds": max(0.0, source - fed)}


def _metrics(questions: Sequence[_Question], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return means of what answers were measured by beyond their score, also by benchmark, tag and category."""
    names = sorted({name for question in questions for name in question.measures}, key=_place)
    found: dict[str, Any] = {}
    for name in names:
        measured = [question for question in questions if question.measures.get(name)]
        found[name] = _measured(measured, name, options)
        if name == "MAE":
            found["RMSE"] = _measured(measured, name, options, squared=True)
    return found


def _place(name: str) -> tuple[int, str]:
    return (_METRICS.index(name) if name in _METRICS else len(_METRICS), name)


def _measured(
    questions: Sequence[_Question], name: str, options: Mapping[str, Any], squared: bool = False
) -> dict[str, Any]:
    found = _measure_mean(questions, name, options, squared)
    for group in ("benchmark", "tag", "category"):
        by_value: dict[str, list[_Question]] = defaultdict(list)
        for question in questions:
            if getattr(question, group) is not None:
                by_value[getattr(question, group)].append(question)
        found[f"per_{group}"] = {
            value: _measure_mean(asked, name, options, squared) for value, asked in sorted(by_value.items())
        }
    return found


def _measure_mean(
    questions: Sequence[_Question], name: str, options: Mapping[str, Any], squared: bool
) -> dict[str, Any]:
    """Average over questions the mean over samples; with `squared` the root of the mean square."""
    power = 2 if squared else 1
    values = [
        math.fsum(value**power for value in question.measures[name]) / len(question.measures[name])
        for question in questions
    ]
    estimate = bootstrap_mean(values, None, **options, clusters=[question.clip for question in questions])
    # The interval of a mean of what is never negative may pass 0.
    ends = {end: np.maximum(getattr(estimate, end), 0.0) ** (1 / power) for end in ("value", "low", "high")}
    return asdict(estimate) | {end: float(value) for end, value in ends.items()}


def _or_reason(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except UndefinedMetricError as error:
        return {"undefined": str(error)}


def _accuracy(
    questions: list[_Question],
    scores: np.ndarray,
    tags: list[str | None],
    clips: list[str | None],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    if not questions:
        raise UndefinedMetricError("No question has the signals of this access")
    found = tag_accuracies(scores, tags, **options, clusters=clips)
    by_category: dict[str, list[_Question]] = defaultdict(list)
    for question in questions:
        if question.category is not None and question.scores:
            by_category[question.category].append(question)
    return {
        "sample_mean": asdict(found.sample_mean),
        "tag_mean": found.tag_mean and asdict(found.tag_mean),
        "per_tag": {tag: asdict(estimate) for tag, estimate in found.per_tag.items()},
        "missing_tags": list(found.missing),
        "per_category": {
            category: asdict(
                bootstrap_mean(
                    [question.mean for question in own],
                    [category] * len(own),
                    **options,
                    clusters=[question.clip for question in own],
                )
            )
            for category, own in sorted(by_category.items())
        },
    }


def _bounds(questions: Sequence[_Question]) -> dict[str, float] | None:
    """Return the mean if all that have no score, samples and questions, were wrong, and if all were right."""
    if not questions:
        return None
    ends = {"low": 0.0, "high": 1.0}
    return {end: math.fsum(q.mean_if(score) for q in questions) / len(questions) for end, score in ends.items()}


def _pass_at_k(questions: list[_Question], samples: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return pass@k by k, the powers of two up to the number of samples and that number; a full score is right."""
    counted = [question for question in questions if question.scores]
    n = [len(question.scores) for question in counted]
    right = [sum(score >= _FULL for score in question.scores) for question in counted]
    strata = [question.tag or "" for question in counted]
    clips = [question.clip for question in counted]
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        str(k): _or_reason(
            lambda k=k: asdict(
                pass_at_k_interval(np.array(n, int), np.array(right, int), k, strata, **options, clusters=clips)
            )
        )
        for k in dict.fromkeys([*powers, samples])
    }


def _disparity(scores: np.ndarray, tags: Sequence[str | None]) -> list[list[float]]:
    by_tag = {tag: scores[[other == tag for other in tags]] for tag in map(str, ModalityTag)}
    known = {tag: values[~np.isnan(values)] for tag, values in by_tag.items()}
    return tag_disparity({tag: float(values.mean()) for tag, values in known.items() if len(values)}).tolist()


def _counts(questions: Sequence[_Question]) -> dict[str, int]:
    by_status = Counter(question.status for question in questions)
    names = {"scored": "scored", "unscored": "unscored", "error": "errors", "lacking": "lacking"}
    return {"questions": len(questions)} | {name: by_status[status] for status, name in names.items()}


def _present(questions: Sequence[_Question]) -> list[str | None]:
    there = {question.tag for question in questions}
    return [tag for tag in (*map(str, ModalityTag), None) if tag in there]


# Questions that were asked with several inputs


Inputs = dict[tuple[str, str | None], dict[str, list[_Question]]]


def _by_input(by_access: Mapping[str, Mapping[int, _Question]]) -> Inputs:
    """Group scores by question (its name and its tag) and input; the same input of two accesses counts once."""
    found: Inputs = defaultdict(dict)
    seen = set()
    for questions in by_access.values():
        for question in questions.values():
            key = (question.row, question.fed)
            if question.scores and question.fed is not None and key not in seen:
                seen.add(key)
                found[question.question, question.tag].setdefault(question.fed, []).append(question)
    return found


def _mean_of(rows: Sequence[_Question]) -> float:
    return math.fsum(question.mean for question in rows) / len(rows)


def _superset_macro(by_access: Mapping[str, Mapping[int, _Question]], options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Average over a question's inputs that contain its tag, then over the tags (MAPLE, arXiv 2602.11596, 3.3).

    `inputs` says how many questions rest on how many inputs, `left_out` how many have none that contains their tag.
    """
    rows = [
        ((name, tag), fed, question)
        for (name, tag), by_input in _by_input(by_access).items()
        if tag is not None
        for fed, own in by_input.items()
        for question in own
    ]
    if not rows:
        raise UndefinedMetricError("No question with a tag was scored")
    keys, fed, asked = zip(*rows, strict=True)
    by_question = superset_scores([question.mean for question in asked], keys, [tag for _, tag in keys], fed)
    clip_of = {key: question.clip for key, _, question in reversed(rows)}
    held = {key: values for key, values in by_question.items() if values}
    if not held:
        raise UndefinedMetricError("No question with a tag was scored with an input that contains it")
    scores = [math.fsum(values) / len(values) for values in held.values()]
    inputs = Counter(map(len, held.values()))
    tags, clips = [tag for _, tag in held], [clip_of[key] for key in held]
    found = tag_accuracies(scores, tags, **options, clusters=clips)
    return asdict(found.tag_mean) | {
        "per_tag": {tag: asdict(estimate) for tag, estimate in found.per_tag.items()},
        "missing_tags": list(found.missing),
        "inputs": {str(number): inputs[number] for number in sorted(inputs)},
        "left_out": len(by_question) - len(held),
    }


def _over_inputs(by_access: Mapping[str, Mapping[int, _Question]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracy by required tag over all inputs, also without a signal (MAPLE, arXiv 2602.11596, table 4)."""
    by_question = _by_input(by_access)
    if all(len(by_input) == 1 for by_input in by_question.values()):
        raise UndefinedMetricError("No question was asked with several inputs")
    # Questions without a clip share their fate with themselves under another input.
    asked = [
        (_mean_of(rows), tag, rows[0].clip or (name, tag))
        for (name, tag), by_input in by_question.items()
        for rows in by_input.values()
    ]
    scores, tags, clips = zip(*asked, strict=True)
    found = tag_accuracies(scores, tags, **options, clusters=clips)
    return {
        "sample_mean": asdict(found.sample_mean),
        "per_tag": {tag: asdict(estimate) for tag, estimate in found.per_tag.items()},
    }


def _strata(by_access: Mapping[str, Mapping[int, _Question]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracies, over all and by required tag, of the inputs of each stratum (MAPLE, arXiv 2602.11596, 5.4.1)."""
    by_stratum: dict[str, list[tuple[float, str, Any]]] = {stratum: [] for stratum in STRATA}
    for (name, tag), by_input in _by_input(by_access).items():
        for fed, rows in by_input.items() if tag is not None else ():
            stratum = ModalityTag(tag).stratum_of(ModalityTag(fed))
            by_stratum[stratum].append((_mean_of(rows), tag, rows[0].clip or (name, tag)))
    if sum(map(bool, by_stratum.values())) < 2:
        raise UndefinedMetricError("No question with a tag was scored with inputs of several strata")
    found = {}
    for stratum, asked in by_stratum.items():
        if asked:
            scores, tags, clips = zip(*asked, strict=True)
            accuracies = tag_accuracies(scores, tags, **options, clusters=clips)
            found[stratum] = {
                "sample_mean": asdict(accuracies.sample_mean),
                "per_tag": {tag: asdict(estimate) for tag, estimate in accuracies.per_tag.items()},
            }
    return found


def _fusion_gain(by_access: Mapping[str, Mapping[int, _Question]], options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Compute the gain over questions that were scored under all seven tags as access, and count the others.

    Where not all seven were asked, a clip's captions are its seven inputs, a row for each tag (MAPLE's C.2: the caption of an
    input is judged against the clip's reference for that input), and so are rows of one clip with one prompt.
    """
    missing = [tag for tag in map(str, ModalityTag) if tag not in by_access]
    if not missing:
        by_name = _inputs_of_rows({tag: by_access[tag].values() for tag in map(str, ModalityTag)})
    else:
        by_name = _inputs_of_clips(by_access.get(REQUIRED, {}).values())
        if not by_name:
            raise UndefinedMetricError(
                f"The fusion gain needs the accesses {','.join(ModalityTag)}; not asked: {', '.join(missing)}"
            )
    whole = [name for name, by_input in by_name.items() if len(by_input) == len(ModalityTag)]
    if not whole:
        raise UndefinedMetricError(
            f"The fusion gain is undefined: none of {len(by_name)} {'clips' if missing else 'rows'} was scored under all tags"
        )
    fused = fused_samples({tag: [_mean_of(by_name[name][tag]) for name in whole] for tag in map(str, ModalityTag)})
    first = [by_name[name][ModalityTag.V][0] for name in whole]
    strata = None if missing or any(q.solution is None for q in first) else [q.tag or "" for q in first]
    estimate = bootstrap_mean(fused, strata, **options, clusters=[question.clip for question in first])
    return asdict(estimate) | {"left_out": len(by_name) - len(whole)}


def _inputs_of_rows(by_tag: Mapping[str, Collection[_Question]]) -> dict[Hashable, dict[str, list[_Question]]]:
    """Group scores by row, then access; the captions of a clip whose rows have a tag each are one, the mean of its rows."""
    asked = {question.row: question for questions in by_tag.values() for question in questions}.values()
    captions = Counter((question.clip, question.tag) for question in asked if question.solution is None)
    several = {clip for (clip, _), count in captions.items() if count > 1} | {None}
    found: dict[Hashable, dict[str, list[_Question]]] = {}
    for tag, questions in by_tag.items():
        for question in questions:
            alone = question.solution is not None or question.clip in several
            inputs = found.setdefault(question.row if alone else question.clip, {})
            if question.scores:
                inputs.setdefault(tag, []).append(question)
    return found


def _inputs_of_clips(questions: Iterable[_Question]) -> dict[Hashable, dict[str, list[_Question]]]:
    """
    Group scored rows by clip, then input; empty unless some clip has a row for each of the seven tags.

    Prompts of captions may differ by tag. What has a solution is a question, and a clip's questions differ: of those, and of a
    clip with several captions of one input, rows with one prompt belong together.
    """
    rows = [question for question in questions if question.clip is not None and question.fed is not None]
    captions = [question for question in rows if question.solution is None]
    several = {
        clip
        for (clip, _), count in Counter((question.clip, question.fed) for question in captions).items()
        if count > 1
    }
    asked: dict[tuple, set[str]] = defaultdict(set)
    found: dict[Hashable, dict[str, list[_Question]]] = defaultdict(dict)
    for question in rows:
        is_whole = question.solution is None and question.clip not in several
        key = (question.clip, None if is_whole else " ".join(_MEDIUM.sub(" ", question.prompt or "").split()))
        asked[key].add(question.fed)
        inputs = found[key]
        if question.scores:
            inputs.setdefault(question.fed, []).append(question)
    return dict(found) if any(len(inputs) == len(ModalityTag) for inputs in asked.values()) else {}
