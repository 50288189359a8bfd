"""
Training runs in a process of their own: `train_job.py PLAN.json`, alone or under a launcher.

The plan holds `rows` (the data set), `media_root`, `out` (where results go) and `runs`, done one after the other. A run
has a `name` and may have

    model             folder of the model; the plan's `model` by default
    trainer           a key of `TRAINERS`
    options           fields of its configuration that differ from `DEFAULTS`
    lora              adapt all towers by LoRA instead of training every weight
    quantized         options of bitsandbytes, with `lora`
    dtype             type of the model's weights; as saved by default
    fixed_completions completions that depend on nothing but the prompt and the number of the copy
    reward            a key of `REWARDS`
    hold_at           in the middle of the accumulation that follows this step: write `NAME.held`, wait to be killed
    resume            a checkpoint to go on from; `true` means the last complete one of `output_dir`
    copies            a checkpoint of an earlier run, `NAME/checkpoint-N`, that is first copied into `output_dir`
    without           a file that the copy lacks
    unsynced          never average gradients over the ranks
    evaluated         of how many rows the evaluation is
    refused           the options are refused: write `NAME-refused.json`, the error
    unread            give the model a weight that no pass reads
    stays_away        a rank that does not come to the second rollout
    undone            `MODULE:FUNCTION` below `maple_trl.trainers`, which does nothing in this run

Every rank writes `NAME-RANK.json` (world size, rows that it used, log, rows of each forward pass and in how many of them
rows shared their prompt, passes of the vision tower, checksums of weights and of optimizer state after each step, error; what a MAPO or AVATAR trainer
knew and trained on) and `NAME-RANK.safetensors` (the trained weights, and under `before.` what they were).
"""

import json
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed
from watchdog import Watchdog

from maple_trl.omni.encoded import tensor_bytes
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.avatar.trainer import AvatarTrainer
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.run_errors import RunStoppedError
from maple_trl.trainers.mapo.config import MAPOConfig
from maple_trl.trainers.mapo.trainer import MAPOTrainer
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.trainer import PROMPTS_KEY, OmniGRPOTrainer
from maple_trl.trainers.omni_sft.config import OmniSFTConfig
from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer


SHARDED = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
DEFAULTS = {
    "num_frames": 4,
    "min_pixels": 1024,
    "max_pixels": 4096,
    "media_workers": 1,  # a process of each rank, whose clips are few
    "num_generations": 2,
    "max_completion_length": 6,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}


def _of_completion(completion_ids, **_):
    return [zlib.crc32(str(list(ids)).encode()) % 101 / 101 for ids in completion_ids]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _of_rank(completion_ids, **_):
    return [zlib.crc32(f"{_rank()}{list(ids)}".encode()) % 101 / 101 for ids in completion_ids]


def _in_thirds(completion_ids, **_):
    return [zlib.crc32(str(list(ids)).encode()) % 3 / 2 for ids in completion_ids]


def _in_halves(completion_ids, **_):
    return [float(zlib.crc32(str(list(ids)).encode()) % 2) for ids in completion_ids]


def _where_varied(completion_ids, varied, **_):
    """Rows say themselves whether their completions are told apart."""
    return [value if told else 0.5 for value, told in zip(_of_completion(completion_ids), varied, strict=True)]


def _of_vanishing(completion_ids, vanishes, **_):
    """Rows name a file that is removed once their completions are scored, and are worth nothing where they name none."""
    for path in filter(None, vanishes):
        Path(path).unlink(missing_ok=True)
    return [
        value if path is not None else 0.5
        for value, path in zip(_of_completion(completion_ids), vanishes, strict=True)
    ]


def _where_known(completion_ids, known, **_):
    """Rows say themselves whether their completions can be scored."""
    return [value if told else None for value, told in zip(_of_completion(completion_ids), known, strict=True)]


