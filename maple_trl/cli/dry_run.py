"""What `--dry_run` prints: what would be read, computed, asked and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from maple_trl.cli.failures import DONE


# Nothing heavier than the standard library up here: every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.forecasts import Forecast
    from maple_trl.jobs.stages import Plan

_TITLES = {"reads": "would read", "computes": "would compute", "asks": "would ask", "writes": "would write"}
_END = "\nThis was a dry run: no network was asked, and nothing was written."


def tell(forecast: Forecast, as_json: bool = False) -> int:
    """Print what a command would do; return the exit status."""
    if as_json:
        print(json.dumps(forecast.as_dict(), indent=2, ensure_ascii=False))
        return DONE
    _print(forecast)
    print(_END)
    return DONE


def tell_training(plan: Plan | None, words: Sequence[str]) -> int:
    """
    Print what a training job, or each stage of a plan, would do; return the exit status.

    Raises:
        SetupError: for what the job would refuse before it loads anything.
    """
    from maple_trl.jobs.forecasts import forecast_training
    from maple_trl.jobs.options import parse_args

    if plan is None:
        return tell(forecast_training(parse_args(words)))
    from maple_trl.jobs.stage_forecasts import forecast_stages

    for i, (stage, forecast) in enumerate(zip(plan.stages, forecast_stages(plan), strict=True)):
        done = ", which is done" if forecast is None else ""
        print(f"{'' if i == 0 else chr(10)}Stage {i + 1} of {len(plan.stages)}: {stage.name}{done}")
        if forecast is not None:
            _print(forecast)
    print(_END)
    return DONE


def _print(forecast: Forecast) -> None:
    for part in fields(forecast):
        lines = getattr(forecast, part.name)
        if part.name in _TITLES:
            print(f"{_TITLES[part.name]}:" + ("" if lines else " nothing"))
            for line in lines:
                print(f"  {line}")
