"""A report on one run or two: the data, and the page that shows them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from maple_trl.files import as_json, write_atomically
from maple_trl.metrics.intervals import UndefinedMetricError
from maple_trl.metrics.significance import compare_runs
from maple_trl.reports.advantages import advantage_sections
from maple_trl.reports.clip_groups import distance_sections
from maple_trl.reports.critical_steps import critical_section
from maple_trl.reports.efficiency import DEFINITION, compared_efficiency, efficiency_section
from maple_trl.reports.embeddings import Embedder
from maple_trl.reports.folders import ReportError, RunData, read_run
from maple_trl.reports.lengths import length_gains, length_sections
from maple_trl.reports.media import MediaTable
from maple_trl.reports.projection import PROJECTIONS, project
from maple_trl.reports.questions import question_means
from maple_trl.reports.rollouts import Rollouts, packed, rollouts_of
from maple_trl.reports.sections import all_sections, missing, near_perfect, no_rollouts
from maple_trl.reports.series import TAGS, end_means, series_of, thinned


FORMAT = 1
"""Version of what the JSON file holds."""
MOST_ROLLOUTS = 100_000
MOST_THUMBNAILS = 200

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"
_SCRIPTS = ("data.js", "charts.js", "sections.js", "viewer.js")


def write_report(
    runs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    json_path: str | os.PathLike | None = None,
    media_root: str | os.PathLike | None = None,
    max_rollouts: int = MOST_ROLLOUTS,
    thumbnails: int = MOST_THUMBNAILS,
    embeddings: str | None = None,
    projection: str = "pca",
    seed: int = 0,
    length_bins: Sequence[int] = (),
) -> Path:
    """
    Write a report as one HTML file that needs no network.

    Args:
        runs: a folder, or two to compare: output folders of training jobs or of evaluations, finished or going on.
        output: the HTML file. Links to media are relative to its folder.
        json_path: a file for the same data as JSON.
        media_root: the folder below which the media lie, where the run's own is not known or has moved.
        max_rollouts: completions of a run in the report, at most; whole groups are left out evenly.
        thumbnails: small copies of so many pictures and videos of a run are put into the page; others are loaded when they are shown.
        embeddings: a model whose hidden states say how near completions are, in the projection and within a clip;
            without it, their wording does.
        projection: `"pca"` or `"tsne"`; see [`~maple_trl.reports.projection.project`].
        seed: of the t-SNE.
        length_bins: where the bins of completion lengths begin, in tokens; without any they hold about as many each.

    Returns:
        `Path`: the HTML file.

    Raises:
        ReportError: when a folder holds no run, there are none or more than two, or a file cannot be written.
        ValueError: for an unknown projection.
        ImportError: without jinja2, plotly or (for a t-SNE) scikit-learn, naming the extra that brings them.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not 1 <= len(folders) <= 2:
        raise ReportError(f"a report is on one run or two, got {len(folders)}")
    if media_root is not None and not Path(media_root).is_dir():
        raise ReportError(f"media root: there is no folder {media_root}")
    output = Path(output)
    read = [read_run(folder) for folder in folders]
    rollouts = [None if run.table is None else rollouts_of(run.table, run.kind, max_rollouts) for run in read]
    data = report_data(read, rollouts, embeddings, projection, seed, length_bins)
    shown = []
    for run, found in zip(read, rollouts, strict=True):
        media = MediaTable(media_root or run.media_root, output.parent, thumbnails)
        shown.append(None if found is None or not len(found) else packed(found, media))
    _write(output, render(data, shown))
    if json_path is not None:
        for run, found in zip(data["runs"], rollouts, strict=True):
            run["rollouts"] |= {} if found is None else {"completions": _columns(found)}
        _write(json_path, json.dumps(as_json(data), ensure_ascii=False, allow_nan=False) + "\n")
    return output


