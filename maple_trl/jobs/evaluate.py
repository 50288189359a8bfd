"""One evaluation from parsed options: model, data, scoring, the processes that share the work, and its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from maple_trl.data.benchmarks import read_benchmark
from maple_trl.evaluation.base import BaseEvaluator
from maple_trl.evaluation.identity import PARSER_VERSION, describe_function, rows_digest, versions
from maple_trl.evaluation.options import ServerError
from maple_trl.evaluation.results import evaluation_results
from maple_trl.files import as_json, digest, write_atomically
from maple_trl.jobs.checks import check_writable
from maple_trl.jobs.console import show_messages
from maple_trl.jobs.data import filter_rows, load_datasets
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.eval_job import EvalJob, EvalMedia
from maple_trl.jobs.eval_presets import settle_template
from maple_trl.jobs.models import LocalModel, ServedModel
from maple_trl.jobs.options import OmniScriptArguments
from maple_trl.jobs.scoring import Scoring
from maple_trl.locks import LockedError, lock_file
from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prompt import PromptBuilder, RowError, check_template
from maple_trl.records.evaluations import EvalStore, EvaluationError
from maple_trl.records.options import deciding
from maple_trl.rewards.calls import RewardError, check_rewards
from maple_trl.trainers.common.rows import check_spelling


FORMAT = 7
"""Version of what `result.json` and `rows.parquet` hold."""


def run_evaluation(job: EvalJob) -> dict[str, Any] | None:
    """
    Run an evaluation, or continue one that was stopped; every process of a launch must call it.

    Batches are cut from the data set alone and shared out among the processes. Results do not depend on their number,
    nor on interruptions.

    Args:
        job ([`EvalJob`]): what is asked, of which model, and where results go.

    Returns:
        `dict` or `None`: what `result.json` holds; `None` in all processes but the first.

    Raises:
        SetupError, EvaluationError: when the evaluation is described wrongly.
    """
    with ExitStack() as held:
        return _evaluate(job, held)


def _evaluate(job: EvalJob, held: ExitStack) -> dict[str, Any] | None:
    started, clock = datetime.now(UTC), time.monotonic()
    state = PartialState(cpu=job.device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=30))
    check_described(job)
    store = EvalStore(job.output_dir)
    questions = load_questions(job)
    scoring = check_scoring(job, questions)
    check_media_root(questions.media_root)
    if state.is_main_process and not job.quiet:
        show_messages()
    model = LocalModel(job, state) if job.server is None else ServedModel(job)
    try:
        model.family.check_pixels(job.media.max_pixels)
    except ValueError as error:
        raise SetupError(str(error)) from error
    try:
        with _loader(job, questions.media_root) as loader:
            builder = job.media.prompt_builder(model.family, loader, job.chat_template_kwargs)
            if isinstance(model, LocalModel):
                try:
                    asked = _askable(builder, questions.rows)
                    check_template(builder, [row.get("prompt") for row in asked], asked)
                except RowError as error:
                    raise SetupError(f"{questions.described['name']}, {error}") from error
            evaluator = model.evaluator(builder, questions.rows, scoring.function, scoring.extract, job.options)
            # What a report needs of an evaluation that is going on, too.
            run = {
                "started": started.isoformat(timespec="seconds"),
                "media_root": os.path.abspath(questions.media_root),
            }
            identity = _on_first(
                state,
                lambda: _begin(store, held, _identity(job, questions, evaluator, model, scoring), run, job.overwrite),
            )
            done = [batch.number for batch in evaluator.batches if store.complete or store.has(batch.number)]
            state.wait_for_everyone()  # until all have counted
            if not store.complete:
                if isinstance(model, LocalModel):
                    model.check(evaluator)
                else:
                    _on_first(state, lambda: model.check(evaluator))
                _ask(evaluator, store, state, job.quiet)
            state.wait_for_everyone()
    finally:
        model.close()
        scoring.close()
    if not state.is_main_process:
        return None
    store.finish(len(evaluator.batches), evaluator.skipped)
    result = {**identity, **_results(store, job), "left_out": questions.left_out}
    run |= {
        "seconds": round(time.monotonic() - clock, 2),  # of this start
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        "batches": len(evaluator.batches),
        "batches_done_before": len(done),
        "server": job.server,
        "judging": scoring.spent,
    }
    _write_run(store, run)
    write_atomically(store.folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _askable(builder: PromptBuilder, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return rows as they are asked, without those that cannot be, which the evaluator names."""
    found = []
    for row in rows:
        with suppress(RowError):
            found.append(builder.asked(row))
    return found


