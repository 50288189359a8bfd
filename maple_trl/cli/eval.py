"""The command `maple-trl eval`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.cli.eval_config import settle, take_settings_apart
from maple_trl.cli.failures import fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from maple_trl.jobs.eval_job import EvalJob

_EXAMPLES = """\
examples:
  maple-trl eval --model builtin:tiny-omni --data builtin:seven-tags --num-frames 4 --max-new-tokens 14 --output runs/eval
  maple-trl eval --model NAME --adapter runs/mapo --data rows.parquet --access required,V,A,S,VA,VS,AS,VAS --output OUT
  maple-trl eval --model NAME --benchmark daily-omni --data FOLDER --output OUT
  maple-trl eval --model NAME --server http://127.0.0.1:8000/v1 --data rows.parquet --output OUT
  maple-trl eval --model NAME --data captions.parquet --judge caption_judge --judge-model NAME --judge-server URL --output OUT
  maple-trl eval --config eval.yaml --limit 100

Several processes: accelerate launch --num_processes N -m maple_trl.cli eval ...

Written into OUTPUT: result.json (accuracies, and all that decides them), rows.parquet (every completion), run.json
(times) and with --report report.html. An evaluation that was stopped goes on when the same command is given again.

A config file holds the options as keys, with _ for -; what stands on the command line wins. extends: names files to build
on. A key that is no option is refused.

A question whose media cannot be used is in no accuracy: it is counted and named, and result.json says what the accuracy
would be if all of these were wrong, and if all were right.

Exit status: 0; 1 when more rows have errors than --max-errors allows, no question could be scored, or the scoring
function or the server failed; 2 for a wrong description; 130 when interrupted.
"""

_MEDIA = (
    ("num_frames", int, "N", "frames per video, evenly from its first picture to its last (8)"),
    ("video_fps", float, "RATE", "frames per second instead of --num-frames"),
    ("max_frames", int, "N", "most frames of one video (64)"),
    ("min_pixels", int, "N", "fewest pixels of a frame (3136)"),
    ("max_pixels", int, "N", "most pixels of a frame (100352)"),
    ("max_media_seconds", float, "S", "longest clip (300)"),
    ("media_decode_timeout", float, "S", "seconds that decoding one clip may take (60)"),
    ("media_workers", int, "N", "processes that decode media; 0: decode in this process (2)"),
    ("media_worker_bytes", int, "N", "memory that each of them may have (4 GiB)"),
    ("media_cache_bytes", int, "N", "memory for decoded clips (2 GiB)"),
    ("max_prompt_length", int, "N", "tokens per prompt; a subtitle is shortened to fit"),
    ("max_media_tokens", int, "N", "video and audio tokens per prompt; frames are made smaller to fit"),
    ("subtitle_template", str, "TEXT", "text around a subtitle; holds {subtitle}"),
    ("media_root", str, "FOLDER", "folder below which the media lie (that of the data)"),
)


def add_eval_command(commands: argparse._SubParsersAction) -> None:
    """Adds `eval` to the parser of `maple-trl`."""
    parser = commands.add_parser(
        "eval",
        help="measure a model on a data set or benchmark, per tag and per choice of signals",
        description="Asks a model every question several times and reports accuracy by tag, with intervals and all that "
        "decides it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with these options")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="folder, Hub id, builtin:tiny-omni, or adapter; with --server the name there (required)",
    )
    model.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter for the model")
    model.add_argument("--dtype", default="auto", metavar="TYPE", help="precision (that of the checkpoint)")
    model.add_argument("--attn-implementation", metavar="NAME", help="attention, e.g. sdpa")
    model.add_argument("--revision", default="main", metavar="NAME", help="of a model on the Hub (main)")
    model.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")
    model.add_argument("--device", choices=("auto", "cpu"), default="auto", help="where to compute (auto)")
    served = parser.add_argument_group("a model behind a server")
    served.add_argument("--server", metavar="URL", help="OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1")
    served.add_argument(
        "--server-video",
        default="images",
        metavar="FORM",
        help="how frames are sent: images (each as a picture) or video_url (as one video, which vLLM reads) (images)",
    )
    served.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (OPENAI_API_KEY)"
    )
    served.add_argument("--api-key-file", metavar="FILE", help="file with the key, instead of the variable")
    served.add_argument("--concurrency", type=int, default=16, metavar="N", help="calls open at once (16)")
    served.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds of one call (600)")
    data = parser.add_argument_group("questions")
    data.add_argument(
        "--data",
        metavar="NAME",
        help="builtin:seven-tags, a .parquet/.jsonl/.json/.csv/.tsv file, a folder with one per split, a Hub id; with --benchmark "
        "the folder of its files (required)",
    )
    data.add_argument("--benchmark", metavar="NAME", help="read --data as this benchmark, e.g. daily-omni")
    data.add_argument(
        "--prompt-style",
        default="think",
        metavar="NAME",
        help="form of a benchmark's prompts: think, answer, or brackets, which asks for [B] and reads that (think)",
    )
    data.add_argument(
        "--missing-media",
        choices=("keep", "leave_out", "error"),
        default="keep",
        help="a benchmark's questions whose files are not there: errors by name, left out, or refused (keep)",
    )
    data.add_argument("--split", metavar="NAME", help="of the data (test; a benchmark's first)")
    data.add_argument("--filter", metavar="JSON", help='rows to use, e.g. {"tag": ["V", "VA"]}')
    data.add_argument("--limit", type=int, metavar="N", help="the first N of these rows")
    asking = parser.add_argument_group("asking")
    asking.add_argument(
        "--access",
        default="required",
        metavar="LIST",
        help="what rows are fed, one or several joined by commas: required (the signals of the row's tag), all (all it "
        "has), or tags (exactly these: V,A,S,VA,VS,AS,VAS is the whole ablation) (required)",
    )
    asking.add_argument("--samples", type=int, default=5, metavar="N", help="completions per question (5)")
    asking.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions per pass (8)")
    asking.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    asking.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest completion (512)")
    asking.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 is greedy, with --samples 1 (1)"
    )
    asking.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; 1 cuts nothing (1)")
    asking.add_argument("--top-k", type=int, default=0, metavar="K", help="best K tokens; 0 cuts nothing (0)")
    asking.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="share of the best token's probability (0)"
    )
    asking.add_argument(
        "--generation",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further options of GenerationConfig; with --server further fields of a request",
    )
    asking.add_argument("--no-shared-prompt", action="store_true", help="pass the prompt once for each sample")
    asking.add_argument(
        "--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help="arguments of the chat template"
    )
    media = parser.add_argument_group("media, as in a training job")
    for name, kind, metavar, text in _MEDIA:
        media.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    media.add_argument("--overlong-media", choices=("quarantine", "trim"), help="what becomes of a longer clip")
    media.add_argument("--media-backend", choices=("pyav", "torchcodec", "auto"), help="decoder of frames (pyav)")
    media.add_argument("--audio-in-video", action="store_true", default=None, help="interleave audio with the video")
    media.add_argument("--media-allow-network", action="store_true", default=None, help="take http(s) URLs")
    results = parser.add_argument_group("results")
    results.add_argument("--output", metavar="FOLDER", help="folder of the results (required)")
    results.add_argument(
        "--judge",
        default="accuracy_reward",
        metavar="NAME",
        help="what scores completions, from 0 to 1, as an entry of a training job's rewards: a name, module:function, or a "
        'mapping as JSON, e.g. {"reward": "caption_judge", "server": {"model": "NAME"}} (accuracy_reward)',
    )
    results.add_argument(
        "--judge-model", metavar="NAME", help="model of a judge that is given by its name, e.g. --judge caption_judge"
    )
    results.add_argument(
        "--judge-server", metavar="URL", help="where that model is: a URL, or local: in this process (the API's own)"
    )
    results.add_argument("--max-errors", type=int, default=0, metavar="N", help="rows with errors allowed (0)")
    results.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (0.95)")
    results.add_argument("--overwrite", action="store_true", help="begin anew where OUTPUT holds an evaluation")
    results.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="write an HTML report as well, as maple-trl report does (report.html in OUTPUT)",
    )
    results.add_argument("--quiet", action="store_true", help="show no progress")
    results.add_argument("--json", action="store_true", help="print result.json")
    take_settings_apart(parser)


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def run_eval(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status is as the help says."""
    from maple_trl.evaluation.options import ScoringError, ServerError
    from maple_trl.jobs.errors import SetupError
    from maple_trl.records.evaluations import EvaluationError

    folder, again = None, "the same command goes on from the last finished batch"
    try:
        arguments = settle(arguments)
        folder = arguments.output
        if arguments.quiet:
            _hush()
        job = _job(arguments)
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
    if arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_results(result, job.output)
    status = _status(result, arguments.max_errors)
    return status if arguments.report is None else max(status, _report(job.output, arguments.report))


