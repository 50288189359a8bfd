"""One training job from parsed arguments: model, data, rewards, trainer, evaluation, and the files it leaves behind."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.files import as_json, write_atomically
from maple_trl.hub.errors import PublishError
from maple_trl.jobs.checks import (
    LORA_OPTIONS,
    adapter_base,
    check_files,
    check_model,
    check_resumed,
    check_rows,
    quantization_options,
)
from maple_trl.jobs.data import evaluates, first_rows, load_datasets, prepare_data
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.folder_lock import hold_folder
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import SUPERVISED, OmniScriptArguments, parse_args, trainer_class
from maple_trl.jobs.rewards import close_rewards, load_rewards
from maple_trl.modalities import SCOPES
from maple_trl.records.metrics_log import first_and_last, whole_log, write_metrics
from maple_trl.records.option_changes import told, write_options
from maple_trl.records.options import chosen, not_deciding, without_keys
from maple_trl.records.run_folder import (
    ZERO_SHOT_FILE,
    holds_evaluation,
    is_inside,
    is_unfinished,
    named,
    remove_results,
    run_results,
)
from maple_trl.records.summary import print_summary


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

    from maple_trl.evaluation import SampledAccuracy
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer

logger = logging.getLogger(__name__)

__all__ = [
    "OmniModelConfig",
    "OmniScriptArguments",
    "SetupError",
    "build_trainer",
    "load_datasets",
    "load_for_training",
    "load_rewards",
    "parse_args",
    "run",
]


# Parts of a job


def load_model_and_processor(
    model_args: OmniModelConfig, training_args: OmniGRPOConfig | OmniSFTConfig
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Load the model in the form that can be trained (of a full Omni checkpoint the Thinker alone) and its processor.

    Of a folder with a LoRA adapter this is the model that the adapter was trained on; see [`continue_adapter`].

    Raises:
        SetupError: without `model_name_or_path`.
    """
    from maple_trl.omni.adapters import processor_beside
    from maple_trl.omni.loading import load_model, load_processor

    if not model_args.model_name_or_path:
        raise SetupError("model_name_or_path is missing; for a first run: builtin:tiny-omni")
    shared = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    kwargs = shared | (training_args.model_init_kwargs or {})
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    dtype = kwargs.pop("dtype", model_args.dtype)
    training_args.model_init_kwargs = kwargs | {"dtype": dtype}  # for the reference model
    folder = model_args.model_name_or_path
    name = adapter_base(folder) or folder
    if "quantization_config" in kwargs:
        kwargs = {"device_map": {"": str(training_args.device)}} | kwargs
    try:
        quantized = quantization_options(model_args, name, shared, training_args.device)
        model = load_model(name, dtype=dtype, **(kwargs | quantized))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise SetupError(f"model_name_or_path: cannot load {name!r}: {error}") from error
    other = model_args.processor_name_or_path
    if other is not None:
        return model, load_processor(other)
    beside = name != folder and processor_beside(folder)
    return model, load_processor(folder if beside else name, **shared)


