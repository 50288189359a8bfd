"""What a review has come to: decisions by tag, reviewers, and how far they agree."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from maple_trl.data.review.agreement import cohen_kappa
from maple_trl.data.review.desk import ReviewDesk
from maple_trl.data.review.entries import Entry
from maple_trl.data.review.outcomes import DECIDED, DISAGREED, Outcome, settle
from maple_trl.modalities import ModalityTag


DECISIONS = ("accepted", "retagged", "edited", "rejected")


def outcomes(desk: ReviewDesk, rule: str, least: int) -> list[Outcome]:
    """Return what counts for each row, in order."""
    return [settle(desk.standing(index), rule, least) for index in range(len(desk.data))]


def summarize(desk: ReviewDesk, rule: str = "agree", least: int = 1) -> dict[str, Any]:
    """
    Summarize a review as JSON knows it.

    Args:
        desk: the set and the log of its review.
        rule: as of [`~maple_trl.data.review.outcomes.settle`].
        least: reviewers without whom nothing is decided.

    Returns:
        `dict`:
            - `rows`, `decided`, `disagreed`, `undecided`: rows by what counts for them under the rule.
            - `by_tag`: of each proposed tag, and of `all`, how many of the decided rows are `accepted`, `retagged`, `edited`
              (a row that is both counts in both) and `rejected`, and `tags_changed`: the share of retagged rows among those
              that are kept, `None` where none is.
            - `new_tags`: how often a proposed tag became another, such as `{"V": {"VA": 3}}`.
            - `reviewers`: [`reviewer_summary`] of each.
            - `agreement`: [`pair_agreement`] of each two.
            - `log`: `damaged` lines as texts, `undone` actions, decisions on rows that changed since (`stale`) or are not
              in the set (`unknown`).
    """
    data, replay = desk.data, desk.log.replay
    found = outcomes(desk, rule, least)
    status = Counter(item.status for item in found)
    tags = data.tags
    decided = [(tag, item.entry) for tag, item in zip(tags, found, strict=True) if item.entry is not None]
    moved: dict[str, Counter[str]] = {}
    for tag, entry in decided:
        if "tag" in entry.changes and not entry.rejected:
            moved.setdefault(tag, Counter())[entry.changes["tag"]] += 1
    known = [index for row in replay.rows if (index := data.index_of(row)) is not None]
    return {
        "rule": rule,
        "min_reviewers": least,
        "rows": len(data),
        "decided": status[DECIDED],
        "disagreed": status[DISAGREED],
        "undecided": len(data) - status[DECIDED] - status[DISAGREED],
        "by_tag": {
            tag: _of_tag(tags.count(tag) if tag != "all" else len(tags), [e for t, e in decided if tag in (t, "all")])
            for tag in [*(tag.value for tag in ModalityTag if tag.value in tags), "all"]
        },
        "new_tags": {tag: dict(moved[tag].most_common()) for tag in map(str, ModalityTag) if tag in moved},
        "reviewers": {name: reviewer_summary(desk, name, known) for name in replay.reviewers},
        "agreement": [
            pair_agreement(desk, *pair, known) for pair in itertools.combinations(sorted(replay.reviewers), 2)
        ],
        "log": {
            "damaged": [str(line) for line in desk.log.damaged],
            "undone": replay.undone,
            "stale": sum(len(desk.stale(index)) for index in known),
            "unknown": sum(len(replay.decisions(row)) for row in replay.rows if data.index_of(row) is None),
        },
    }


def _of_tag(rows: int, entries: Sequence[Entry]) -> dict[str, Any]:
    counts = _decisions(entries)
    kept = len(entries) - counts["rejected"]
    return {"rows": rows, **counts, "tags_changed": counts["retagged"] / kept if kept else None}


def _decisions(entries: Sequence[Entry]) -> dict[str, int]:
    counts = Counter(part for entry in entries for part in entry.decision.split(", "))
    return {name: counts[name] for name in DECISIONS}


def reviewer_summary(desk: ReviewDesk, reviewer: str, known: Sequence[int]) -> dict[str, Any]:
    """
    Summarize what a reviewer did.

    Args:
        known: the rows of the set that somebody has decided on.

    Returns:
        `dict`: `decided` rows; these by decision; `seconds`, the median over rows of the time from a row's
        showing to its decision, with that of further decisions on it; `answered`, rows that the reviewer answered before the right answer was shown, and
        `answered_right`, the share that was right.
    """
    entries = [(index, desk.standing(index)[reviewer]) for index in known if reviewer in desk.standing(index)]
    ids = {desk.data.ids[index] for index, _ in entries}
    seconds: dict[str, float] = {}
    for entry in desk.log.replay.actions(reviewer):
        if entry.seconds is not None and entry.row in ids:
            seconds[entry.row] = seconds.get(entry.row, 0.0) + entry.seconds
    answers = [(desk.data.row(index).get("answer"), entry.answer) for index, entry in entries if entry.answer]
    right = sum(str(answer).strip().upper() == given for answer, given in answers)
    return {
        "decided": len(entries),
        **_decisions([entry for _, entry in entries]),
        "seconds": statistics.median(seconds.values()) if seconds else None,
        "answered": len(answers),
        "answered_right": right / len(answers) if answers else None,
    }


def pair_agreement(desk: ReviewDesk, one: str, other: str, known: Sequence[int]) -> dict[str, Any]:
    """
    Compare two reviewers on the rows on which both decided.

    Returns:
        `dict`: their names; `rows`; `decision_agreed` and `decision_kappa` on what was decided (accepted, retagged, edited,
        both, rejected); `kept`, the rows that both keep, and on these `tag_agreed` and `tag_kappa` on the tag that the
        row has then. Shares and kappas are `None` where they are not defined.
    """
    decisions, tags = [], []
    for index in known:
        standing = desk.standing(index)
        if one not in standing or other not in standing:
            continue
        pair = standing[one], standing[other]
        decisions.append(tuple(entry.decision for entry in pair))
        if not any(entry.rejected for entry in pair):
            tags.append(tuple(entry.changes.get("tag", desk.data.tags[index]) for entry in pair))
    return {
        "reviewers": [one, other],
        "rows": len(decisions),
        "decision_agreed": _agreed(decisions),
        "decision_kappa": cohen_kappa([a for a, _ in decisions], [b for _, b in decisions]),
        "kept": len(tags),
        "tag_agreed": _agreed(tags),
        "tag_kappa": cohen_kappa([a for a, _ in tags], [b for _, b in tags]),
    }


def _agreed(pairs: Sequence[tuple[str, ...]]) -> float | None:
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None
