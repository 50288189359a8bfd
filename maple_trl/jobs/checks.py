"""What can be known to be wrong with a job before its model is loaded, which takes minutes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import SUPERVISED


if TYPE_CHECKING:
    from datasets import Dataset

    from maple_trl.jobs.model_config import OmniModelConfig
    from maple_trl.jobs.options import OmniScriptArguments
    from maple_trl.omni.families import PromptEncoder
    from maple_trl.omni.prompt import PromptBuilder
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig


PLOT_ENDINGS = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".ps", ".tif", ".tiff", ".webp")
"""Formats of matplotlib; to ask itself would import it, which writes a cache of fonts into the user's folder."""


def check_files(script_args: OmniScriptArguments, make: bool = True) -> None:
    """
    Check that the files of results can be written.

    Args:
        make: make their folders.

    Raises:
        SetupError: for a file of results that cannot be written, or is the one that the job reads, and for a plot whose ending
            names no format.
    """
    _check_ending(script_args.plot_file)
    for option in ("summary_file", "metrics_file", "plot_file"):
        path = getattr(script_args, option)
        if path is None:
            continue
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise SetupError(f"{option}: {path} is a folder; name a file in it")
        if os.path.realpath(path) == os.path.realpath(script_args.dataset_name or ""):
            raise SetupError(f"{option}: {path} is the data set, which would be overwritten; name another file")
        try:
            if make:
                os.makedirs(folder, exist_ok=True)
            else:
                check_writable(folder, option)
        except OSError as error:
            raise SetupError(f"{option}: cannot make the folder {folder}: {error.strerror}") from error
        there = path if os.path.exists(path) else folder
        if os.path.exists(there) and not os.access(there, os.W_OK):
            raise SetupError(f"{option}: no permission to write {path}")


def _check_ending(plot: str | None) -> None:
    """Check that a plot's ending names a format that matplotlib writes; without matplotlib there is none, which the job says."""
    if plot is None or find_spec("matplotlib") is None:
        return
    if os.path.splitext(plot)[1].lower() not in PLOT_ENDINGS:
        raise SetupError(
            f"plot_file: the ending of {plot} says the format, and must be one of {', '.join(PLOT_ENDINGS)}"
        )


