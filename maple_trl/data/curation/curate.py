"""A curation from clips to files: its stages in turn, what is known of them from earlier runs, and the account of it all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maple_trl.data.curation.asking import SPENT, Asker, Planner
from maple_trl.data.curation.config import CurationConfig, check_machine
from maple_trl.data.curation.engines import ENGINES, log_of, ray_running, read_log, run_local, run_ray
from maple_trl.data.curation.errors import CurationError, UnfinishedError
from maple_trl.data.curation.logs import GrowingLog
from maple_trl.data.curation.prompts import PROMPTS
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.data.curation.stages import NAMES, STAGES
from maple_trl.data.curation.stages.collect import list_source, source_root
from maple_trl.data.curation.stages.splits import assign_splits
from maple_trl.data.curation.stages.write import CLIPS, write
from maple_trl.files import write_atomically
from maple_trl.locks import LockedError, held_file


Progress = Callable[[str, int, int], None]

SUMMARY, DROPPED = "summary.json", "dropped.jsonl"


@dataclass
class Account:
    """
    What became of the rows of one stage.

    Attributes:
        stage: its name.
        rows_in: rows that came in.
        rows_out: rows that go on.
        dropped: reason -> number.
        notes: what else was counted.
        asked: rows that this run had still to do.
    """

    stage: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    asked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what is the same for every run that comes to this result."""
        return {
            "stage": self.stage,
            "in": self.rows_in,
            "out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "notes": dict(sorted(self.notes.items())),
        }


@dataclass
class CurationSummary:
    """
    What a run did.

    Attributes:
        accounts: of each stage that was come to.
        written: table -> split -> tag -> rows; `None` where nothing was written.
        spent: calls, tokens and cost by stage and server, over all runs; of a dry run what is to come, at most.
    """

    accounts: list[Account] = field(default_factory=list)
    written: dict[str, dict[str, dict[str, int]]] | None = None
    spent: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self, config: CurationConfig) -> dict[str, Any]:
        """Return it as JSON knows it, with the prompts, and the models of the `config` that it comes from."""
        return {
            "name": config.name,
            "stages": [account.as_dict() for account in self.accounts],
            "written": self.written,
            "spent": self.spent,
            "cost": round(sum(entry["cost"] for entry in self.spent), 6),
            "models": {name: options.model for name, options in config.endpoints()},
            "prompts": {prompt.name: {"version": prompt.version, "hash": prompt.digest} for prompt in PROMPTS},
        }


def curate(
    config: CurationConfig,
    engine: str = "local",
    only: Sequence[str] = (),
    dry_run: bool = False,
    progress: Progress = lambda stage, done, rows: None,
) -> CurationSummary:
    """
    Make a tagged set of questions and captions of a folder of clips.

    Each finished row is noted in the output folder at once, and every answer of a server is kept there: a run that was
    killed goes on where it was, and pays for no answer twice.

    Args:
        config (`CurationConfig`): all settings.
        engine (`str`, *optional*, defaults to `"local"`): `"local"` or `"ray"`.
        only (`Sequence[str]`, *optional*): names of the stages that are run; what they start from must be finished.
        dry_run (`bool`, *optional*, defaults to `False`): send and write nothing; count calls, tokens and cost, at most.
        progress (`Callable`, *optional*): called with a stage, its rows that are done, and all of them.

    Raises:
        CurationError: when something is described wrongly; nothing has been sent then.
        UnfinishedError: when servers failed on more rows than the settings allow.
    """
    if engine not in ENGINES:
        raise CurationError(f"--engine: must be one of {', '.join(ENGINES)}, got {engine!r}")
    wrong = [name for name in only if name not in NAMES]
    if wrong:
        raise CurationError(f"--only: there is no stage {wrong[0]!r}; there are {', '.join(NAMES)}")
    check_machine(config, engine, dry_run)
    source = list_source(config)
    if dry_run:
        return _Run(config, "local", only, Planner(config), progress).go(source)
    config.work.mkdir(parents=True, exist_ok=True)
    try:
        with held_file(config.work / "lock"):
            _sweep(Path(config.output))
            return _Run(config, engine, only, Asker(config), progress).go(source)
    except LockedError as error:
        raise CurationError(f"output: another run writes into {config.output}; wait for its end") from error