def check_described(job: EvalJob) -> None:
    """
    Check what an evaluation says by itself, and that its results can be written.

    Raises:
        SetupError: for an option that is out of range or has no effect, and a folder that cannot be written into.
        EvaluationError: for a folder that holds something else.
    """
    if job.limit is not None and job.limit < 1:
        raise SetupError(f"limit must be 1 or more, got {job.limit}")
    if not 0 < job.confidence < 1:
        raise SetupError(f"confidence must be strictly between 0 and 1, e.g. 0.95, got {job.confidence}")
    EvalStore(job.output_dir or ".").check()
    check_writable(job.output_dir or ".", "--output")
    if job.benchmark is None and job.tags is not None:
        raise SetupError(
            "--tags gives the questions of a benchmark other signals; rows of a table say it by themselves (tag)"
        )
    if job.benchmark is None and (job.pictures != "keep" or job.write_media):
        raise SetupError(
            "--pictures and --write_media are for a benchmark's own files; a table's media are read as they are"
        )


def check_columns(job: EvalJob, columns: Sequence[str], name: str) -> None:
    """Raise SetupError for a column that is missing or misspelt in the data set that errors call `name`."""
    try:
        check_spelling(columns, name, makes_prompt=job.media.prompt_template is not None)
    except ValueError as error:
        raise SetupError(str(error)) from error


def check_scoring(job: EvalJob, questions: Questions) -> Scoring:
    """Return what scores the completions; raise SetupError where it is described wrongly, or needs a column that is not there."""
    scoring = Scoring(job, questions.media_root, questions.rows)
    if questions.rows:
        try:
            check_rewards([scoring.function], list(questions.rows[0]), questions.described["name"])
        except RewardError as error:
            raise SetupError(f"--judge: {error}") from error
    return scoring


def check_media_root(media_root: str) -> None:
    """Raise SetupError where there is no folder of media."""
    if not os.path.isdir(media_root):
        raise SetupError(f"media root {media_root!r} is not a folder (--media-root)")


def _loader(job: EvalJob, root: str) -> MediaLoader:
    try:
        host_memory().set_limit(job.media.host_share())
        return job.media.media_loader(root)
    except (FileNotFoundError, RuntimeError) as error:
        raise SetupError(str(error)) from error


def _on_first(state: PartialState, compute: Callable[[], Any]) -> Any:
    """Return what the first process computes, or raise the error that it met, in all processes."""
    found: list[Any] = [None, None, False]
    if state.is_main_process:
        try:
            found[0] = compute()
        except (EvaluationError, SetupError, OSError) as error:
            found[1:] = str(error), isinstance(error, ServerError)
    if state.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise (ServerError if found[2] else EvaluationError)(found[1])
    return found[0]


def _begin(
    store: EvalStore, held: ExitStack, identity: dict[str, Any], run: Mapping[str, Any], overwrite: bool
) -> dict[str, Any]:
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"--output: {store.folder} cannot be made a folder: {error.strerror}") from error
    try:
        held.callback(lock_file(store.folder / ".lock").release)
    except LockedError:
        raise EvaluationError(f"another evaluation is writing into {store.folder}") from None
    store.begin(identity, overwrite)
    _write_run(store, run)
    return identity


