"""What a run left out, what failed in it, and what never fired: counted as it goes, and named at its end."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from maple_trl.files import read_json, write_atomically
from maple_trl.trainers.common.learning_checks import LearningChecks
from maple_trl.trainers.common.quarantine import NAMED_FILES, RowRegistry


TALLY_FILE = "run_tally.json"

Note = dict[str, Any]
"""`kind`, `count`, `text` (a clause for people), and what else is known of it."""

_FED_LESS = {
    "rows_without_audio_track": "was asked for sound that its video does not have",
    "rows_with_shortened_subtitle": "had its subtitle shortened",
}


class RunTally:
    """
    Counts of a run, the same on every rank; a resumed run goes on with those of its checkpoint.

    Args:
        speaks (`bool`, *optional*, defaults to `True`): whether this process warns.
    """

    def __init__(self, speaks: bool = True):
        self.checks = LearningChecks(speaks)
        self.rewards: Counter[str] = Counter()  # completions that a reward function was asked about
        self.unrewarded: Counter[str] = Counter()  # and gave nothing
        self.counts: Counter[str] = Counter()  # of all else

    def save(self, folder: str) -> None:
        """Write the counts into a checkpoint."""
        state = {name: dict(getattr(self, name)) for name in ("rewards", "unrewarded", "counts")}
        text = json.dumps(state | {"checks": self.checks.state_dict()})
        write_atomically(os.path.join(folder, TALLY_FILE), text + "\n")

    def load(self, folder: str) -> None:
        """Take over the counts of a checkpoint; one of an earlier version has none."""
        state = read_json(os.path.join(folder, TALLY_FILE))
        if state is None:
            return
        self.checks.load_state_dict(state["checks"])
        for name in ("rewards", "unrewarded", "counts"):
            setattr(self, name, Counter(state[name]))

    def notes(self) -> list[Note]:
        """Return notes on failed rewards, steps without a gradient, equal rewards, and rows that were fed less."""
        found = [
            make_note(
                "unrewarded",
                self.unrewarded[name],
                f"reward {name!r} gave nothing for {self.unrewarded[name]} of {self.rewards[name]} completions",
                name=name,
                of=self.rewards[name],
            )
            for name in self.rewards
            if self.unrewarded[name]
        ]
        zero, equal = self.checks.zero_gradients, self.checks.equal_rewards
        if zero.count:
            text = f"{zero.count} of {plural(zero.seen, 'step')} without an update (gradient 0)"
            found.append(make_note("zero_gradient", zero.count, text, of=zero.seen, longest=zero.longest))
        if equal.warned or (equal.seen and equal.count == equal.seen):
            text = f"all rewards equal in {equal.count} of {plural(equal.seen, 'rollout')}"
            found.append(make_note("equal_rewards", equal.count, text, of=equal.seen, longest=equal.longest))
        for name, what in _FED_LESS.items():
            if self.counts[name]:
                text = f"{plural(self.counts[name], 'time')} a row {what}"
                found.append(make_note(name, self.counts[name], text))
        return found


def make_note(kind: str, count: int, text: str, **known: Any) -> Note:
    """Make a note of a count, a clause for people, and what else is known."""
    return {"kind": kind, "count": int(count), "text": text, **known}


def plural(count: int, noun: str) -> str:
    """Write a count with its noun, e.g. `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def quarantine_notes(registries: Sequence[RowRegistry]) -> list[Note]:
    """Return a note per data set on rows that could not be used, by reason, with their first files."""
    found = []
    for registry in registries:
        reasons = registry.reasons()
        if not reasons:
            continue
        count, of = reasons.total(), len(registry.dataset)
        text = f"{registry.name}: {count} of {plural(of, 'row')} quarantined {registry.reasons_and_files()}"
        files = registry.first_files()
        found.append(
            make_note("quarantined", count, text, dataset=registry.name, of=of, reasons=dict(reasons), files=files)
        )
    return found


def changed_notes(registries: Sequence[RowRegistry]) -> list[Note]:
    """Return a note per data set on files that were changed during the run, and whose rows show something else since."""
    found = []
    for registry in registries:
        files = sorted(registry.changed_files)
        if files:
            named = ", ".join(files[:NAMED_FILES]) + (", …" if len(files) > NAMED_FILES else "")
            text = f"{registry.name}: {plural(len(files), 'file')} changed while the run read them ({named})"
            found.append(make_note("changed_files", len(files), text, dataset=registry.name, files=files))
    return found


def unseen_note(registry: RowRegistry, epochs: float) -> list[Note]:
    """Return a note on usable rows that a run of at least one epoch has not come to, if there are any."""
    usable = len(registry.dataset) - registry.reasons().total()
    unseen = usable - registry.usable_seen()
    if epochs < 1 or unseen <= 0:
        return []
    text = f"{registry.name}: {unseen} of {usable} usable rows were in no batch"
    return [make_note("unseen_rows", unseen, text, dataset=registry.name, of=usable)]
