"""
Seconds of a training step of MAPLE's variants, in turns in one process: an instrument, and a command of its own.

    python benchmarks/claims/step_times.py --json step_times.json [--clips FOLDER] [--seeds 0 1 2 3 4]

What MAPLE calls a step is a rollout with its updates. Each variant trains an epoch from the task's start, then each once more in the
opposite order, so that a machine that grows slower or faster in the meantime is no difference between them. CPU seconds of the
process do not count what else runs. `generate` is the rollout with its rewards, `update` the rest.

The instrument `step_times` does it on the task's own clips of 0.4 seconds, `step_times_clips` on real ones, of a folder in
Daily-Omni's layout that `--clips` or the environment variable `MAPLE_CLIPS` names; nothing of them is copied. Their rows are given the
tags V, A and VA in turn (they have no subtitles), so that MAPO feeds a third of them the picture alone and a third the sound.
Without a folder the command's part `clips` says that it was not run.

The instrument `step_times_3b` counts seconds of the clock on a GPU, at the sizes of Qwen2.5-Omni-3B (the task `three_b`); its `step`
is the whole, the optimizer's part too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

RECIPES = {
    "mupo": "tiny/mupo",
    "mapo": "tiny/mapo_token",
    "early": "tiny/early_filtering",
    "full": "tiny/full_recipe",
}
STEPS = 56
"""An epoch, so that the static curriculum has come to all tags."""
CLIP_ROWS, CLIP_STEPS = 48, 6
"""Rows of real clips: 16 of each of three tags; the steps of an epoch, a rollout of each tag."""
NOT_RUN = "not run: no folder of clips; name one with --clips or in MAPLE_CLIPS"


def variants_in_turn(
    seed: int, steps: int, options: Mapping[str, Any], task: str = "embedded", clock: str = "cpu"
) -> dict[str, Any]:
    """
    Train each variant twice, the second time in the opposite order; return seconds per rollout by variant.

    Args:
        clock: what the rollout's part and the updates' are told in, `cpu` or `wall`; with `wall` the whole, `step`, is told too.
    """
    from devices import release_memory

    names = list(RECIPES)
    order = names[seed % len(names) :] + names[: seed % len(names)]
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name in [*order, *order[::-1]]:
        spent[name].append(_epoch(RECIPES[name], seed, steps, options, task, clock))
        release_memory()
    return {name: {key: sum(one[key] for one in both) / 2 for key in both[0]} for name, both in spent.items()}


def _epoch(recipe: str, seed: int, steps: int, options: Mapping[str, Any], task: str, clock: str) -> dict[str, float]:
    from instruments import Cost
    from runs import Run
    from tasks import prepared
    from transformers import PrinterCallback
    from worker import job_file

    from maple_trl.jobs.options import parse_args as parse_job
    from maple_trl.jobs.train import build_trainer

    run = Run(task, recipe, seed, {"max_steps": steps, **options})
    with tempfile.TemporaryDirectory(prefix="claims-") as output:
        trainer, _ = build_trainer(*parse_job(["--config", str(job_file(run, prepared(task), Path(output)))]))
        trainer.remove_callback(PrinterCallback)
        cost, whole = Cost(trainer), stopwatch(trainer)
        trainer.train()
        log = trainer.state.log_history
    media = [entry["tag/all/media_tokens"] for entry in log if "tag/all/media_tokens" in entry]
    steps_of, rollouts_of = {"cpu": (cost.cpu, cost.rollout_cpu), "wall": (cost.wall, cost.rollout_wall)}[clock]
    return {
        "cpu": cost.cpu / cost.rollouts,
        "wall": cost.wall / cost.rollouts,
        f"generate_{clock}": rollouts_of / cost.rollouts,
        f"update_{clock}": (steps_of - rollouts_of) / cost.rollouts,
        "media_tokens": sum(media) / len(media),
    } | ({"step": whole.seconds / cost.rollouts} if clock == "wall" else {})


def stopwatch(trainer: Any) -> Any:
    """Put on a trainer what counts the `seconds` from before its first step to after its last, the optimizer's too."""
    from devices import wait_for_gpu
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            wait_for_gpu()
            self._begun = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            wait_for_gpu()
            self.seconds = time.perf_counter() - self._begun

    made = Stopwatch()
    trainer.add_callback(made)
    return made


class StepTimes:
    """Seconds of the variants on the task of the run that asks for it, at its seed; of a run that is not trained itself."""

    VERSION = 1

    def __init__(self, trainer: Any, measure: Any, cost: Any):
        self._seed = trainer.args.seed
        self._longest = trainer.args.max_steps  # of a run that only shows that it can be carried out

    def result(self) -> dict[str, Any]:
        return variants_in_turn(self._seed, min(STEPS, self._longest), {})


