"""One decision of several: what the reviewers of a row have decided together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from maple_trl.data.review.desk import UNDECIDED, outcome
from maple_trl.data.review.entries import Entry


RULES = ("agree", "majority", "last")
"""
`agree`: all who decided on the row decided the same. `majority`: more than half of them did. `last`: the latest decision counts.
"""

DECIDED, DISAGREED = "decided", "disagreed"


@dataclass(frozen=True)
class Outcome:
    """
    What counts for a row.

    Attributes:
        status: `decided`; `disagreed` where the rule finds no decision among several; `undecided` where too few decided.
        entry: a decision that stands for it; `None` where there is none.
        reviewers: who decided so, sorted.
    """

    status: str
    entry: Entry | None = None
    reviewers: tuple[str, ...] = ()


def settle(decisions: Mapping[str, Entry], rule: str = "agree", least: int = 1) -> Outcome:
    """
    Return what counts of the decisions on a row.

    Two decisions are the same when both reject, or both keep with the same changes.

    Args:
        decisions: of each reviewer.
        rule: one of `RULES`.
        least: reviewers without whom nothing is decided.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}; the rules are {', '.join(RULES)}")
    if not decisions or len(decisions) < least:
        return Outcome(UNDECIDED)
    latest = max(decisions.values(), key=lambda entry: entry.time)
    chosen = outcome(latest)
    if rule != "last":
        chosen, votes = Counter(map(outcome, decisions.values())).most_common(1)[0]
        if votes < len(decisions) if rule == "agree" else 2 * votes <= len(decisions):
            return Outcome(DISAGREED)
    same = {name: entry for name, entry in decisions.items() if outcome(entry) == chosen}
    return Outcome(DECIDED, max(same.values(), key=lambda entry: entry.time), tuple(sorted(same)))
