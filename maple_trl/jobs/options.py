"""Arguments of a training job: what a YAML file or the command line can say, and how it is checked."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any

# trl and its dataclasses without a trainer take a tenth of a second; torch and transformers are imported where they are
# needed, so that the command line can show its help without them.
from trl import ModelConfig, TrlParser

from maple_trl.jobs.declared import declared_class, load_class
from maple_trl.jobs.errors import SetupError, did_you_mean
from maple_trl.jobs.help_format import HelpFormatter
from maple_trl.jobs.recipe_files import find_config, no_config, recipe_file
from maple_trl.modalities import SCOPES


if TYPE_CHECKING:
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


# Trainers

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


# Dataclasses


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


@dataclass
class OmniModelConfig(ModelConfig):
    r"""
    [`~trl.ModelConfig`] with switches for the parts of an omni model.

    Args:
        processor_name_or_path (`str`, *optional*):
            Folder or Hub id of the processor, where the model has none beside it; that of the model it was trained from.
        lora_vision, lora_audio, lora_projectors, lora_llm (`bool`, *optional*, defaults to `True`):
            Parts that get LoRA adapters; with `use_peft` only.
        freeze_vision, freeze_audio, freeze_projectors, freeze_llm (`bool`, *optional*, defaults to `False`):
            Parts that full fine-tuning leaves as they are; without `use_peft` only.
        quantize_towers (`bool`, *optional*, defaults to `False`):
            Give few bits to towers and projectors too; with `load_in_4bit` or `load_in_8bit` only, which quantize the
            language model. The LM head keeps its bits always.

    Raises:
        ValueError: for a switch that would have no effect, and for options of `ModelConfig` that omni models do not
            support.
    """

    processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the processor (the model's own)."}
    )
    lora_vision: bool = field(default=True, metadata={"help": "LoRA on the vision encoder (with use_peft)."})
    lora_audio: bool = field(default=True, metadata={"help": "LoRA on the audio encoder (with use_peft)."})
    lora_projectors: bool = field(default=True, metadata={"help": "LoRA on the projectors (with use_peft)."})
    lora_llm: bool = field(default=True, metadata={"help": "LoRA on the language model (with use_peft)."})
    freeze_vision: bool = field(
        default=False, metadata={"help": "Do not train the vision encoder (full fine-tuning)."}
    )
    freeze_audio: bool = field(default=False, metadata={"help": "Do not train the audio encoder (full fine-tuning)."})
    freeze_projectors: bool = field(
        default=False, metadata={"help": "Do not train the projectors (full fine-tuning)."}
    )
    freeze_llm: bool = field(default=False, metadata={"help": "Do not train the language model (full fine-tuning)."})
    quantize_towers: bool = field(
        default=False,
        metadata={"help": "Few bits for towers and projectors too (with load_in_4bit or load_in_8bit)."},
    )

    def __post_init__(self):
        check_quantization(self)
        super().__post_init__()
        if self.use_peft and self.frozen:
            raise ValueError(
                f"{_listed('freeze', self.frozen)} has no effect with use_peft: LoRA freezes the whole base model. Choose "
                "what is adapted with lora_vision, lora_audio, lora_projectors, lora_llm."
            )
        not_adapted = [scope for scope in SCOPES if scope not in self.adapted]
        if not self.use_peft and not_adapted:
            raise ValueError(
                f"{_listed('lora', not_adapted)}: false has no effect without use_peft. Set use_peft: true, or freeze "
                f"parts of full fine-tuning with {_listed('freeze', not_adapted)}."
            )
        if self.use_peft and not self.adapted:
            raise ValueError(f"use_peft needs at least one of {_listed('lora', SCOPES)}")
        if self.use_peft and not (self.lora_r >= 1 and 0 <= self.lora_dropout < 1):
            raise ValueError(
                f"lora_r must be at least 1 and lora_dropout in [0, 1), got lora_r={self.lora_r}, "
                f"lora_dropout={self.lora_dropout}"
            )
        if self.lora_target_modules or self.lora_target_parameters:
            raise ValueError(f"lora_target_modules is replaced by {_listed('lora', SCOPES)}")
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(f"lora_task_type must be 'CAUSAL_LM', got {self.lora_task_type!r}")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError(
                "load_in_4bit and load_in_8bit need use_peft: true. Weights of few bits cannot be trained, only LoRA adapters "
                "beside them"
            )

    @property
    def adapted(self) -> list[str]:
        """Scopes with LoRA switched on."""
        return [scope for scope in SCOPES if getattr(self, f"lora_{scope}")]

    @property
    def frozen(self) -> list[str]:
        """Scopes that full fine-tuning leaves out."""
        return [scope for scope in SCOPES if getattr(self, f"freeze_{scope}")]


def check_quantization(options: Any) -> None:
    """
    Check options of quantization, as of [`~trl.ModelConfig`] with `quantize_towers`, against each other.

    Raises:
        ValueError: for one that would have no effect, or is not known.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true: choose one")
    four = {
        "use_bnb_nested_quant": options.use_bnb_nested_quant,
        "bnb_4bit_quant_type": options.bnb_4bit_quant_type != "nf4",
    }
    four["bnb_4bit_quant_storage"] = options.bnb_4bit_quant_storage is not None
    for name in (name for name, given in four.items() if given and not options.load_in_4bit):
        raise ValueError(f"{name} has no effect without load_in_4bit: true")
    if options.quantize_towers and not (options.load_in_4bit or options.load_in_8bit):
        raise ValueError("quantize_towers has no effect without load_in_4bit or load_in_8bit: true")
    if options.bnb_4bit_quant_type not in _QUANT_TYPES:
        raise ValueError(f"bnb_4bit_quant_type must be nf4 or fp4, got {options.bnb_4bit_quant_type!r}")
    if options.bnb_4bit_quant_storage not in (None, *_STORAGES):
        raise ValueError(
            f"bnb_4bit_quant_storage must be one of {', '.join(_STORAGES)}, got {options.bnb_4bit_quant_storage!r}"
        )


