"""The page of a report: a template, filled with data that no browser can take for markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"
_SCRIPTS = ("data.js", "charts.js", "sections.js", "viewer.js")


def render(data: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any] | None]) -> str:
    """
    The HTML of a report.

    Everything that comes from a run stands in blocks of JSON (`<`, `>` and `&` as escapes) or in base64, and scripts
    put it into the page as text. A policy in the page lets the browser run the scripts of this package alone, by their
    hashes, and load nothing but pictures, sound and video beside the page.

    Args:
        data: of [`~maple_trl.reports.report.report_data`].
        rollouts: for each run what [`~maple_trl.reports.rollouts.packed`] gives.

    Raises:
        ImportError: without jinja2 or plotly, naming the extra that brings them.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f'reports need jinja2 and plotly ({error}): pip install "maple-trl[report]"') from error
    scripts = [get_plotlyjs(), "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)]
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    about = [None if found is None else {k: v for k, v in found.items() if k != "chunks"} for found in rollouts]
    return environment.get_template("page.html.j2").render(
        data=data,
        rollouts=about,
        chunks=[[] if found is None else found["chunks"] for found in rollouts],
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        style=(_ASSETS / "report.css").read_text(encoding="utf-8"),
    )


def _source_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
