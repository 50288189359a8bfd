"""One training job from parsed arguments: model, data, rewards, trainer, evaluation, and the files it leaves behind."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# trl and its dataclasses without a trainer take a tenth of a second; torch and transformers are imported where they are
# needed, so that the command line can show its help without them.
from trl import ModelConfig

from maple_trl.modalities import ModalityTag


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from maple_trl.evaluation import SampledAccuracy
    from maple_trl.trainers.omni_grpo import OmniGRPOTrainer
    from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig

BUILTIN_DATASETS = ("builtin:seven-tags",)
SCOPES = ("vision", "audio", "projectors", "llm")
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


class SetupError(ValueError):
    """The job is described wrongly: an unknown key, a data set or reward that is not there. The message says which."""


@dataclass
class OmniScriptArguments:
    r"""
    What the job reads, rewards and reports.

    Args:
        dataset_name (`str`):
            `builtin:seven-tags` (written into the user's cache when it is first used), a `.parquet`, `.json` or
            `.jsonl` file, a folder with one such file per split (`train.parquet`, `test.parquet`) or made by
            `save_to_disk`, or a Hub id. While `media_root` is left at `.`, local data have their own folder as media
            root.
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split for evaluation; needed only where something is evaluated.
        rewards (`list[str]`, *optional*, defaults to `["format_reward", "accuracy_reward"]`):
            Reward functions: names from `maple_trl.rewards`, or `module:function`. Weights are `reward_weights`.
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
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data: 'builtin:seven-tags', a .parquet/.json/.jsonl file, a folder with one such file per split or "
            "made by save_to_disk, or a Hub id. While media_root is '.', local data have their own folder as media root."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split for evaluation; needed only where something is evaluated."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["format_reward", "accuracy_reward"],
        metadata={"help": "Reward functions: names from maple_trl.rewards, or module:function."},
    )
    evaluate_before_after: bool = field(
        default=False, metadata={"help": "Measure sampled accuracy per tag before and after training."}
    )
    eval_questions_per_tag: int = field(
        default=64, metadata={"help": "Most questions of each tag in that measurement."}
    )
    summary_file: str | None = field(
        default=None, metadata={"help": "Where the summary goes (default: summary.json in output_dir)."}
    )
    metrics_file: str | None = field(
        default=None, metadata={"help": "Where the logged metrics go (default: metrics.jsonl in output_dir)."}
    )
    plot_file: str | None = field(
        default=None, metadata={"help": "Where the plot goes (default: training.png in output_dir)."}
    )

    def __post_init__(self):
        if not self.rewards:
            raise ValueError("rewards must name at least one reward function, e.g. accuracy_reward")
        if self.eval_questions_per_tag < 1:
            raise ValueError(f"eval_questions_per_tag must be positive, got {self.eval_questions_per_tag}")


@dataclass
class OmniModelConfig(ModelConfig):
    r"""
    [`~trl.ModelConfig`] with switches for the parts of an omni model.

    Args:
        lora_vision, lora_audio, lora_projectors, lora_llm (`bool`, *optional*, defaults to `True`):
            Parts that get LoRA adapters; with `use_peft` only.
        freeze_vision, freeze_audio, freeze_projectors, freeze_llm (`bool`, *optional*, defaults to `False`):
            Parts that full fine-tuning leaves as they are; without `use_peft` only.

    Raises:
        ValueError: for a switch that would have no effect, and for options of `ModelConfig` that omni models do not
            support.
    """

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

    def __post_init__(self):
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
        if self.lora_target_modules or self.lora_target_parameters:
            raise ValueError(f"lora_target_modules is replaced by {_listed('lora', SCOPES)}")
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(f"lora_task_type must be 'CAUSAL_LM', got {self.lora_task_type!r}")
        if self.load_in_4bit or self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are not supported for omni models in this version")

    @property
    def adapted(self) -> list[str]:
        """Scopes with LoRA switched on."""
        return [scope for scope in SCOPES if getattr(self, f"lora_{scope}")]

    @property
    def frozen(self) -> list[str]:
        """Scopes that full fine-tuning leaves out."""
        return [scope for scope in SCOPES if getattr(self, f"freeze_{scope}")]


def _listed(prefix: str, scopes: Sequence[str]) -> str:
    return ", ".join(f"{prefix}_{scope}" for scope in scopes)


