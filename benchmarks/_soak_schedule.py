"""When a soak strikes with what: decided by a seed alone, in optimizer steps, so that a busy machine changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """
    A kind of fault.

    Attributes:
        changes_data: whether rows or rewards are lost by it, so that the weights are not those of an undisturbed run.
        ends_run: whether the run ends by it, and has to be started again.
        checkpoints: complete checkpoints that must be there before.
        waits: whether it waits for the turn of a certain row, and has to be due early.
    """

    name: str
    changes_data: bool = False
    ends_run: bool = False
    checkpoints: int = 0
    waits: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        # It comes first, when there is no checkpoint yet to go on from.
        Kind("kill_saving", ends_run=True),
        Kind("torn_checkpoint", ends_run=True, checkpoints=2),
        Kind("kill_rank", ends_run=True, checkpoints=1),
        Kind("disk_full", ends_run=True, checkpoints=1),
        Kind("kill_decoder"),
        Kind("hang_decoder"),
        Kind("kill_judge"),
        Kind("judge_rubbish"),
        Kind("judge_429"),
        Kind("judge_hang"),
        Kind("judge_reset"),
        Kind("clock_jump"),
        Kind("stop_rank"),
        Kind("clip_removed", changes_data=True),
        Kind("clip_truncated", changes_data=True),
        Kind("clip_replaced", changes_data=True),
        Kind("clip_kills_decoder", changes_data=True, waits=True),
        Kind("clip_hangs_decoder", changes_data=True, waits=True),
        Kind("judge_lost", changes_data=True),
    )
}
HARMLESS = tuple(name for name, kind in KINDS.items() if not kind.changes_data)
LOSSY = tuple(name for name, kind in KINDS.items() if kind.changes_data)


@dataclass(frozen=True)
class Event:
    """
    A fault that is due.

    Attributes:
        step: it strikes as soon as the run has logged this optimizer step.
        seed: of what it draws: which process, by how much.
    """

    step: int
    kind: str
    seed: int


def draw_schedule(seed: int, kinds: Sequence[str], last: int, save_steps: int, rounds: int = 1) -> list[Event]:
    """
    Draw when each kind strikes, `rounds` times each, spread over the steps from 1 to `last`.

    Faults that end the run are at least `save_steps + 1` steps apart, so that the run gets on between them, and come once
    the checkpoints that they need are there.

    Raises:
        ValueError: for an unknown kind, and for fewer steps than the faults need.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown faults {', '.join(unknown)}; there are {', '.join(KINDS)}")
    draw = random.Random(f"{seed} {','.join(sorted(kinds))}")
    ending = [name for name in kinds if KINDS[name].ends_run] * rounds
    others = [name for name in kinds if not KINDS[name].ends_run] * rounds
    draw.shuffle(ending)
    draw.shuffle(others)
    others.sort(key=lambda name: not KINDS[name].waits)
    ending.sort(key=lambda name: KINDS[name].checkpoints)  # the sort is stable: among equals by chance
    found, step, gap = [], 0, save_steps + 1
    spare = last
    for name in ending:  # the earliest step of each
        needed = KINDS[name].checkpoints * save_steps
        step = max(step + gap if found else 1, needed + 1 if needed else save_steps - 1)
        found.append((step, name))
    if found:
        spare = last - found[-1][0]
    if spare < 0 or last < 1:
        raise ValueError(f"{len(ending)} faults that end the run need {found[-1][0]} steps, and there are {last}")
    delays = sorted(draw.randint(0, spare) for _ in found)
    if ending and not KINDS[ending[0]].checkpoints:
        delays[0] = 0
    events = [
        Event(step + delay, name, draw.getrandbits(32)) for (step, name), delay in zip(found, delays, strict=True)
    ]
    width = last / max(len(others), 1)
    for place, name in enumerate(others):
        events.append(Event(1 + int(place * width + draw.random() * (width - 1)), name, draw.getrandbits(32)))
    return sorted(events, key=lambda event: (event.step, event.kind))
