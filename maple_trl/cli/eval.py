"""The command `maple-trl eval`: its options, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

_EXAMPLES = """\
examples:
  maple-trl eval --model_name_or_path builtin:tiny-omni --dataset_name builtin:seven-tags --num_frames 4 --max_completion_length 14 --output_dir runs/eval
  maple-trl eval --model_name_or_path NAME --adapter runs/mapo --dataset_name rows.parquet --access required,V,A,S,VA,VS,AS,VAS --output_dir OUT
  maple-trl eval --model_name_or_path NAME --benchmark daily-omni --dataset_name FOLDER --output_dir OUT
  maple-trl eval --model_name_or_path NAME --preset avatar --benchmark lvbench --dataset_name FOLDER --output_dir OUT
  maple-trl eval --model_name_or_path NAME --server http://127.0.0.1:8000/v1 --dataset_name rows.parquet --output_dir OUT
  maple-trl eval --model_name_or_path NAME --dataset_name captions.parquet --reward_funcs caption_judge --judge_model NAME --judge_server URL --output_dir OUT
  maple-trl eval --config eval.yaml --limit 100

Several processes: accelerate launch --num_processes N -m maple_trl.cli eval ...

Written into OUTPUT: result.json (accuracies, and all that decides them), rows.parquet (every completion), run.json
(times) and with --report report.html. An evaluation that was stopped goes on when the same command is given again.

--preset maple-qa, maple-caption or avatar sets decoding, frames, lengths and prompts as that paper evaluates; any option that
is given wins.

A clip longer than --max_media_seconds is seen over its whole length, and heard in parts that are spread over it; how much of
the sound was left out is counted in result.json.

A config file (--config FILE) holds the options as keys, with _ for -; what stands on the command line wins. extends: names files to build
on. A key that is no option is refused.

A question whose media cannot be used is in no accuracy: it is counted and named, and result.json says what the accuracy
would be if all of these were wrong, and if all were right.

Exit status: 0; 1 when more rows have errors than --max_errors allows, no question could be scored, or the scoring
function or the server failed; 2 for a wrong description; 130 when interrupted.
"""

_DESCRIPTION = (
    "Asks a model every question several times and reports accuracy by tag, with intervals and all that decides it."
)
# What holds the options; read from their sources for the help, which answers at once.
_PLACES = {
    "options": "maple_trl.jobs.eval_job:EvalArguments",
    "asking": "maple_trl.evaluation.options:EvalOptions",
    "media, as in a training job": "maple_trl.jobs.eval_job:EvalMedia",
}


def _print_help() -> int:
    from maple_trl.jobs.declared import declared_class
    from maple_trl.jobs.options import OptionParser

    types = {title: declared_class(place) for title, place in _PLACES.items()}
    for title, kind in types.items():
        kind._argument_group_name = title
    OptionParser(types.values(), prog="maple-trl eval", description=_DESCRIPTION, epilog=_EXAMPLES).print_help()
    return 0


def read_job(words: Sequence[str]) -> EvalJob:
    """
    Read an evaluation as a command line and config files describe it.

    Raises:
        SetupError: for what is unknown, missing or wrong.
    """
    from maple_trl.evaluation.options import EvalOptions
    from maple_trl.jobs.eval_job import EvalArguments, EvalJob, EvalMedia
    from maple_trl.jobs.eval_presets import preset_values
    from maple_trl.jobs.options import OptionParser, read_options

    parser, set_by_preset = OptionParser([EvalArguments, EvalOptions, EvalMedia], prog="maple-trl eval"), {}

    def further(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        set_by_preset.update(preset_values(values, given))
        return set_by_preset

    required = ("model_name_or_path", "dataset_name", "output_dir")
    arguments, options, media = read_options(parser, words, required, further)
    return EvalJob(**vars(arguments), options=options, media=media, set_by_preset=set_by_preset)


def run_eval(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    if asks_for_help(words):
        return _print_help()
    from maple_trl.evaluation.options import ScoringError, ServerError
    from maple_trl.jobs.errors import SetupError
    from maple_trl.records.evaluations import EvaluationError

    folder, again = None, "the same command goes on from the last finished batch"
    try:
        job = read_job(words)
        folder = job.output_dir
        if job.quiet:
            _hush()
        from maple_trl.cli.eval_print import print_results
        from maple_trl.jobs.evaluate import run_evaluation

        result = run_evaluation(job)
    except (ScoringError, ServerError) as error:
        return fail("eval", error, folder, again)
    except (SetupError, EvaluationError) as error:
        return refuse("eval", error, 2, folder)
    except KeyboardInterrupt:
        return refuse("eval", f"stopped; {again}", 130)
    except Exception as error:
        return fail("eval", error, folder, again if folder and Path(folder, "evaluation.json").is_file() else "")
    if result is None:  # the first process tells
        return 0
    if job.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_results(result, job.output_dir)
    status = _status(result, job.max_errors)
    return status if job.report is None else max(status, _report(job.output_dir, job.report))


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
        from maple_trl.reports import ReportError, write_report

        write_report([folder], path)
    except (ReportError, ImportError, OSError) as error:
        print(f"maple-trl eval: no report: {error}", file=sys.stderr)
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
