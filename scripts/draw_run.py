"""
Draws a training run for README, as the run itself does in its `training.png`: `docs/run.svg`.

    maple-trl train --config recipes/demo.yaml
    python scripts/draw_run.py runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from svg_files import DRAWN, compact

from maple_trl.reports.plots import plot_training


PICTURE = Path(__file__).resolve().parents[1] / "docs" / "run.svg"


def main(run: Path) -> None:
    """Draw what a run's folder holds, the same bytes each time."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    with rc_context(DRAWN):
        plot_training(log, summary["before"], summary["after"], PICTURE)
    PICTURE.write_text(compact(PICTURE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
