"""One evaluation from parsed options: model, data, scoring, the processes that share the work, and its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from maple_trl.evaluation.eval_identity import (
    describe_function,
    device_name,
    digest,
    files_digest,
    rows_digest,
    versions,
    weights_digest,
)
from maple_trl.evaluation.eval_options import EvalOptions, EvaluationError
from maple_trl.evaluation.eval_results import evaluation_results
from maple_trl.evaluation.eval_store import EvalStore
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.evaluation.report import as_json, write_atomically
from maple_trl.job_args import OmniScriptArguments, SetupError
from maple_trl.job_data import filter_rows, load_datasets
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.media import MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.rewards.answers import extract_answer
from maple_trl.train import adapter_base, load_rewards
from maple_trl.trainers.media_config import MediaConfig
from maple_trl.trainers.rows import check_spelling


FORMAT = 1
"""Version of what `result.json` and `rows.parquet` hold."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Of the media options, those that decide what the model reads.
_DECIDING = (
    "num_frames",
    "video_fps",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "max_media_seconds",
    "overlong_media",
    "media_decode_timeout",
    "media_allow_network",
    "audio_in_video",
    "max_prompt_length",
    "max_media_tokens",
    "subtitle_template",
)


_SHOWN = 10  # rows with errors that are printed


class _Plain:
    def __post_init__(self):
        pass


@dataclass
class EvalMedia(MediaConfig, _Plain):
    """The options of a trainer that decide what rows are fed, with the same names, defaults and checks."""


@dataclass
class EvalJob:
    """
    An evaluation as it is described.

    Args:
        model: a folder, a Hub id, `builtin:NAME`, or a folder with a LoRA adapter.
        data: a data set as `dataset_name` of a training job; with `benchmark`, the folder of its files.
        output: the folder of the results.
        adapter: a folder with a LoRA adapter for the model.
        benchmark: name of a benchmark.
        split: of the data set; default `test`, of a benchmark its first.
        prompt_style, missing_media: of a benchmark, see [`~maple_trl.data.benchmarks.read_benchmark`].
        filter: rows to use, as `dataset_filter` of a training job.
        limit: the first so many of these rows.
        judge: name of the function that scores, from `maple_trl.rewards` or as `module:function`.
        options, media: how questions are asked, and what rows are fed.
        chat_template_kwargs: further arguments of the chat template.
        dtype, attn_implementation, revision, trust_remote_code: as in `from_pretrained`.
        device: `auto` or `cpu`.
        confidence: of the intervals.
        overwrite: begin anew where the folder holds an evaluation.
        quiet: show no progress.
    """

    model: str
    data: str
    output: str
    adapter: str | None = None
    benchmark: str | None = None
    split: str | None = None
    prompt_style: str = "think"
    missing_media: str = "keep"
    filter: str | None = None
    limit: int | None = None
    judge: str = "accuracy_reward"
    options: EvalOptions = field(default_factory=EvalOptions)
    media: EvalMedia = field(default_factory=EvalMedia)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    device: str = "auto"
    confidence: float = 0.95
    overwrite: bool = False
    quiet: bool = False