_QUANT_TYPES = ("nf4", "fp4")
_STORAGES = ("uint8", "int8", "float16", "float32", "float64", "bfloat16")


def _listed(prefix: str, scopes: Sequence[str]) -> str:
    return ", ".join(f"{prefix}_{scope}" for scope in scopes)


# Arguments


# What stands for a value in the help, by the option's name, else by its type.
_NAMED_METAVARS = {
    "FILE": "api_key_file cache judge_file log metrics_file plot_file summary_file token_file video",
    "FOLDER": "adapter encoder_cache_dir logging_dir media_root output_dir",
    "MODEL": "embeddings judge_model model model_name_or_path processor_name_or_path",
    "DATA": "dataset_name",
    "JSON": "dataset_filter",
    "URL": "base_url judge_server server",
    "TAG": "tags",
    "REWARD": "reward_funcs",
}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "BOOL", "_json_object": "JSON"}
_METAVAR_OF = {name: metavar for metavar, names in _NAMED_METAVARS.items() for name in names.split()}


class OptionParser(TrlParser):
    """
    A [`~trl.TrlParser`] that reports errors as [`SetupError`] instead of ending the process.

    Every name of an option may be written with dashes for underscores. Mappings are JSON.

    Args:
        types (`Iterable[type]`): the dataclasses that it fills.
        kwargs: as of [`~argparse.ArgumentParser`].
    """

    def __init__(self, types: Iterable[type], **kwargs: Any):
        super().__init__(types, allow_abbrev=False, add_help=False, formatter_class=HelpFormatter, **kwargs)
        for action in self._actions:
            if _kind(action) in ("dict", "Mapping"):
                action.type = _json_object
            if action.choices is None:
                action.metavar = action.metavar or _METAVAR_OF.get(action.dest) or _METAVARS.get(_kind(action))
            for option in action.option_strings:
                self._option_string_actions.setdefault("--" + option[2:].replace("_", "-"), action)
        switches = {a.dest: a for a in self._actions if not isinstance(a, argparse._StoreFalseAction)}
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction) and action.dest in switches:
                # One line in the help for both.
                switches[action.dest].negated, action.help = action.option_strings[0], argparse.SUPPRESS

    def error(self, message: str):
        """Raise SetupError instead of ending the process."""
        raise SetupError(message)


