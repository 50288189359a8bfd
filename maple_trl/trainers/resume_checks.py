"""Whether a run can go on from a checkpoint as if it had not been stopped: known from its files, before anything is loaded."""

from __future__ import annotations

import os
import re

from maple_trl.trainers.rollout_state import ResumeError, is_complete, last_complete_checkpoint


def find_checkpoint(wanted: str | bool, output_dir: str) -> str:
    """
    The folder that `resume_from_checkpoint` means: a path, or `True` for the last complete checkpoint in `output_dir`.

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


def check_parts(checkpoint: str, rank: int, world: int) -> None:
    """
    Holds a checkpoint against what a run needs to go on with: weights, optimizer, learning-rate schedule, random numbers.

    Raises:
        ResumeError: naming what it lacks.
    """
    lacking = missing_parts(checkpoint, rank, world)
    if not lacking:
        return
    raise ResumeError(
        f"resume_from_checkpoint: {checkpoint} lacks {_listed(lacking)}{_why(checkpoint, world)}. The run would go on "
        "without a word as another one. Resume from a whole checkpoint; to train on from these weights alone, with a new "
        f"optimizer and schedule, begin a new run: model_name_or_path={checkpoint} and another output_dir"
    )


def missing_parts(checkpoint: str, rank: int, world: int) -> list[str]:
    """What a checkpoint lacks for this rank, in words; an empty file counts as missing."""
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
    """What tells from the other files why some are missing."""
    states = [name for name in os.listdir(checkpoint) if re.fullmatch(r"rng_state(_\d+)?\.pth", name)]
    if not states:
        return ", as one that was written with save_only_model=True"
    if len(states) != world:
        wrote = "one process" if len(states) == 1 else f"{len(states)} processes"
        return f"; it has random numbers of {wrote}, and this run has {world}"
    return ""
