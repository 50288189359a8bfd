"""The parts of a report, as JSON values. A part for which a run has no data is `{"missing": why}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from maple_trl.algorithms.difficulty import tag_difficulty
from maple_trl.metrics.gaps import tag_disparity
from maple_trl.records.metrics_log import RATIO_EDGES, signal_profile
from maple_trl.reports.folders import RunData
from maple_trl.reports.rollouts import Rollouts
from maple_trl.reports.series import TAGS, Series, end_means, ends, metrics_by_tag, rounded


BINS = 50
"""Bins of the histograms of rewards, as many as MAPLE's difficulty has."""
COLUMNS = 120
"""Columns of the map of tags over steps, at most."""

Section = dict[str, Any]


def missing(why: str) -> Section:
    """Return a part that says why it is missing."""
    return {"missing": why}


def near_perfect() -> dict[str, list[float]]:
    """
    Return the share of each bin under Beta(100, 1), rewards of a nearly solved tag (MAPLE, arXiv 2602.11596, 4.2).

    The distribution function is x^100, so that nothing is approximated.
    """
    borders = np.linspace(0, 1, BINS + 1)
    return {"reward": rounded((borders[:-1] + borders[1:]) / 2), "share": rounded(np.diff(borders**100))}


def all_sections(run: RunData, series: Series, rollouts: Rollouts | None) -> dict[str, Section]:
    """Return every part of a run but its curves, its projection and its completions."""
    return {
        "rewards": reward_section(run, rollouts),
        "weights": weights_section(run, series),
        "curriculum": curriculum_section(run, series, rollouts),
        "disparity": disparity_section(run, series),
        "positions": positions_section(run),
        "replay": replay_section(run, series),
        "ratios": ratios_section(run, series),
        "accuracy": accuracy_section(run),
    }


# Rewards


def reward_section(run: RunData, rollouts: Rollouts | None) -> Section:
    """
    Return histograms of the task reward by tag, with the difficulty of the tag.

    They are of the first and the last fifth of the steps at which the tag was trained; of an evaluation, of all
    completions under its first access.
    """
    if rollouts is None or not len(rollouts):
        return no_rollouts(run)
    what, values = task_rewards(rollouts)
    given = [value for value in values if value is not None]
    if not given:
        return missing("No completion has a reward.")
    if min(given) < 0 or max(given) > 1:
        return missing(
            f"Beta(100, 1) is a distribution over [0, 1], but {what} goes from {min(given):g} to {max(given):g}."
        )
    found: dict[str, dict[str, Section]] = {}
    for tag, own in lines_by_tag(rollouts).items():
        own = [line for line in own if values[line] is not None]
        phases = {name: lines for name, lines in lines_by_phase(run, rollouts, own).items() if lines}
        if phases:
            steps = rollouts.get("step")
            found[tag] = {
                name: _histogram([values[line] for line in lines])
                | ({} if steps[lines[0]] is None else {"steps": [steps[lines[0]], steps[lines[-1]]]})
                for name, lines in phases.items()
            }
    if not found:
        return missing("The completions have no tags.")
    return {"reward": what, "bins": BINS, "tags": found}


def lines_by_tag(rollouts: Rollouts) -> dict[str, list[int]]:
    """Return the numbers of the fresh completions of each tag, in canonical order."""
    found: dict[str, list[int]] = {tag: [] for tag in TAGS}
    for line, (tag, replayed) in enumerate(zip(rollouts.get("tag"), rollouts.get("replayed"), strict=True)):
        if tag in found and not replayed:
            found[tag].append(line)
    return {tag: lines for tag, lines in found.items() if lines}


def lines_by_phase(run: RunData, rollouts: Rollouts, lines: list[int]) -> dict[str, list[int]]:
    """Return the lines of the first and the last fifth of the steps; of an evaluation, those of its first access."""
    if run.kind == "evaluation":
        accesses, first = rollouts.get("access"), run.accesses[0]
        return {f"access {first}": [line for line in lines if accesses[line] == first]}
    steps = rollouts.get("step")
    if not lines:
        return {}
    early, late = ends([steps[line] for line in lines])
    return {
        "first fifth": [line for line in lines if steps[line] <= early],
        "last fifth": [line for line in lines if steps[line] >= late],
    }