def choose_parameters(
    model: PreTrainedModel, processor: ProcessorMixin, model_args: OmniModelConfig, quiet: bool = False
) -> LoraConfig | None:
    """
    Decide what is trained: LoRA on the chosen parts, or the whole model without the frozen parts.

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
    kept = model_args.lora_modules_to_save or []
    absent = [name for name in kept if not any(part.split(".")[-1] == name for part, _ in model.named_modules())]
    if absent:
        raise ValueError(f"lora_modules_to_save: no part of the model is called {absent[0]!r}; it takes e.g. lm_head")
    lora_config.use_rslora = model_args.use_rslora
    lora_config.use_dora = model_args.use_dora
    lora_config.modules_to_save = model_args.lora_modules_to_save
    return lora_config


def continue_adapter(model: PreTrainedModel, folder: str, wanted: LoraConfig | None) -> PeftModel:
    """
    Load a LoRA adapter from a folder into the model, to be trained on.

    Args:
        wanted (`LoraConfig`, *optional*): what the job asks for.

    Raises:
        SetupError: when the job asks for another adapter than the one in the folder.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from maple_trl.omni.adapters import load_adapter
    from maple_trl.omni.checkpoints import CheckpointError

    if wanted is None:
        raise SetupError(
            f"{folder} holds a LoRA adapter: set use_peft: true to train it on, or merge it into its model and save that "
            "(`PeftModel.from_pretrained(base, adapter).merge_and_unload()`)"
        )
    try:
        continued = load_adapter(model, folder, trainable=True)
    except CheckpointError as error:
        raise SetupError(f"model_name_or_path: {error}") from error
    config = continued.peft_config["default"]
    for field, option in LORA_OPTIONS.items():
        if getattr(config, field) != getattr(wanted, field):
            raise SetupError(
                f"{option} is {getattr(wanted, field)!r}, but the adapter in {folder} was made with "
                f"{getattr(config, field)!r}: use that"
            )
    adapted = {name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    differing = sorted(adapted ^ set(wanted.target_modules))
    if differing:
        raise SetupError(
            f"the adapter in {folder} is on other layers than lora_vision, lora_audio, lora_projectors and lora_llm say, "
            f"e.g. {differing[0]}: choose the parts that it was made with"
        )
    return continued


def load_for_training(
    model_args: OmniModelConfig, training_args: OmniGRPOConfig | OmniSFTConfig
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin, LoraConfig | None]:
    """
    Load what a trainer takes: a model whose frozen parts are frozen, its processor, and the adapter that is to be added.

    Of a folder with a LoRA adapter the model has it already, to be trained on, and there is none to add.

    Args:
        model_args ([`OmniModelConfig`]): which model, and what of it is trained.
        training_args ([`OmniGRPOConfig`] or [`OmniSFTConfig`]): configuration of the trainer.

    Returns:
        `tuple`: `model`, `processing_class` and `peft_config` of a trainer.

    Raises:
        SetupError: when the model cannot be loaded, or is an adapter other than the one that is asked for.
        ValueError: when a chosen part holds no layer, or the model's family has no such part.
    """
    model, processor = load_model_and_processor(model_args, training_args)
    lora = choose_parameters(model, processor, model_args, quiet=training_args.process_index != 0)
    if adapter_base(model_args.model_name_or_path) is not None:
        model, lora = continue_adapter(model, model_args.model_name_or_path, lora), None
    return model, processor, lora


def build_trainer(
    script_args: OmniScriptArguments, training_args: OmniGRPOConfig | OmniSFTConfig, model_args: OmniModelConfig
) -> tuple[OmniGRPOTrainer | OmniSFTTrainer, Dataset | None]:
    """
    Build everything that a job needs, ready to train.

    Args:
        script_args ([`OmniScriptArguments`]): what the job trains with, reads, rewards and reports.
        training_args ([`OmniGRPOConfig`] or [`OmniSFTConfig`]): configuration of the trainer.
        model_args ([`OmniModelConfig`]): which model, and what of it is trained.

    Returns:
        `tuple[OmniGRPOTrainer | OmniSFTTrainer, Dataset | None]`: the trainer, of the class that
        `script_args.trainer` names, and the test split where there is one.

    Raises:
        SetupError: when a part that the arguments name is not there.
    """
    from maple_trl.integrations.tracking import TRACKERS, TrackingCallback
    from maple_trl.jobs.console import show_progress
    from maple_trl.trainers.common.rows import asked_rows

    _check_writable(training_args.output_dir)
    check_files(script_args)
    rewards = {}
    if script_args.trainer not in SUPERVISED:
        rewards["reward_funcs"] = load_rewards(script_args.reward_funcs, training_args)
    train, test = prepare_data(script_args, training_args)
    checked = first_rows(train, getattr(training_args, "generation_batch_size", None) or 1)
    check_rows(script_args, training_args, checked, rewards.get("reward_funcs", []))
    check_model(model_args, training_args, checked, script_args.evaluate_before_after)
    try:
        model, processor, lora = load_for_training(model_args, training_args)
        trainer = trainer_class(script_args.trainer)(
            model=model,
            **rewards,
            args=training_args,
            train_dataset=train,
            eval_dataset=test if evaluates(training_args) else None,
            processing_class=processor,
            peft_config=lora,
        )
        if script_args.evaluate_before_after and trainer.family is not None:
            test = asked_rows(test, trainer.prompt_builder, f"split {script_args.dataset_test_split!r}")
    except SetupError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # nothing has been trained yet
        raise SetupError(str(error)) from error
    trainer.dataset_name = script_args.dataset_name
    trainer.job_options = chosen(script_args) | chosen(model_args)
    show_progress(trainer)
    if set(TRACKERS) & set(training_args.report_to or []):
        trainer.add_callback(TrackingCallback(trainer))
    if script_args.evaluate_before_after and trainer.family is None:
        raise SetupError("evaluate_before_after needs an omni model; switch it off for a text-only one")
    if script_args.evaluate_before_after and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise SetupError(
            "evaluate_before_after looks at the model before FSDP or DeepSpeed has spread it over the processes; switch it "
            "off, and use eval_strategy to evaluate during training"
        )
    return trainer, test


def _check_writable(output_dir: str | None) -> None:
    """Check that results can be written, before the model is loaded."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise SetupError(f"output_dir: cannot write into {output_dir}: {error}") from error


def checkpoint_to_resume(training_args: OmniGRPOConfig | OmniSFTConfig) -> str | None:
    """
    Return the checkpoint from which a job goes on.

    `resume_from_checkpoint` is a folder, `true` for the last checkpoint in `output_dir`, or `auto` for the last one that is
    whole, where there is any: the same command begins a job and goes on with it.

    Raises:
        SetupError: when there is no such checkpoint.
    """
    from maple_trl.trainers.common.checkpoint import ResumeError
    from maple_trl.trainers.common.resume_checks import find_checkpoint, last_whole_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no", "none"):
        return None
    last = str(wanted).lower() in ("true", "yes")
    try:
        if _resumes_by_itself(training_args):
            return last_whole_checkpoint(training_args.output_dir, training_args.world_size)
        return find_checkpoint(True if last else str(wanted), training_args.output_dir)
    except ResumeError as error:
        raise SetupError(str(error)) from error


def check_checkpoint(
    checkpoint: str | None,
    script_args: OmniScriptArguments,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    model_args: OmniModelConfig,
) -> None:
    """Raise SetupError for a checkpoint that is not whole, or of another form than what is trained now."""
    from maple_trl.trainers.common.checkpoint import ResumeError
    from maple_trl.trainers.common.resume_checks import check_parts

    if checkpoint is not None:
        try:
            replaceable = trainer_class(script_args.trainer).replaceable_state
            check_parts(checkpoint, training_args.process_index, training_args.world_size, replaceable)
        except ResumeError as error:
            raise SetupError(str(error)) from error
    check_resumed(checkpoint, model_args)


def _resumes_by_itself(training_args: OmniGRPOConfig | OmniSFTConfig) -> bool:
    return str(training_args.resume_from_checkpoint).lower() == "auto"


def check_output_dir(
    script_args: OmniScriptArguments,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    model_args: OmniModelConfig,
    checkpoint: str | None,
) -> bool:
    """
    Check that `output_dir` is free for this job, before the model is loaded.

    Returns:
        `bool`: whether results are to be removed before training: those of another run (`overwrite`), or what this one left
            before its first checkpoint (`resume_from_checkpoint=auto`).

    Raises:
        SetupError: when it holds results of another run and the job neither goes on from one of its checkpoints nor
            overwrites them, holds an evaluation, or when what would be removed is what the job reads.
    """
    folder = training_args.output_dir
    if holds_evaluation(folder):
        raise SetupError(f"output_dir: {folder} holds an evaluation; name another folder for the training run")
    results = run_results(folder)
    if not results or (checkpoint is not None and is_inside(checkpoint, folder)):
        return False
    if results == [ZERO_SHOT_FILE] and not script_args.overwrite:
        return False  # a run that came no further; one that would measure the same goes on from there
    if _resumes_by_itself(training_args) and all(map(is_unfinished, results)):
        return True
    if not script_args.overwrite:
        raise SetupError(
            f"output_dir: {folder} holds results of another run ({named(results)}). Name another folder, go on with that run "
            "(--resume_from_checkpoint true), or replace it (--overwrite)"
        )
    read = {"model_name_or_path": model_args.model_name_or_path, "dataset_name": script_args.dataset_name}
    for option, path in read.items():
        removed = [os.path.join(folder, name) for name in results]
        own = option == "model_name_or_path" and path and os.path.realpath(path) == os.path.realpath(folder)
        if path and (own or any(is_inside(path, result) for result in removed)):
            raise SetupError(f"output_dir: overwrite would remove {path}, which is {option}; name another output_dir")
    return True


# The job


def run(
    script_args: OmniScriptArguments,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    model_args: OmniModelConfig,
    last: bool = True,
) -> dict[str, Any]:
    """
    Run a job: build everything, evaluate, train, evaluate again, and write the results.

    Written into `output_dir`: the options (`args.json`), the model with its processor, `metrics.jsonl`, `training.png`
    (where matplotlib is installed), `summary.json` and, with `report`, `report.html`. Only the first process prints and writes these.

    Args:
        script_args ([`OmniScriptArguments`]): what the job trains with, reads, rewards and reports.
        training_args ([`OmniGRPOConfig`] or [`OmniSFTConfig`]): configuration of the trainer.
        model_args ([`OmniModelConfig`]): which model, and what of it is trained.
        last (`bool`, *optional*, defaults to `True`):
            No other job follows in this process: the processes part at the end.

    Returns:
        `dict`: the summary: `before` and `after` (sampled accuracy by tag and under `all`; `None` without
        `evaluate_before_after`), `questions` (how many stand behind each), `unusable` (left out for their media), `seconds` (the whole job, and of one that was resumed the training up to its checkpoint), `train_seconds`,
        `steps`, `model`, `dataset`, `learned` (reward and accuracy over the first and the last tenth of the log),
        `fired` and `left_out` (what was replayed and hinted; what was left out, failed or never fired; see
        [`~maple_trl.trainers.common.media_trainer.MediaTrainer.left_out`]).

    Raises:
        SetupError: when the arguments name something that is not there, or another job is writing into `output_dir`; nothing
            has been trained then.
        RunStoppedError: when the run was stopped, or made no step.
        PublishError: when it was not uploaded (`push_to_hub`); everything else has been written.
    """
    # What the folder holds is looked at, removed and written by one job at a time.
    with hold_folder(training_args.output_dir, training_args):
        return _run(script_args, training_args, model_args, last)


def _run(
    script_args: OmniScriptArguments,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    model_args: OmniModelConfig,
    last: bool,
) -> dict[str, Any]:
    """Run a job, whose folder is its own, as [`run`] says."""
    from maple_trl.jobs.console import describe_run, show_messages
    from maple_trl.trainers.common.checkpoint import ResumeError
    from maple_trl.trainers.common.run_errors import RunStoppedError

    started = time.monotonic()
    checkpoint = checkpoint_to_resume(training_args)
    replaces = check_output_dir(script_args, training_args, model_args, checkpoint)
    check_checkpoint(checkpoint, script_args, training_args, model_args)
    trainer, test = build_trainer(script_args, training_args, model_args)
    if checkpoint is None:
        trainer.check_quarantine()
    else:  # before anything is written, and before the evaluation
        try:
            trainer.check_checkpoint(checkpoint)
        except ResumeError as error:
            raise SetupError(str(error)) from error
    if replaces:
        _remove_results(trainer, keep=() if script_args.overwrite else (ZERO_SHOT_FILE,))
    if trainer.is_world_process_zero():
        changed = _keep_options(checkpoint, script_args, training_args, model_args)
        describe_run(trainer, model_args.model_name_or_path)
        show_messages()
        if changed:
            logger.warning("options differ from those with which %s was trained: %s", checkpoint, told(changed))
    before = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    metrics_path = _place(script_args.metrics_file, training_args, "metrics.jsonl")
    train_started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.was_asked_to_end:
            raise RunStoppedError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as the job was asked to end; its "
                "checkpoint is written, the model is not; with resume_from_checkpoint: auto, the same command goes on from there"
            )
        train_seconds = time.monotonic() - train_started + trainer.clock.before
        unpublished = _save(trainer)  # before anything else that may fail: hours of training are in it
    except ResumeError as error:
        raise SetupError(str(error)) from error
    finally:  # a run that is interrupted leaves what it had logged
        close_rewards(getattr(trainer, "reward_funcs", []))
        # A run that could not go on from its checkpoint has no more than that one's part of a log that is there.
        went_on = checkpoint is None or trainer.steps_made or not metrics_path.exists()
        if trainer.is_world_process_zero() and trainer.state.log_history and went_on:
            write_metrics(_log_of(trainer), metrics_path)
    started -= trainer.clock.before  # the steps of former starts are among those of the run
    try:
        after = _evaluate(trainer, test, script_args) if script_args.evaluate_before_after else None
    except Exception:
        if unpublished is not None and trainer.is_world_process_zero():
            print(unpublished, flush=True)  # what is raised tells of the evaluation alone
        raise
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
        "learned": first_and_last(_log_of(trainer)),
        "fired": trainer.fired(),
        "left_out": trainer.left_out() + _unusable_questions(after),
    }
    if trainer.is_world_process_zero():
        plot_path = _place(script_args.plot_file, training_args, "training.png")
        summary_path = _place(script_args.summary_file, training_args, "summary.json")
        write_atomically(summary_path, json.dumps(as_json(summary), indent=2) + "\n")
        _draw(_log_of(trainer), summary["before"], summary["after"], plot_path)
        written = _written(training_args.output_dir, (metrics_path, summary_path, plot_path))
        print_summary(summary | {"written": written}, training_args.output_dir)
        if script_args.report:
            _report(training_args.output_dir)
    trainer.accelerator.wait_for_everyone()  # all of the results are there
    if trainer.family is not None:
        trainer.loader.close()
    if last:
        trainer.accelerator.end_training()
    if unpublished is not None:
        raise unpublished
    return summary


def _save(trainer: OmniGRPOTrainer | OmniSFTTrainer) -> PublishError | None:
    """Save the model and its processor, and upload them where that is asked for; return what stopped the upload."""
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(trainer.args.output_dir)
    try:
        trainer.save_model(trainer.args.output_dir)
    except PublishError as error:
        return PublishError(
            f"{error}. The run is whole in {trainer.args.output_dir}: `maple-trl push {trainer.args.output_dir} REPO_ID` uploads it"
        )
    return None


def _log_of(trainer: OmniGRPOTrainer | OmniSFTTrainer) -> list[Mapping[str, Any]]:
    return whole_log(trainer.state.log_history, Path(trainer.args.output_dir, "metrics.jsonl"))


def _keep_options(checkpoint: str | None, *parts: Any) -> dict[str, list[Any]]:
    """Write the options of a job, and return those that a start from a checkpoint has changed."""
    options = json.loads(json.dumps(as_json(_options(*parts)), default=str))
    undecided = {name for part in parts for name in not_deciding(type(part))}
    return write_options(parts[1].output_dir, options, checkpoint, undecided)


def _options(*parts: Any) -> dict[str, Any]:
    """Return every option of a job by its name, without keys."""
    script_args, training_args, model_args = parts
    options = vars(script_args) | vars(model_args) | training_args.to_dict()
    # Whose names end as those of keys do is hidden with them, also where it is not set.
    shown = [name for name in ("eos_token", "pad_token") if name in options]
    shown += [name for name in options if name.endswith("_token") and getattr(training_args, name, None) is None]
    options |= {name: getattr(training_args, name, None) for name in shown}
    return {name: without_keys(value) for name, value in options.items()}


def _written(folder: str, files: Sequence[Path]) -> list[str]:
    """List what a run has left: names in its folder, paths of what lies elsewhere, and its last checkpoint."""
    names = run_results(folder)
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    if len(checkpoints) > 1:
        names = [name for name in names if name not in checkpoints[:-1]]
        names[names.index(checkpoints[-1])] += f" and {len(checkpoints) - 1} before it"
    names += [name for name in ("args.json", "quarantine.json") if Path(folder, name).is_file()]
    paths = [path.name if path.parent == Path(folder) else str(path) for path in files if path.exists()]
    return [*dict.fromkeys([*names, *paths])]


def _remove_results(trainer: OmniGRPOTrainer | OmniSFTTrainer, keep: Collection[str]) -> None:
    """Make `output_dir` free, once everything that could stop the job has been built."""
    if trainer.is_world_process_zero():
        removed = remove_results(trainer.args.output_dir, keep)
        whose = "this run, which had no whole checkpoint," if _resumes_by_itself(trainer.args) else "another run"
        print(f"overwrite: removed {named(removed)} of {whose} from {trainer.args.output_dir}")
    trainer.accelerator.wait_for_everyone()


def _unusable_questions(after: SampledAccuracy | None) -> list[dict[str, Any]]:
    """Note how many questions of the evaluation were asked of nobody."""
    if after is None or not after.unusable:
        return []
    text = f"{after.unusable} questions of the evaluation left out for their media"
    return [{"kind": "unusable_questions", "count": after.unusable, "text": text}]


def _evaluate(
    trainer: OmniGRPOTrainer | OmniSFTTrainer, dataset: Dataset, script_args: OmniScriptArguments
) -> SampledAccuracy:
    """Measure the accuracy by tag of answers that the policy samples now; every process takes part."""
    from maple_trl.evaluation import sampled_accuracy
    from maple_trl.rewards import AccuracyReward, accuracy_reward
    from maple_trl.rewards.routing import innermost

    rewards = map(innermost, getattr(trainer, "reward_funcs", ()))
    # Answers are read in the form that the job rewards, or else asks for.
    template = trainer.args.template()
    form = None if template is None else template.answer_format
    asked = accuracy_reward if form is None else AccuracyReward(form)
    score = next((reward for reward in rewards if isinstance(reward, AccuracyReward)), asked)
    return sampled_accuracy(
        trainer.generate_completions,
        dataset,
        score,
        questions_per_tag=script_args.eval_questions_per_tag,
        seed=trainer.args.seed,
    )


def _place(path: str | None, training_args: OmniGRPOConfig | OmniSFTConfig, name: str) -> Path:
    return Path(path) if path else Path(training_args.output_dir) / name


def _report(folder: str) -> None:
    """Write the report and say where; a job does not fail for want of it, whatever stops it."""
    try:
        from maple_trl.reports import write_report

        path = write_report(folder, Path(folder, "report.html"))
    except Exception as error:
        print(f"no report: {error or type(error).__name__}")
    else:
        print(f"Report: {path}, to be opened in a browser")


def _draw(log_history: list[dict], before: Mapping | None, after: Mapping | None, path: Path) -> None:
    """Draw the plot; a job does not fail for want of it, whatever stops it."""
    try:
        from maple_trl.reports.plots import plot_training

        plot_training(log_history, before, after, path)
    except Exception as error:
        print(f"no plot: {error or type(error).__name__}")
