"""Arguments of a training job: what a YAML file or the command line can say, and how it is checked."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any

from maple_trl.jobs.command_line import take_config, take_option
from maple_trl.jobs.config_files import config_files, take_env
from maple_trl.jobs.config_values import checked_values
from maple_trl.jobs.declared import declared_class, load_class
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.installed import check_installed
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.option_parser import OptionParser, option_keys
from maple_trl.messages import did_you_mean


if TYPE_CHECKING:
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


# What `trainer` may name: the config class and the trainer, as `module:class`, for importing them loads torch and TRL.
TRAINERS = {
    "omni_grpo": (
        "maple_trl.trainers.omni_grpo.config:OmniGRPOConfig",
        "maple_trl.trainers.omni_grpo.trainer:OmniGRPOTrainer",
    ),
    "mapo": ("maple_trl.trainers.mapo.config:MAPOConfig", "maple_trl.trainers.mapo.trainer:MAPOTrainer"),
    "avatar": ("maple_trl.trainers.avatar.config:AvatarConfig", "maple_trl.trainers.avatar.trainer:AvatarTrainer"),
    "omni_sft": (
        "maple_trl.trainers.omni_sft.config:OmniSFTConfig",
        "maple_trl.trainers.omni_sft.trainer:OmniSFTTrainer",
    ),
}
DEFAULT_TRAINER = "omni_grpo"
SUPERVISED = ("omni_sft",)
"""Trainers that learn from a column `completion` and take no rewards."""


def config_class(trainer: str) -> type[OmniGRPOConfig | OmniSFTConfig]:
    """Return the config class of a trainer in `TRAINERS`; raise SetupError for another name."""
    _check_trainer(trainer)
    return load_class(TRAINERS[trainer][0])


def trainer_class(trainer: str) -> type[OmniGRPOTrainer | OmniSFTTrainer]:
    """Return the trainer behind a name in `TRAINERS`; raise SetupError for another name."""
    _check_trainer(trainer)
    return load_class(TRAINERS[trainer][1])


def _check_trainer(name: Any) -> None:
    if name not in list(TRAINERS):
        raise SetupError(f"trainer must be one of {', '.join(map(repr, TRAINERS))}, got {name!r}")


@dataclass
class OmniScriptArguments:
    r"""
    What the job trains with, reads, rewards and reports.

    Args:
        trainer (`str`, *optional*, defaults to `"omni_grpo"`):
            `omni_grpo` ([`OmniGRPOTrainer`]), `mapo` ([`MAPOTrainer`], for MAPLE's MAPO and MUPO), `avatar`
            ([`AvatarTrainer`]) or `omni_sft` ([`OmniSFTTrainer`], supervised); it decides which config class the other
            options belong to.
        dataset_name (`str`):
            `builtin:seven-tags` (written into the user's cache when it is first used; `builtin:seven-tags-hints` is the
            same with a column `hint`), a `.parquet`, `.json` or `.jsonl`, `.csv` or `.tsv` file, a folder with one such file per split (`train.parquet`, `test.parquet`) or made by
            `save_to_disk`, or a Hub id. While `media_root` is left at `.`, local data have their own folder as media
            root.
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split for evaluation; needed only where something is evaluated.
        dataset_filter (`dict[str, list]`, *optional*):
            Rows that the job uses, in every split: those whose column has one of the values, for each column named.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Read the rows of local Parquet files as they are needed, instead of all before training: for `omni_grpo` and
            `omni_sft`, with `max_steps`. Only the first rows are then checked before training, and rows whose media
            cannot be used end the run, since none can stand in.
        completion_template (`str`, *optional*):
            With `omni_sft`: builds the column `completion`, e.g. `<think>...</think><answer>{solution}</answer>`, where
            `{solution}` is the row's column of that name.
        reward_funcs (`list`, *optional*, defaults to `["format_reward", "accuracy_reward"]`):
            Reward functions: names from `maple_trl.rewards`, `module:function`, or mappings for what takes parameters,
            such as `{reward: caption_judge, server: {model: ..., base_url: ...}}` (see
            [`~maple_trl.jobs.rewards.read_entries`]; as JSON on the command line). Weights are `reward_weights`.
            `omni_sft` uses none.
        evaluate_before_after (`bool`, *optional*, defaults to `False`):
            Measure sampled accuracy per tag before and after training.
        eval_questions_per_tag (`int`, *optional*, defaults to `64`):
            Most questions of each tag in that measurement.
        summary_file (`str`, *optional*):
            Where the summary goes; default `summary.json` in `output_dir`.
        metrics_file (`str`, *optional*):
            Where the logged metrics go, one JSON object a line; default `metrics.jsonl` in `output_dir`.
        plot_file (`str`, *optional*):
            Where the plot goes; default `training.png` in `output_dir`.
        report (`bool`, *optional*, defaults to `False`):
            Write `report.html` into `output_dir` at the end, as `maple-trl report` does; without the extra `report` the
            job says so and goes on.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace the results of another run in `output_dir`, which are refused otherwise: its checkpoints, weights,
            completions, log and summary are removed before training. A run that is resumed removes nothing.
        rewards (`list`, *optional*):
            The former name of `reward_funcs`.

    Raises:
        ValueError: for options that are out of range, or have no effect with this trainer.
    """

    trainer: str = field(
        default=DEFAULT_TRAINER,
        metadata={
            "help": "'omni_grpo' (options of OmniGRPOConfig), 'mapo' (options of MAPOConfig: stratified batches, tag "
            "weights, curricula, dynamic sampling), 'avatar' (options of AvatarConfig: replay, shaped advantages, hints) "
            "or 'omni_sft' (options of OmniSFTConfig: supervised, without rewards)."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data: 'builtin:seven-tags', a .parquet/.jsonl/.json/.csv/.tsv file, a folder with one such file per split or "
            "made by save_to_disk, or a Hub id. While media_root is '.', local data have their own folder as media root."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split for evaluation; needed only where something is evaluated."}
    )
    dataset_filter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Rows to use, in every split: a mapping of columns to the values allowed there, e.g. {tag: [V, VA]}; "
            "as JSON on the command line."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows of local Parquet files as they are needed (omni_grpo and omni_sft, with max_steps); only the "
            "first rows are checked before training."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={
            "help": "With omni_sft: builds the column 'completion' from others, e.g. "
            "'<think>...</think><answer>{solution}</answer>'. Braces that are meant as such are doubled."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["format_reward", "accuracy_reward"],
        metadata={
            "aliases": ["--rewards"],
            "help": "Reward functions: names from maple_trl.rewards, module:function, or mappings for judges and other "
            "rewards with parameters, e.g. {reward: caption_judge, server: {model: NAME, base_url: URL}}; those as JSON on "
            "the command line.",
        },
    )
    evaluate_before_after: Annotated[bool, "place"] = field(
        default=False, metadata={"help": "Measure sampled accuracy per tag before and after training."}
    )
    eval_questions_per_tag: Annotated[int, "place"] = field(
        default=64, metadata={"help": "Most questions of each tag in that measurement."}
    )
    summary_file: Annotated[str | None, "place"] = field(
        default=None, metadata={"help": "Where the summary goes (default: summary.json in output_dir)."}
    )
    metrics_file: Annotated[str | None, "place"] = field(
        default=None, metadata={"help": "Where the logged metrics go (default: metrics.jsonl in output_dir)."}
    )
    plot_file: Annotated[str | None, "place"] = field(
        default=None, metadata={"help": "Where the plot goes (default: training.png in output_dir)."}
    )
    report: Annotated[bool, "place"] = field(
        default=False, metadata={"help": "Write report.html into output_dir at the end, as `maple-trl report` does."}
    )
    overwrite: Annotated[bool, "place"] = field(
        default=False,
        metadata={
            "help": "Replace the results of another run in output_dir (checkpoints, weights, completions, log, summary), "
            "which is refused otherwise. A run that is resumed removes nothing."
        },
    )
    rewards: InitVar[list | None] = None  # the former name of reward_funcs

    def __post_init__(self, rewards):
        _check_trainer(self.trainer)
        name, entries = ("reward_funcs", self.reward_funcs) if rewards is None else ("rewards", rewards)
        if not entries:
            raise ValueError(f"{name} must name at least one reward function, e.g. accuracy_reward")
        from maple_trl.jobs.rewards import read_entries

        self.reward_funcs = read_entries(entries, name)
        self.dataset_filter = _checked_filter(self.dataset_filter)
        if self.completion_template is not None:
            if self.trainer not in SUPERVISED:
                raise ValueError(f"completion_template has no effect with trainer {self.trainer}; it is for omni_sft")
            template_columns(self.completion_template)
        if self.eval_questions_per_tag < 1:
            raise ValueError(f"eval_questions_per_tag must be positive, got {self.eval_questions_per_tag}")


OmniScriptArguments.rewards = property(lambda self: self.reward_funcs)  # as attribute, and above as argument


def _checked_filter(value: Any) -> dict[str, list] | None:
    """Return the filter with a list of values for each column."""
    if value is None:
        return None
    form = 'a mapping of columns to lists of values, e.g. {"tag": ["V", "VA"]}'
    try:
        columns = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"dataset_filter must be {form}; {value!r} is no JSON: {error}") from error
    if not isinstance(columns, dict) or not columns:
        raise ValueError(f"dataset_filter must be {form}, got {value!r}")
    columns = {name: values if isinstance(values, list) else [values] for name, values in columns.items()}
    for name, values in columns.items():
        if not values or any(isinstance(item, dict | list) for item in values):
            raise ValueError(f"dataset_filter must be {form}; for {name!r} it has {values!r}")
    return columns


def template_columns(template: str) -> list[str]:
    """
    Return the columns that a `completion_template` names.

    Raises:
        ValueError: when it names none, or holds something else in braces.
    """
    example = "e.g. '<think>...</think><answer>{solution}</answer>'"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"completion_template {template!r}: {error}; {example}") from error
    fields = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    for name, form, conversion in fields:
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"completion_template {template!r}: what stands in braces must be the name of a column; braces that are "
                f"meant as such are doubled; {example}"
            )
    if not fields:
        raise ValueError(
            f"completion_template {template!r} names no column, so that all rows would teach the same; {example}"
        )
    return list(dict.fromkeys(name for name, *_ in fields))


def make_parser(trainer: str = DEFAULT_TRAINER, declared: bool = False) -> OptionParser:
    """
    Build the parser of a training job.

    Args:
        trainer (`str`, *optional*, defaults to `"omni_grpo"`):
            Key of `TRAINERS`, whose config class the parser fills.
        declared (`bool`, *optional*, defaults to `False`):
            Read that class from its source. Such a parser knows the same options within a fraction of a second, and
            accepts at least what the other does; its values are of no use.
    """
    _check_trainer(trainer)
    config = declared_class(TRAINERS[trainer][0]) if declared else config_class(trainer)
    parser = OptionParser((OmniScriptArguments, config, OmniModelConfig), prog="maple-trl train")
    for action in parser._actions if declared else ():
        action.nargs, action.required = action.nargs or "?", False
    return parser


def read_options(
    parser: OptionParser,
    words: Sequence[str],
    required: Sequence[str] = (),
    further: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] | None = None,
    reads_config: bool = True,
) -> tuple[Any, ...]:
    """
    Read what a command other than `train` is given: by command line, else by `--config FILE`, else by the defaults.

    Files are read as those of a training job: they may build on others with `extends` and set variables with `env`. A
    key without a value stands for the default.

    Args:
        required (`Sequence[str]`, *optional*): options that must be given.
        further (`Callable`, *optional*): returns other defaults; it is told all values, and which options are given.
        reads_config (`bool`, *optional*, defaults to `True`): whether `--config` is such a file, and no option of the
            command.

    Returns:
        `tuple`: the dataclasses that the parser fills, and a namespace of its positional arguments where it has any.

    Raises:
        SetupError: for what is unknown, missing or wrong, naming file and key.
    """
    path, words = take_config(words) if reads_config else (None, list(words))
    named: set[str] = set()
    defaults = {action.dest: action.default for action in parser._actions}
    advice = functools.partial(did_you_mean, otherwise=f"`{parser.prog} --help` lists all options")
    for file, config in [] if path is None else config_files(path):
        os.environ.update(take_env(config, file))
        found = checked_values(parser, config, file, advice, plain=True)
        named = {name for name in named | found.keys() if found.get(name, "") is not None}
        parser.set_defaults_with_config(
            **{name: defaults[name] if value is None else value for name, value in found.items()}
        )
    given = _parse_known(parser, words, "argument", functools.partial(did_you_mean, prefix="--"))
    if further is not None:
        flags = (parser._option_string_actions.get(word.split("=")[0]) for word in words)
        named |= {action.dest for action in flags if action is not None}
        parser.set_defaults_with_config(**further(vars(given), named))
    for name in required:
        if not getattr(given, name):
            file = f", and {path} does not hold {name} either" if path else ""
            raise SetupError(f"--{name} is missing{file}")
    try:
        return parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise SetupError(str(error)) from error


def parse_args(
    argv: Sequence[str], above: tuple[str, Mapping[str, Any]] | None = None
) -> tuple[OmniScriptArguments, OmniGRPOConfig | OmniSFTConfig, OmniModelConfig]:
    """
    Read `--config FILE` and the overrides behind it; what stands on the command line wins.

    FILE may be the name of a recipe that came with the package, such as `demo`. A config file may build on others with
    `extends: FILE` or `extends: [FILES]`, relative to itself. Later files win over earlier ones and the file itself over
    all of them; a file that is reached twice counts where it is reached first.

    Args:
        argv (`Sequence[str]`):
            Command line without the program's name.
        above (`tuple[str, Mapping[str, Any]]`, *optional*):
            A file's name and keys that win over the config file, not over the command line.

    Returns:
        `tuple`: script, training and model arguments; the class of the second is that of the `trainer`.

    Raises:
        SetupError: for a key that no dataclass has (naming the closest one that exists, or the trainer that has it), a
            value of the wrong type, a key given twice, an unreadable file, files that extend each other, and whatever
            the dataclasses reject.
    """
    path, options = take_config(argv)
    files = [] if path is None else config_files(path)
    trainer = trainer_option(options) or _trainer_of(files)
    files += [] if above is None else [above]
    environment: dict[str, str] = {}
    for file, config in files:
        environment |= take_env(config, file)
    _read(
        make_parser(trainer, declared=True), trainer, files, options
    )  # most mistakes, before torch and TRL are loaded
    os.environ.update(environment)
    parser = make_parser(trainer)
    _read(parser, trainer, files, options)
    try:
        script_args, training_args, model_args = parser.parse_args_into_dataclasses(
            args=options, look_for_args_file=False
        )
    except json.JSONDecodeError as error:
        raise SetupError(f"{_option_of(error.doc, parser, options)}{error.doc!r:.200} is no JSON: {error}") from error
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise SetupError(_told(error)) from error
    check_installed(training_args)
    return script_args, training_args, model_args


def _read(
    parser: OptionParser, trainer: str, files: Sequence[tuple[str, Mapping[str, Any]]], options: Sequence[str]
) -> None:
    """Make the values of config files the parser's defaults; raise SetupError for what it does not know."""
    advice = functools.partial(instead, trainer)
    for file, config in files:
        parser.set_defaults_with_config(**checked_values(parser, config, file, advice))
    _parse_known(parser, options, "option", functools.partial(advice, prefix="--"))


def _parse_known(
    parser: OptionParser, words: Sequence[str], kind: str, advice: Callable[..., str]
) -> argparse.Namespace:
    """Return the values of a command line; raise SetupError for a word that the parser does not know."""
    values, unknown = parser.parse_known_args(words)
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), None)
        if flag is None:
            raise SetupError(f"unexpected value {unknown[0]!r}; options are written --name value")
        name = flag.split("=")[0].lstrip("-")
        raise SetupError(f"unknown {kind} --{name}{advice(name.replace('-', '_'), option_keys(parser))}")
    return values