def task_rewards(rollouts: Rollouts) -> tuple[str, list[float | None]]:
    """Return the reward that says if a task was solved: `accuracy_reward` if there is one, else the weighted sum."""
    named = [dict(rewards or ()) for rewards in rollouts.get("rewards")]
    if any("accuracy_reward" in rewards for rewards in named):
        return "accuracy_reward", [rewards.get("accuracy_reward") for rewards in named]
    return ("the score" if "access" in rollouts.columns else "the weighted sum of rewards"), rollouts.get("reward")


def _histogram(values: list[float]) -> Section:
    positions = np.minimum((np.asarray(values) * BINS + 1e-4).astype(int), BINS - 1)
    return {
        "count": len(values),
        "mean": math.fsum(values) / len(values),
        "share": rounded(np.bincount(positions, minlength=BINS) / len(values)),
        "kl_binary": tag_difficulty(values, "binary"),
        "kl_continuous": tag_difficulty(values, "continuous"),
    }


# Weights and curriculum


def weights_section(run: RunData, series: Series) -> Section:
    """Name the curves of each tag's weight, priority and difficulty."""
    found = {
        name: {tag: f"tag/{tag}/{name}" for tag in metrics_by_tag(series, name)}
        for name in ("weight", "priority", "kl")
    }
    found = {name: curves for name, curves in found.items() if curves}
    if found:
        return found
    if run.kind == "evaluation":
        return missing("An evaluation has no weights.")
    return missing(
        "The log has no weights, priorities or difficulties of tags: MAPOTrainer logs them with tag_weights or "
        "curriculum 'adaptive', or where task_reward names a reward."
    )