# Arguments


def make_parser():
    """The [`~trl.TrlParser`] of a training job; it reports errors as [`SetupError`] instead of ending the process."""
    from trl import TrlParser

    from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig

    class JobParser(TrlParser):
        def error(self, message):
            raise SetupError(message)

    types = (OmniScriptArguments, OmniGRPOConfig, OmniModelConfig)
    return JobParser(types, prog="maple-trl train", allow_abbrev=False, add_help=False)


def parse_args(argv: Sequence[str]) -> tuple[OmniScriptArguments, OmniGRPOConfig, OmniModelConfig]:
    """
    Reads `--config FILE` and the overrides behind it; what stands on the command line wins.

    Args:
        argv (`Sequence[str]`):
            Command line without the program's name.

    Returns:
        `tuple`: script, training and model arguments.

    Raises:
        SetupError: for a key that no dataclass has (naming the closest one that exists), a value of the wrong type, a
            key given twice, an unreadable file, and whatever the dataclasses reject.
    """
    parser = make_parser()
    path, options = _split_config(argv)
    if path is not None:
        config = _read_config(path)
        environment = config.pop("env", None) or {}
        if not isinstance(environment, Mapping):
            raise SetupError(f"{path}: env must be a mapping of variable names to values")
        parser.set_defaults_with_config(**_checked(parser, config, path))
        os.environ.update({key: str(value) for key, value in environment.items()})
    unknown = parser.parse_known_args(options)[1]
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), None)
        if flag is None:
            raise SetupError(f"unexpected value {unknown[0]!r}; options are written --name value")
        name = flag.split("=")[0].lstrip("-")
        raise SetupError(f"unknown option --{name}{_closest(name.replace('-', '_'), _keys(parser), '--')}")
    try:
        return parser.parse_args_into_dataclasses(args=options, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise SetupError(str(error)) from error


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config` (in either spelling, the last one counts) and the other arguments."""
    path, rest, words = None, [], iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise SetupError("--config needs a file name")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is written twice, of which YAML would silently take the last."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise SetupError(f"{path}: line {key_node.start_mark.line + 1}: {key!r} is given twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader: it builds plain data only
    except OSError as error:
        raise SetupError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path} must hold a mapping of option names to values, as recipes/demo.yaml does")
    return config


def _keys(parser) -> dict[str, Any]:
    """Actions of a parser by the name under which a config file gives their value."""
    return {action.dest: action for action in reversed(parser._actions)}


def _closest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else "; `maple-trl train --help-all` lists all options"


def _checked(parser, config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The values of a config file, held to the types that the command line enforces."""
    actions = _keys(parser)
    checked = {}
    for key, value in config.items():
        if key not in actions:
            raise SetupError(f"{path}: unknown key {key!r}{_closest(str(key), actions)}")
        action = actions[key]
        if action.nargs == "+" and value is not None and not isinstance(value, list):
            value = [value]
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare no as false
        for item in value if isinstance(value, list) else [value]:
            _check_value(action, key, item, path)
        checked[key] = value
    return checked


def _check_value(action, key: str, value: Any, path: str) -> None:
    if value is None or isinstance(value, dict):
        return
    if action.choices is not None and value not in action.choices:
        raise SetupError(f"{path}: {key} must be one of {', '.join(map(repr, action.choices))}, got {value!r}")
    is_switch = getattr(action.type, "__name__", "") == "string_to_bool" or action.nargs == 0
    wanted = getattr(action.type, "__name__", "")
    if isinstance(value, str):
        wrong = False  # the parser converts text itself, as on the command line
    elif is_switch:
        wanted, wrong = "true or false", not isinstance(value, bool)
    elif wanted == "int":
        wanted, wrong = "a whole number", isinstance(value, bool) or not isinstance(value, int)
    elif wanted == "float":
        wanted, wrong = "a number", isinstance(value, bool) or not isinstance(value, int | float)
    else:
        wrong = False
    if wrong:
        raise SetupError(f"{path}: {key} must be {wanted}, got {value!r}")


# Parts of a job


def load_rewards(names: Sequence[str]) -> list[Callable]:
    """
    The reward functions of a job.

    Args:
        names (`Sequence[str]`):
            Names from `maple_trl.rewards` or `module:function`; a module may lie in the current folder.

    Raises:
        SetupError: for a name that leads to no function, listing those of `maple_trl.rewards`.
    """
    from maple_trl import rewards

    builtin = [name for name in rewards.__all__ if name.endswith("_reward")]
    found = []
    for name in names:
        if name in builtin:
            found.append(getattr(rewards, name))
            continue
        module_name, _, function_name = name.partition(":")
        if not function_name:
            raise SetupError(f"unknown reward {name!r}; there are {', '.join(builtin)}, or write module:function")
        if os.getcwd() not in sys.path:  # a console script's sys.path starts at its own folder
            sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            raise SetupError(f"cannot load the reward {name!r}: {error}") from error
        if not callable(function):
            raise SetupError(f"the reward {name!r} is no function but {type(function).__name__}")
        found.append(function)
    return found


def load_datasets(script_args: OmniScriptArguments, media_root: str = ".") -> tuple[dict[str, Dataset], str]:
    """
    The splits of a job's data set that exist, and the folder to which their media paths are relative.

    Args:
        script_args ([`OmniScriptArguments`]):
            Names the data set, and the splits to read.
        media_root (`str`, *optional*, defaults to `"."`):
            The media root that the user set; at `"."` local data sets use their own folder.

    Returns:
        `tuple[dict[str, Dataset], str]`: data sets by split (the training split always, the test split where it
        exists), and the media root.

    Raises:
        SetupError: when there is no such data set or training split, listing what is there.
    """
    name = script_args.dataset_name
    if not name:
        raise SetupError("dataset_name is missing; for a first run: builtin:seven-tags")
    wanted = (script_args.dataset_train_split, script_args.dataset_test_split)
    if name.startswith("builtin:"):
        if name not in BUILTIN_DATASETS:
            raise SetupError(f"there is no embedded data set {name!r}; embedded: {', '.join(BUILTIN_DATASETS)}")
        from maple_trl.data import default_folder, load_seven_tags

        folder, splits = default_folder(), load_seven_tags()
    elif Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        splits = _read_local(Path(name), wanted)
    elif name.startswith(("/", "./", "../", "~")) or Path(name).suffix in _READERS:
        raise SetupError(f"dataset_name: there is no file or folder {name}")
    else:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        folder = None
        try:
            splits = load_dataset(name, script_args.dataset_config)
        except (OSError, ValueError, DatasetsError) as error:
            raise SetupError(f"cannot load the data set {name!r}: {error}") from error
    if wanted[0] not in splits:
        raise SetupError(f"{name} has no split {wanted[0]!r}; its splits: {', '.join(splits) or 'none'}")
    root = media_root if folder is None or media_root != "." else str(folder.resolve())
    return {split: splits[split] for split in wanted if split in splits}, root


def _read_local(path: Path, wanted: Sequence[str]) -> Mapping[str, Dataset]:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if path.is_file():
        if path.suffix not in _READERS:
            raise SetupError(f"{path}: a data file is one of {', '.join(_READERS)}")
        files = {wanted[0]: [str(path)]}
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        stored = load_from_disk(str(path))
        return stored if isinstance(stored, DatasetDict) else {wanted[0]: stored}
    else:
        # Not load_dataset(folder): it would take the media files beside the tables for the data.
        files = {split: _shards(path, split) for split in wanted}
        files = {split: shards for split, shards in files.items() if shards}
        if wanted[0] not in files:
            there = sorted(p.name for p in path.iterdir() if p.suffix in _READERS)
            raise SetupError(
                f"{path} holds no {wanted[0]}.parquet, {wanted[0]}.jsonl or {wanted[0]}.json"
                + (f"; it has {', '.join(there)}" if there else " and no other table either")
            )
    reader = _READERS[Path(next(iter(files.values()))[0]).suffix]
    try:
        return load_dataset(reader, data_files=files)
    except (OSError, ValueError, DatasetsError) as error:
        raise SetupError(f"cannot read {path}: {error.__cause__ or error}") from error


def _shards(folder: Path, split: str) -> list[str]:
    """Files of one split: `train.parquet`, or the shards `train-00000-of-00002.parquet`, …"""
    for suffix in _READERS:
        whole = folder / f"{split}{suffix}"
        if whole.is_file():
            return [str(whole)]
        shards = sorted(str(path) for path in folder.glob(f"{split}-*-of-*{suffix}"))
        if shards:
            return shards
    return []


def load_model_and_processor(
    model_args: OmniModelConfig, training_args: OmniGRPOConfig
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    The model in the form that can be trained (of a full Omni checkpoint the Thinker alone) and its processor.

    Raises:
        SetupError: without `model_name_or_path`.
    """
    from maple_trl.omni.loading import load_model, load_processor

    if not model_args.model_name_or_path:
        raise SetupError("model_name_or_path is missing; for a first run: builtin:tiny-omni")
    shared = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    kwargs = shared | (training_args.model_init_kwargs or {})
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    dtype = kwargs.pop("dtype", model_args.dtype)
    training_args.model_init_kwargs = kwargs | {"dtype": dtype}  # for the reference model
    model = load_model(model_args.model_name_or_path, dtype=dtype, **kwargs)
    return model, load_processor(model_args.model_name_or_path, **shared)


def choose_parameters(
    model: PreTrainedModel, processor: ProcessorMixin, model_args: OmniModelConfig, quiet: bool = False
) -> LoraConfig | None:
    """
    Decides what is trained: LoRA on the chosen parts, or the whole model without the frozen parts.

    Args:
        quiet (`bool`, *optional*, defaults to `False`):
            Do not print the table of LoRA targets; for all processes but the first.

    Returns:
        `LoraConfig` or `None`: what the trainer takes as `peft_config`; `None` for full fine-tuning.

    Raises:
        ValueError: when a chosen part holds no layer, or the model's family has no such part.
    """
    from rich.console import Console

    from maple_trl.omni.families import family_for
    from maple_trl.omni.lora import build_lora_config, freeze

    if not model_args.use_peft:
        if model_args.frozen:
            freeze(model, family_for(model, processor), *model_args.frozen)
        return None
    lora_config = build_lora_config(
        model,
        family_for(model, processor),
        **{scope: scope in model_args.adapted for scope in SCOPES},
        r=model_args.lora_r,
        alpha=model_args.lora_alpha,
        dropout=model_args.lora_dropout,
        console=Console(quiet=quiet),
    )
    lora_config.use_rslora = model_args.use_rslora
    lora_config.use_dora = model_args.use_dora
    lora_config.modules_to_save = model_args.lora_modules_to_save
    return lora_config


def build_trainer(
    script_args: OmniScriptArguments, training_args: OmniGRPOConfig, model_args: OmniModelConfig
) -> tuple[OmniGRPOTrainer, Dataset | None]:
    """
    Everything that a job needs, ready to train.

    Returns:
        `tuple[OmniGRPOTrainer, Dataset | None]`: the trainer, and the test split where there is one.

    Raises:
        SetupError: when a part that the arguments name is not there.
    """
    from maple_trl.omni.prompt import RowError
    from maple_trl.trainers.omni_grpo import OmniGRPOTrainer

    rewards = load_rewards(script_args.rewards)
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    test = splits.get(script_args.dataset_test_split)
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    if test is None and (evaluates or script_args.evaluate_before_after):
        raise SetupError(
            f"{script_args.dataset_name} has no split {script_args.dataset_test_split!r} to evaluate on; name another "
            "with dataset_test_split, or switch off evaluate_before_after and eval_strategy"
        )
    model, processor = load_model_and_processor(model_args, training_args)
    try:
        trainer = OmniGRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=splits[script_args.dataset_train_split],
            eval_dataset=test if evaluates else None,
            processing_class=processor,
            peft_config=choose_parameters(model, processor, model_args, quiet=training_args.process_index != 0),
        )
    except RowError as error:
        raise SetupError(f"{script_args.dataset_name}: {error}") from error
    return trainer, test


def checkpoint_to_resume(training_args: OmniGRPOConfig) -> str | None:
    """
    The checkpoint from which a job goes on.

    `resume_from_checkpoint` is a folder, or `true` for the last checkpoint in `output_dir`.

    Raises:
        SetupError: when there is no such checkpoint.
    """
    from maple_trl.trainers.rollout_state import last_complete_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no", "none"):
        return None
    if str(wanted).lower() in ("true", "yes"):
        folder = training_args.output_dir
        last = last_complete_checkpoint(folder)
        if last is None:
            raise SetupError(f"resume_from_checkpoint: there is no complete checkpoint-N folder in {folder}")
        return last
    if not os.path.isdir(wanted):
        raise SetupError(f"resume_from_checkpoint: there is no folder {wanted}")
    return str(wanted)


# The job


def run(
    script_args: OmniScriptArguments, training_args: OmniGRPOConfig, model_args: OmniModelConfig
) -> dict[str, Any]:
    """
    Runs a job: builds everything, evaluates, trains, evaluates again, and writes the results.

    Written into `output_dir`: the model with its processor, `metrics.jsonl`, `training.png` (where matplotlib is
    installed) and `summary.json`. Only the first process prints and writes these.

    Returns:
        `dict`: the summary: `before` and `after` (sampled accuracy by tag and under `all`; `None` without
        `evaluate_before_after`), `questions` (how many stand behind each), `seconds` (the whole job), `train_seconds`,
        `steps`, `model`, `dataset`.

    Raises:
        SetupError: when the arguments name something that is not there; nothing has been trained then.
    """
    started = time.monotonic()
    checkpoint = checkpoint_to_resume(training_args)
    trainer, test = build_trainer(script_args, training_args, model_args)
    before = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    train_started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:  # a run that is interrupted leaves what it had logged
        if trainer.is_world_process_zero():
            metrics_path = _place(script_args.metrics_file, training_args, "metrics.jsonl")
            write_metrics(trainer.state.log_history, metrics_path)
    train_seconds = time.monotonic() - train_started
    after = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    trainer.save_model(training_args.output_dir)
    summary = {
        "before": before and before.accuracy,
        "after": after and after.accuracy,
        "questions": after and after.questions,
        "seconds": round(time.monotonic() - started, 2),
        "train_seconds": round(train_seconds, 2),
        "steps": trainer.state.global_step,
        "model": model_args.model_name_or_path,
        "dataset": script_args.dataset_name,
    }
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(training_args.output_dir)
        plot_path = _place(script_args.plot_file, training_args, "training.png")
        summary_path = _place(script_args.summary_file, training_args, "summary.json")
        _draw(trainer.state.log_history, summary["before"], summary["after"], plot_path)
        write_atomically(summary_path, json.dumps(_plain(summary), indent=2) + "\n")
        print_summary(summary, training_args.output_dir)
    trainer.accelerator.end_training()
    return summary


def _evaluate(trainer: OmniGRPOTrainer, dataset: Dataset, script_args: OmniScriptArguments) -> SampledAccuracy:
    """Accuracy by tag of the answers that the policy samples now; every process takes part."""
    from maple_trl.evaluation import sampled_accuracy
    from maple_trl.rewards import accuracy_reward

    return sampled_accuracy(
        trainer.generate_completions,
        dataset,
        accuracy_reward,
        questions_per_tag=script_args.eval_questions_per_tag,
        seed=trainer.args.seed,
    )


def _place(path: str | None, training_args: OmniGRPOConfig, name: str) -> Path:
    return Path(path) if path else Path(training_args.output_dir) / name


def _draw(log_history: list[dict], before: Mapping | None, after: Mapping | None, path: Path) -> None:
    """Draws the plot; a job does not fail for want of matplotlib."""
    from maple_trl.evaluation.plots import plot_training

    try:
        plot_training(log_history, before, after, path)
    except ImportError as error:
        print(f"no plot: {error}")


# Results


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _umask() -> int:
    """The process's umask; a scratch file is private, the finished one is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_metrics(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a trainer's log as JSON lines; values that JSON cannot hold (NaN, infinity) become `null`."""
    write_atomically(path, "".join(json.dumps(_plain(entry)) + "\n" for entry in log_history))


def _plain(value: Any) -> Any:
    """A value as strict JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def accuracy_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Before and after by tag, in canonical order and `all` last."""
    names = [*(tag.value for tag in ModalityTag), "all"]
    return [(name, before[name], after[name]) for name in names if name in before and name in after]


def print_summary(summary: Mapping[str, Any], output_dir: str) -> None:
    """Prints accuracy per tag before and after, and where the results are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if summary["before"] is not None:
        table = Table(title="Sampled accuracy", title_justify="left")
        table.add_column("tag")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for name, old, new in accuracy_rows(summary["before"], summary["after"]):
            if name == "all":
                table.add_section()
            table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        console.print(table)
    steps, seconds = summary["steps"], summary["seconds"]
    console.print(f"{steps} steps, {seconds:.0f} s in all; results in {output_dir}", highlight=False)