def _write(path: str | os.PathLike, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error


def report_data(
    runs: Sequence[RunData],
    rollouts: Sequence[Rollouts | None],
    embeddings: str | None = None,
    projection: str = "pca",
    seed: int = 0,
    length_bins: Sequence[int] = (),
) -> dict[str, Any]:
    """Return what a report says of one run or two, but for the completions themselves, as JSON values."""
    names = _distinct([run.name for run in runs])
    embedder = Embedder(embeddings)
    shared = {  # of which runs must be comparable: made of all of them together
        "advantages": advantage_sections(runs, rollouts),
        "lengths": length_sections(runs, rollouts, length_bins),
        "distances": distance_sections(runs, rollouts, embedder),
        "projection": project(runs, rollouts, embedder, projection, seed),
    }
    efficiency = [efficiency_section(run) for run in runs]
    described = []
    for i, (run, name, found) in enumerate(zip(runs, names, rollouts, strict=True)):
        series = series_of(run.log)
        curves, per_point = thinned(series)
        described.append(
            {
                "name": name,
                "folder": str(run.folder),
                "kind": run.kind,
                "finished": run.finished,
                "updated": run.updated,
                "notes": run.notes,
                "facts": _facts(run, series, found, efficiency[i]),
                "efficiency": efficiency[i],
                "curves": {"source": run.log_source, "metrics": curves, "entries_per_point": per_point}
                if curves
                else missing("An evaluation has no training log." if run.kind == "evaluation" else _no_log(run)),
                **all_sections(run, series, found),
                "critical": critical_section(run),
                **{part: sections[i] for part, sections in shared.items()},
                "rollouts": _about_rollouts(run, found),
            }
        )
    return as_json(
        {
            "format": FORMAT,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "tags": TAGS,
            "near_perfect": near_perfect(),
            "runs": described,
            "comparison": comparison(runs),
            "length_gains": length_gains(runs, length_bins),
            "efficiency": {"definition": DEFINITION, "ratio": compared_efficiency(efficiency)},
        }
    )


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


def _no_log(run: RunData) -> str:
    return f"{run.folder} holds neither metrics.jsonl nor a checkpoint with a log."


def _about_rollouts(run: RunData, rollouts: Rollouts | None) -> dict[str, Any]:
    if rollouts is None or not len(rollouts):
        return no_rollouts(run)
    return {"count": len(rollouts), "total": rollouts.total, "groups": int(rollouts.groups[-1]) + 1}


def _columns(rollouts: Rollouts) -> dict[str, list]:
    columns = {name: values for name, values in rollouts.columns.items() if name != "rewards"}
    if "rewards" in rollouts.columns:
        columns["rewards"] = [dict(rewards or ()) for rewards in rollouts.columns["rewards"]]
    return columns | {"group_number": rollouts.groups.tolist()}


def _facts(
    run: RunData, series: Mapping[str, tuple], rollouts: Rollouts | None, efficiency: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Return what the overview says of a run: names and values."""
    if run.kind == "evaluation":
        return _evaluation_facts(run)
    summary = run.summary or {}
    facts: list[tuple[str, Any]] = [("model", summary.get("model")), ("data", summary.get("dataset"))]
    steps = [step for steps, _ in series.values() for step in steps]
    facts.append(("last step logged", max(steps) if steps else None))
    for label, name in (
        ("reward", "reward"),
        ("seconds per step", "step_time"),
        ("completion tokens", "completions/mean_length"),
    ):
        if name in series:
            first, last = end_means(*series[name])
            facts.append((f"{label}, first → last fifth of the log", f"{first:.4g} → {last:.4g}"))
    facts += _efficiency_facts(efficiency)
    for name in ("before", "after"):
        value = (summary.get(name) or {}).get("all")
        facts.append((f"accuracy {name} training", None if value is None else f"{value:.3f}"))
    facts.append(("seconds in all", summary.get("seconds")))
    facts.append(("questions left out for their media", summary.get("unusable")))
    facts.append(("completions kept", None if rollouts is None else rollouts.total))
    facts += [("left out, failed or never fired", text) for text in _left_out(run)]
    return [(name, value) for name, value in facts if value is not None]


def _efficiency_facts(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if "missing" in found:
        return []
    facts = [(f"seconds per step, mean of {found['steps']} steps", f"{found['seconds_per_step']:.4g}")]
    if found["completions_per_step"] is None:
        return [*facts, ("seconds per step / batch", "unknown: args.json of a training job says the batch")]
    label = f"seconds per step / batch of {found['completions_per_step']} completions"
    return [*facts, (label, f"{found['seconds_per_completion']:.4g}")]


def _left_out(run: RunData) -> list[str]:
    """Return what a finished run says that it left out; of another one, its quarantine."""
    notes = (run.summary or {}).get("left_out")
    if notes is None:
        return [run.quarantined] if run.quarantined else []
    return [str(note.get("text")) for note in notes if isinstance(note, Mapping)] or ["nothing"]


def _evaluation_facts(run: RunData) -> list[tuple[str, Any]]:
    result = run.result or {}
    facts: list[tuple[str, Any]] = [
        ("model", result.get("model", {}).get("name")),
        ("adapter", (result.get("model", {}).get("adapter") or {}).get("name")),
        ("data", result.get("data", {}).get("name")),
        ("samples per question", result.get("asking", {}).get("samples")),
    ]
    for access, found in result.get("accesses", {}).items():
        estimate = found["accuracy"].get("sample_mean")
        text = None if estimate is None else _interval(estimate)
        counts = found["counts"]
        text = f"{text or 'undefined'}; {counts['scored']} of {counts['questions']} questions scored"
        facts.append((f"accuracy, access {access}", text))
    facts.append(("seconds", (run.summary or {}).get("seconds")))
    return [(name, value) for name, value in facts if value is not None]


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate.get("low") is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


# Two evaluations


def comparison(runs: Sequence[RunData]) -> dict[str, Any]:
    """
    Compare two evaluations in pairs, by access, over the questions that both have scored.

    A question is the row with the same id and the same tag; `left_out` counts those that only one run has scored. Where the
    runs name clips, signs are flipped and the interval is made by clip; `clips` says how many there are.
    """
    if len(runs) < 2:
        return missing("There is one run.")
    if not all(run.kind == "evaluation" and run.table is not None for run in runs):
        return missing(
            "A paired test needs two evaluations: the completions of training runs are not of the same questions."
        )
    (first, clips), (second, more_clips) = (question_means(run, "score") for run in runs)
    clips = more_clips | clips
    found = {}
    for access in [access for access in runs[0].accesses if access in first and access in second]:
        both = [key for key in first[access] if key in second[access]]
        scores = [[run[access][key] for key in both] for run in (first, second)]
        try:
            result = compare_runs(
                *scores,
                strata=[key[1] or "" for key in both],
                resamples=2000,
                clusters=[clips.get(key) for key in both],
            )
        except UndefinedMetricError:
            found[access] = missing("The runs have scored no question in common.")
            continue
        names = ("difference", "low", "high", "p_value", "test", "better", "worse", "count", "clips")
        left_out = len(first[access]) + len(second[access]) - 2 * len(both)
        found[access] = {name: getattr(result, name) for name in names} | {"left_out": left_out}
    if not found:
        return missing("The evaluations have no access in common.")
    data = [(run.result or {}).get("data", {}).get("sha256") for run in runs]
    return {"accesses": found, "same_data": data[0] == data[1]}


def render(data: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any] | None]) -> str:
    """
    Render the HTML of a report.

    Everything that comes from a run stands in blocks of JSON (`<`, `>` and `&` as escapes) or in base64, and scripts
    put it into the page as text. A policy in the page lets the browser run the scripts of this package alone, by their
    hashes, and load nothing but pictures, sound and video beside the page.

    Args:
        data: of [`~maple_trl.reports.report.report_data`].
        rollouts: for each run what [`~maple_trl.reports.rollouts.packed`] gives.

    Raises:
        ImportError: without jinja2 or plotly, naming the extra that brings them.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f'reports need jinja2 and plotly ({error}): pip install "maple-trl[report]"') from error
    scripts = [get_plotlyjs(), "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)]
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    about = [None if found is None else {k: v for k, v in found.items() if k != "chunks"} for found in rollouts]
    return environment.get_template("page.html.j2").render(
        data=data,
        rollouts=about,
        chunks=[[] if found is None else found["chunks"] for found in rollouts],
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        style=(_ASSETS / "report.css").read_text(encoding="utf-8"),
    )


def _source_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