def _sometimes_failed(completion_ids, known, **_):
    """It fails on a third of the completions, and on all of some rows."""
    failed = [zlib.crc32(str(list(ids)).encode()) % 3 == 0 for ids in completion_ids]
    values = _where_known(completion_ids, known)
    return [None if lost else value for value, lost in zip(values, failed, strict=True)]


def _failed_after_the_first(completion_ids, trainer_state, **_):
    return _of_completion(completion_ids) if trainer_state.global_step == 0 else [None] * len(completion_ids)


def _of_tag(tag, first: int) -> list[float]:
    """One process finds the tags easy that the other finds hard."""
    easy = dict(zip(("S", "A", "VA"), (0.25, 0.5, 0.75), strict=True))
    return [easy[one] if _rank() == first else 1 - easy[one] for one in tag]


def _of_tag_and_rank(tag, **_):
    return _of_tag(tag, first=0)


def _of_tag_and_other_rank(tag, **_):
    return _of_tag(tag, first=1)


def _unpredictable(completion_ids, **_):
    return [random.SystemRandom().random() for _ in completion_ids]


REWARDS = {
    "of_completion": _of_completion,
    "of_rank": _of_rank,
    "of_tag_and_rank": _of_tag_and_rank,
    "of_tag_and_other_rank": _of_tag_and_other_rank,
    "unpredictable": _unpredictable,
    "in_halves": _in_halves,
    "in_thirds": _in_thirds,
    "where_varied": _where_varied,
    "of_vanishing": _of_vanishing,
    "where_known": _where_known,
    "sometimes_failed": _sometimes_failed,
    "failed_after_the_first": _failed_after_the_first,
}


class Hold(TrainerCallback):
    def __init__(self, step: int, marker: Path):
        self.step, self.marker = step, marker

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if state.is_world_process_zero:  # which is the last to have finished the checkpoint
                self.marker.touch()
            time.sleep(600)


class Checksums(TrainerCallback):
    """What changes from step to step, in two numbers."""

    def __init__(self):
        self.of_steps: list[tuple[int, int]] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = [parameter.detach() for parameter in model.parameters()]
        states = optimizer.state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.of_steps.append((_checksum(weights), _checksum(moments)))


def _checksum(tensors) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor_bytes(tensor), total)
    return total


class Watched:
    """A trainer under test, watched: it notes which rows each rank really used."""

    run: dict = {}
    comparing = False  # whether prompts can be shared

    def encode_rows(self, rows):
        if self.run.get("stays_away") == self.accelerator.process_index and self.state.global_step:
            time.sleep(600)
        used, prompts = super().encode_rows(rows)
        self.used = [*getattr(self, "used", []), [row.get("id") for row in used]]
        return used, prompts

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self.run.get("fixed_completions"):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        first = self.accelerator.process_index * len(prompt_ids)
        copies = [row % self.num_generations for row in range(first, first + len(prompt_ids))]
        return [self.fixed_completion(*row) for row in zip(self._serving, copies, strict=True)], None

    def fixed_completion(self, prompt, copy: int) -> list[int]:
        tokenizer = self.processing_class.tokenizer
        special = {*tokenizer.all_special_ids, *self.family.suppressed_ids}
        words = [i for i in range(len(tokenizer)) if i not in special]
        draw = random.Random(f"{prompt.key} {copy}")
        return draw.choices(words, k=draw.randint(2, 6))

    def _try_sharing(self, prompt):
        self.comparing = True
        try:
            return super()._try_sharing(prompt)
        finally:
            self.comparing = False

    def training_step(self, model, *args, **kwargs):
        if not self.run.get("unsynced"):
            return super().training_step(model, *args, **kwargs)
        with model.no_sync():
            return super().training_step(model, *args, **kwargs)


class NotesRows:
    """Notes which completions were trained on, by micro-batch."""

    def _compute_loss(self, model, inputs):
        prompts = inputs.get(PROMPTS_KEY, ())
        rows = zip(prompts, inputs["completion_ids"], inputs["completion_mask"], strict=bool(prompts))
        trained = [(prompt.key, ids[mask.bool()].tolist()) for prompt, ids, mask in rows if mask.any()]
        self.trained = [*getattr(self, "trained", []), trained]
        return super()._compute_loss(model, inputs)


