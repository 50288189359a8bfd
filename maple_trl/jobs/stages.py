"""
Jobs that run one after another, each from the model that the one before it wrote.

AVATAR trains so (arXiv 2508.03100, section 4.3 and Table 1): a supervised cold start, then three stages of
reinforcement learning, each with its own data and rewards.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maple_trl.files import as_json, write_atomically
from maple_trl.jobs.command_line import take_config, take_option
from maple_trl.jobs.config_files import config_files, take_env
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.folder_lock import hold_folder
from maple_trl.jobs.option_parser import option_keys
from maple_trl.jobs.options import SUPERVISED, make_parser, parse_args, trainer_of
from maple_trl.messages import did_you_mean
from maple_trl.records.run_folder import named, run_results
from maple_trl.records.summary import left_out_line


STATE_FILE = "stages.json"

# Options that stages cannot share, and why.
_RESERVED = {
    "trainer": "each stage's file names its own",
    "resume_from_checkpoint": "stages go on by themselves where they stopped, as with auto",
    "summary_file": "each stage writes its own into its folder",
    "metrics_file": "each stage writes its own into its folder",
    "plot_file": "each stage writes its own into its folder",
    "overwrite": "stages go on where they stopped; another output_dir begins anew",
}


@dataclass
class Stage:
    """
    One job of a plan.

    Attributes:
        name: that of its file, and of its folder.
        file: its config file.
        common: keys of the stages' file that its trainer knows.
        words: options of the command line that its trainer knows.
    """

    name: str
    file: str
    common: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """
    Stages and where they write.

    Attributes:
        path: the file that lists the stages.
        output_dir: holds a folder per stage, and `stages.json`.
        environment: variables that its file sets, for all stages.
    """

    path: str
    output_dir: str
    stages: list[Stage]
    environment: dict[str, str] = field(default_factory=dict)

    def folder(self, index: int) -> str:
        """Return the absolute path where a stage writes: adapters note the model that they belong to."""
        return os.path.abspath(os.path.join(self.output_dir, self.stages[index].name))

    def parse(self, index: int) -> tuple:
        """
        Parse the arguments of a stage, as [`~maple_trl.jobs.options.parse_args`] gives them.

        Raises:
            SetupError: naming the stage.
        """
        stage = self.stages[index]
        words = ["--config", stage.file, *stage.words, "--output_dir", self.folder(index)]
        if index:
            words += ["--model_name_or_path", self.folder(index - 1)]
        try:
            return parse_args(words, above=(self.path, {**stage.common, "env": self.environment}))
        except SetupError as error:
            raise SetupError(f"stage {stage.name}: {error}") from error


def load_plan(argv: Sequence[str]) -> Plan | None:
    """
    Read the stages that a command line asks for; `None` when its config file lists none.

    The file, or one that it extends, holds `stages`, a list of config files relative to the file that has it,
    `output_dir`, and options that override those of every stage whose trainer has them; `model_name_or_path` is that of
    the first stage. So do options behind it on the command line, which win. Variables that it sets (`env`) are set with
    each stage, and win over the stage's own.

    Args:
        argv (`Sequence[str]`): command line without the program's name.

    Raises:
        SetupError: for a list that is none, a file that is not there, and an option that no stage knows or that stages
            cannot share.
    """
    path, words = take_config(argv)
    if path is None:
        return None
    config, environment, listed = {}, {}, path
    files = config_files(path)
    if not any("stages" in keys for _, keys in files):
        return None
    for file, keys in files:
        environment |= take_env(keys, file)
        config |= keys
        listed = file if "stages" in keys else listed
    files = config.pop("stages")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise SetupError(f"{path}: stages must be a list of config files, got {files!r}")
    stages = [Stage(Path(file).stem, os.path.join(os.path.dirname(listed), file)) for file in files]
    names = [stage.name for stage in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SetupError(f"{path}: two stages are called {twice!r}; their folders would be the same")
    output_dir, words = take_option(words, "--output_dir")
    output_dir = output_dir or config.pop("output_dir", None)
    config.pop("output_dir", None)
    if not isinstance(output_dir, str):
        raise SetupError(f"{path}: output_dir is missing; the stages write into folders of it")
    try:
        # As declared: what libraries are loaded with, the first stage's variables decide.
        parsers = [make_parser(trainer_of(stage.file), declared=True) for stage in stages]
    except SetupError as error:
        raise SetupError(f"{path}: {error}") from error
    _share_keys(path, config, stages, parsers)
    _share_words(words, stages, parsers)
    return Plan(path, output_dir, stages, environment)


def _share_keys(path: str, config: Mapping[str, Any], stages: list[Stage], parsers: list) -> None:
    """Give each stage the keys that its trainer knows."""
    for key, value in config.items():
        if _is_what_stages_do(key, value):
            continue
        _check_shareable(f"{path}: {key}", key)
        owners = [stage for stage, parser in zip(stages, parsers, strict=True) if key in option_keys(parser)]
        if not owners:
            raise SetupError(f"{path}: unknown key {key!r}, which no stage's trainer has{_closest(key, parsers)}")
        for stage in owners:
            stage.common[key] = value


def _share_words(words: Sequence[str], stages: list[Stage], parsers: list) -> None:
    """Give each stage the options of the command line that its trainer knows."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        elif not groups:
            raise SetupError(f"unexpected value {word!r}; options are written --name value")
        else:
            groups[-1].append(word)
    for group in groups:
        flag, _, value = group[0].partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if _is_what_stages_do(key, value or " ".join(group[1:])):
            continue
        _check_shareable(flag, key)
        owners = [
            stage for stage, parser in zip(stages, parsers, strict=True) if flag in parser._option_string_actions
        ]
        if not owners:
            raise SetupError(f"unknown option {flag}, which no stage's trainer has{_closest(key, parsers, '--')}")
        for stage in owners:
            stage.words += group


