"""A report on one run or several: the data, and the page that shows them."""

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
from maple_trl.reports.alerts import alerts
from maple_trl.reports.clip_groups import distance_sections
from maple_trl.reports.configuration import configuration_section, left_out_section
from maple_trl.reports.critical_steps import critical_section
from maple_trl.reports.efficiency import DEFINITION, compared_efficiency, efficiency_section
from maple_trl.reports.embeddings import Embedder
from maple_trl.reports.folders import ReportError, RunData, read_run
from maple_trl.reports.lengths import length_gains, length_sections
from maple_trl.reports.media import MediaTable
from maple_trl.reports.projection import PROJECTIONS, project
from maple_trl.reports.questions import NOT_NAMED, question_means, share_names
from maple_trl.reports.rollouts import Rollouts, pack, packed, rollouts_of
from maple_trl.reports.sections import all_sections, missing, near_perfect, no_rollouts
from maple_trl.reports.series import TAGS, Series, end_means, series_of, sharing_steps, thinned


FORMAT = 2
"""Version of what the JSON file holds."""
MOST_RUNS = 8
"""Runs of a report, at most: more could not be told apart in a chart."""
MOST_ROLLOUTS = 100_000
MOST_THUMBNAILS = 200

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"
_SCRIPTS = "data charts curves overview accuracy sections viewer live main".split()
_LIVE = '<script type="application/json" id="report-live">{}</script>'


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
    live: float | None = None,
) -> Path:
    """
    Write a report as one HTML file that needs no network.

    Args:
        runs: a folder, or up to eight to compare: output folders of training jobs or of evaluations, finished or going on.
            Evaluations are compared with the first one.
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
        live: the page, while it is open, loads itself anew after so many seconds, as
            [`~maple_trl.reports.watch.watch_report`] writes it.

    Returns:
        `Path`: the HTML file.

    Raises:
        ReportError: when a folder holds no run, there are none or more than eight, or a file cannot be written.
        ValueError: for an unknown projection.
        ImportError: without jinja2, plotly or (for a t-SNE) scikit-learn, naming the extra that brings them.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ReportError(f"a report is on 1 to {MOST_RUNS} runs, got {len(folders)}")
    if media_root is not None and not Path(media_root).is_dir():
        raise ReportError(f"media root: there is no folder {media_root}")
    output = Path(output)
    read = [read_run(folder) for folder in folders]
    rollouts = [
        None if run.table is None else rollouts_of(run.table, run.kind, max_rollouts, run.options) for run in read
    ]
    data = report_data(read, rollouts, embeddings, projection, seed, length_bins)
    shown = []
    for run, found in zip(read, rollouts, strict=True):
        media = MediaTable(media_root or run.media_root, output.parent, thumbnails)
        shown.append(None if found is None or not len(found) else packed(found, media))
    _write(output, render(data, shown, live))
    if json_path is not None:
        for run, found in zip(data["runs"], rollouts, strict=True):
            run["rollouts"] |= {} if found is None else {"completions": _columns(found)}
        _write(json_path, json.dumps(as_json(data), ensure_ascii=False, allow_nan=False) + "\n")
    return output


def end_live(page: str | os.PathLike) -> None:
    """Let a page of a run that nobody watches any more stay as it is."""
    text = Path(page).read_text(encoding="utf-8")
    begins, ends = _LIVE.split("{}")
    start = text.index(begins) + len(begins)
    _write(page, text[:start] + "null" + text[text.index(ends, start) :])


def _write(path: str | os.PathLike, text: str) -> None:
    try:
        write_atomically(path, text, remade=True)
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
    """Return what a report says of one run or several, but for the completions themselves, as JSON values."""
    names = _distinct(runs)
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
                "headline": headline(run, series, efficiency[i]),
                "alerts": alerts(run, series, found),
                "facts": _facts(run, series, found, efficiency[i]),
                "configuration": configuration_section(run),
                "left_out": left_out_section(run),
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
            "comparisons": [{"run": i} | comparison(runs[0], run) for i, run in enumerate(runs[1:], 1)],
            "length_gains": length_gains(runs, length_bins),
            "efficiency": {"definition": DEFINITION, "ratios": compared_efficiency(efficiency)},
        }
    )


def _distinct(runs: Sequence[RunData]) -> list[str]:
    """Name runs by their folders, with those above them where these are alike, and by letters where all is."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    longer = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{name} ({letter})" for name, letter in zip(names, "ABCDEFGH", strict=False)]


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
    facts.append(("time in all", duration(summary.get("seconds"))))
    facts.append(("completions kept", None if rollouts is None else rollouts.total))
    facts += [("left out, failed or never fired", text) for text in _left_out(run)]
    return [(name, value) for name, value in facts if value is not None]