class JobTrainer(Watched, OmniGRPOTrainer):
    pass


class MAPOJobTrainer(NotesRows, Watched, MAPOTrainer):
    """
    It notes what it knows after each step, and what the model was wrapped in when it was asked for completions outside of
    training.
    """

    def generate_completions(self, rows, batch_size=None):
        self.asked = [*getattr(self, "asked", []), [type(self.model_wrapped).__name__, len(rows)]]
        return super().generate_completions(rows, batch_size)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            parts = (self.schedule, self.curriculum, self.sampling, self.tag_weights)
            known = {type(part).__name__: part.state_dict() for part in parts}
            self.known = [*getattr(self, "known", []), known]
        super().log(logs, *args, **kwargs)


class AvatarJobTrainer(Watched, AvatarTrainer):
    """It notes what it remembers after each step, and which completions were trained on, by micro-batch."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self.run.get("fixed_completions"):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # A rank's fresh rows are no whole groups: copies are counted over all ranks, and over a prompt's visits.
        self.made = getattr(self, "made", Counter())
        own = []
        for rank, keys in enumerate(gather_object([[prompt.key for prompt in self._serving]])):
            for key in keys:
                if rank == self.accelerator.process_index:
                    own.append(self.made[key])
                self.made[key] += 1
        return [self.fixed_completion(*row) for row in zip(self._serving, own, strict=True)], None

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            memory = self.memory
            stored = [e for prompt in memory.vcrs.state_dict() for e in memory.buffer.stored(prompt)]
            fields = ("prompt", "row", "reward", "step", "hinted", "rewards")
            experiences = [
                {name: getattr(e, name) for name in fields}
                | {"ids": e.completion_ids.tolist(), "logps": e.logps.tolist()}
                for e in stored
            ]
            known = {"sizes": memory.buffer.sizes(), "experiences": experiences, **memory.state_dict()}
            self.known = [*getattr(self, "known", []), known]
        super().log(logs, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        columns = [inputs[name] for name in (PROMPTS_KEY, "completion_ids", "completion_mask", "replayed")]
        trained = [
            (prompt.key, ids[mask.bool()].tolist(), bool(replayed))
            for prompt, ids, mask, replayed in zip(*columns, strict=True)
        ]
        self.trained = [*getattr(self, "trained", []), trained]
        return super()._compute_loss(model, inputs)


class SFTJobTrainer(Watched, OmniSFTTrainer):
    pass


TRAINERS = {
    "sft": (SFTJobTrainer, OmniSFTConfig),
    "omni": (JobTrainer, OmniGRPOConfig),
    "mapo": (MAPOJobTrainer, MAPOConfig),
    "avatar": (AvatarJobTrainer, AvatarConfig),
}


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight of which each rank may have a part."""
    if hasattr(weight, "full_tensor"):
        return weight.detach().full_tensor().clone()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().clone()


def copy_checkpoint(source: Path, to: Path, without: str | None) -> None:
    """Once for all ranks."""
    with PartialState().main_process_first():
        if not to.exists():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns(without or ""))


def undone(name: str | None):
    if name is None:
        return nullcontext()
    module, function = name.split(":")
    return mock.patch.object(import_module(f"maple_trl.trainers.{module}"), function, lambda *_: {})


