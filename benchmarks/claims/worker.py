"""
Carry out runs and write their results; in processes of their own, so that they share neither memory nor random streams.

    python benchmarks/claims/worker.py RUN.json RESULT.json [RUN.json RESULT.json ...]

RUN.json holds the fields of [`runs.Run`]. Exit status 0: the results are there; the error is on the screen otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"  # results depend on it
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from devices import held
from instruments import INSTRUMENTS, Cost
from runs import QUICK_QUESTIONS, SERIES, Run, is_kept, questions_file, read_result, source, write_result
from scores import encoded_scores, rounded
from tasks import Task, cache_folder, load_task, made_with, prepared, start_of, use_folders

from maple_trl.evaluation import sampled_accuracy
from maple_trl.evaluation.sampled import choose_questions
from maple_trl.jobs.options import parse_args
from maple_trl.jobs.train import build_trainer
from maple_trl.metrics.clips import clips_of


LOG_DIGITS = 4


def job_files(run: Run, folder: Path, output: Path) -> list[tuple[str, Path]]:
    """Write the jobs that `maple-trl train --config` would take, with their names; each begins with the model of the one before."""
    files: list[tuple[str, Path]] = []
    for name, config in run.jobs():
        config = json.loads(json.dumps(config).replace("{folder}", str(folder)))
        if files and run.trained:
            config["model_name_or_path"] = str(files[-1][1].parent)
        config |= {"output_dir": str(output / name), "disable_tqdm": True, "report_to": [], "overwrite": True}
        file = output / name / "job.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        files.append((name, file))
    return files


def job_file(run: Run, folder: Path, output: Path) -> Path:
    """Write the job of a run, the last one where it has several."""
    return job_files(run, folder, output)[-1][1]


def parse_jobs(run: Run, folder: Path, output: Path) -> None:
    """Parse the jobs of a run: every config that they belong to has then accepted them."""
    for _, file in job_files(run, folder, output):
        parse_args(["--config", str(file)])


class Exam:
    """The held-out questions of a task, the same for every run, and what a trainer's policy answers to them."""

    def __init__(self, trainer: Any, task: Task, test: Any):
        self._trainer, self._task = trainer, task
        self._test = [dict(row) for row in test]

    def __call__(self, questions: int, samples: int, accesses: Sequence[str] = ("trained",)) -> dict[str, Any]:
        """
        Ask questions by one or several accesses; `trained` is that of training.

        Returns:
            By access: `accuracy` and `errors` by tag, `samples`, and `questions`, which are in the order of `rows`: id,
            tag, and the sum of the scores of the answers, or `None` where none has a score.
        """
        usual = self._trainer.prompt_builder.modality_access
        found = {access: self._ask(questions, samples, access) for access in accesses if access != "trained"}
        if "trained" in accesses:
            found["trained"] = found[usual] if usual in found else self._ask(questions, samples, usual)
        return found

    def rows(self, questions: int) -> list[Mapping[str, Any]]:
        """Return so many questions of each tag, in the order in which they are asked."""
        return choose_questions(self._test, questions)

    def _ask(self, questions: int, samples: int, access: str) -> dict[str, Any]:
        answered: list[bool] = []
        scored: list[float | None] = []

        def generate(asked: Sequence[Any]) -> Sequence[str | None]:
            texts = self._trainer.generate_completions(asked)
            answered.extend(text is not None for text in texts)
            return texts

        def score(**columns: Any) -> list[float | None]:
            scored.extend(self._task.score(**columns))
            return scored

        builder = self._trainer.prompt_builder
        usual, builder.modality_access = builder.modality_access, access
        try:
            found = sampled_accuracy(generate, self._test, score, questions, 0, samples)
        finally:
            builder.modality_access = usual
        each = iter(scored)
        by_answer = [next(each) if known else None for known in answered]
        by_question = [by_answer[start : start + samples] for start in range(0, len(by_answer), samples)]
        return {
            "accuracy": found.accuracy,
            "errors": found.errors,
            "samples": samples,
            "questions": [
                [row["id"], row["tag"], summed(own)]
                for row, own in zip(self.rows(questions), by_question, strict=True)
            ],
        }


def summed(scores: Sequence[float | None]) -> float | None:
    """Return the sum of a question's scores, in which answers without one count as the mean of the others."""
    known = [score for score in scores if score is not None and not math.isnan(score)]
    return sum(known) / len(known) * len(scores) if known else None