def _sweep(output: Path) -> None:
    """Remove what a killed run had not written to its end."""
    for pattern in (
        *(f".{name}.*" for name in (CLIPS, DROPPED, SUMMARY)),
        *(f"{'*/' * n}.*.partial" for n in (1, 2, 3)),
    ):
        for path in output.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class _Run:
    def __init__(
        self, config: CurationConfig, engine: str, only: Sequence[str], asker: Asker | Planner, progress: Progress
    ):
        self.config, self.engine, self.only, self.progress = config, engine, only or NAMES, progress
        self.tools = Tools(config, source_root(config), asker)
        self.summary = CurationSummary()
        self.rows: dict[str, list[Row]] = {}
        self.dropped: list[dict[str, str]] = []
        self._open, self._has_ray = contextlib.ExitStack(), False

    def go(self, source: list[Row]) -> CurationSummary:
        with self._open:
            self._open.callback(self.tools.close)
            for stage in self._needed():
                self._pass(stage, source if stage.after is None else self.rows[stage.after])
        if isinstance(self.tools.asker, Planner):
            self.summary.spent = _planned(self.tools.asker, self.config)
            return self.summary
        self.summary.spent = spent(self.config)
        if {"splits", "write"}.intersection(self.only):
            self._finish()
        return self.summary

    def _needed(self) -> list[Stage]:
        """Return the stages that are run, and those that they start from."""
        wanted = set(self.only)
        if wanted.intersection(("splits", "write")):
            wanted |= {"filter", "captions"}
        for stage in reversed(STAGES):
            if stage.name in wanted and stage.after is not None:
                wanted.add(stage.after)
        return [stage for stage in STAGES if stage.name in wanted]

    # A stage

    def _pass(self, stage: Stage, rows: Sequence[Row]) -> None:
        """Take a stage's outcomes from its log, and run it over the rest."""
        identity, config = stage.identity(self.config), self.config
        units = stage.units(rows, config)
        keys = [stage.key(unit, identity) for unit in units]
        known = read_log(log_of(stage, config))
        waiting = {
            key: unit
            for key, unit in zip(keys, units, strict=True)
            if key not in known or not stage.intact(known[key].rows, self.tools.root)
        }
        account = Account(stage.name, len(units), asked=len(waiting))
        self.summary.accounts.append(account)
        self.progress(stage.name, len(units) - len(waiting), len(units))
        unfinished = self._run(stage, waiting, known, len(units)) if waiting else {}
        made: list[Row] = []
        for key, unit in zip(keys, units, strict=True):
            if key in unfinished:
                self._count(account, stage.name_of(unit), "server", unfinished[key])
                continue
            made += known[key].rows
            account.notes.update(known[key].notes)
            for name, reason, detail in known[key].dropped:
                self._count(account, name, reason, detail)
        joined = stage.join(made, config)
        for name, reason, detail in joined.dropped:
            self._count(account, name, reason, detail)
        self.rows[stage.name] = joined.rows
        account.rows_out = len(joined.rows)

    def _count(self, account: Account, name: str, reason: str, detail: str) -> None:
        account.dropped[reason] += 1
        self.dropped.append({"stage": account.stage, "name": name, "reason": reason, "detail": detail})

    def _run(self, stage: Stage, waiting: dict[str, Row], known: dict[str, Outcome], total: int) -> dict[str, str]:
        """Run a stage over its open rows; return those that servers left open."""
        if stage.name not in self.only:
            raise CurationError(
                f"--only: the stage {stage.name}, which comes before, has {len(waiting)} of {total} rows still to do; name "
                "it too"
            )

        def told(done: int) -> None:
            self.progress(stage.name, total - len(waiting) + done, total)

        if self.engine == "ray":
            self._start_ray()
            result = run_ray(stage, waiting, self.tools, told)
        else:
            result = run_local(stage, waiting, self.tools, told)
        known.update(result.finished)
        if len(result.unfinished) > self.config.run.max_unfinished * total:
            first = next(iter(result.unfinished.values()))
            raise UnfinishedError(
                f"stage {stage.name}: servers failed on {len(result.unfinished)} of {total} rows, more than "
                f"run.max_unfinished {self.config.run.max_unfinished:g} allows: {first}; the same command asks for them again"
            )
        return result.unfinished

    def _start_ray(self) -> None:
        """Have Ray at hand from the first stage that needs it to the end."""
        if not self._has_ray:
            self._open.enter_context(ray_running(self.config))
            self._has_ray = True

    # The end

    def _finish(self) -> None:
        tables = {"questions": self.rows["filter"], "captions": self.rows["captions"]}
        outcomes = assign_splits(tables, self.config)
        account = Account("splits", sum(map(len, tables.values())))
        for outcome in outcomes.values():
            account.rows_out += len(outcome.rows)
            for name, reason, detail in outcome.dropped:
                self._count(account, name, reason, detail)
        self.summary.accounts.append(account)
        if "write" not in self.only:
            return
        made = {kind: outcome.rows for kind, outcome in outcomes.items()}
        write(made, self.rows["align"], self.config)
        self.summary.accounts.append(Account("write", account.rows_out, account.rows_out))
        self.summary.written = {kind: _by_tag(rows) for kind, rows in made.items()}
        folder = Path(self.config.output)
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.dropped)
        write_atomically(folder / DROPPED, "".join(f"{line}\n" for line in lines))
        write_atomically(folder / SUMMARY, json.dumps(self.summary.as_dict(self.config), indent=2) + "\n")