def _kind(action: argparse.Action) -> str:
    """Return the name of an option's type; an optional one's converter is called as that."""
    return getattr(action.type, "__name__", "")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


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
        found = _checked(parser, config, file, advice, plain=True)
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

    FILE may be the name of a recipe that came with the package, such as `demo`. A config file may build on others with `extends: FILE` or `extends: [FILES]`, relative to itself. Later files win
    over earlier ones and the file itself over all of them; a file that is reached twice counts where it is reached
    first.

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
    _check_installed(training_args)
    return script_args, training_args, model_args


def _read(
    parser: OptionParser, trainer: str, files: Sequence[tuple[str, Mapping[str, Any]]], options: Sequence[str]
) -> None:
    """Make the values of config files the parser's defaults; raise SetupError for what it does not know."""
    advice = functools.partial(instead, trainer)
    for file, config in files:
        parser.set_defaults_with_config(**_checked(parser, config, file, advice))
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


def _check_installed(training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """Raise SetupError for a package that an option needs and that is not there."""
    from transformers.integrations import integration_utils
    from transformers.utils import is_liger_kernel_available

    for name in training_args.report_to or []:  # a list by now
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = integration_utils.INTEGRATION_TO_CALLBACK
            raise SetupError(
                f"report_to: unknown {name!r}{did_you_mean(name, known, 'there are ' + ', '.join(known))}"
            )
        is_there = getattr(integration_utils, f"is_{name.removesuffix('_ml')}_available", None)
        if is_there is not None and not is_there():
            raise SetupError(f"report_to: the package of {name} is not installed; install it, or set report_to: none")
    if getattr(training_args, "use_liger_kernel", False) and not is_liger_kernel_available():
        raise SetupError("use_liger_kernel: the package liger-kernel is not installed")
    _check_optimizer(training_args)


def _check_optimizer(training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """Make the optimizer and its schedule for a parameter that stands for the model's, which come after the model."""
    import torch
    from transformers import Trainer, get_scheduler

    name = str(getattr(training_args.optim, "value", training_args.optim))
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(training_args, torch.nn.Module())
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        if made.__module__.startswith("torch.optim"):  # others may ask for a GPU or for layers of the model
            optimizer = made([torch.nn.Parameter(torch.zeros(1))], **options)
    except ImportError as error:
        raise SetupError(f"optim: {name} needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        if not training_args.optim_target_modules:  # layers of the model, which is not there yet
            raise SetupError(
                f"optim: {name} cannot be made with the options given (adam_beta1, optim_args, …): {error}"
            ) from error
    try:
        get_scheduler(
            training_args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        kind = getattr(training_args.lr_scheduler_type, "value", training_args.lr_scheduler_type)
        raise SetupError(f"lr_scheduler_type: {kind} cannot be made of lr_scheduler_kwargs: {error}") from error


def trainer_option(words: Sequence[str]) -> str | None:
    """Return what `--trainer` says on a command line; `None` where it is not given."""
    return take_option(words, "--trainer")[0]


def trainer_of(path: str) -> str:
    """Return the trainer that a config file, or one that it builds on, names."""
    return _trainer_of(config_files(path))


def _trainer_of(files: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return next((config["trainer"] for _, config in reversed(files) if config.get("trainer")), DEFAULT_TRAINER)


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of one option (however it is spelt, the last one counts) and the other arguments."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        flag, given, text = word.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(word)
            continue
        value = text if given else next(words, None)
        if value is None:
            raise SetupError(f"{name} needs a value")
    return value, rest


def take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the path that `--config` names, a file or a recipe that came with the package, and the other arguments."""
    path, rest = take_option(argv, "--config")
    return None if path is None else find_config(path), rest


def take_switch(argv: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Return whether a switch is on, which may have true or false behind it, and the other arguments."""
    on, rest, words = False, [], list(argv)
    while words:
        word = words.pop(0)
        flag, given, text = word.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(word)
            continue
        if not given and words and words[0].lower() in _SWITCHES:
            text = words.pop(0)
        if (text or "true").lower() not in _SWITCHES:
            raise SetupError(f"{name} must be true or false, got {text!r}")
        on = _SWITCHES[(text or "true").lower()]
    return on, rest


_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


# Config files


def config_files(path: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return a config file and those that it extends, in the order in which they count, each with its own keys."""
    try:
        config = read_config(path)
    except SetupError as error:
        raise SetupError(f"{above[-1]}: extends {path}: {error}" if above else str(error)) from error
    bases = config.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SetupError(f"{path}: extends must be a file or a list of files, got {bases!r}")
    chain = (*above, path)
    files = {}
    for base in bases:
        beside = os.path.normpath(os.path.join(os.path.dirname(path), base))
        base = beside if os.path.isfile(beside) or recipe_file(base) is None else str(recipe_file(base))
        if os.path.realpath(base) in map(os.path.realpath, chain):
            raise SetupError(f"{path}: extends {base}, which is built on it: {' -> '.join((*chain, base))}")
        for file, keys in config_files(base, chain):
            files.setdefault(os.path.realpath(file), (file, keys))
    return [*files.values(), (path, config)]


def read_config(path: str) -> dict[str, Any]:
    """
    Read the keys of a config file, without those of the files that it extends.

    Raises:
        SetupError: when it cannot be read, is no mapping, or gives a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is written twice, of which YAML would silently take the last."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise SetupError(
                        f"{path}: line {key_node.start_mark.line + 1}: {key!r} cannot be the name of an option"
                    )
                if key in seen:
                    raise SetupError(f"{path}: line {key_node.start_mark.line + 1}: {key!r} is given twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader: it builds plain data only
    except OSError as error:
        further = no_config(path) if isinstance(error, FileNotFoundError) else ""
        raise SetupError(f"cannot read the config file {path}: {error.strerror or error}{further}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        told = ", ".join(part for part in (error.context, error.problem) if part)
        hint = " (indent with spaces)" if "'\\t'" in told else ""
        raise SetupError(f"{path}{where}: is not a YAML file: {told}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SetupError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path} must hold a mapping of option names to values, as recipes/demo.yaml does")
    return config


def take_env(config: dict[str, Any], path: str) -> dict[str, str]:
    """
    Take `env`, the environment variables that a config file sets, out of its keys.

    Raises:
        SetupError: when it is no mapping.
    """
    variables = config.pop("env", None) or {}
    if not isinstance(variables, Mapping):
        raise SetupError(f"{path}: env must be a mapping of variable names to values")
    return {name: str(value) for name, value in variables.items()}


def option_keys(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Map the names by which a config file gives a value to a parser's actions, the first of each being its own."""
    own = [action for action in parser._actions if action.dest != argparse.SUPPRESS]
    names = {action.dest: action for action in reversed(own)}
    aliases = {option[2:]: action for action in own for option in action.option_strings}
    return names | {name: action for name, action in aliases.items() if "-" not in name and name not in names}


def instead(trainer: str, name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    """Return what to write instead of a name that the job's parser does not know."""
    for other in TRAINERS:
        config = declared_class(TRAINERS[other][0])
        if other != trainer and name in (field.name for field in dataclasses.fields(config)):
            return f", which is an option of {config.__name__}: set trainer: {other}"
    return did_you_mean(name, known, "`maple-trl train --help-all` lists all options", prefix)


def _checked(
    parser: OptionParser, config: Mapping[str, Any], path: str, advice: Callable[..., str], plain: bool = False
) -> dict[str, Any]:
    """
    Hold the values of a config file to the types that the command line enforces, by the options' own names.

    Args:
        advice: what to write instead of a name, among those that there are.
        plain: texts are texts, as the command line would give them, and never what a library reads otherwise.
    """
    actions = option_keys(parser)
    checked: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in config.items():
        if key not in actions:
            raise SetupError(f"{path}: unknown key {key!r}{advice(str(key), actions)}")
        action = actions[key]
        if names.setdefault(action.dest, key) != key:
            raise SetupError(f"{path}: {names[action.dest]} and {key} are one option; give one of them")
        if action.nargs == "+" and value is not None and not isinstance(value, list):
            value = [value]
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare no as false
        several = isinstance(value, list) and action.nargs in ("+", "*")
        if plain and _kind(action) == "str" and not several:
            value = _as_text(action, key, value, path)
        if several and action.type in (int, float):
            value = [_as_number(action, key, item, path) for item in value]
        for item in value if several else [value]:
            _check_value(action, key, item, path)
        if action.dest == "reward_funcs" and value is not None:
            from maple_trl.jobs.rewards import read_entries

            read_entries(value, f"{path}: {key}")
        if isinstance(action, argparse._StoreFalseAction) and isinstance(value, bool):
            value = not value
        checked[action.dest] = value
    return checked


def _as_number(action, key: str, value: Any, path: str) -> Any:
    """Convert an item of a list of numbers: YAML reads 1e-6 as a text, and of a list the parser converts nothing."""
    try:
        return action.type(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SetupError(f"{path}: {key} must hold numbers, got {value!r}") from error


def _as_text(action, key: str, value: Any, path: str) -> str | None:
    """Return a value as the command line would give it; mappings stand for their JSON."""
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    if isinstance(value, bool | list):
        raise SetupError(f"{path}: {key} must be a text, got {value!r}")
    return json.dumps(value) if isinstance(value, dict) else value if value is None else str(value)


def _is_scalar(action) -> bool:
    """Return whether an option takes a number, a switch, or one of several names."""
    return _kind(action) in ("int", "float", "string_to_bool") or action.nargs == 0 or action.choices is not None


# Options that take a text and nothing else; of others the parser tells no such thing.
_TEXTS = {
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "completion_template"),
    *("summary_file", "metrics_file", "plot_file", "output_dir", "run_name", "media_root", "media_backend"),
    *("model_name_or_path", "model_revision", "attn_implementation", "modality_access", "subtitle_template"),
    "system_prompt",
    *("encoder_cache_dir", "hub_model_id", "lora_modules_to_save"),
}


def _check_value(action, key: str, value: Any, path: str) -> None:
    if key in _TEXTS and value is not None and not isinstance(value, str):
        raise SetupError(
            f"{path}: {key} must be a text, got {value!r} (a number that is meant as one stands in quotes)"
        )
    if key == "report_to" and value is not None and not isinstance(value, str | list):
        raise SetupError(f"{path}: report_to must be the name of a tracker or a list of names, got {value!r}")
    if action.type is _json_object and value is not None and not isinstance(value, dict):
        try:
            if not isinstance(value, str):
                raise argparse.ArgumentTypeError(f"must be a mapping of names to values, got {value!r}")
            _json_object(value)
        except argparse.ArgumentTypeError as error:
            raise SetupError(f"{path}: {key}: {error}") from error
    if value is None or (isinstance(value, dict | list) and not _is_scalar(action)):
        return
    if action.choices is not None and value not in action.choices:
        raise SetupError(f"{path}: {key} must be one of {', '.join(map(repr, action.choices))}, got {value!r}")
    kind = _kind(action)
    if action.nargs == 0 or kind == "string_to_bool":
        wanted, types = "true or false", bool
    elif kind in ("int", "float"):
        wanted, types = ("a whole number", int) if kind == "int" else ("a number", int | float)
    else:
        return
    wrong = not isinstance(value, types) or (types is not bool and isinstance(value, bool))
    if isinstance(value, str) and action.nargs != 0:  # YAML reads 1e-6 as a text
        try:
            action.type(value)
            wrong = False
        except (ValueError, argparse.ArgumentTypeError):
            pass
    if wrong:
        raise SetupError(f"{path}: {key} must be {wanted}, got {value!r}")