def curriculum_section(run: RunData, series: Series, rollouts: Rollouts | None) -> Section:
    """Return the share of each tag among the completions of a step, which shows when it was trained."""
    if run.kind == "evaluation":
        return missing("An evaluation has no curriculum.")
    if rollouts is not None and any(tag in TAGS for tag in rollouts.get("tag")):
        steps, tags = rollouts.get("step"), rollouts.get("tag")
        source = "completions kept in rollouts/"
    else:
        curves = metrics_by_tag(series, "reward")
        if not curves:
            return missing("Neither completions nor a log by tag say which tags were trained when.")
        steps = [step for tag in curves for step in curves[tag][0]]
        tags = [tag for tag in curves for _ in curves[tag][0]]
        source = "log entries in which the tag has a reward"
    known = sorted(set(steps))
    size = -(-len(known) // COLUMNS)
    column = {step: i // size for i, step in enumerate(known)}
    counts = np.zeros((len(TAGS), -(-len(known) // size)))
    for step, tag in zip(steps, tags, strict=True):
        if tag in TAGS:
            counts[TAGS.index(tag), column[step]] += 1
    total = counts.sum(axis=0)
    shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    rows = [i for i in range(len(TAGS)) if counts[i].any()]
    return {
        "source": source,
        "step": known[::size],
        "tags": [TAGS[i] for i in rows],
        "share": [rounded(shares[i], 4) for i in rows],
    }


# Disparity


def disparity_section(run: RunData, series: Series) -> Section:
    """Return |accuracy of a tag - accuracy of another|, for each state of the model or each access."""
    if run.kind == "evaluation":
        panels = [
            _panel(f"access {access}", {t: e["value"] for t, e in found["accuracy"].get("per_tag", {}).items()})
            for access, found in (run.result or {}).get("accesses", {}).items()
        ]
        source = "pass@1 of the evaluation"
    elif run.summary is not None and run.summary.get("before") and run.summary.get("after"):
        panels = [_panel(f"{name} training", run.summary[name]) for name in ("before", "after")]
        source = "sampled accuracy before and after training (summary.json)"
    else:
        curves = metrics_by_tag(series, "accuracy") or metrics_by_tag(series, "rewards/accuracy_reward")
        if not curves:
            return missing(
                "There are no accuracies by tag: set evaluate_before_after, train with accuracy_reward on rows with "
                "tags, or name the folders of two evaluations."
            )
        means = {tag: end_means(*curve) for tag, curve in curves.items()}
        panels = [
            _panel(title, {tag: both[i] for tag, both in means.items()})
            for i, title in enumerate(("first fifth", "last fifth"))
        ]
        source = "accuracy of the completions that were trained on, first and last fifth of each tag's log entries"
    panels = [panel for panel in panels if panel is not None]
    return {"source": source, "panels": panels} if panels else missing("No question with a tag has been scored.")


def _panel(title: str, accuracy: Mapping[str, float | None]) -> Section | None:
    known = {tag: float(accuracy[tag]) for tag in TAGS if accuracy.get(tag) is not None}
    if not known:
        return None
    matrix = tag_disparity(known)
    return {"title": title, "accuracy": known, "matrix": [rounded(row) for row in matrix]}


# Positions, replay, ratios


def positions_section(run: RunData) -> Section:
    """Return the size of the training signal by position in a completion, over all steps and at both ends."""
    log = [entry for entry in run.log if "loss_profile/0" in entry]
    if not log:
        return missing("The log has no loss_profile: AvatarTrainer writes it.")
    early, late = ends([entry["step"] for entry in log])
    phases = {
        "all steps": log,
        f"steps up to {early:g}": [entry for entry in log if entry["step"] <= early],
        f"from step {late:g}": [entry for entry in log if entry["step"] >= late],
    }
    profiles = {name: rounded(profile) for name, part in phases.items() if (profile := signal_profile(part))}
    if not profiles:
        return missing("Every loss_profile in the log is 0.")
    points = len(next(iter(profiles.values())))
    return {"position": rounded([i / max(points - 1, 1) for i in range(points)]), "profiles": profiles}


def replay_section(run: RunData, series: Series) -> Section:
    """Name the curves of the replay buffer's tiers and ages, and of what it serves and does."""
    if "replay/size" not in series:
        return missing("The log has no replay buffer: AvatarTrainer has one with replayed_generations above 0.")
    names = {
        "tiers": ["replay/size/easy", "replay/size/medium", "replay/size/hard"],
        "ages": ["replay/age_mean", "replay/age_max"],
        "shares": [
            "replay/share",
            "replay/hit_rate",
            "replay/of_other_prompts",
            "replay/zero_variance_fresh",
            "replay/zero_variance_mixed",
            "hint/rate",
        ],
        "drawn": ["replay/drawn/easy", "replay/drawn/medium", "replay/drawn/hard"],
        "gradients": ["replay/gradient_on", "replay/gradient_off"],
    }
    return {part: [name for name in curves if name in series] for part, curves in names.items()}


def ratios_section(run: RunData, series: Series) -> Section:
    """
    Return importance ratios of replayed tokens: names of the curves of their quantiles, and histograms.

    Those are of the first and the last fifth of the log entries that have any.
    """
    names = [f"replay/ratio_{name}" for name in ("p05", "p50", "p95", "max")]
    names = [name for name in names if name in series]
    if not names:
        return missing("The log has no importance ratios: AvatarTrainer logs those of replayed tokens.")
    found: Section = {"quantiles": names}
    found["effective"] = [name for name in ["replay/effective_share"] if name in series]
    bins = [series.get(f"replay/ratio_share/{i}") for i in range(len(RATIO_EDGES) + 1)]
    if all(bins):
        early, late = ends(bins[0][0])
        first, last = zip(*(end_means(*one) for one in bins), strict=True)
        found["histogram"] = {
            "edges": rounded(RATIO_EDGES),
            "phases": {f"steps up to {early:g}": rounded(first, 4), f"from step {late:g}": rounded(last, 4)},
        }
    return found


# Evaluations


def accuracy_section(run: RunData) -> Section:
    """Return accuracies with intervals, gaps and counts by access, and what decides them."""
    if run.kind == "evaluation" and run.result is not None:
        return {
            name: run.result.get(name)
            for name in (
                "accesses",
                "superset_macro",
                "over_inputs",
                "fusion_gain",
                "errors",
                "confidence",
                "left_out",
            )
            if name in run.result
        } | {"decided_by": decided_by(run.result)}
    before_after = {name: (run.summary or {}).get(name) for name in ("before", "after", "questions")}
    if before_after["before"] and before_after["after"]:
        return before_after
    if run.kind == "evaluation":
        return missing("No question has been answered yet.")
    return missing(
        "No accuracy was measured before and after training: set evaluate_before_after; a run that is going on writes "
        "summary.json at its end."
    )


def decided_by(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what decides an evaluation's numbers, as names and values."""
    parts = "model data prompt media asking generation scoring device versions".split()
    found: list[tuple[str, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif value is not None:
            found.append((name, str(value)))

    for part in parts:
        add(part, result.get(part))
    return found


def no_rollouts(run: RunData) -> Section:
    """Say what stands in place of a part that needs completions."""
    if run.kind == "evaluation":
        return missing("No question has been answered yet.")
    return missing(
        "The run kept no completions: its trainer writes them to rollouts/ while rollout_log_size is above 0."
    )
