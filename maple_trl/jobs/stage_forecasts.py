"""What stages would do, of which some may be done: told without a network, and without writing a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.forecasts import Forecast, forecast_training
from maple_trl.jobs.stages import check_state


if TYPE_CHECKING:
    from maple_trl.jobs.stages import Plan


def forecast_stages(plan: Plan) -> list[Forecast | None]:
    """
    Say what [`~maple_trl.jobs.stages.run_stages`] would do, stage by stage.

    Returns:
        `list[Forecast | None]`: `None` for a stage that is done. The one that was begun goes on from its checkpoint.

    Raises:
        SetupError: naming the stage, for what the stages themselves would refuse before the first one starts.
    """
    jobs = [plan.parse(i) for i in range(len(plan.stages))]
    state = check_state(plan, jobs)
    forecasts: list[Forecast | None] = [None] * state.done
    for i in range(state.done, len(jobs)):
        state.go_on(i, jobs[i])
        above = plan.stages[i - 1].name if i > state.done else None
        try:
            forecasts.append(forecast_training(jobs[i], above))
        except SetupError as error:
            raise SetupError(f"stage {plan.stages[i].name}: {error}") from error
    return forecasts