def do(run: dict, plan: dict) -> None:
    out = Path(plan["out"])
    if "copies" in run:
        copy_checkpoint(out / run["copies"], out / run["name"] / Path(run["copies"]).name, run.get("without"))
    path = run.get("model", plan["model"])
    trainer_class, config_class = TRAINERS[run.get("trainer", "omni")]
    known = {field.name for field in fields(config_class)}
    options = {name: value for name, value in DEFAULTS.items() if name in known} | run.get("options", {})
    args = config_class(**{"output_dir": str(out / run["name"]), "media_root": plan["media_root"], **options})
    set_seed(7)  # adapters are drawn at random
    checksums = Checksums()
    model, kwargs = path, {"callbacks": [] if SHARDED else [checksums]}
    if "dtype" in run or run.get("lora"):
        few = {"quantization_config": run["quantized"], "device_map": {"": "cpu"}} if "quantized" in run else {}
        model = load_model(path, dtype=run.get("dtype", "float32"), **few)
    if run.get("unread"):
        model = load_model(path)
        model.unread = torch.nn.Parameter(torch.ones(2))
    if run.get("lora"):
        kwargs["peft_config"] = build_lora_config(model, family_for(model, load_processor(path)), r=4, alpha=8)
    if "hold_at" in run:
        kwargs["callbacks"] += [Hold(run["hold_at"], out / f"{run['name']}.held")]
    if config_class is not OmniSFTConfig:
        kwargs["reward_funcs"] = REWARDS[run.get("reward", "of_completion")]
    rows, processor = Dataset.from_list(run.get("rows", plan["rows"])), load_processor(path)
    if run.get("evaluated"):
        kwargs["eval_dataset"] = rows.select(range(run["evaluated"]))
    try:
        trainer = trainer_class(model, args=args, train_dataset=rows, processing_class=processor, **kwargs)
    except ValueError as error:
        if "refused" not in run:
            raise
        (out / f"{run['name']}-refused.json").write_text(json.dumps(str(error)))
        return
    trainer.run = run
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    passes: list[int] = []
    packed: list[int] = []

    def count(module, args, kwargs):
        layout = kwargs.get("shared_prefix")
        if not trainer.comparing:
            passes.append(len(kwargs["input_ids"]) if layout is None else sum(len(own) for _, own in layout.groups))
            packed.append(layout is not None)

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    seen: list[int] = []

    def see(*_):
        if not trainer.comparing:
            seen.append(1)

    for name, module in trainer.model.named_modules():
        if name.endswith("visual"):
            module.register_forward_pre_hook(see, with_kwargs=True)
    before = trainable(trainer.model)
    result = {"rank": rank, "world": world, "backend": None, "error": None}
    if world > 1:
        result["backend"] = torch.distributed.get_backend()
    try:
        with undone(run.get("undone")):
            trainer.train(resume_from_checkpoint=run.get("resume"))
    except (ResumeError, RunStoppedError) as error:
        result["error"] = str(error)
    result |= {
        "log": trainer.state.log_history,
        "used": getattr(trainer, "used", []),
        "quarantined": [row.path for row in trainer.row_encoder.quarantined],
        "checksums": checksums.of_steps,
        "passes": passes,
        "packed": sum(packed),
        "seen": len(seen),
        "known": getattr(trainer, "known", []),
        "trained": getattr(trainer, "trained", []),
        "asked": getattr(trainer, "asked", []),
        "missing": sorted([*key, count] for key, count in getattr(trainer, "missing_rewards", {}).items()),
    }
    result["cpu"] = time.process_time()
    result["find_unused"] = getattr(trainer.model_wrapped, "find_unused_parameters", None)
    after = trainable(trainer.accelerator.unwrap_model(trainer.model))
    save_file(
        after | {f"before.{name}": weight for name, weight in before.items()},
        out / f"{run['name']}-{rank}.safetensors",
    )
    (out / f"{run['name']}-{rank}.json").write_text(json.dumps(result))


def shard_on_cpu() -> None:
    """Has accelerate shard a model over processes of a CPU, which it does over those of GPUs alone."""
    DEFAULTS.update(use_cpu=False, ddp_backend="gloo")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(plan["out"]).mkdir(parents=True, exist_ok=True)
    for run in plan["runs"]:
        do(run, plan)


if __name__ == "__main__":
    if SHARDED:
        shard_on_cpu()
    with Watchdog(float(os.environ["WATCHDOG"])) if "WATCHDOG" in os.environ else nullcontext():
        main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
