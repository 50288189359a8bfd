"""
A run as a notebook shows it: HTML of headings and tables, with no script, style sheet or address in it.

All texts, of models and of data alike, are escaped, so that none of them can be read as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from maple_trl.records.metrics_log import first_and_last
from maple_trl.records.rollouts import ROLLOUTS, read_rollouts
from maple_trl.records.summary import left_out_line


_LONGEST = 600
"""Characters of a text that are shown; of a longer one the beginning and the end."""


def run_html(
    title: str, log_history: Sequence[Mapping[str, Any]], output_dir: str, left_out: Sequence[Mapping[str, Any]]
) -> str:
    """
    Describe a run: how far it is, what it has learned, its latest completions, and what it left out.

    Args:
        title: whose run it is.
        log_history: of the trainer, from its beginning or a part of it.
        output_dir: of the run; its completions are in `rollouts/`.
        left_out: notes with a `text`, as of [`~maple_trl.OmniGRPOTrainer.left_out`].
    """
    steps = max((entry.get("step", 0) for entry in log_history), default=0)
    parts = [f"<h4>{escape(title)}: {f'{steps} steps' if steps else 'not trained yet'}</h4>"]
    if not steps:
        return parts[0]
    learned = first_and_last(log_history)
    if learned:
        rows = [[name, f"{first:.3f}", f"{last:.3f}"] for name, (first, last) in learned.items()]
        parts.append(table_html(["", "first tenth of the log", "last tenth"], rows))
    table, _, _ = read_rollouts(Path(output_dir, ROLLOUTS), latest=1)
    if table is not None:
        parts.append(completions_html(table, groups=1))
    parts.append(f"<p>{escape(left_out_line(left_out))}</p>")
    return "\n".join(parts)


def completions_html(table: pa.Table, groups: int = 1) -> str:
    """
    Show the last groups of a table of completions, each with its prompt, the best rewarded completions first.

    Args:
        table: with the columns of [`~maple_trl.records.rollouts.LINES`].
        groups: how many, at most.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in table.to_pylist():
        found.setdefault((line["rollout"], line["group"]), []).append(line)
    return "\n".join(_group_html(lines) for lines in list(found.values())[-groups:])


def _group_html(lines: Sequence[Mapping[str, Any]]) -> str:
    first = lines[0]
    fed = [name for kind in ("video", "audio", "image") for name in first.get(kind) or ()]
    fed += [first["subtitle"]] if first.get("subtitle") else []
    facts = {
        "step": first["step"],
        "tag": first["tag"],
        "fed": ", ".join(dict.fromkeys(fed)),
        "solution": first.get("solution"),
    }
    head = ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    names = list(dict.fromkeys(name for line in lines for name, _ in line["rewards"] or ()))
    rows = []
    for line in sorted(lines, key=lambda line: -(float("-inf") if line["reward"] is None else line["reward"])):
        given = dict(line["rewards"] or ())
        marks = [name for name in ("replayed", "hinted") if line.get(name)]
        numbers = [line["reward"], *(given.get(name) for name in names), line.get("advantage")]
        rows.append([line["completion"], *map(_number, numbers), ", ".join(marks)])
    columns = ["completion", "reward", *names, "advantage", ""]
    return f"<p><b>{escape(head)}</b><br>{_shortened(first.get('prompt'))}</p>\n{table_html(columns, rows)}"


def table_html(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; cells are texts, and escaped here."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{_shortened(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _shortened(text: Any) -> str:
    """Escape a text, without the middle of a long one."""
    text = "" if text is None else str(text)
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    return escape(text)