class StepTimesOnClips(StepTimes):
    """The same on real clips of the folder that `MAPLE_CLIPS` names."""

    def result(self) -> dict[str, Any]:
        if not os.environ.get("MAPLE_CLIPS"):
            raise ValueError(NOT_RUN)
        from tasks import digest

        folder = Path(os.environ["MAPLE_CLIPS"])
        told = {
            "questions": digest([folder / "qa.json"])
        }  # no part of the run's identity: it says whose clips they were
        return told | on_clips(self._seed, folder, min(CLIP_STEPS, self._longest))


class StepTimesOfThreeB(StepTimes):
    """The same by the clock of a GPU, after a short training that is not counted, in which its kernels are loaded."""

    TASK, WARM_UP = "three_b", 2

    def result(self) -> dict[str, Any]:
        from devices import release_memory

        release_memory()
        _epoch(RECIPES["mupo"], self._seed, self.WARM_UP, {}, self.TASK, "wall")
        release_memory()
        return variants_in_turn(self._seed, self._longest, {}, self.TASK, "wall")


INSTRUMENTS: dict[str, type] = {
    "step_times": StepTimes,
    "step_times_clips": StepTimesOnClips,
    "step_times_3b": StepTimesOfThreeB,
}
"""By the names that runs ask for them by."""


def clip_rows(folder: Path) -> list[dict[str, Any]]:
    """Return rows of real clips with the tags V, A and VA in turn, the same number of each."""
    from maple_trl.data.daily_omni import load_daily_omni

    found = list(load_daily_omni(folder))
    if not found:
        raise ValueError(f"{folder} has no question whose clip is there")
    rows = []
    for number in range(CLIP_ROWS):
        row = found[number // 3 % len(found)]
        keep = {name: row[name] for name in ("prompt", "options", "answer", "solution", "video", "audio")}
        question = row["prompt"][0]["content"].split("\n")[0]
        rows.append({**keep, "question": question, "id": f"clip-{number:03}", "tag": ("V", "A", "VA")[number % 3]})
    return rows


def on_clips(seed: int, folder: Path, steps: int = CLIP_STEPS) -> dict[str, Any]:
    """Do the same on real clips of a folder in Daily-Omni's layout."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory(prefix="claims-clips-") as table:
        rows = Dataset.from_list(clip_rows(folder))
        for split in ("train", "test"):
            rows.to_parquet(str(Path(table, f"{split}.parquet")))
        options = {
            "dataset_name": table,
            "media_root": str(folder.resolve()),
            "num_frames": 8,
            "max_pixels": 112 * 112,
            "max_prompt_length": 2048,
            "max_completion_length": 14,
        }
        return variants_in_turn(seed, steps, options)


def ratios(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times the CPU seconds of each variant MUPO takes, seed by seed."""
    names = [name for name in RECIPES if name != "mupo"]
    return {name: [one["mupo"]["cpu"] / one[name]["cpu"] for one in seeds] for name in names}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--clips", metavar="FOLDER", default=os.environ.get("MAPLE_CLIPS"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps on the task's clips; 0: none")
    args = parser.parse_args(argv)
    if args.clips is not None and not Path(args.clips, "qa.json").is_file():
        parser.error(f"--clips {args.clips}: there is no qa.json; a folder in Daily-Omni's layout is asked for")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    result: dict[str, Any] = {"seeds": args.seeds, "task": [], "clips": NOT_RUN if args.clips is None else []}
    for seed in args.seeds:
        if args.steps:
            result["task"].append(variants_in_turn(seed, args.steps, {}))
        if args.clips is not None:
            result["clips"].append(on_clips(seed, Path(args.clips)))
    for part in ("task", "clips"):
        found = result[part]
        if isinstance(found, str) or not found:
            print(f"{part}: {found or NOT_RUN.split(':')[0]}")
            continue
        result[f"{part}_ratios"] = ratios(found)
        for name in RECIPES:
            mean = {key: sum(one[name][key] for one in found) / len(found) for key in found[0][name]}
            times = ", ".join(f"{one['mupo']['cpu'] / one[name]['cpu']:.2f}" for one in found)
            print(
                f"{part}, {name}: {mean['cpu']:.3f} CPU s a step ({mean['generate_cpu']:.3f} + {mean['update_cpu']:.3f}), "
                f"{mean['media_tokens']:.0f} media tokens; MUPO takes {times} times as long"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
