"""What of a run its reader must see before anything else: rewards that say nothing, gradients that are no numbers, losses."""

from __future__ import annotations

from maple_trl.reports.folders import RunData
from maple_trl.reports.rollouts import Rollouts
from maple_trl.reports.series import Series, end_means, ends


_ALIKE = 0.9
"""Share of groups without a signal from which it is said."""


def alerts(run: RunData, series: Series, rollouts: Rollouts | None) -> list[str]:
    """Return sentences on a training run, the worst first; none where nothing is remarkable."""
    if run.kind == "evaluation":
        return []
    return [
        *_not_finite(run),
        *_constant_rewards(series),
        *_without_signal(series),
        *_unscorable(series, rollouts),
        *_cut(series),
        *([f"{run.quarantined}: see Left out."] if run.quarantined else []),
    ]


def _not_finite(run: RunData) -> list[str]:
    return [
        f"{name} was not a finite number in {count} of {total} log entries."
        for name, (count, total) in run.not_finite.items()
    ]


def _constant_rewards(series: Series) -> list[str]:
    """Tell of rewards that were 0 for every completion, or the same for every one, over the whole log or lately."""
    found = []
    names = [name for name in series if name == "reward" or name.startswith("rewards/") and name.endswith("/mean")]
    for name in names:
        label = "The reward (weighted sum)" if name == "reward" else f"{name[8:-5]}"
        steps, values = series[name]
        spread = series.get("reward_std" if name == "reward" else f"{name[:-4]}std")
        if not any(values):
            found.append(f"{label} was 0 for every completion, in all {len(values)} log entries: it teaches nothing.")
            continue
        last = max(i for i, value in enumerate(values) if value)
        if len(steps) >= 10 and steps[last] < ends(steps)[1]:
            found.append(f"{label} has been 0 for every completion since step {steps[last + 1]:g}.")
        elif spread is not None and len(spread[1]) > 1 and not any(spread[1]) and len(set(values)) == 1:
            found.append(
                f"{label} was {values[0]:g} for every completion, in all {len(values)} log entries: it tells none from another."
            )
    return found


def _without_signal(series: Series) -> list[str]:
    name = next((name for name in ("tag/all/zero_variance", "frac_reward_zero_std") if name in series), None)
    if name is None:
        return []
    _, late = end_means(*series[name])
    if late < _ALIKE:
        return []
    return [
        f"In the last fifth of the log {100 * late:.0f} % of the groups had equal rewards: hardly anything is learned."
    ]


def _unscorable(series: Series, rollouts: Rollouts | None) -> list[str]:
    if "tag/all/unscorable" in series:
        first, last = end_means(*series["tag/all/unscorable"])
        share = max(first, last)
    else:
        rewards = [] if rollouts is None else rollouts.get("reward")
        share = sum(value is None for value in rewards) / len(rewards) if rewards else 0.0
    return [f"{100 * share:.0f} % of the completions could not be scored."] if share >= 0.01 else []


def _cut(series: Series) -> list[str]:
    if "completions/clipped_ratio" not in series:
        return []
    _, late = end_means(*series["completions/clipped_ratio"])
    if late < 0.5:
        return []
    return [f"In the last fifth of the log {100 * late:.0f} % of the completions were cut at max_completion_length."]
