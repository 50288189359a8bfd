"""Pictures of the docs as small SVG files, the same bytes each time."""

from __future__ import annotations

import re


DRAWN = {
    "svg.hashsalt": "maple-trl",
    "svg.fonttype": "none",  # text, and not the outlines of its letters
    "font.family": "sans-serif",
    "font.sans-serif": "DejaVu Sans",  # its widths place the text; elsewhere a browser takes its own
}
"""Settings of matplotlib while it draws one."""


def compact(svg: str) -> str:
    """Return an SVG of matplotlib's with two decimals, each path on a line, and without the date."""
    svg = re.sub(r"<dc:date>.*?</dc:date>\s*", "", svg)
    svg = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"\s*\n(?=[LCQz] ?|\")", " ", svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