def compact(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what an exam found as a result keeps it: the scores of questions as a string of digits."""
    return {
        access: {name: value for name, value in one.items() if name not in ("questions", "errors")}
        | {"error": one["errors"]["all"]}
        | encoded_scores([summed for *_, summed in one["questions"]], one["samples"])
        for access, one in found.items()
    }


def told_questions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is kept of questions once for all runs: their ids, their tags, and which of them share a clip."""
    numbers: dict[Any, int] = {}
    clips = [row["id"] if clip is None else clip for row, clip in zip(rows, clips_of(rows), strict=True)]
    return {
        "ids": [row["id"] for row in rows],
        "tags": [row["tag"] for row in rows],
        "clips": [numbers.setdefault(clip, len(numbers)) for clip in clips],
    }


def keep_questions(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the questions of a task's version, or see that they are those which its other runs were asked."""
    told, there = told_questions(rows), read_result(file)
    if there is None:
        write_result(file, told)
    elif there != told:
        raise ValueError(f"the questions are others than in {file}: a task whose questions change has another VERSION")


def series(log: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return what is kept of a run's log, as means over equal stretches of its steps."""
    names = sorted({name for entry in log for name, value in entry.items() if isinstance(value, int | float)})
    found: dict[str, list[float | None]] = {}
    for name in names:
        if not is_kept(name):
            continue
        means: list[float | None] = []
        for part in range(SERIES):
            stretch = log[len(log) * part // SERIES : len(log) * (part + 1) // SERIES]
            values = [entry[name] for entry in stretch if isinstance(entry.get(name), int | float)]
            means.append(sum(values) / len(values) if values else None)
        found[name] = rounded(means, LOG_DIGITS)
    return found


def carry_out(run: Run, questions: Path | None = None) -> dict[str, Any]:
    """
    Train and measure, on the task's device; return the result.

    Args:
        questions: the file where the questions are kept, once for all runs of the task's version.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    task = load_task(run.task)
    with held(task, cache_folder()):
        return _carried_out(run, task, questions)


def _carried_out(run: Run, task: Task, questions: Path | None) -> dict[str, Any]:
    folder = prepared(run.task, run.quick)
    asked, samples = (QUICK_QUESTIONS, 1) if run.quick else (task.QUESTIONS, task.SAMPLES)
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="claims-") as output:
        *earlier, (_, last) = job_files(run, folder, Path(output))
        stages = [
            {"name": name} | carry_out_stage(file, task, folder, asked, samples)
            for name, file in (earlier if run.trained else ())
        ]
        trainer = job_trainer(last)
        exam = Exam(trainer, task, task.held_out(folder))
        if questions is not None:
            keep_questions(questions, exam.rows(asked))
        cost = Cost(trainer)
        watched = {name: INSTRUMENTS[name](trainer, exam, cost) for name in run.instruments}
        if run.trained:
            trainer.train()
        found = {
            "after": compact(exam(asked, samples, ("trained", *task.ACCESSES))),
            "cost": cost.result(),
            "log": series([entry for entry in trainer.state.log_history if "loss" in entry]),
            **({"stages": stages} if stages else {}),
            **{name: one.result() for name, one in watched.items()},
        }
    return {
        **run.identity(),
        "recipe": run.recipe,
        "options": dict(run.options),
        "seed": run.seed,
        "packages": made_with(task),
        "source": source(),
        "start": start_of(folder),
        "minutes": rounded((time.process_time() - began) / 60),
        **rounded(found),
    }


def job_trainer(file: Path) -> Any:
    """Build the trainer of a job that prints nothing."""
    from transformers import PrinterCallback

    trainer, _ = build_trainer(*parse_args(["--config", str(file)]))
    trainer.remove_callback(PrinterCallback)
    return trainer


def carry_out_stage(file: Path, task: Task, folder: Path, asked: int, samples: int) -> dict[str, Any]:
    """Train a stage that others follow, leave its model beside its job, and measure it."""
    trainer = job_trainer(file)
    cost = Cost(trainer)
    trainer.train()
    trainer.save_model(str(file.parent))
    trainer.processing_class.save_pretrained(str(file.parent))
    told = {
        "after": compact(Exam(trainer, task, task.held_out(folder))(asked, samples)),
        "cost": cost.result(),
        "log": series([entry for entry in trainer.state.log_history if "loss" in entry]),
    }
    trainer.loader.close()
    return told


def end_with(process: int) -> None:
    """End this process soon after another has ended, however that ended."""

    def watch() -> None:
        while True:
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out the runs that a command line names, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="RUN.json RESULT.json")
    parser.add_argument("--tasks", type=Path, help="a folder with further tasks")
    parser.add_argument("--cache", type=Path, help="where tasks keep what they make")
    parser.add_argument("--tied", type=int, metavar="PID", help="end when this process ends")
    told = parser.parse_args(argv)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # trainers would split batches over all GPUs that they see
    if told.tied:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no folders behind
        end_with(told.tied)
    use_folders(told.tasks, told.cache)
    if len(told.files) % 2:
        parser.error("each RUN.json needs a RESULT.json")
    failed = False
    for described, file in zip(told.files[::2], told.files[1::2], strict=True):
        print(f"== {file.stem}", flush=True)
        try:
            run = Run(**json.loads(described.read_text(encoding="utf-8")))
            if read_result(file) is None:
                write_result(file, carry_out(run, questions_file(file, run.identity())))
        except Exception:
            failed = True
            traceback.print_exc()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