def _is_what_stages_do(key: str, value: Any) -> bool:
    """Return whether an option asks for no more than stages do anyway: scripts that start any job again give it to all."""
    return key == "resume_from_checkpoint" and str(value).lower() == "auto"


def _check_shareable(place: str, key: str) -> None:
    if key in _RESERVED:
        raise SetupError(f"{place} cannot be set for all stages: {_RESERVED[key]}")


def _closest(name: str, parsers: list, prefix: str = "") -> str:
    known = dict.fromkeys(key for parser in parsers for key in option_keys(parser))
    return did_you_mean(name, known, prefix=prefix)


# Running


def run_stages(plan: Plan) -> list[dict[str, Any]]:
    """
    Run the stages that are not done yet; the one that was stopped goes on from its last whole checkpoint.

    `stages.json` in the output folder says what is done, and with which options. All stages are checked before the
    first one starts. Every process of a distributed job must call this.

    Returns:
        `list[dict]`: the summary of each stage (see [`~maple_trl.jobs.train.run`]).

    Raises:
        SetupError: when a stage is described wrongly, or was begun or finished with other options, or when another process
            is running these stages.
    """
    jobs = [plan.parse(i) for i in range(len(plan.stages))]
    with hold_folder(plan.output_dir, jobs[0][1]):
        return _run_stages(plan, jobs)


def _run_stages(plan: Plan, jobs: Sequence[tuple]) -> list[dict[str, Any]]:
    """Run the stages, whose folder is held."""
    from maple_trl.jobs import train

    state = check_state(plan, jobs)
    _check_jobs(plan, jobs, state.done)
    writes = jobs[0][1].process_index == 0
    for i in range(state.done, len(plan.stages)):
        # Anew: a job's configuration also sets variables that hold for the whole process.
        script_args, training_args, model_args = job = plan.parse(i)
        state.go_on(i, job)
        if writes:
            _announce(plan, i, training_args.resume_from_checkpoint)
        state.begin(i, job, write=writes)
        try:
            summary = train.run(script_args, training_args, model_args, last=i == len(plan.stages) - 1)
        except SetupError as error:
            raise SetupError(f"stage {plan.stages[i].name}: {error}") from error
        state.finish(i, summary, write=writes)
        del script_args, training_args, model_args, job
        _release_memory()
    if writes:
        print_stages(plan, state.summaries())
    return state.summaries()