def run_evaluation(job: EvalJob) -> dict[str, Any] | None:
    """
    Runs an evaluation, or goes on with one that was stopped; every process of a launch must call it.

    Batches are cut from the data set alone and shared out among the processes. Results do not depend on their number,
    nor on interruptions.

    Returns:
        `dict` or `None`: what `result.json` holds; `None` in all processes but the first.

    Raises:
        SetupError, EvaluationError: when the evaluation is described wrongly.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    state = PartialState(cpu=job.device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=30))
    if job.limit is not None and job.limit < 1:
        raise SetupError(f"limit must be 1 or more, got {job.limit}")
    if not 0 < job.confidence < 1:
        raise SetupError(f"confidence must be strictly between 0 and 1, e.g. 0.95, got {job.confidence}")
    (score,) = load_rewards([job.judge])
    questions = load_questions(job)
    model, processor, described = load_policy(job, state)
    family = family_for(model, processor)
    loader = MediaLoader(
        questions.media_root,
        job.media.media_limits(),
        cache_bytes=job.media.media_cache_bytes,
        allow_network=job.media.media_allow_network,
        backend=job.media.media_backend,
    )
    with loader:
        builder = PromptBuilder(
            family,
            loader,
            audio_in_video=job.media.audio_in_video,
            subtitle_template=job.media.subtitle_template,
            max_prompt_length=job.media.max_prompt_length,
            max_media_tokens=job.media.max_media_tokens,
            chat_template_kwargs=job.chat_template_kwargs,
        )
        evaluator = Evaluator(model, builder, questions.rows, score, extract_answer, job.options)
        store = EvalStore(job.output)
        lock = FileLock(store.folder / ".lock")
        identity = _on_first(
            state,
            lambda: _begin(
                store, lock, _identity(job, questions, evaluator, described, score, state.device), job.overwrite
            ),
        )
        resumed = sum(store.has(batch.number) for batch in evaluator.batches)
        state.wait_for_everyone()  # until all have counted
        if not store.complete:
            if job.options.shared_prompt and job.options.samples > 1:
                evaluator.check_shared_prompt()
            _ask(evaluator, store, state, job.quiet)
        state.wait_for_everyone()
    if not state.is_main_process:
        return None
    store.finish(len(evaluator.batches), evaluator.skipped)
    result = {**identity, **_results(store, job), "left_out": questions.left_out}
    run = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 2),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        "batches": len(evaluator.batches),
        "batches_done_before": resumed,
    }
    write_atomically(store.folder / "run.json", json.dumps(run, indent=2) + "\n")
    write_atomically(store.folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    lock.release()
    return result


def _on_first(state: PartialState, compute: Callable[[], Any]) -> Any:
    """What the first process computes, or the error that it met, in all processes."""
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found = [compute(), None]
        except (EvaluationError, SetupError, OSError) as error:
            found = [None, str(error)]
    if state.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise EvaluationError(found[1])
    return found[0]


def _begin(store: EvalStore, lock: FileLock, identity: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    store.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EvaluationError(f"another evaluation is writing into {store.folder}") from None
    store.begin(identity, overwrite)
    return identity


def _ask(evaluator: Evaluator, store: EvalStore, state: PartialState, quiet: bool) -> None:
    """Asks this process's share of the batches that are not done."""
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
    """

    rows: list[dict[str, Any]]
    media_root: str
    described: dict[str, Any]
    left_out: list[dict[str, str]] = field(default_factory=list)


def load_questions(job: EvalJob) -> Questions:
    """
    The questions of an evaluation.

    Raises:
        SetupError: when there is no such data set, split or benchmark, or it holds no row.
    """
    root, described, left_out = job.media.media_root, {}, []
    if job.benchmark is None:
        split = job.split or "test"
        name = f"{job.data}, split {split!r}"
        dataset, root = _load_split(job.data, split, root)
        described = {"split": split}
    else:
        name = f"benchmark {job.benchmark}"
        found = _read_benchmark(job)
        dataset, root = found.dataset, str(found.media_root) if root == "." else root
        left_out = [{"name": item.name, "cause": item.cause, "reason": item.reason} for item in found.left_out]
        style = {"name": found.style.name, "version": found.style.version, "digest": found.style.digest}
        described = {"split": job.split, "missing_media": job.missing_media, "prompt_style": style}
        described["left_out"] = dict(sorted(Counter(item["cause"] for item in left_out).items()))
    if not len(dataset):
        raise SetupError(f"{name} holds no row")
    if "prompt" not in dataset.column_names:
        raise SetupError(f"{name} has no column 'prompt'; its columns: {', '.join(dataset.column_names)}")
    try:
        check_spelling(dataset.column_names, name)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if job.filter is not None:
        try:
            allowed = OmniScriptArguments(dataset_filter=job.filter).dataset_filter
        except ValueError as error:
            raise SetupError(str(error)) from error
        dataset = filter_rows(dataset, allowed, name)
    rows = dataset.select(range(min(job.limit or len(dataset), len(dataset)))).to_list()
    described = {"name": job.data, "benchmark": job.benchmark, "filter": job.filter, "limit": job.limit} | described
    return Questions(rows, root, described | {"rows": len(rows), "sha256": rows_digest(rows)}, left_out)


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
        from maple_trl.data.benchmarks import read_benchmark
    except ImportError as error:
        raise SetupError(f"benchmark {job.benchmark!r}: the loaders cannot be imported ({error})") from error
    try:
        return read_benchmark(
            job.benchmark, job.data, job.split, prompt_style=job.prompt_style, missing_media=job.missing_media
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"benchmark {job.benchmark!r}: {error}") from error


def load_policy(job: EvalJob, state: PartialState) -> tuple[Any, Any, dict[str, Any]]:
    """
    The model with its adapter, in evaluation mode on its device; its processor; and what describes it (with a digest of
    the weights in the first process).

    Raises:
        SetupError: when there is no such model or adapter, or the adapter does not fit.
    """
    name, adapter = job.model, job.adapter
    base = adapter_base(name)
    if base is not None:
        if adapter is not None:
            raise SetupError(f"{name} is an adapter itself; with --adapter, --model names the model below it: {base}")
        name, adapter = base, name
    if adapter is not None and not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise SetupError(f"adapter: {adapter} holds no adapter_config.json; name a folder with a LoRA adapter")
    shared = {"revision": job.revision, "trust_remote_code": job.trust_remote_code}
    kwargs = shared | ({"attn_implementation": job.attn_implementation} if job.attn_implementation else {})
    beside = adapter is not None and os.path.exists(os.path.join(adapter, "tokenizer_config.json"))
    try:
        model = load_model(name, dtype=job.dtype, **kwargs).to(state.device)
        processor = load_processor(adapter if beside else name, **shared)
    except (OSError, ValueError, ImportError) as error:
        raise SetupError(f"model: cannot load {name!r}: {error}") from error
    described = {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        # Before the adapter, which moves the weights below it to other names.
        "sha256": weights_digest(model) if state.is_main_process else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "adapter": None if adapter is None else {"name": adapter, "sha256": files_digest(adapter, _ADAPTER_FILES)},
    }
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return model.eval(), processor, described


def _with_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns, and would evaluate a model whose adapter is half there.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        raise SetupError(f"adapter: {folder} does not fit the model: {error}") from error


def _identity(
    job: EvalJob,
    questions: Questions,
    evaluator: Evaluator,
    described: Mapping[str, Any],
    score: Callable,
    device: torch.device,
) -> dict[str, Any]:
    """All that decides the numbers and is known before the first question."""
    processor = evaluator.family.processor
    return as_json(
        {
            "format": FORMAT,
            "model": {**described, "family": type(evaluator.family).__name__},
            "data": questions.described,
            "prompt": {
                "sha256": digest([row.get("prompt") for row in questions.rows]),
                "chat_template_sha256": digest(_chat_template(processor)),
                "chat_template_kwargs": dict(job.chat_template_kwargs),
            },
            "media": {name: getattr(job.media, name) for name in _DECIDING}
            | {"media_backend": evaluator.loader.backend},
            "asking": dataclasses.asdict(job.options),
            "generation": evaluator.generation_config.to_diff_dict(),
            "scoring": {"score": describe_function(score), "parser": describe_function(extract_answer)},
            "device": device_name(device),
            "versions": versions(),
        }
    )


def _chat_template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)


def _results(store: EvalStore, job: EvalJob) -> dict[str, Any]:
    lines = store.lines()
    found = evaluation_results(lines, job.options.access, job.options.samples, job.confidence)
    fed = {(row, access): text for row, access, text in _columns(lines, "row", "access", "inputs") if text}
    whole = hashlib.sha256(json.dumps(sorted([*key, text] for key, text in fed.items())).encode()).hexdigest()
    return {"inputs_sha256": whole, "confidence": job.confidence, **found}


def _columns(lines: Any, *names: str) -> Sequence[tuple]:
    return list(zip(*(lines[name].to_pylist() for name in names), strict=True))


# What is printed


def print_results(result: Mapping[str, Any], folder: str | Path) -> None:
    """Prints accuracy by access and tag, the modality gap, and what went wrong."""
    from rich.console import Console
    from rich.table import Table

    from maple_trl.modalities import ModalityTag

    console, accesses = Console(), result["accesses"]
    table = Table(title="Accuracy (pass@1)", title_justify="left")
    table.add_column("tag")
    for access in accesses:
        table.add_column(access, justify="right")

    def add(name: str, value: Callable[[Mapping[str, Any]], Any]) -> None:
        table.add_row(name, *(_plain(value(found)) for found in accesses.values()))

    for tag in map(str, ModalityTag):
        if any(tag in found["accuracy"].get("per_tag", {}) for found in accesses.values()):
            add(tag, lambda found, tag=tag: found["accuracy"].get("per_tag", {}).get(tag, {}).get("value"))
    table.add_section()
    for name, end in (("all", "value"), ("  from", "low"), ("  to", "high")):
        add(name, lambda found, end=end: found["accuracy"].get("sample_mean", {}).get(end))
    add("mean of tags", lambda found: (found["accuracy"].get("tag_mean") or {}).get("value"))
    add("modality gap", lambda found: found["modality_gap"]["sample"].get("mean", {}).get("value"))
    table.add_section()
    for name in ("scored", "errors", "unscored", "lacking"):
        add(name, lambda found, name=name: found["counts"][name])
    console.print(table)
    if "value" in result["fusion_gain"]:
        console.print(f"fusion gain {result['fusion_gain']['value']:.3f}", highlight=False)
    failed: dict[tuple, list[str]] = {}
    for error in result["errors"]:
        where = error["path"] or error["detail"]
        failed.setdefault((error["row"], error["id"], error["reason"], where), []).append(error["access"])
    for (row, name, reason, where), under in list(failed.items())[:_SHOWN]:
        text = f"row {row} ({name}), access {', '.join(under)}: {reason}: {where}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if len(failed) > _SHOWN:
        console.print(f"and {len(failed) - _SHOWN} more; result.json names them all", highlight=False)
    if result["left_out"]:
        console.print(f"{len(result['left_out'])} questions were left out; result.json names them", highlight=False)
    console.print(f"results in {folder}", highlight=False, markup=False, soft_wrap=True)


def _plain(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