def _write_run(store: EvalStore, run: Mapping[str, Any]) -> None:
    write_atomically(store.folder / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def _ask(evaluator: BaseEvaluator, store: EvalStore, state: PartialState, quiet: bool) -> None:
    """Ask this process's share of the batches that are not done."""
    share = evaluator.batches[state.process_index :: state.num_processes]
    waiting = [batch for batch in share if not store.has(batch.number)]
    shows = state.is_local_main_process and not quiet
    questions = sum(len(batch.rows) for batch in share)
    done = questions - sum(len(batch.rows) for batch in waiting)
    with tqdm(total=questions, initial=done, desc="Questions", disable=None if shows else True) as bar:
        for batch, following in zip(waiting, [*waiting[1:], None], strict=True):
            if following is not None:
                evaluator.prefetch(following)
            try:
                store.write(batch.number, evaluator.run(batch))
            except torch.OutOfMemoryError as error:
                raise EvaluationError(
                    f"out of memory with {len(batch.rows)} questions of {evaluator.options.samples} samples: give a "
                    f"smaller --batch-size, which is another evaluation (--overwrite). {error}"
                ) from error
            bar.update(len(batch.rows))


# Parts


@dataclass
class Questions:
    """
    The rows of an evaluation.

    Attributes:
        rows: in order.
        media_root: the folder below which their media lie.
        described: where they come from, as JSON values.
        left_out: questions of a benchmark that did not become rows, each with `name`, `cause` and `reason`.
        dataset: the rows as a table, with the types of their columns.
    """

    rows: list[dict[str, Any]]
    media_root: str
    described: dict[str, Any]
    left_out: list[dict[str, str]] = field(default_factory=list)
    dataset: Dataset | None = None


def load_questions(job: EvalJob) -> Questions:
    """
    Load the questions of an evaluation.

    Raises:
        SetupError: when there is no such data set, split or benchmark, or it holds no row.
    """
    root, described, left_out = job.media.media_root, {}, []
    if job.benchmark is None:
        split = job.dataset_test_split or "test"
        name = f"{job.dataset_name}, split {split!r}"
        dataset, root = _load_split(job.dataset_name, split, root)
        settle_template(job, dataset.column_names)
        described = {"split": split}
    else:
        name = f"benchmark {job.benchmark}"
        found = _read_benchmark(job)
        dataset, root = found.dataset, str(found.media_root) if root == "." else root
        left_out = [{"name": item.name, "cause": item.cause, "reason": item.reason} for item in found.left_out]
        style = {"name": found.style.name, "version": found.style.version, "digest": found.style.digest}
        style = style if job.media.prompt_template is None else None  # which it takes the place of
        described = {"split": job.dataset_test_split, "missing_media": job.missing_media, "prompt_style": style}
        described |= {"tags": job.tags, "pictures": job.pictures}
        described["left_out"] = dict(sorted(Counter(item["cause"] for item in left_out).items()))
    if not len(dataset):
        why = (
            f": {len(left_out)} left out, the first ({left_out[0]['name']}): {left_out[0]['reason']}"
            if left_out
            else ""
        )
        raise SetupError(f"{name} holds no row{why}")
    check_columns(job, dataset.column_names, name)
    allowed = None
    if job.dataset_filter is not None:
        try:
            allowed = OmniScriptArguments(dataset_filter=job.dataset_filter).dataset_filter
        except ValueError as error:
            raise SetupError(str(error)) from error
        dataset = filter_rows(dataset, allowed, name)
    dataset = dataset.select(range(min(job.limit or len(dataset), len(dataset))))
    rows = dataset.to_list()
    source = {"name": job.dataset_name, "benchmark": job.benchmark, "filter": allowed, "limit": job.limit}
    described = source | described
    return Questions(rows, root, described | {"rows": len(rows), "sha256": rows_digest(rows)}, left_out, dataset)


def _load_split(data: str, split: str, root: str):
    arguments = OmniScriptArguments(dataset_name=data, dataset_train_split=split, dataset_test_split=split)
    try:
        splits, root = load_datasets(arguments, root)
    except SetupError as error:
        if "corresponds to no data" in str(error):
            raise SetupError(f"{data}, split {split!r} holds no row") from error
        raise
    return splits[split], root


def _read_benchmark(job: EvalJob):
    try:
        given = {"prompt_style": job.prompt_style, "missing_media": job.missing_media, "tags": job.tags}
        given |= {"pictures": job.pictures, "write_media": job.write_media}
        return read_benchmark(job.benchmark, job.dataset_name, job.dataset_test_split, **given)
    except (OSError, ValueError) as error:
        raise SetupError(f"benchmark {job.benchmark!r}: {error}") from error


def _identity(
    job: EvalJob, questions: Questions, evaluator: BaseEvaluator, model: LocalModel | ServedModel, scoring: Scoring
) -> dict[str, Any]:
    """Return all that decides the numbers and is known before the first question."""
    return as_json(
        {
            "format": FORMAT,
            "preset": None if job.preset is None else {"name": job.preset, "set": job.set_by_preset},
            "model": model.described,
            "data": questions.described,
            "prompt": {
                **({} if evaluator.template is None else {"template": evaluator.template.described}),
                "sha256": digest([row.get("prompt") for row in questions.rows]),
                "chat_template_sha256": model.chat_template_sha256,
                "chat_template_kwargs": dict(job.chat_template_kwargs),
            },
            "media": _media(job.media) | {"media_backend": evaluator.loader.backend},
            "asking": dataclasses.asdict(job.options),
            "generation": evaluator.generation,
            "scoring": {
                "score": scoring.described,
                "parser": {"version": PARSER_VERSION} | describe_function(scoring.extract),
            },
            "device": model.device,
            "versions": versions(),
        }
    )


def _media(media: EvalMedia) -> dict[str, Any]:
    """Return what decides which frames and sounds are fed of a signal; which signals are, `access` says."""
    return {name: value for name, value in deciding(media).items() if name != "modality_access"}


def _results(store: EvalStore, job: EvalJob) -> dict[str, Any]:
    lines = store.lines()
    found = evaluation_results(lines, job.options.access, job.options.samples, job.confidence)
    fed = {(row, access): text for row, access, text in _columns(lines, "row", "access", "inputs") if text}
    whole = hashlib.sha256(json.dumps(sorted([*key, text] for key, text in fed.items())).encode()).hexdigest()
    return {"inputs_sha256": whole, "confidence": job.confidence, **found}


def _columns(lines: Any, *names: str) -> Sequence[tuple]:
    return list(zip(*(lines[name].to_pylist() for name in names), strict=True))
