"""
Draws README's badges from setup.cfg: `docs/badges/*.svg`. Nothing is asked of a server when they are shown.

    python scripts/draw_badges.py
"""

from __future__ import annotations

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "badges"
BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{name}: {value}">
<title>{name}: {value}</title>
<rect width="{width}" height="20" rx="3" fill="#444d56"/>
<path fill="{colour}" d="M{split} 0h{rest}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3H{split}z"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left}" y="14" textLength="{name_width}">{name}</text>
<text x="{right}" y="14" textLength="{value_width}">{value}</text>
</g>
</svg>
"""


def lowest(specifiers: SpecifierSet) -> str:
    """Return the version from which a range goes on."""
    return next(one.version for one in specifiers if one.operator == ">=")


def facts() -> dict[str, tuple[str, str, str]]:
    """Return name, value and colour of each badge, by its file."""
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = {
        Requirement(line).name: Requirement(line) for line in read["options"]["install_requires"].split("\n") if line
    }
    return {
        "license": ("license", read["metadata"]["license_expression"], "#2a9d8f"),
        "python": ("python", f"{lowest(SpecifierSet(read['options']['python_requires']))}+", "#33658a"),
        "trl": ("TRL", lowest(needed["trl"].specifier), "#b5651d"),
        "docs": ("docs", "make docs", "#5b5f97"),
    }


def draw(name: str, value: str, colour: str) -> str:
    """Return a badge as SVG."""
    name_width, value_width = (round(6.6 * len(text)) for text in (name, value))
    split, width = name_width + 12, name_width + value_width + 24
    return BADGE.format(
        name=name,
        value=value,
        colour=colour,
        width=width,
        split=split,
        rest=width - split - 3,
        left=split / 2,
        right=split + (width - split) / 2,
        name_width=name_width,
        value_width=value_width,
    )


def main() -> None:
    """Write all badges."""
    FOLDER.mkdir(exist_ok=True)
    for file, (name, value, colour) in facts().items():
        (FOLDER / f"{file}.svg").write_text(draw(name, value, colour), encoding="utf-8")


if __name__ == "__main__":
    main()
