"""The completions of a run, in groups, as the viewer of a report pages through them."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maple_trl.files import as_json
from maple_trl.metrics.clips import clip_of
from maple_trl.reports.media import MEDIA, MediaTable, media_of
from maple_trl.reports.series import TAGS


CHUNK = 400
"""Completions that a page unpacks together."""

_TRAINING = (
    "step group row id tag clip prompt completion solution rewards reward advantage tokens replayed hinted written_at "
    "video audio image subtitle"
).split()
_SHOWN = ("completion", "rewards", "advantage", "tokens", "written_at", "answer", "finish")
_EVALUATION = {
    "access": "access",
    "row": "row",
    "id": "id",
    "tag": "tag",
    "clip": "clip",
    "fed": "fed",
    "prompt": "prompt",
    "completion": "completion",
    "solution": "solution",
    "score": "reward",
    "completion_tokens": "tokens",
    "answer": "answer",
    "finish": "finish",
    "video": "video",
    "audio": "audio",
    "image": "image",
    "subtitle": "subtitle",
}


@dataclass
class Rollouts:
    """
    Completions, those of a group next to each other.

    Attributes:
        columns: lists of equal length by name; a run has only those that its files have.
        groups: of each completion, the number of its group, ascending from 0.
        visits: of each completion, how often its prompt has been drawn in this rollout before, and this time.
        total: completions that the run's files hold; more than there are here where they were thinned out.
    """

    columns: dict[str, list]
    groups: np.ndarray
    total: int
    visits: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)

    def get(self, name: str) -> list:
        """Return a column; all `None` where the run has no such."""
        return self.columns.get(name) or [None] * len(self)


def rollouts_of(table: pa.Table, kind: str, most: int, options: Mapping[str, Any] | None = None) -> Rollouts:
    """
    Return the completions of a table.

    Args:
        table: of `maple_trl.trainers.common.rollout_log` or of an evaluation.
        kind: `"training"` or `"evaluation"`.
        most: whole groups are left out, evenly over the run, where there are more completions.
        options: of a training run, which say how many completions a prompt has.
    """
    names = set(table.column_names)
    visits = np.ones(len(table), dtype=np.int64)
    if kind == "evaluation":
        lines = np.flatnonzero(pc.is_valid(table["sample"]).to_numpy(zero_copy_only=False))
        table, visits = table.take(pa.array(lines)), visits[lines]
        keys = [table["access"].to_pylist(), table["row"].to_pylist()]
        taken = {new: old for old, new in _EVALUATION.items() if old in names}
    else:
        keys = [table["rollout"].to_pylist(), table["group"].to_pylist()]
        visits = visits_of(list(zip(*keys, strict=True)), table["replayed"].to_pylist(), *_sizes(options or {}))
        keys.append(visits.tolist())
        taken = {name: name for name in _TRAINING if name in names}
    numbers: dict[tuple, int] = {}
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in zip(*keys, strict=True)], dtype=np.int64)
    total = len(groups)
    if total > most:
        kept = np.unique(np.linspace(0, len(numbers) - 1, max(1, len(numbers) * most // total)).round().astype(int))
        lines = np.flatnonzero(np.isin(groups, kept))
        table, groups, visits = table.take(pa.array(lines)), groups[lines], visits[lines]
    order = np.argsort(groups, kind="stable")
    if len(order) and (np.diff(order) != 1).any():
        table = table.take(pa.array(order))
    groups = np.unique(groups[order], return_inverse=True)[1]
    return Rollouts({new: table[old].to_pylist() for new, old in taken.items()}, groups, total, visits[order])


def _sizes(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return how many completions a draw of a prompt has, and how many fresh ones where all draws replay as many."""
    size, replayed = options.get("num_generations"), options.get("replayed_generations") or 0
    if not isinstance(size, int) or size < 1:
        return None, None
    alike = replayed and options.get("replay_scope") != "prompt"
    return size, size - replayed if alike else None


def visits_of(
    keys: Sequence[tuple[int, str]], replayed: Sequence[bool], largest: int | None = None, smallest: int | None = None
) -> np.ndarray:
    """
    Return of each completion which draw of its prompt in its rollout it is of, from 1: each is a group of its own.

    Fresh completions of a draw stand next to each other, so a new draw begins where another prompt stands between, or
    where a group is full. Replayed ones stand behind all of them and fill the groups up in their order.

    Args:
        keys: of each completion, its rollout and its prompt.
        replayed: of each completion.
        largest: completions of a draw; without it, what most draws of the rollout have.
        smallest: fresh completions of a draw whose others are replayed, where that is the same for all draws.
    """
    visits = np.ones(len(keys), dtype=np.int64)
    stretches: dict[tuple[int, str], list[list[int]]] = {}
    before = None
    for line, key in enumerate(keys):
        if replayed[line]:
            continue
        if key != before:
            stretches.setdefault(key, []).append([])
        stretches[key][-1].append(line)
        before = key
    of_rollout: dict[int, Counter[int]] = {}
    for (rollout, _), own in stretches.items():
        of_rollout.setdefault(rollout, Counter()).update(map(len, own))
    counts: dict[tuple[int, str], list[int]] = {}
    for key, own in stretches.items():
        usual = of_rollout[key[0]].most_common(1)[0][0]
        full = usual if largest is None or usual == smallest else largest
        draws = counts.setdefault(key, [])
        for lines in own:
            for i, line in enumerate(lines):
                if i % full == 0:
                    draws.append(0)
                draws[-1] += 1
                visits[line] = len(draws)
    at = dict.fromkeys(counts, 0)
    for line in np.flatnonzero(replayed):
        draws = counts.get(keys[line])
        if draws is None:  # of a prompt that this rollout has not drawn
            continue
        while at[keys[line]] < len(draws) - 1 and largest is not None and draws[at[keys[line]]] >= largest:
            at[keys[line]] += 1
        draws[at[keys[line]]] += 1
        visits[line] = at[keys[line]] + 1
    return visits