def check_state(plan: Plan, jobs: Sequence[tuple]) -> StageState:
    """
    Return what is known of the stages, once it has been compared with their jobs, and these with each other.

    Raises:
        SetupError: when a stage was begun or finished with other options, its folder holds something else, or one would train
            the whole model after another has written an adapter.
    """
    state = StageState(plan, jobs[0][1].world_size)
    adapted = None
    for i, job in enumerate(jobs):
        state.check(i, job)
        name, peft = plan.stages[i].name, job[2].use_peft
        if adapted is not None and not peft:
            raise SetupError(
                f"stage {name}: use_peft is false, but stage {adapted} before it writes a LoRA adapter: set use_peft: "
                "true, or train the whole model in all stages"
            )
        adapted = name if peft else None
    return state


def _check_jobs(plan: Plan, jobs: Sequence[tuple], done: int) -> None:
    """Check what can be known to be wrong before hours are spent on the stages before it."""
    from maple_trl.jobs.checks import check_rows
    from maple_trl.jobs.data import prepare_data
    from maple_trl.jobs.rewards import load_rewards

    for i in range(done, len(jobs)):
        script_args, training_args, _ = jobs[i]
        try:
            rewards = []
            if script_args.trainer not in SUPERVISED:
                rewards = load_rewards(script_args.reward_funcs, training_args)
            train, _ = prepare_data(script_args, training_args)
            check_rows(script_args, training_args, train, rewards)
        except SetupError as error:
            raise SetupError(f"stage {plan.stages[i].name}: {error}") from error


