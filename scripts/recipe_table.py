"""
Puts the table of recipes into docs/maple_recipes.md, from what the files say in their first lines.

    python scripts/recipe_table.py
"""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
DOC = ROOT / "docs" / "maple_recipes.md"
BEGIN, END = "<!-- recipes, written by scripts/recipe_table.py -->", "<!-- end of recipes -->"
SETS = ("maple_qa", "maple_caption")


def files() -> list[Path]:
    """Return the recipes of both sets, without what they are built on."""
    return [path for name in SETS for path in sorted((RECIPES / name).glob("*.yaml")) if "base" not in path.stem]


def tiny_of(path: Path) -> Path:
    """Return the place of a recipe's twin with the embedded model."""
    prefix = "caption_" if "maple_caption" in path.parts else ""
    return RECIPES / "tiny" / f"{prefix}{path.name}"


def read(path: Path) -> tuple[str, str, str]:
    """
    Return what the first lines of a recipe say: what of the paper it is, the paper's figures, and where it departs.

    Raises:
        ValueError: when they do not say it.
    """
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    found = re.fullmatch(r"MAPLE (.+?)\. In the paper: (.+)\.", lines[0])
    if found is None:
        raise ValueError(
            f"{path}: the first line must be '# MAPLE <what>. In the paper: <figures>.', got {lines[0]!r}"
        )
    said = " ".join(lines[1:]).removeprefix("Departs: ")
    return found[1], found[2], said


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| recipe | MAPLE | in the paper | what to know | twin with the embedded model |",
        "|---|---|---|---|---|",
    ]
    for path in files():
        links = [
            f"[{p.relative_to(RECIPES).with_suffix('')}](../{p.relative_to(ROOT)})" for p in (path, tiny_of(path))
        ]
        what, figures, said = (cell.replace("|", r"\|") for cell in read(path))
        lines.append(f"| {links[0]} | {what} | {figures} | {said or '–'} | {links[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the document."""
    before, rest = DOC.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    DOC.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