def question_names(rollouts: Rollouts) -> list[str]:
    """Name each completion's question: by the row's id, else its number, else its group."""
    columns = zip(rollouts.get("id"), rollouts.get("row"), rollouts.get("group"), strict=True)
    return [name or (f"row {row}" if row is not None else str(group)) for name, row, group in columns]


def clip_names(rollouts: Rollouts) -> list[str | None]:
    """Name each completion's clip; of runs whose files do not say it, by the media that were fed."""
    if "clip" in rollouts.columns:
        return rollouts.columns["clip"]
    media = zip(*(rollouts.get(name) for name in MEDIA), strict=True)
    return [clip_of(dict(zip(MEDIA, files, strict=True))) for files in media]


def reward_names(rollouts: Rollouts) -> list[str]:
    """Return the names of the reward functions."""
    names: dict[str, None] = {}
    for rewards in rollouts.get("rewards"):
        names |= dict.fromkeys(name for name, _ in rewards or ())
    return list(names)


def packed(rollouts: Rollouts, media: MediaTable) -> dict[str, Any]:
    """
    Pack what a page needs to filter and to show completions.

    That is an index over all, and their texts in chunks, each as compressed JSON in base64, of which a page unpacks
    those that it shows.
    """
    names = reward_names(rollouts)
    shown = {name: rollouts.get(name) for name in _SHOWN}
    questions: dict[str, int] = {}
    accesses: dict[str, int] = {}
    columns = {name: rollouts.get(name) for name in ("step", "access", "prompt", "solution", "row")}
    get = rollouts.get
    starts = np.flatnonzero(np.diff(rollouts.groups, prepend=-1))
    ends = [*starts[1:], len(rollouts)]
    index: dict[str, list] = {
        "tag": [TAGS.index(tag) if tag in TAGS else -1 for tag in get("tag")],
        "reward": [None if value is None else round(value, 4) for value in get("reward")],
        "flags": [bool(r) + 2 * bool(h) for r, h in zip(get("replayed"), get("hinted"), strict=True)],
        "first": starts.tolist(),
        "step": [],
        "question": [],
        "access": [],
        "visit": rollouts.visits[starts].tolist(),
        "chunk": [],
    }
    called = question_names(rollouts)
    chunks: list[dict[str, list]] = []
    size = CHUNK
    for start, end in zip(starts.tolist(), ends, strict=True):
        if size >= CHUNK:
            chunks.append({"first": len(index["chunk"]), "groups": []})
            size = 0
        size += end - start
        index["step"].append(columns["step"][start])
        index["question"].append(questions.setdefault(called[start], len(questions)))
        index["access"].append(accesses.setdefault(columns["access"][start], len(accesses)))
        index["chunk"].append(len(chunks) - 1)
        chunks[-1]["groups"].append(
            {
                "prompt": columns["prompt"][start],
                "solution": columns["solution"][start],
                "row": columns["row"][start],
                "media": media_of(media, rollouts.columns, start),
                "completions": [_completion(shown, line, names) for line in range(start, end)],
            }
        )
    return {
        "count": len(rollouts),
        "total": rollouts.total,
        "groups": len(starts),
        "rewards": names,
        "questions": pack(list(questions)),
        "accesses": [name for name in accesses if name is not None],
        "media": pack(media.entries),
        "index": pack(index),
        "chunks": [pack(chunk) for chunk in chunks],
    }


def _completion(columns: dict[str, list], line: int, names: list[str]) -> dict[str, Any]:
    """Return a completion as the page shows it, without what it lacks."""
    given = dict(columns["rewards"][line] or ())
    found = {
        "text": columns["completion"][line] or "",
        "rewards": [given.get(name) for name in names],
        "advantage": columns["advantage"][line],
        "tokens": columns["tokens"][line],
        "writtenAt": columns["written_at"][line],
        "answer": columns["answer"][line],
        "cut": columns["finish"][line] == "length" or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def pack(value: Any) -> str:
    """Compress JSON into base64: text that holds no character that HTML reads."""
    text = json.dumps(as_json(value), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=5, mtime=0)).decode()
