"""docs/data.md says what the code does: columns, kinds of problems, converters."""

import re
from pathlib import Path

from datasets import List, Value

from maple_trl.data.converters import CONVERTERS
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.validation import KINDS, REQUIRED


TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def table(head: str) -> list[list[str]]:
    """The cells of the table that begins with a line."""
    lines = TEXT[TEXT.index(head) :].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:end]]


def written(feature) -> str:
    if isinstance(feature, Value):
        assert feature.dtype == "string"
        return "text"
    if isinstance(feature, List):
        return f"list of {written(feature.feature)}"
    return f"{{{', '.join(feature)}}}"


def test_the_columns():
    told = {cells[0].strip("`"): cells[1] for cells in table("| column | type |")}
    assert told == {name: written(feature) for name, feature in ROW_FEATURES.items()}
    assert list(told) == list(ROW_FEATURES)
    assert f"{', '.join(f'`{name}`' for name in REQUIRED[:-1])} and `{REQUIRED[-1]}` must be filled" in TEXT


def test_the_kinds_of_problems():
    assert {cells[0].strip("`"): cells[1] for cells in table("| kind | what is wrong |")} == dict(KINDS)


def test_the_converters():
    told = {cells[0].strip("`"): cells for cells in table("| name | set |")}
    assert list(told) == list(CONVERTERS)
    for name, converter in CONVERTERS.items():
        assert f"`{converter.source}`" in told[name][2]
        tag = told[name][3]
        assert tag == (converter.tag or "all it has") or name == "vast"
