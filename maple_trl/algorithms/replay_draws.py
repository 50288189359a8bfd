"""Which of some stored completions are replayed (AVATAR, arXiv 2508.03100, 4.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence


DRAWS = ("uniform", "diverse", "balanced", "priority")
SAME_REWARD = 1e-6
"""Rewards that differ by no more count as equal."""


def draw_positions(
    kind: str,
    advantages_N: Sequence[float],
    differing_N: Sequence[bool],
    count: int,
    draw: random.Random,
    surplus: int = 0,
) -> list[int]:
    """
    Draw some of N candidates, none twice.

    - `uniform`: all are equally likely.
    - `diverse`: those that differ come first, equally likely among themselves, then the others.
    - `balanced`: as many above their baseline as below it. Pairs of both come first; what these leave is filled so that
      the two counts differ by as little as possible, with candidates at their baseline before others.
    - `priority`: one after the other, with a chance in proportion to the size of the advantage; those of advantage 0
      come last.

    Args:
        kind (`str`): one of [`DRAWS`].
        advantages_N (`Sequence[float]`): reward minus baseline of each.
        differing_N (`Sequence[bool]`): whether each one's reward differs from what is known of its prompt.
        count (`int`): how many; all where there are fewer.
        draw (`random.Random`): decides by chance.
        surplus (`int`, *optional*, defaults to `0`):
            How many more are above than below among those that others drew before, which `balanced` makes up for where
            it has a choice.

    Returns:
        `list[int]`: positions, of shape (min(count, N),).

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in DRAWS:
        raise ValueError(f"The draw must be one of {', '.join(DRAWS)}, got {kind!r}")
    order = list(range(len(advantages_N)))
    draw.shuffle(order)
    if kind == "balanced":
        return _balanced(order, advantages_N, min(count, len(order)), surplus)
    if kind == "diverse":
        order.sort(key=lambda i: not differing_N[i])
    elif kind == "priority":
        # The largest of u^(1/w) are a draw without replacement by the weights w (Efraimidis and Spirakis 2006).
        keys = {i: draw.random() ** (1 / abs(advantages_N[i])) if side(advantages_N[i]) else -1.0 for i in order}
        order.sort(key=keys.__getitem__, reverse=True)
    return order[:count]


def side(advantage: float) -> int:
    """Return 1 above the baseline, -1 below it, 0 at it."""
    return (advantage > SAME_REWARD) - (advantage < -SAME_REWARD)


def differs(reward: float, known: Sequence[float]) -> bool:
    """Return whether a reward gives variance to those known of its prompt: always, where they vary themselves."""
    return not known or max(known) - min(known) > SAME_REWARD or abs(reward - known[0]) > SAME_REWARD


def _balanced(order: Sequence[int], advantages: Sequence[float], count: int, surplus: int) -> list[int]:
    left = {of: [i for i in order if side(advantages[i]) == of] for of in (1, 0, -1)}
    first = [side(advantages[i]) for i in order if side(advantages[i])][:1]  # a fair side of an odd one
    pairs = min(len(left[1]), len(left[-1]), count // 2)
    chosen = left[1][:pairs] + left[-1][:pairs]
    left[1], left[-1] = left[1][pairs:], left[-1][pairs:]
    while len(chosen) < count:
        owed = -side(surplus)
        wanted = (owed, 0, *first, 1, -1) if owed else (0, *first, 1, -1)
        taken = next(of for of in wanted if left[of])
        chosen.append(left[taken].pop())
        surplus += taken
    return chosen
