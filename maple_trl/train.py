"""One training job from parsed arguments: model, data, rewards, trainer, evaluation, and the files it leaves behind."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.evaluation.report import as_json, print_summary, write_atomically, write_metrics
from maple_trl.job_args import OmniModelConfig, OmniScriptArguments, SetupError, parse_args, trainer_class
from maple_trl.omni.scopes import SCOPES


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from maple_trl.evaluation import SampledAccuracy
    from maple_trl.trainers.omni_grpo import OmniGRPOTrainer
    from maple_trl.trainers.omni_grpo_config import OmniGRPOConfig

__all__ = ["OmniModelConfig", "OmniScriptArguments", "SetupError", "build_trainer", "parse_args", "run"]

BUILTIN_DATASETS = ("builtin:seven-tags",)
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


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
        except Exception as error:  # the module is the user's: importing it can fail in any way
            raise SetupError(
                f"cannot load the reward {name!r}: {type(error).__name__}: {error}; name a function of yours as "
                "module:function, from the current folder or an installed package"
            ) from error
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
            raise SetupError(
                f"cannot load the data set {name!r}: there is no such local folder, and as a Hub id: {error}"
            ) from error
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
    except (OSError, ValueError, DatasetsError, StopIteration) as error:
        reason = error.__cause__ or error
        raise SetupError(f"cannot read {path}: {reason if str(reason) else 'it holds no row'}") from error


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
        `tuple[OmniGRPOTrainer, Dataset | None]`: the trainer, of the class that `script_args.trainer` names, and the
        test split where there is one.

    Raises:
        SetupError: when a part that the arguments name is not there.
    """
    _check_writable(training_args.output_dir)
    rewards = load_rewards(script_args.rewards)
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    test = splits.get(script_args.dataset_test_split)
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    if test is None and (evaluates or script_args.evaluate_before_after):
        raise SetupError(
            f"{script_args.dataset_name} has no split {script_args.dataset_test_split!r} to evaluate on; name another "
            "with dataset_test_split, or switch off evaluate_before_after and eval_strategy"
        )
    try:
        model, processor = load_model_and_processor(model_args, training_args)
        trainer = trainer_class(script_args.trainer)(
            model=model,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=splits[script_args.dataset_train_split],
            eval_dataset=test if evaluates else None,
            processing_class=processor,
            peft_config=choose_parameters(model, processor, model_args, quiet=training_args.process_index != 0),
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # nothing has been trained yet
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise SetupError(f"{error} (raised in {where.filename}, line {where.lineno})") from error
    if script_args.evaluate_before_after and trainer.family is None:
        raise SetupError("evaluate_before_after needs an omni model; switch it off for a text-only one")
    if script_args.evaluate_before_after and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise SetupError(
            "evaluate_before_after looks at the model before FSDP or DeepSpeed has spread it over the processes; switch it "
            "off, and use eval_strategy to evaluate during training"
        )
    return trainer, test


def _check_writable(output_dir: str | None) -> None:
    """Before the model is loaded: can results be written?"""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise SetupError(f"output_dir: cannot write into {output_dir}: {error}") from error


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
    if not os.path.exists(os.path.join(wanted, "trainer_state.json")):
        raise SetupError(f"resume_from_checkpoint: {wanted} is no checkpoint, or one that was not written to its end")
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
        `evaluate_before_after`), `questions` (how many stand behind each), `unusable` (left out for their media), `seconds` (the whole job), `train_seconds`,
        `steps`, `model`, `dataset`.

    Raises:
        SetupError: when the arguments name something that is not there; nothing has been trained then.
    """
    from maple_trl.trainers.rollout_state import ResumeError

    started = time.monotonic()
    checkpoint = checkpoint_to_resume(training_args)
    trainer, test = build_trainer(script_args, training_args, model_args)
    before = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    train_started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ResumeError as error:
        raise SetupError(str(error)) from error
    finally:  # a run that is interrupted leaves what it had logged
        if trainer.is_world_process_zero() and trainer.state.log_history:
            metrics_path = _place(script_args.metrics_file, training_args, "metrics.jsonl")
            write_metrics(trainer.state.log_history, metrics_path)
    train_seconds = time.monotonic() - train_started
    after = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    trainer.save_model(training_args.output_dir)
    summary = {
        "before": before and before.accuracy,
        "after": after and after.accuracy,
        "questions": after and after.questions,
        "unusable": after and after.unusable,
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
        write_atomically(summary_path, json.dumps(as_json(summary), indent=2) + "\n")
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
