"""The questions of an evaluation, to be compared with those of another."""

from __future__ import annotations

import json

from maple_trl.reports.folders import RunData
from maple_trl.reports.media import MEDIA


Question = tuple
"""A row's id or number, or else what it asks; and its tag."""

_ASKED = ("prompt", "solution", *MEDIA)
NOT_NAMED = (
    "The evaluations are not of the same rows, and rows are told by their number alone: no question with the same prompt, "
    "media and solution was scored by both. A column id that names every row differently tells which belong together."
)
"""Why two evaluations whose rows have no names cannot be compared."""


def share_names(first: RunData, second: RunData) -> bool:
    """
    Return whether a row's id, or its number, means the same question in both evaluations.

    Of the same rows it does. Else the ids of both must be more than row numbers, which stand in for ids where a table has none
    or has one twice: row 0 of a part of a table is another row than that of the whole.
    """
    digests = [(run.result or {}).get("data", {}).get("sha256") for run in (first, second)]
    if digests[0] is not None and digests[0] == digests[1]:
        return True
    return not any(_numbered(run) for run in (first, second))


def _numbered(run: RunData) -> bool:
    rows = zip(run.table["id"].to_pylist(), run.table["row"].to_pylist(), strict=True)
    return all(not id_ or id_ == str(row) for id_, row in rows)


def question_means(
    run: RunData, name: str, by_name: bool = True
) -> tuple[dict[str, dict[Question, float]], dict[Question, str]]:
    """
    Average a column of an evaluation over the scored samples of each question.

    Args:
        by_name: tell questions apart by their rows' ids, else numbers; otherwise by prompt, solution and media, whereby rows
            that are alike in these are one question, and what an older version kept without prompts is left out.

    Returns:
        the means by access and question, and the clips of questions.
    """
    sums: dict[str, dict[Question, list[float]]] = {}
    clips: dict[Question, str] = {}
    names = ("access", "id", "row", "tag", "score", "clip", name, *_ASKED)
    columns = [
        run.table[name].to_pylist() if name in run.table.column_names else [None] * len(run.table) for name in names
    ]
    for access, id_, row, tag, score, clip, value, *asked in zip(*columns, strict=True):
        if score is not None and value is not None and (by_name or asked[0] is not None):
            key = ((id_ if id_ else row) if by_name else json.dumps(asked), tag)
            sums.setdefault(access, {}).setdefault(key, []).append(value)
            if clip is not None:
                clips[key] = clip
    means = {
        access: {key: sum(values) / len(values) for key, values in questions.items()}
        for access, questions in sums.items()
    }
    return means, clips