def _release_memory() -> None:
    """Give back what the trainer of the last stage held; it is full of reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _announce(plan: Plan, index: int, checkpoint: str | None) -> None:
    start = "" if checkpoint is None else f", going on from {os.path.basename(checkpoint)}"
    print(f"\nStage {index + 1} of {len(plan.stages)}: {plan.stages[index].name}{start}", flush=True)


def print_stages(plan: Plan, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print a line per stage: steps, seconds, and sampled accuracy where it was measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    for column in ("steps", "seconds", "before", "after"):
        table.add_column(column, justify="right")
    for stage, summary in zip(plan.stages, summaries, strict=True):
        accuracy = [summary[when] and f"{summary[when]['all']:.3f}" for when in ("before", "after")]
        table.add_row(
            stage.name, str(summary["steps"]), f"{summary['seconds']:.0f}", *(text or "-" for text in accuracy)
        )
    console = Console()
    console.print(table)
    console.print(f"results in {plan.output_dir}", highlight=False)
    for stage, summary in zip(plan.stages, summaries, strict=True):
        if summary.get("left_out"):
            line = f"{stage.name}: {left_out_line(summary['left_out'])}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


# State


def resolved_options(job: tuple) -> dict[str, Any]:
    """Return every option of a job that decides what a stage learns, by its name, as JSON knows it."""
    from maple_trl.jobs.rewards import what_is_learned
    from maple_trl.records.options import deciding

    script_args, training_args, model_args = job
    as_written = training_args.to_dict()  # keys hidden, enumerations by their values
    options = deciding(script_args) | deciding(model_args)
    options |= {name: as_written[name] for name in deciding(training_args) if name in as_written}
    del options["reward_funcs"]
    options["rewards"] = what_is_learned(script_args.reward_funcs)
    return json.loads(json.dumps(as_json(options), default=str))


class StageState:
    """
    What `stages.json` says: which stages are done, and with which options they were begun or finished.

    Args:
        plan: the stages.
        world: how many processes are to go on from a checkpoint.

    Raises:
        SetupError: when the file is damaged or belongs to other stages.
    """

    def __init__(self, plan: Plan, world: int):
        self.plan, self.world = plan, world
        self._checkpoints: dict[int, str | None] = {}
        self.path = os.path.join(plan.output_dir, STATE_FILE)
        self.entries: list[dict[str, Any]] = []
        if os.path.exists(self.path):
            try:
                with open(self.path, encoding="utf-8") as file:
                    self.entries = json.load(file)["stages"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SetupError(f"{self.path} cannot be read ({error}); choose another output_dir") from error
        names = [stage.name for stage in plan.stages]
        known = [entry["name"] for entry in self.entries]
        if known != names[: len(known)]:
            raise SetupError(
                f"{self.path} tells of the stages {', '.join(known)}, but {plan.path} lists {', '.join(names)}: stages can "
                "only be added at the end. Choose another output_dir"
            )

    @property
    def done(self) -> int:
        """How many stages are finished; they are the first ones."""
        return sum(entry["done"] for entry in self.entries)

    def check(self, index: int, job: tuple) -> None:
        """Check a stage against what is known of it."""
        folder, name = self.plan.folder(index), self.plan.stages[index].name
        if index >= len(self.entries):
            results = run_results(folder)
            if results:
                raise SetupError(
                    f"stage {name}: {folder} holds results of another run ({named(results)}), of which {self.path} knows "
                    "nothing; choose another output_dir"
                )
            return
        entry = self.entries[index]
        if not entry["done"] and self.checkpoint(index) is None:
            return
        before, now = entry["options"], resolved_options(job)
        # Later stages start from the folder of the one before, which may have moved with all of them.
        ignored = {"model_name_or_path"} if index else set()
        changed = [key for key in before if key in now and key not in ignored and before[key] != now[key]]
        if changed:
            differences = ", ".join(f"{key} {before[key]!r} -> {now[key]!r}" for key in changed)
            what = "is done" if entry["done"] else "was begun"
            way = "" if entry["done"] else f", or delete {folder} to begin the stage anew"
            raise SetupError(
                f"stage {name} {what} with other options: {differences}. Put them back, choose another output_dir{way}"
            )
        last = index == self.done - 1
        if last and index < len(self.plan.stages) - 1 and not _holds_model(folder):
            raise SetupError(
                f"stage {name} is done, but its model is no longer in {folder}: choose another output_dir"
            )

    def begun(self, index: int) -> bool:
        """Return whether a stage has run before, to its end or not."""
        return index < len(self.entries)

    def checkpoint(self, index: int) -> str | None:
        """
        Return the checkpoint from which a stage goes on, past damaged ones; `None` to begin it.

        Raises:
            SetupError: when it has checkpoints, of which none is whole.
        """
        from maple_trl.trainers.common.checkpoint import ResumeError
        from maple_trl.trainers.common.resume_checks import last_whole_checkpoint

        if index not in self._checkpoints:  # looked for once: each damaged one is a warning
            folder = self.plan.folder(index)
            try:
                self._checkpoints[index] = last_whole_checkpoint(folder, self.world, anew=f"delete {folder}")
            except ResumeError as error:
                raise SetupError(f"stage {self.plan.stages[index].name}: {error}") from error
        return self._checkpoints[index]

    def go_on(self, index: int, job: tuple) -> None:
        """Let a stage's job go on where it was stopped."""
        script_args, training_args, _ = job
        training_args.resume_from_checkpoint = self.checkpoint(index)
        # What a stage that was stopped before its first checkpoint has left is its own.
        script_args.overwrite = script_args.overwrite or self.begun(index)

    def begin(self, index: int, job: tuple, write: bool) -> None:
        """Note with which options a stage runs, before it writes anything and fills some of them in."""
        self._set(index, {"done": False, "options": resolved_options(job)}, write)

    def finish(self, index: int, summary: Mapping[str, Any], write: bool) -> None:
        """Note that a stage is done; its model is in its folder."""
        options = self.entries[index]["options"]
        self._set(index, {"done": True, "options": options, "summary": as_json(summary)}, write)

    def _set(self, index: int, entry: dict[str, Any], write: bool) -> None:
        self.entries[index:] = [{"name": self.plan.stages[index].name} | entry]
        if write:
            write_atomically(self.path, json.dumps({"stages": self.entries}, indent=2) + "\n")

    def summaries(self) -> list[dict[str, Any]]:
        """Return what each finished stage measured."""
        return [entry["summary"] for entry in self.entries if entry["done"]]


def _holds_model(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json"))