def _hush() -> None:
    """No progress of the libraries below, which show theirs in files of a log as well."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _report(folder: str, file: str) -> int:
    """Writes the report; the numbers are there already, so that what stops it costs nothing."""
    path = Path(file or Path(folder, "report.html"))
    try:
        from maple_trl.reports import ReportError, write_report

        write_report([folder], path)
    except (ReportError, ImportError, OSError) as error:
        print(f"maple-trl eval: no report: {error}", file=sys.stderr)
        return 1
    print(f"report: {path}", file=sys.stderr)
    return 0


def _job(arguments: argparse.Namespace) -> EvalJob:
    from maple_trl.evaluation.options import EvalOptions, parse_access
    from maple_trl.jobs.errors import SetupError

    if arguments.max_errors < 0:
        raise SetupError(f"--max-errors must be 0 or more, got {arguments.max_errors}")
    names = "samples batch_size seed max_new_tokens temperature top_p top_k min_p generation".split()
    options = EvalOptions(
        access=parse_access(arguments.access),
        shared_prompt=not arguments.no_shared_prompt,
        **{name: getattr(arguments, name) for name in names},
    )
    from maple_trl.jobs.eval_job import EvalJob, EvalMedia

    names = [
        *(name for name, *_ in _MEDIA),
        "overlong_media",
        "media_backend",
        "audio_in_video",
        "media_allow_network",
    ]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "video_fps" in given:
        given.setdefault("num_frames", None)
    try:
        media = EvalMedia(**given)
    except ValueError as error:
        raise SetupError(str(error)) from error
    names = "model adapter data benchmark split prompt_style missing_media filter limit judge output chat_template_kwargs dtype"
    names += " attn_implementation revision trust_remote_code device confidence overwrite quiet"
    names += " judge_model judge_server server server_video api_key_env api_key_file concurrency timeout"
    return EvalJob(options=options, media=media, **{name: getattr(arguments, name) for name in names.split()})


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
