"""Tables that benchmarks compute, in Markdown, and in the pages that show them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def told(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join(lines + [f"| {' | '.join(told(value) for value in row.values())} |" for row in rows])


def with_tables(text: str, tables: dict[str, list[dict[str, Any]]]) -> str:
    """A page whose marked tables are those that are computed."""
    for name, rows in tables.items():
        begin, end = f"<!-- table {name} -->", "<!-- end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end, 1)
        text = f"{before}{begin}\n{table(rows)}\n{end}{after}"
    return text


def write_tables(page: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", metavar="FILE", help="put the tables into this page")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")


def give(tables: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Print tables, and write them where `add_outputs` was told to."""
    for name, rows in tables.items():
        print(f"{name}\n{table(rows)}\n")
    if args.write:
        write_tables(Path(args.write), tables)
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
