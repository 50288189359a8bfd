"""Where the function of a stage runs over its rows: in this process, or in those of Ray Data. Both run the same function."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from maple_trl.data.curation.asking import Asker, DroppedError, ServerError
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.errors import CurationError
from maple_trl.data.curation.logs import GrowingLog
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.data.curation.stages import STAGES
from maple_trl.data.curation.stages.collect import source_root


ENGINES = ("local", "ray")
_RAY_STARTS = 3


@dataclass
class Pass:
    """
    What a pass over a stage's open rows brought.

    Attributes:
        finished: key -> outcome.
        unfinished: key -> what a server said in place of an answer.
    """

    finished: dict[str, Outcome] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)


def log_of(stage: Stage, config: CurationConfig, part: str = "") -> GrowingLog:
    """Return the log of a stage's outcomes."""
    return GrowingLog(config.work, stage.name, part)


def read_log(log: GrowingLog) -> dict[str, Outcome]:
    """Read the outcomes of earlier runs, by their keys."""
    known = {}
    for entry in log.entries():
        with contextlib.suppress(KeyError, TypeError):
            dropped = [tuple(item) for item in entry["dropped"]]
            known[entry["key"]] = Outcome(entry["rows"], dropped, Counter(entry["notes"]))
    return known


async def run_rows(
    stage: Stage,
    units: dict[str, Row],
    tools: Tools,
    log: GrowingLog | None,
    progress: Callable[[int], None] = lambda done: None,
) -> Pass:
    """
    Run a stage's function over rows, several at a time; each outcome is noted at once.

    Once as many rows as run at a time have been asked for and servers have answered none of them, the others are not begun.

    Args:
        units: key -> row.
        log: where outcomes are noted; `None` for nowhere.
        progress: called with the rows that are done.
    """
    result, chunk, paid = Pass(), tools.config.run.chunk, bool(stage.endpoints(tools.config))
    slots = asyncio.Semaphore(chunk)

    async def finish(key: str, unit: Row) -> None:
        async with slots:
            if len(result.unfinished) >= chunk and not result.finished:
                result.unfinished[key] = "not asked: the servers answered none of the rows before"
                return
            try:
                outcome = await stage.work(unit, tools)
            except DroppedError as error:
                outcome = Outcome()
                outcome.drop(stage.name_of(unit), error.reason, error.detail)
            except ServerError as error:
                result.unfinished[key] = str(error)
                return
            # As a later run reads it, so that both make the same of it.
            outcome.rows, outcome.notes = json.loads(json.dumps(outcome.rows)), +outcome.notes
            if log is not None:
                log.add({"key": key, **vars(outcome)}, flush=paid)
            result.finished[key] = outcome
            progress(len(result.finished) + len(result.unfinished))

    async with asyncio.TaskGroup() as group:
        for key, unit in units.items():
            group.create_task(finish(key, unit))
    return result


def run_local(stage: Stage, units: dict[str, Row], tools: Tools, progress: Callable[[int], None]) -> Pass:
    """Run a stage over rows in this process; a dry run notes nothing."""
    log = None if tools.planning else log_of(stage, tools.config)
    try:
        return asyncio.run(run_rows(stage, units, tools, log, progress))
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors


def _first(errors: BaseExceptionGroup) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


# Ray


def run_batch(batch: dict[str, Any], config: CurationConfig, name: str) -> dict[str, list[str]]:
    """
    Run a stage over a batch in a process of Ray, with clients, decoders and logs of its own.

    Args:
        batch: `key` and `unit` (JSON) of its rows.
        config: all settings; keys of servers are read by each process itself.
        name: of the stage.

    Returns:
        `key`, and `problem` where a row is unfinished; outcomes are in the log.
    """
    (stage,) = [stage for stage in STAGES if stage.name == name]
    host = socket.gethostname()
    part = f"{host}-{os.getpid()}"
    units = {str(key): json.loads(unit) for key, unit in zip(batch["key"], batch["unit"], strict=True)}
    asker = Asker(config, part, config.run.ray_workers, host if config.run.ray_address else "")
    tools = Tools(config, source_root(config), asker)
    try:
        result = asyncio.run(run_rows(stage, units, tools, log_of(stage, config, part)))
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    finally:
        tools.close()
    return {"key": list(units), "problem": [result.unfinished.get(key, "") for key in units]}


@contextlib.contextmanager
def ray_running(config: CurationConfig) -> Iterator[None]:
    """
    Have Ray at hand: the cluster that is named, the one that this process is connected to, or one on this machine.

    One on this machine listens on the loopback interface where Ray lets it, asks for its token, and has no dashboard.
    """
    if config.run.ray_address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before the import: some ports listen on all interfaces
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    about: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if config.run.ray_address is not None:
        about["address"] = config.run.ray_address
    else:
        about |= {"num_cpus": config.run.ray_workers + 1, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    for tries_left in range(_RAY_STARTS - 1, -1, -1):
        try:
            ray.init(**about)
            break
        except Exception as error:  # on a busy machine its own processes may take longer than it waits for them
            ray.shutdown()
            if not tries_left or "timed out during startup" not in str(error):
                raise CurationError(
                    f"--engine ray: Ray cannot be started ({type(error).__name__}: {error})"
                ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_ray(stage: Stage, units: dict[str, Row], tools: Tools, progress: Callable[[int], None]) -> Pass:
    """
    Run a stage over rows by Ray Data.

    Workers note outcomes in logs of their own in the output folder, which all machines must see under one path.
    """
    import ray.data

    config = tools.config
    items = [{"key": key, "unit": json.dumps(unit)} for key, unit in units.items()]
    workers = min(config.run.ray_workers, len(items))
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * workers))
    done = dataset.map_batches(
        run_batch,
        fn_kwargs={"config": config, "name": stage.name},
        batch_size=max(1, min(config.run.chunk, -(-len(items) // workers))),
        # Tasks, whose processes Ray keeps for the next stage; actors would import everything anew.
        compute=ray.data.TaskPoolStrategy(size=workers),
    )
    result, problems = Pass(), {}
    for batch in done.iter_batches(batch_size=None):
        problems |= {str(key): str(problem) for key, problem in zip(batch["key"], batch["problem"], strict=True)}
        progress(len(problems))
    result.unfinished = {key: problem for key, problem in problems.items() if problem}
    known = read_log(log_of(stage, config))
    result.finished = {key: known[key] for key in units if key not in result.unfinished}
    return result