def check_writable(folder: str, option: str) -> None:
    """Raise SetupError, naming the option, where a folder cannot be made or written into."""
    above = os.path.abspath(folder)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise SetupError(f"{option}: {folder} cannot be made a folder: {above} is a file; name another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SetupError(f"{option}: no permission to write into {above}")


def check_rows(
    script_args: OmniScriptArguments,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    train: Dataset,
    rewards: Sequence[Any],
    whole: bool = True,
) -> None:
    """
    Check the columns of the training split against what is read of them.

    Args:
        whole: these are all rows; of some, what only all can say is not asked.

    Raises:
        SetupError: for a column that is missing or misspelt.
    """
    from maple_trl.rewards.calls import RewardError, check_rewards

    name = f"{script_args.dataset_name}, split {script_args.dataset_train_split!r}"
    columns = train.column_names
    try:
        if script_args.trainer not in SUPERVISED:
            check_rewards(rewards, columns, name)
            training_args.check_answer_form(rewards, columns)
    except (RewardError, ValueError) as error:
        raise SetupError(str(error)) from error
    if script_args.trainer in SUPERVISED and "completion" not in columns:
        raise SetupError(
            f"{name} has no column 'completion', which is what is learnt; its columns: {', '.join(columns)}. "
            "completion_template builds it from others"
        )
    if script_args.trainer == "mapo" and "tag" not in columns:
        raise SetupError(f"{name} has no column 'tag', which mapo batches by; its columns: {', '.join(columns)}")
    _check_reward_options(training_args, rewards)
    if script_args.trainer == "avatar":
        _check_hints(training_args, train if whole else SimpleNamespace(column_names=columns))
    if not os.path.isdir(training_args.media_root):
        raise SetupError(f"media root {training_args.media_root!r} is not a folder (media_root)")


def _check_hints(args: Any, train: Any) -> None:
    from maple_trl.trainers.avatar.checks import check_hint_column, check_hint_visits

    try:
        check_hint_column(args, train)
        check_hint_visits(args, train, warn=False)  # the trainer will
    except ValueError as error:
        raise SetupError(str(error)) from error


def _check_reward_options(args: OmniGRPOConfig | OmniSFTConfig, rewards: Sequence[Any]) -> None:
    from trl.trainer.utils import get_callable_name

    names = [get_callable_name(reward) for reward in rewards]
    weights = getattr(args, "reward_weights", None)
    if weights is not None and len(weights) != len(names):
        raise SetupError(f"reward_weights has {len(weights)} weights for {len(names)} rewards: {', '.join(names)}")
    task = getattr(args, "task_reward", None)
    if task is not None and task not in names:
        raise SetupError(f"task_reward must name one of the rewards ({', '.join(names)}), got {task!r}")


def check_model(
    model_args: OmniModelConfig,
    training_args: OmniGRPOConfig | OmniSFTConfig,
    train: Dataset,
    evaluates: bool,
    whole: bool = True,
) -> None:
    """
    Check the model's files, and that the rows are prompts for its family.

    Args:
        evaluates: whether its accuracy is measured, for which it must read media.
        whole: these are all rows; of some neither their number is judged, nor whether their media are there.

    Raises:
        SetupError: when there is no such model, it is damaged or not supported, a row cannot be a prompt, or there are too
            few rows.
    """
    from maple_trl.evaluation.served_prompts import MessageEncoder
    from maple_trl.omni.adapters import processor_beside
    from maple_trl.omni.checkpoints import CheckpointError, check_checkpoint, reach, read_config
    from maple_trl.omni.families import family_class
    from maple_trl.omni.loading import check_tokens, hub_arguments, load_processor, resolve_checkpoint
    from maple_trl.omni.prompt import check_template

    if not model_args.model_name_or_path:
        raise SetupError("model_name_or_path is missing; for a first run: builtin:tiny-omni")
    check_quantized(model_args, training_args)
    given = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    folder = model_args.model_name_or_path
    try:
        name = resolve_checkpoint(adapter_base(folder) or folder)
        options = given | hub_arguments(training_args.model_init_kwargs or {})
        options = reach(name, options)
        other = model_args.processor_name_or_path
        check_checkpoint(name, options, processor=other is None, text=not evaluates)
        config = read_config(name, options)
    except (CheckpointError, ValueError) as error:
        _check_prompts(MessageEncoder(), training_args, train, whole)  # one that reads everything
        raise SetupError(f"model_name_or_path: {error}") from error
    family = family_class(config.model_type) or family_class(f"{config.model_type}_thinker")
    if family is not None:  # else it reads text alone
        if hasattr(training_args, "check_for_media"):
            try:
                training_args.check_for_media()
            except ValueError as error:
                raise SetupError(str(error)) from error
        beside = name != folder and processor_beside(folder)
        try:
            of_model = folder if beside else name
            processor = load_processor(of_model, **options) if other is None else load_processor(other)
            if other is not None:
                check_tokens(processor, config, other)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _check_prompts(MessageEncoder(), training_args, train, whole)
            raise SetupError(f"model_name_or_path: {error}") from error
        stand_in = family.stand_in(config, processor)
        try:
            stand_in.check_pixels(training_args.max_pixels)
        except ValueError as error:
            raise SetupError(str(error)) from error
        asked = _check_prompts(stand_in, training_args, train, whole)
        try:
            check_template(_prompt_builder(stand_in, training_args), asked["prompt"], asked)
        except ValueError as error:
            raise SetupError(f"train_dataset, {error}") from error


def check_quantized(model_args: OmniModelConfig, training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """
    Check that a job which asks for weights of 4 or 8 bits can have them.

    Raises:
        SetupError: naming what is missing, or does not go with them.
    """
    few = model_args.load_in_4bit or model_args.load_in_8bit
    own = (training_args.model_init_kwargs or {}).get("quantization_config")
    if not few and own is None:
        return
    from maple_trl.omni.quantization import as_config, check_installed
    from maple_trl.trainers.common.quantized import check_run

    if few and own is not None:
        raise SetupError(
            "load_in_4bit, load_in_8bit: model_init_kwargs has a quantization_config of its own; keep one of them"
        )
    try:
        check_installed()
        if own is not None:
            as_config(own)
        check_run(training_args, model_args.use_peft)
    except (ImportError, ValueError) as error:
        raise SetupError(str(error)) from error


def quantization_options(options: Any, name: str, given: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """
    Return the arguments of `load_model` that follow from options of quantization; none where there are none.

    Args:
        options: as of [`~trl.ModelConfig`], with `quantize_towers`.
        name: the model whose configuration says its precision, where `dtype` is `auto`.
        given: what its configuration is read with; see [`~maple_trl.omni.checkpoints.reach`].
        device: which holds the weights.

    Raises:
        ImportError: without bitsandbytes.
    """
    if not (options.load_in_4bit or options.load_in_8bit):
        return {}
    from trl import get_quantization_config

    from maple_trl.omni.checkpoints import checkpoint_dtype
    from maple_trl.omni.loading import resolve_checkpoint
    from maple_trl.omni.quantization import check_installed

    check_installed()
    resolved = copy.copy(options)
    if options.dtype in (None, "auto"):
        resolved.dtype = checkpoint_dtype(resolve_checkpoint(name), given)
    return {
        "quantization_config": get_quantization_config(resolved),
        "quantize_towers": options.quantize_towers,
        "device_map": {"": str(device)},
    }


def _prompt_builder(family: PromptEncoder, args: OmniGRPOConfig | OmniSFTConfig) -> PromptBuilder:
    """Return a builder for what a row says, with which nothing is decoded."""
    return args.prompt_builder(family, args.media_loader(backend="pyav"), args.chat_template_kwargs)


def _check_prompts(
    family: PromptEncoder, args: OmniGRPOConfig | OmniSFTConfig, train: Dataset, whole: bool
) -> Dataset:
    """Return the rows as they are asked."""
    from maple_trl.trainers.common.quarantine import RowRegistry, write_quarantine
    from maple_trl.trainers.common.rows import asked_rows
    from maple_trl.trainers.common.run_errors import TooManyQuarantinedError

    try:
        probe = "paths" if args.media_check == "probe" and whole else False
        builder = _prompt_builder(family, args)
        asked = asked_rows(train, builder, "train_dataset")
        registry = RowRegistry(asked, builder, probe=probe, progress=False)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if not whole:
        return asked
    problem = registry.too_many(args.max_quarantined_share)
    if problem is not None:
        if args.process_index == 0:
            write_quarantine(os.path.join(args.output_dir, "quarantine.json"), [*registry.quarantined.values()])
        raise TooManyQuarantinedError(
            f"{problem}. Nothing was trained. Mend the files (is media_root right?), or raise max_quarantined_share"
        )
    generations = getattr(args, "num_generations", None)
    needed = args.generation_batch_size // generations if generations else 0
    if len(train) < needed:
        raise SetupError(
            f"train_dataset has {len(train)} usable rows, but one rollout takes {needed} prompts (generation_batch_size / "
            "num_generations): lower per_device_train_batch_size or gradient_accumulation_steps, or raise num_generations"
        )
    return asked


def check_resumed(checkpoint: str | None, model_args: OmniModelConfig) -> None:
    """
    Check a checkpoint against what is trained now: the whole model, or an adapter of the same form.

    Raises:
        SetupError: naming the option that differs.
    """
    if checkpoint is None:
        return
    path = os.path.join(checkpoint, "adapter_config.json")
    if not os.path.isfile(path):
        if model_args.use_peft:
            raise SetupError(
                f"use_peft is true, but {checkpoint} holds a whole model: resume with use_peft: false, as the run began, or "
                "begin a new run from it (model_name_or_path, another output_dir)"
            )
        return
    if not model_args.use_peft:
        raise SetupError(
            f"use_peft is false, but {checkpoint} holds a LoRA adapter: resume with use_peft: true and the LoRA options with "
            "which the run began"
        )
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(checkpoint)
    for field, option in LORA_OPTIONS.items():
        before, now = getattr(config, field), getattr(model_args, option)
        if (before or None) != (now or None):
            raise SetupError(f"{option} is {now!r}, but {checkpoint} was trained with {before!r}: resume with that")


LORA_OPTIONS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "lora_modules_to_save",
}
"""Fields of an adapter's config, and the options that set them."""


def adapter_base(name_or_path: str | None) -> str | None:
    """Return the model that a folder with a LoRA adapter was trained on; `None` for everything else."""
    path = os.path.join(name_or_path or "", "adapter_config.json")
    if not os.path.exists(path) or os.path.exists(os.path.join(name_or_path, "config.json")):
        return None
    from maple_trl.omni.adapters import adapted_model, read_adapter_config
    from maple_trl.omni.checkpoints import CheckpointError

    try:
        base = read_adapter_config(str(name_or_path)).base_model_name_or_path
        if not base:
            raise SetupError(f"{path} does not say which model the adapter belongs to (base_model_name_or_path)")
        return adapted_model(str(name_or_path), base)
    except CheckpointError as error:
        raise SetupError(str(error)) from error