def _by_tag(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for row in rows:
        counts[row["split"]][row["tag"]] = counts[row["split"]].get(row["tag"], 0) + 1
    return counts


# What it costs


def spent(config: CurationConfig) -> list[dict[str, Any]]:
    """Return calls, tokens and cost by stage and server, over all runs into the output folder of a `config`."""
    sums: dict[tuple[str, str], Counter] = {}
    for entry in GrowingLog(config.work, SPENT).entries():
        numbers = {name: entry.get(name, 0) for name in ("calls", "prompt_tokens", "completion_tokens")}
        sums.setdefault((str(entry.get("stage")), str(entry.get("endpoint"))), Counter()).update(numbers)
    return [_priced(place, numbers, config) for place, numbers in sorted(sums.items(), key=_in_order)]


def _planned(planner: Planner, config: CurationConfig) -> list[dict[str, Any]]:
    sums = {
        place: Counter(
            calls=calls, prompt_tokens=planner.prompt_tokens[place], completion_tokens=planner.answer_tokens[place]
        )
        for place, calls in planner.calls.items()
    }
    return [_priced(place, numbers, config) for place, numbers in sorted(sums.items(), key=_in_order)]


def _in_order(item: tuple[tuple[str, str], Counter]) -> tuple[int, str, str]:
    (stage, endpoint), _ = item
    return (NAMES.index(stage) if stage in NAMES else len(NAMES), stage, endpoint)


def _priced(place: tuple[str, str], numbers: Counter, config: CurationConfig) -> dict[str, Any]:
    options = dict(config.endpoints()).get(place[1])  # a server that is no longer in the file has no price
    prices = (options.prompt_price, options.completion_price) if options else (0.0, 0.0)
    cost = (numbers["prompt_tokens"] * prices[0] + numbers["completion_tokens"] * prices[1]) / 1e6
    names = ("calls", "prompt_tokens", "completion_tokens")
    return {"stage": place[0], "server": place[1], **{name: numbers[name] for name in names}, "cost": round(cost, 6)}
