"""
Carry out one run and write its result; a process of its own, so that runs share neither memory nor random streams.

    python benchmarks/claims/worker.py RUN.json RESULT.json

RUN.json holds the fields of [`runs.Run`]. Exit status 0: the result is there; the error is on the screen otherwise.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"  # results depend on it
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import yaml
from instruments import INSTRUMENTS, Cost
from runs import Run, read_result, write_result
from tasks import Task, load_task, prepared

from maple_trl.evaluation import sampled_accuracy
from maple_trl.evaluation.sampled import choose_questions
from maple_trl.jobs.options import parse_args
from maple_trl.jobs.train import build_trainer


PACKAGES = ("maple-trl", "torch", "transformers", "trl", "accelerate", "datasets")
SERIES = 24
"""Points that are kept of what a run logs: means over as many stretches of it."""


def job_files(run: Run, folder: Path, output: Path) -> list[tuple[str, Path]]:
    """Write the jobs that `maple-trl train --config` would take, with their names; each begins with the model of the one before."""
    files: list[tuple[str, Path]] = []
    for name, config in run.jobs():
        config = json.loads(json.dumps(config).replace("{folder}", str(folder)))
        if files and run.trained:
            config["model_name_or_path"] = str(files[-1][1].parent)
        config |= {
            "output_dir": str(output / name),
            "evaluate_before_after": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "per_device_eval_batch_size": 448,
            "report_to": [],
            "overwrite": True,
        }
        file = output / name / "job.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        files.append((name, file))
    return files


def measuring(trainer: Any, task: Task, test: Any) -> Callable[..., dict[str, Any]]:
    """Return a function that asks the policy held-out questions, the same each time, by one or several accesses."""
    builder = trainer.prompt_builder
    usual = builder.modality_access

    def measure(questions: int, samples: int, accesses: tuple[str, ...] = ("trained",)) -> dict[str, Any]:
        asked = [dict(row) for row in choose_questions(test, questions)]
        found: dict[str, Any] = {}
        for access in accesses:
            builder.modality_access = usual if access == "trained" else access
            scores: list[float | None] = []

            def score(**columns: Any) -> list[float | None]:
                scores.extend(task.score(**columns))
                return scores

            try:
                answers = sampled_accuracy(trainer.generate_completions, asked, score, questions, 0, samples)
            finally:
                builder.modality_access = usual
            by_question = [scores[i : i + samples] for i in range(0, len(scores), samples)]
            found[access] = {
                "accuracy": answers.accuracy,
                "errors": answers.errors,
                "questions": [
                    [row["id"], row["tag"], sum(map(float, own))] for row, own in zip(asked, by_question, strict=True)
                ],
                "samples": samples,
            }
        return found

    return measure


def series(log: list[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return what a run logged, as means over equal stretches of its steps."""
    names = sorted({name for entry in log for name, value in entry.items() if isinstance(value, int | float)})
    found: dict[str, list[float | None]] = {}
    for name in names:
        if name.startswith(("memory/", "media/")):
            continue
        means: list[float | None] = []
        for part in range(SERIES):
            stretch = log[len(log) * part // SERIES : len(log) * (part + 1) // SERIES]
            values = [entry[name] for entry in stretch if isinstance(entry.get(name), int | float)]
            means.append(round(sum(values) / len(values), 6) if values else None)
        found[name] = means
    return found


def carry_out(run: Run) -> dict[str, Any]:
    """Train and measure; return the result."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    task, folder = load_task(run.task), prepared(run.task)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="claims-") as output:
        *earlier, (_, last) = job_files(run, folder, Path(output))
        stages = [{"name": name} | carry_out_stage(file, task, folder) for name, file in earlier if run.trained]
        trainer = job_trainer(last)
        measure = measuring(trainer, task, task.held_out(folder))
        cost = Cost(trainer)
        watched = {name: INSTRUMENTS[name](trainer, measure, cost) for name in run.instruments}
        accesses = ("trained", *task.ACCESSES)
        if run.trained:
            trainer.train()
        return {
            **run.identity(),
            "seed": run.seed,
            "packages": {name: version(name) for name in PACKAGES},
            "minutes": (time.perf_counter() - began) / 60,
            "after": measure(task.QUESTIONS, task.SAMPLES, accesses),
            "cost": cost.result(),
            "log": series([entry for entry in trainer.state.log_history if "loss" in entry]),
            **({"stages": stages} if stages else {}),
            **{name: one.result() for name, one in watched.items()},
        }


def job_trainer(file: Path) -> Any:
    """Build the trainer of a job that prints nothing."""
    from transformers import PrinterCallback

    trainer, _ = build_trainer(*parse_args(["--config", str(file)]))
    trainer.remove_callback(PrinterCallback)
    return trainer


def carry_out_stage(file: Path, task: Task, folder: Path) -> dict[str, Any]:
    """Train a stage that others follow, leave its model beside its job, and measure it."""
    trainer = job_trainer(file)
    cost = Cost(trainer)
    trainer.train()
    trainer.save_model(str(file.parent))
    trainer.processing_class.save_pretrained(str(file.parent))
    measure = measuring(trainer, task, task.held_out(folder))
    told = {
        "after": measure(task.QUESTIONS, task.SAMPLES),
        "cost": cost.result(),
        "log": series([entry for entry in trainer.state.log_history if "loss" in entry]),
    }
    trainer.loader.close()
    return told


def main(argv: list[str]) -> None:
    told, file = json.loads(Path(argv[0]).read_text(encoding="utf-8")), Path(argv[1])
    run = Run(**told)
    if read_result(file) is None:
        write_result(file, carry_out(run))


if __name__ == "__main__":
    main(sys.argv[1:])
