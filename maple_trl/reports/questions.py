"""The questions of an evaluation, to be compared with those of another."""

from __future__ import annotations

from maple_trl.reports.folders import RunData


Question = tuple
"""A row's id, else its number; and its tag."""


def question_means(run: RunData, name: str) -> tuple[dict[str, dict[Question, float]], dict[Question, str]]:
    """
    Average a column of an evaluation over the scored samples of each question.

    Returns:
        the means by access and question, and the clips of questions.
    """
    sums: dict[str, dict[Question, list[float]]] = {}
    clips: dict[Question, str] = {}
    names = ("access", "id", "row", "tag", "score", "clip", name)
    columns = [
        run.table[name].to_pylist() if name in run.table.column_names else [None] * len(run.table) for name in names
    ]
    for access, id_, row, tag, score, clip, value in zip(*columns, strict=True):
        if score is not None and value is not None:
            key = (id_ if id_ else row, tag)
            sums.setdefault(access, {}).setdefault(key, []).append(value)
            if clip is not None:
                clips[key] = clip
    means = {
        access: {key: sum(values) / len(values) for key, values in questions.items()}
        for access, questions in sums.items()
    }
    return means, clips
