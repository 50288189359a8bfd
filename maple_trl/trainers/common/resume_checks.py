"""Whether a run can go on from a checkpoint as if it had not been stopped: known from its files, before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open

from maple_trl.records.metrics_log import read_log
from maple_trl.trainers.common.checkpoint import (
    REFERENCE_FILE,
    ResumeError,
    checkpoints,
    complete_checkpoints,
    is_complete,
    last_complete_checkpoint,
)
from maple_trl.trainers.common.pickles import check_pickles


logger = logging.getLogger(__name__)


def find_checkpoint(wanted: str | bool, output_dir: str) -> str:
    """
    Find the folder that `resume_from_checkpoint` means: a path, or `True` for the last complete one in `output_dir`.

    Raises:
        ResumeError: when there is no such checkpoint.
    """
    if wanted is True:
        last = last_complete_checkpoint(output_dir)
        if last is None:
            raise ResumeError(
                f"resume_from_checkpoint: there is no complete checkpoint-N folder in {output_dir}; name the checkpoint's "
                "folder, or leave resume_from_checkpoint out to begin a new run"
            )
        return last
    if not os.path.isdir(wanted):
        raise ResumeError(f"resume_from_checkpoint: there is no folder {wanted}")
    if not is_complete(wanted):
        within = last_complete_checkpoint(wanted)
        advice = "" if within is None else f"; it holds {os.path.basename(within)}: name {within}"
        raise ResumeError(
            f"resume_from_checkpoint: {wanted} is no checkpoint, or one that was not written to its end: it has no whole "
            f"trainer_state.json{advice}"
        )
    return wanted


def last_whole_checkpoint(output_dir: str, world: int, anew: str = "leave it out and set overwrite") -> str | None:
    """
    Find the newest checkpoint from which all processes can go on, past those that are damaged; each of these is a warning.

    `None` when none was written to its end, as for a first start.

    Args:
        anew: what errors say is to be done to begin anew.

    Raises:
        ResumeError: when there are complete checkpoints, and none is whole, or when the log says that the run went on after one
            that has no whole end now.
    """
    reasons = []
    for checkpoint in complete_checkpoints(output_dir):
        try:
            for rank in range(world):
                check_parts(checkpoint, rank, world)
        except ResumeError as error:
            reasons.append(str(error))
            logger.warning("%s is passed over. %s", checkpoint, error)
        else:
            return checkpoint
    if reasons:
        raise ResumeError(
            f"resume_from_checkpoint: none of the {len(reasons)} complete checkpoints in {output_dir} is whole. "
            f"{anew[0].upper()}{anew[1:]} to begin anew, or name another output_dir. The newest: "
            + reasons[0].removeprefix("resume_from_checkpoint: ")
        )
    _check_never_finished(output_dir, anew)
    return None


def _check_never_finished(output_dir: str, anew: str) -> None:
    """Check that the run was stopped while it wrote the checkpoints of which none is complete: they are removed otherwise."""
    log = os.path.join(output_dir, "metrics.jsonl")
    begun = checkpoints(output_dir)
    if not begun or not os.path.isfile(log):
        return
    step, newest = begun[0]
    reached = max((entry.get("step") or 0 for entry in read_log(log)), default=0)
    if reached > step:
        raise ResumeError(
            f"resume_from_checkpoint: {newest} has no whole trainer_state.json, though the run went on from it to step "
            f"{reached} ({log}): it was damaged later. Bring the file back, train on from the weights alone "
            f"(model_name_or_path={newest} and another output_dir), or {anew} to begin anew"
        )


def check_parts(checkpoint: str, rank: int, world: int, replaceable: Collection[str] = ()) -> None:
    """
    Check that a checkpoint has what a run needs: weights, optimizer, learning-rate schedule, random numbers.

    Args:
        replaceable: files without which a run may go on; whoever reads them says what is wrong with them.

    Raises:
        ResumeError: naming what it lacks, or a file that is damaged or would run code.
    """
    check_pickles(checkpoint)
    for name in sorted({*os.listdir(checkpoint), REFERENCE_FILE} - set(replaceable)):
        reason = _damage(os.path.join(checkpoint, name))
        if reason is not None:
            raise ResumeError(
                f"resume_from_checkpoint: {os.path.join(checkpoint, name)} is damaged: {reason}. Resume from another checkpoint"
            )
    lacking = missing_parts(checkpoint, rank, world)
    if not lacking:
        return
    raise ResumeError(
        f"resume_from_checkpoint: {checkpoint} lacks {_listed(lacking)}{_why(checkpoint, world)}. The run would go on "
        "without a word as another one. Resume from a whole checkpoint; to train on from these weights alone, with a new "
        f"optimizer and schedule, begin a new run: model_name_or_path={checkpoint} and another output_dir"
    )


def _damage(path: str) -> str | None:
    """Return what is wrong with a file that was not written to its end, as its form tells; `None` for a whole one."""
    suffix = os.path.splitext(path)[1]
    if not os.path.isfile(path) or not os.path.getsize(path):
        return None
    try:
        if suffix == ".json":
            with open(path, encoding="utf-8") as file:
                json.load(file)
        elif suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return "it has no end"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None


def missing_parts(checkpoint: str, rank: int, world: int) -> list[str]:
    """List in words what a checkpoint lacks for this rank; an empty file counts as missing."""
    names = [name for name in os.listdir(checkpoint) if _has_content(os.path.join(checkpoint, name))]

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    sharded = has(r"global_step\d+")  # DeepSpeed keeps weights, optimizer and schedule in a folder of its own
    weights = r"(model|pytorch_model|adapter_model)[^_]*\.(safetensors|bin)(\.index\.json)?|pytorch_model_fsdp.*"
    lacking = []
    if not sharded and not has(weights):
        lacking.append("the model's weights")
    # In a file, in one per rank, or with FSDP in a folder.
    if not sharded and not has(r"optimizer(_.*)?|optimizer\.(pt|bin)(_.*)?|rank\d+-of-\d+-optimizer\.pt"):
        lacking.append("the optimizer's state (optimizer.pt)")
    if not sharded and not has(r"scheduler\.pt"):
        lacking.append("the learning-rate schedule's (scheduler.pt)")
    random = "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"
    if random not in names:
        lacking.append(f"the random numbers' ({random})")
    return lacking


def _has_content(path: str) -> bool:
    return os.path.isdir(path) or os.path.getsize(path) > 0


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _why(checkpoint: str, world: int) -> str:
    """Return the end of a sentence that tells from the other files why some are missing."""
    states = [name for name in os.listdir(checkpoint) if re.fullmatch(r"rng_state(_\d+)?\.pth", name)]
    if not states:
        return ", as one that was written with save_only_model=True"
    if len(states) != world:
        wrote = "one process" if len(states) == 1 else f"{len(states)} processes"
        return f"; it has random numbers of {wrote}, and this run has {world}"
    return ""


_OPTIONS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_beta1 and adam_beta2"}
_OPTIONS |= {"eps": "adam_epsilon", "momentum": "optim_args: momentum"}


def options_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of an optimizer's parameter groups, without the parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def check_optimizer(checkpoint: str, made: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """
    Compare the options of a run's optimizer with those that a checkpoint's state has put in their place.

    Args:
        made, loaded: as [`options_of`] gives them, before the state was loaded and after.

    Raises:
        ResumeError: when they are those of another kind of optimizer. One that was set and has no effect is a warning.
    """
    for before, now in zip(made, loaded, strict=True):
        if not set(before) <= set(now):
            raise ResumeError(
                f"{checkpoint} has the state of another optimizer (optim): resume with the one it was made with"
            )
        for name, option in _OPTIONS.items():
            if name in before and _plain(before[name]) != _plain(now[name]):
                logger.warning(
                    "%s is %s, which has no effect: %s was trained with %s, and the optimizer's state brings that back. To train "
                    "on with another, begin a new run from its weights",
                    option,
                    before[name],
                    checkpoint,
                    now[name],
                )


def _plain(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, Sequence) else float(value)