def headline(run: RunData, series: Series, efficiency: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what a reader looks for first, of a training run: name, value and what more there is to say of it."""
    if run.kind == "evaluation":
        return _evaluation_headline(run)
    found = []
    last = max((step for steps, _ in series.values() for step in steps), default=None)
    options, summary = run.options or {}, run.summary or {}
    planned = options.get("max_steps")
    planned = planned if isinstance(planned, int) and planned > 0 else None
    seconds = efficiency.get("seconds_per_step")
    if last is not None:
        left = ""
        if planned and run.finished is False and seconds and planned > last:
            left = f"about {duration((planned - last) * seconds)} left"
        found.append(("step", f"{last:g} of {planned}" if planned else f"{last:g}", left))
    if "reward" in series:
        first, end = end_means(*series["reward"])
        found.append(("reward", f"{end:.3f}", f"{end - first:+.3f} since the first fifth"))
    before, after = ((summary.get(name) or {}).get("all") for name in ("before", "after"))
    accuracy = next((name for name in ("tag/all/accuracy", "rewards/accuracy_reward/mean") if name in series), None)
    if before is not None and after is not None:
        found.append(
            ("accuracy, test rows", f"{100 * after:.1f} %", f"{100 * (after - before):+.1f} points by training")
        )
    elif accuracy is not None:
        first, end = end_means(*series[accuracy])
        found.append(
            ("accuracy, sampled", f"{100 * end:.1f} %", f"{100 * (end - first):+.1f} points since the first fifth")
        )
    if seconds:
        found.append(("time of a step", duration(seconds), f"mean of {efficiency['steps']} steps"))
    if run.quarantine:
        found.append(("in quarantine", f"{len(run.quarantine)}", "prompts"))
    return found


def _evaluation_headline(run: RunData) -> list[tuple[str, str, str]]:
    found = []
    for access, result in (run.result or {}).get("accesses", {}).items():
        estimate = result["accuracy"].get("sample_mean")
        if estimate is None or estimate.get("value") is None:
            continue
        known = estimate.get("low") is not None
        interval = f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f} %" if known else ""
        found.append((f"accuracy, access {access}", f"{100 * estimate['value']:.1f} %", interval))
    return found[:8]


def duration(seconds: float | None) -> str | None:
    """Write a time as a reader says it: `0.42 s`, `105 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds is None:
        return None
    if seconds < 180:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def when(moment: str) -> str:
    """Write a time of ISO 8601 as a reader says it: `30 Nov 2026, 04:09 UTC`; anything else as it is."""
    try:
        return datetime.fromisoformat(moment).astimezone(UTC).strftime("%-d %b %Y, %H:%M UTC")
    except ValueError:
        return moment


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
    if (run.summary or {}).get("left_out") is None:
        return [run.quarantined] if run.quarantined else []
    return [str(note.get("text")) for note in run.left_out] or ["nothing"]


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
    times = run.summary or {}
    facts.append(
        ("time of the last start" if times.get("batches_done_before") else "time", duration(times.get("seconds")))
    )
    return [(name, value) for name, value in facts if value is not None]


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate.get("low") is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


# Two evaluations


def comparison(first_run: RunData, second_run: RunData) -> dict[str, Any]:
    """
    Compare two evaluations in pairs, by access, over the questions that both have scored.

    A question is the row with the same id and the same tag; where the runs are not of the same rows and ids are row numbers
    (`by_name` is false), what has the same prompt, media, solution and tag. `left_out` counts those that only one run has
    scored. Where the runs name clips, signs are flipped and the interval is made by clip; `clips` says how many there are.
    """
    runs = (first_run, second_run)
    if not all(run.kind == "evaluation" and run.table is not None for run in runs):
        return missing(
            "A paired test needs two evaluations: the completions of training runs are not of the same questions."
        )
    by_name = share_names(*runs)
    (first, clips), (second, more_clips) = (question_means(run, "score", by_name) for run in runs)
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
            found[access] = missing("The runs have scored no question in common." if by_name else NOT_NAMED)
            continue
        names = ("difference", "low", "high", "p_value", "test", "better", "worse", "count", "clips")
        left_out = len(first[access]) + len(second[access]) - 2 * len(both)
        found[access] = {name: getattr(result, name) for name in names} | {"left_out": left_out}
    if not found:
        return missing("The evaluations have no access in common." if by_name else NOT_NAMED)
    data = [(run.result or {}).get("data", {}).get("sha256") for run in runs]
    return {"accesses": found, "same_data": data[0] == data[1], "by_name": by_name}


def render(data: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any] | None], live: float | None = None) -> str:
    """
    Render the HTML of a report.

    Everything that comes from a run stands in blocks of JSON (`<`, `>` and `&` as escapes) or in base64, and scripts
    put it into the page as text. A policy in the page lets the browser run the scripts of this package alone, by their
    hashes, and load nothing but pictures, sound and video beside the page.

    Args:
        data: of [`~maple_trl.reports.report.report_data`].
        rollouts: for each run what [`~maple_trl.reports.rollouts.packed`] gives.
        live: seconds after which the page loads itself anew.

    Raises:
        ImportError: without jinja2 or plotly, naming the extra that brings them.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f'reports need jinja2 and plotly ({error}): pip install "maple-trl[report]"') from error
    scripts = [get_plotlyjs(), "\n".join((_ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)]
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    environment.filters["when"] = when
    curves = [run["curves"].get("metrics") for run in data["runs"]]
    lean = [run | {"curves": {k: v for k, v in run["curves"].items() if k != "metrics"}} for run in data["runs"]]
    about = [None if found is None else {k: v for k, v in found.items() if k != "chunks"} for found in rollouts]
    return environment.get_template("page.html.j2").render(
        data={**data, "runs": lean},
        curves=[None if found is None else pack(sharing_steps(found)) for found in curves],
        rollouts=about,
        live=_LIVE.format("null" if live is None else json.dumps({"interval": live})),
        following=live is not None,
        chunks=[[] if found is None else found["chunks"] for found in rollouts],
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        style=(_ASSETS / "report.css").read_text(encoding="utf-8"),
    )


def _source_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
