"""The command `maple-trl eval`: its options, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.cli.loading import tell_when_loading


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

_ERRORS = ("maple_trl.evaluation.options:ScoringError", "maple_trl.evaluation.options:ServerError")
EVALUATION_ERRORS = {"maple_trl.records.evaluations:EvaluationError": WRONG, **dict.fromkeys(_ERRORS, FAILED)}


def run(job: EvalJob) -> int:
    """Evaluate, and print accuracies by tag."""
    if job.dry_run:
        from maple_trl.cli.dry_run import tell
        from maple_trl.jobs.forecasts import forecast_evaluation

        return tell(forecast_evaluation(job), job.json)
    if job.quiet:
        _hush()
    from maple_trl.cli.eval_print import print_results
    from maple_trl.jobs.evaluate import run_evaluation

    result = run_evaluation(job)
    if result is None:  # the first process tells
        return 0
    if job.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_results(result, job.output_dir)
    status = _status(result, job.max_errors)
    return status if job.report is None else max(status, _report(job.output_dir, job.report))


class EvalCommand(Command):
    """Reads presets too."""

    def read(self, words: Sequence[str]) -> tuple[EvalJob]:
        """Read an evaluation."""
        if "--json" not in words:
            tell_when_loading()
        return (read_job(words),)


def read_job(words: Sequence[str]) -> EvalJob:
    """
    Read an evaluation as a command line and config files describe it.

    Raises:
        SetupError: for what is unknown, missing or wrong.
    """
    from maple_trl.jobs.eval_job import EvalJob
    from maple_trl.jobs.eval_presets import preset_values
    from maple_trl.jobs.options import read_options

    set_by_preset: dict[str, Any] = {}

    def further(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        set_by_preset.update(preset_values(values, given))
        return set_by_preset

    arguments, options, media = read_options(COMMAND.parser(), words, COMMAND.required, further)
    return EvalJob(**vars(arguments), options=options, media=media, set_by_preset=set_by_preset)


def _hush() -> None:
    """Turn off the progress bars of libraries, which they show in files of a log as well."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _report(folder: str, file: str) -> int:
    """Write the report; what stops it costs nothing, as the numbers are there already."""
    path = Path(file or Path(folder, "report.html"))
    try:
        from maple_trl.reports import write_report

        write_report([folder], path)
    except Exception as error:
        print(f"maple-trl eval: no report: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"report: {path}", file=sys.stderr)
    return 0


def _status(result: dict, max_errors: int) -> int:
    rows = {error["row"] for error in result["errors"]}
    if len(rows) > max_errors:
        found = "1 row has errors" if len(rows) == 1 else f"{len(rows)} rows have errors"
        print(
            f"maple-trl eval: {found}, more than --max-errors {max_errors}; result.json names them",
            file=sys.stderr,
        )
    scored = any(found["counts"]["scored"] for found in result["accesses"].values())
    if not scored:
        print("maple-trl eval: no question could be scored; result.json says why", file=sys.stderr)
    return int(len(rows) > max_errors or not scored)


COMMAND = EvalCommand(
    name="eval",
    help="measure a model on a data set or benchmark, by tag and by choice of signals",
    run=run,
    description="Asks a model every question several times and reports accuracy by tag, with intervals and all that decides it.",
    examples=(
        "maple-trl eval --model_name_or_path builtin:tiny-omni --dataset_name builtin:seven-tags --num_frames 4 "
        "--max_completion_length 14 --output_dir runs/eval",
        "maple-trl eval --model_name_or_path NAME --adapter runs/mapo --dataset_name rows.parquet "
        "--access required,V,A,S,VA,VS,AS,VAS --output_dir OUT",
        "maple-trl eval --model_name_or_path NAME --benchmark daily-omni --dataset_name FOLDER --output_dir OUT",
        "maple-trl eval --model_name_or_path NAME --preset avatar --benchmark lvbench --dataset_name FOLDER --output_dir OUT",
        "maple-trl eval --model_name_or_path NAME --server http://127.0.0.1:8000/v1 --dataset_name rows.parquet "
        "--output_dir OUT",
        "maple-trl eval --model_name_or_path NAME --dataset_name captions.parquet --reward_funcs caption_judge "
        "--judge_model NAME --judge_server URL --output_dir OUT",
        "maple-trl eval --config eval.yaml --limit 100 --dry_run",
    ),
    notes="""\
Written into OUT: result.json (accuracies, and all that decides them), rows.parquet (every completion), run.json (times) and
with --report report.html. An evaluation that was stopped goes on when the same command is given again.

--preset maple-qa, maple-caption or avatar sets decoding, frames, lengths and prompts as that paper evaluates; any option that
is given wins.

A clip longer than --max_media_seconds is seen over its whole length, and heard in parts that are spread over it; how much of
the sound was left out is counted in result.json.

A config file may build on others, with the key extends. A key that is no option is refused.

A question whose media cannot be used is in no accuracy: it is counted and named, and result.json says what the accuracy
would be if all of these were wrong, and if all were right.""",
    statuses={
        FAILED: "more rows have errors than --max_errors allows, no question could be scored, or the scoring function, the "
        "server or the report failed",
    },
    options={
        "options": "maple_trl.jobs.eval_job:EvalArguments",
        "asking": "maple_trl.evaluation.options:EvalOptions",
        "media, as in a training job": "maple_trl.jobs.eval_job:EvalMedia",
    },
    required=("model_name_or_path", "dataset_name", "output_dir"),
    errors=EVALUATION_ERRORS,
    writes=lambda job: job.output_dir,
    stopped="the same command goes on from the last finished batch",
    again="the same command goes on from the last finished batch",
    begun=lambda folder: Path(folder, "evaluation.json").is_file(),
    several=True,
)