def _option_of(text: str, parser, words: Sequence[str]) -> str:
    """Return the option that has a text as its value, for the beginning of an error."""
    values = vars(parser.parse_known_args(words)[0])
    return next((f"{name}: " for name, value in values.items() if value == text), "")


def _told(error: Exception) -> str:
    """Reword an error of a library's dataclass for those who write a job."""
    if "deepspeed" in str(error).lower() and isinstance(error, ImportError):
        return (
            "deepspeed: the package is not installed (pip install --no-build-isolation 'maple-trl[deepspeed]'); leave the "
            "option out without it"
        )
    if isinstance(error, OSError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    return str(error)


def trainer_option(words: Sequence[str]) -> str | None:
    """Return what `--trainer` says on a command line; `None` where it is not given."""
    return take_option(words, "--trainer")[0]


def trainer_of(path: str) -> str:
    """Return the trainer that a config file, or one that it builds on, names."""
    return _trainer_of(config_files(path))


def _trainer_of(files: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return next((config["trainer"] for _, config in reversed(files) if config.get("trainer")), DEFAULT_TRAINER)


def instead(trainer: str, name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    """Return what to write instead of a name that the job's parser does not know."""
    for other in TRAINERS:
        config = declared_class(TRAINERS[other][0])
        if other != trainer and name in (field.name for field in dataclasses.fields(config)):
            return f", which is an option of {config.__name__}: set trainer: {other}"
    return did_you_mean(name, known, "`maple-trl train --help-all` lists all options", prefix)
