"""What a job would read, compute, ask and write: told without a network, and without writing a file."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.jobs.data import (
    BUILTIN_DATASETS,
    CHECKED_ROWS,
    check_place,
    check_split,
    check_streaming,
    evaluates,
    filter_rows,
    find_tables,
    prepare_rows,
)
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import SUPERVISED, OmniScriptArguments
from maple_trl.jobs.tables import SUFFIXES, count_rows, hold_rows, table_rows
from maple_trl.modalities import ModalityTag


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from maple_trl.jobs.eval_job import EvalJob
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig

_BUILTIN_ROWS_OF_TAG = 64  # in each split of the embedded set
_ADAM = 2  # moments beside each trained weight, in its type
_NUMBER = "maple_trl row number"  # a column that no table has
_OPENAI = "the API's own address (OPENAI_BASE_URL, else OpenAI)"


@dataclass
class Forecast:
    """
    What a job would do.

    Attributes:
        reads: files and models, a line each.
        computes: what is done with them.
        asks: servers, each with how often.
        writes: files and folders.
        numbers: what was counted, by name: rows, steps, completions, tokens, calls and bytes; `None` for what only the
            job itself will know.
    """

    reads: list[str] = field(default_factory=list)
    computes: list[str] = field(default_factory=list)
    asks: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    numbers: dict[str, int | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {"dry_run": True, **vars(self)}


# Data


@dataclass(frozen=True)
class Split:
    """
    The rows of one split, as far as that is known before they are loaded.

    Attributes:
        told: where they come from, for a reader.
        rows: how many pass the filter; `None` of a set that is not here yet.
        fetched: whether they would be downloaded.
        first: the first of these rows, at most `CHECKED_ROWS`; `None` where they are not here, or cannot be typed by themselves.
        problem: why the split cannot be used; it counts only where it is.
    """

    told: str
    rows: int | None
    fetched: bool = False
    first: Dataset | None = None
    problem: SetupError | None = None

    @property
    def whole(self) -> bool:
        """Whether the first rows are all."""
        return self.first is not None and len(self.first) == self.rows


def look_at_data(
    name: str | None, splits: Sequence[str], allowed: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Split]:
    """
    Count the rows of a data set, and read the first; of Parquet beside these its headers, and the columns of the filter.

    Args:
        name: as `dataset_name`.
        splits: the first must be there.
        allowed: as `dataset_filter`.

    Raises:
        SetupError: as [`~maple_trl.jobs.data.load_datasets`] for what is not there.
    """
    if not name:
        raise SetupError("dataset_name is missing; for a first run: builtin:seven-tags")
    if name.startswith("builtin:"):
        known = [split for split in splits if split in ("train", "test")]
        return {split: _look(_builtin, name, split, allowed, split == splits[0]) for split in known}
    path = Path(name)
    if not path.exists():
        if name.startswith(("/", "./", "../", "~")) or path.suffix.lower() in SUFFIXES:
            raise SetupError(f"dataset_name: there is no file or folder {name}")
        return {splits[0]: Split(f"data set {name} of the Hub, which is not asked now", None, fetched=True)}
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _stored(path, splits, allowed)
    found = find_tables(path, splits)
    return {split: _look(_tables, files, split, allowed, split == splits[0]) for split, files in found.items()}


def _look(
    read: Callable[..., Split], source: Any, split: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool
) -> Split:
    """Look at a split; what is wrong with one that need not be used is kept for whoever does."""
    try:
        return read(source, split, allowed, strict)
    except SetupError as error:
        if strict:
            raise
        return Split(str(error), 0, problem=error)


def _builtin(name: str, split: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool) -> Split:
    from maple_trl.data.synthetic import add_hints, default_folder

    if name not in BUILTIN_DATASETS:
        raise SetupError(f"there is no embedded data set {name!r}; embedded: {', '.join(BUILTIN_DATASETS)}")
    folder = default_folder()
    file = folder / f"{split}.parquet"
    if file.is_file():
        found = _tables([file], split, allowed, strict)
        hinted = name.endswith("-hints") and found.first is not None
        return replace(found, first=add_hints(found.first)) if hinted else found
    told = f"{name}, split {split}, which would be made in {folder} first"
    if not allowed:
        return Split(told, _BUILTIN_ROWS_OF_TAG * len(ModalityTag))
    tags = {ModalityTag.parse(tag) for tag in allowed.get("tag", ())}
    return Split(told, _BUILTIN_ROWS_OF_TAG * len(tags) if set(allowed) == {"tag"} else None)


def _stored(path: Path, splits: Sequence[str], allowed: Mapping[str, Sequence[Any]] | None) -> dict[str, Split]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    tables = found if isinstance(found, DatasetDict) else {splits[0]: found}
    check_split(path, splits[0], tables)

    def read(rows: Dataset, split: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool) -> Split:
        told = f"{path}, split {split}"
        rows = filter_rows(rows, allowed, told, strict) if allowed else rows
        first = rows.select(range(min(CHECKED_ROWS, len(rows))))
        return Split(told, len(rows), first=_in_memory(lambda: first))

    return {
        split: _look(read, tables[split], split, allowed, split == splits[0]) for split in splits if split in tables
    }


def _tables(files: Sequence[Path], split: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool) -> Split:
    import pyarrow as pa

    size = sum(file.stat().st_size for file in files)
    told = f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''} ({size_of(size)}), split {split}"
    try:
        if files[0].suffix.lower() == ".parquet":
            rows, first = _parquet_rows(files, told, allowed, strict)
        else:
            rows, first = _text_rows(files, told, allowed, strict)
    except (OSError, pa.ArrowException) as error:
        raise SetupError(f"cannot read {files[0]}: {error}") from error
    return Split(told, rows, first=first)


def _parquet_rows(
    files: Sequence[Path], told: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool
) -> tuple[int, Dataset | None]:
    """Return how many rows pass the filter, and the first of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = sum(pq.read_metadata(file).num_rows for file in files)
    if not rows:
        raise SetupError(f"cannot read {files[0]}: it holds no row")
    # A shard may lack columns that another has.
    schema = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="permissive")
    numbers: Sequence[int] = range(min(rows, CHECKED_ROWS))
    if allowed:
        _check_columns(allowed, dict.fromkeys(schema.names), told)
        parts = [pq.ParquetFile(file).read(columns=list(allowed)) for file in files]  # of those that a shard has
        passing = _passing(Dataset(pa.concat_tables(parts, promote_options="permissive")), told, allowed, strict)
        rows, numbers = len(passing), passing[:CHECKED_ROWS]
    batches = (batch for file in files for batch in pq.ParquetFile(file).iter_batches(batch_size=CHECKED_ROWS))
    return rows, _in_memory(lambda: Dataset(_taken(batches, numbers, schema)))


def _taken(batches: Iterable[pa.RecordBatch], numbers: Sequence[int], schema: pa.Schema) -> pa.Table:
    """Return the rows of these numbers, which rise, with all columns."""
    import pyarrow as pa

    found, start = [schema.empty_table()], 0
    for batch in batches if numbers else ():
        here = [number - start for number in numbers if start <= number < start + len(batch)]
        found += [pa.Table.from_batches([batch]).take(here)] if here else []
        start += len(batch)
        if start > numbers[-1]:
            break
    return pa.concat_tables(found, promote_options="permissive")


def _text_rows(
    files: Sequence[Path], told: str, allowed: Mapping[str, Sequence[Any]] | None, strict: bool
) -> tuple[int, Dataset | None]:
    """Do the same as [`_parquet_rows`] of JSON and CSV."""
    rows, kinds = count_rows(files)
    numbers: Sequence[int] = range(min(rows, CHECKED_ROWS))
    if allowed:
        _check_columns(allowed, kinds, told)
        cells = hold_rows((row for _, row in table_rows(files)), {name: kinds[name] for name in allowed})
        passing = _passing(cells, told, allowed, strict)
        rows, numbers = len(passing), passing[:CHECKED_ROWS]
    wanted = set(numbers)
    chosen = (row for number, (_, row) in enumerate(table_rows(files)) if number in wanted)
    return rows, _in_memory(lambda: hold_rows(islice(chosen, len(wanted)), kinds))


def _in_memory(make: Callable[[], Dataset]) -> Dataset | None:
    """Return rows with their media as texts; `None` where they cannot be typed by themselves, as all of a table may."""
    import pyarrow as pa

    from maple_trl.omni.embedded import as_paths

    try:
        return as_paths(make())
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def _check_columns(allowed: Mapping[str, Any], columns: Mapping[str, Any], told: str) -> None:
    for column in allowed:
        if column not in columns:
            raise SetupError(f"dataset_filter: {told} has no column {column!r}; its columns: {', '.join(columns)}")


def _passing(cells: Dataset, told: str, allowed: Mapping[str, Sequence[Any]], strict: bool) -> list[int]:
    """Return the numbers of the rows that the filter leaves, of a data set with its columns alone."""
    numbered = cells.add_column(_NUMBER, list(range(len(cells))))
    return list(filter_rows(numbered, allowed, told, strict)[_NUMBER])


# Models


@dataclass(frozen=True)
class Model:
    """
    A model, as far as that is known before it is loaded.

    Attributes:
        told: where it comes from, for a reader.
        weights: how many; `None` of a model that is not here.
        fetched: whether it would be downloaded.
    """

    told: str
    weights: int | None
    fetched: bool = False


def look_at_model(name: str | None) -> Model:
    """
    Look for a model, and count its weights by the headers of its files.

    Raises:
        SetupError: for a folder that is none of a model, and a name that leads nowhere.
    """
    from huggingface_hub import try_to_load_from_cache

    from maple_trl.jobs.checks import adapter_base
    from maple_trl.omni.checkpoints import CheckpointError, check_checkpoint, check_hub_id
    from maple_trl.omni.loading import resolve_checkpoint

    if not name:
        raise SetupError("model_name_or_path is missing; for a first run: builtin:tiny-omni")
    base = adapter_base(name)
    if base is not None:
        model = look_at_model(base)
        return replace(model, told=f"{model.told}, with the adapter in {name}")
    try:
        place = resolve_checkpoint(name)
        if os.path.exists(place):
            check_checkpoint(place, {})
            files = sorted(Path(place).glob("*.safetensors"))
            size = sum(file.stat().st_size for file in files)
            return Model(f"model {name} ({size_of(size)})", sum(map(_weights, files)))
        check_hub_id(name, "model")
    except (CheckpointError, ValueError) as error:
        raise SetupError(f"model_name_or_path: {error}") from error
    here = isinstance(try_to_load_from_cache(name, "config.json"), str)
    told = "of which there is a copy" if here else "which would be downloaded"
    return Model(f"model {name} of the Hub, {told}", None, fetched=not here)


def _weights(file: Path) -> int:
    """Count the weights of a safetensors file by its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


# Training


def forecast_training(
    job: tuple[OmniScriptArguments, OmniGRPOConfig | OmniSFTConfig, OmniModelConfig], above: str | None = None
) -> Forecast:
    """
    Say what a training job would do, in this process or in each of several.

    The job's own checks are made as far as they load no model, make no file and need no network; of a table here, they
    are given its first rows.

    Args:
        job: as [`~maple_trl.jobs.options.parse_args`] returns it.
        above (`str`, *optional*): the stage whose model this one begins with, which is not there yet.

    Raises:
        SetupError: for what the job itself would refuse before it loads anything: files, rewards, data, model and output
            folder.
    """
    from maple_trl.jobs.checks import check_files, check_quantized, check_writable
    from maple_trl.jobs.train import check_checkpoint, check_output_dir, checkpoint_to_resume

    script, args, model = job
    found = Forecast()
    checkpoint = checkpoint_to_resume(args)
    replaces = check_output_dir(script, args, model, checkpoint)
    check_checkpoint(checkpoint, script, args, model)
    check_writable(args.output_dir, "output_dir")
    check_files(script, make=False)
    if script.dataset_streaming:
        check_streaming(script, args)
    check_quantized(model, args)
    begun = Model(f"the model of stage {above}", None) if above else look_at_model(model.model_name_or_path)
    found.reads.append(begun.told)
    found.asks += [f"the Hub, for the model {model.model_name_or_path}"] if begun.fetched else []
    found.reads += [f"checkpoint {checkpoint}"] if checkpoint else []
    splits = look_at_data(
        script.dataset_name, (script.dataset_train_split, script.dataset_test_split), script.dataset_filter
    )
    rows = _count_rows(found, splits, script, args)
    steps = _count_steps(found, script, args, rows)
    _check_first_rows(splits[script.dataset_train_split], script, args, model, of_model=begun.weights is not None)
    if script.trainer not in SUPERVISED:
        _count_completions(found, script, args, steps)
    _tell_written(found, script, args, model, steps, begun.weights, replaces)
    return found


def _check_first_rows(
    split: Split, script: OmniScriptArguments, args: Any, model: OmniModelConfig, of_model: bool
) -> None:
    """Check the rewards, and the first rows against them and the model as the job checks all; `of_model`: its files are here."""
    from maple_trl.jobs.checks import check_model, check_rows
    from maple_trl.jobs.rewards import close_rewards, load_rewards

    rewards = [] if script.trainer in SUPERVISED else load_rewards(script.reward_funcs, args)
    try:
        check_place(script, local=not split.fetched)
        if split.first is None:
            return
        filtered = copy.copy(script)
        filtered.dataset_filter = None  # which they have passed
        rows = prepare_rows(split.first, filtered, script.dataset_train_split, True, args.prompt_template is not None)
        looked = copy.copy(args)  # the media root of local data is set in it
        looked.media_root = media_root_of(script.dataset_name, args.media_root)
        check_rows(script, looked, rows, rewards, split.whole)
        other = model.processor_name_or_path
        if of_model and (other is None or os.path.exists(other)):
            check_model(model, looked, rows, script.evaluate_before_after, whole=False)
    finally:
        close_rewards(rewards)


def media_root_of(name: str, media_root: str) -> str:
    """Return the folder that media of a data set of this machine are relative to, as a job finds it."""
    path = Path(name)
    if media_root != "." or not path.exists():
        return media_root
    return str((path if path.is_dir() else path.parent).resolve())


def _count_rows(found: Forecast, splits: Mapping[str, Split], script: OmniScriptArguments, args: Any) -> int | None:
    train, test = script.dataset_train_split, script.dataset_test_split
    measures = evaluates(args) or script.evaluate_before_after
    check_split(script.dataset_name, train, splits)
    known = splits[train].rows is not None
    if measures and known and test not in splits:
        raise SetupError(
            f"{script.dataset_name} has no split {test!r} to evaluate on; name another with dataset_test_split, or "
            "switch off evaluate_before_after and eval_strategy"
        )
    if measures and test in splits and splits[test].problem is not None:
        raise splits[test].problem
    found.asks += [f"the Hub, for the data set {script.dataset_name}"] if splits[train].fetched else []
    for split in splits if measures else [train]:
        found.reads.append(f"{splits[split].told}: {many(splits[split].rows, 'row')}")
    rows = splits[train].rows
    found.numbers["rows"] = rows
    return rows


def _count_steps(found: Forecast, script: OmniScriptArguments, args: Any, rows: int | None) -> int | None:
    """Return the optimizer steps: `max_steps`, or what the epochs come to."""
    of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if script.trainer in SUPERVISED:
        for_epoch = None if rows is None else -(-rows // of_step)
        what = f"{of_step} rows each"
    else:
        prompts = args.generation_batch_size // args.num_generations
        rounds = None if rows is None else rows // prompts
        if rounds == 0:
            raise SetupError(f"there are {rows} rows, but one rollout takes {prompts} prompts")
        rollout_steps = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
        for_epoch = None if rounds is None else max(1, int(rounds * rollout_steps))
        what = f"a rollout of {prompts} prompts x {args.num_generations} completions for {rollout_steps:g} of them"
    given = args.max_steps > 0
    epochs = args.num_train_epochs
    steps = args.max_steps if given else None if for_epoch is None else max(1, int(for_epoch * epochs))
    about = "" if given else f"about, in {epochs:g} epochs; "
    found.computes.append(
        f"{many(steps, 'optimizer step')} ({about}{what}), by {script.trainer} on {args.device.type}"
    )
    found.numbers["steps"] = steps
    return steps


def _count_completions(found: Forecast, script: OmniScriptArguments, args: Any, steps: int | None) -> None:
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    completions = None if steps is None else -(-steps * per_step // args.num_iterations)
    longest = args.max_completion_length
    tokens = completions * longest if completions and longest else None
    found.numbers |= {"completions": completions, "tokens": tokens}
    found.computes.append(f"{many(completions, 'completion')}, of {many(tokens, 'token')} at most")
    if script.evaluate_before_after:
        found.computes.append(
            f"sampled accuracy before and after, on {script.eval_questions_per_tag} questions a tag at most"
        )
    names = [entry if isinstance(entry, str) else entry["reward"] for entry in script.reward_funcs]
    found.computes.append(f"rewards: {', '.join(names)}")
    calls = 0
    for entry in script.reward_funcs:
        server = entry.get("server") if isinstance(entry, Mapping) else None
        if server:
            calls = None if completions is None or calls is None else calls + completions
            place = server.get("base_url") or _OPENAI
            found.asks.append(
                f"{entry['reward']}: {many(completions, 'call')} at most of {server['model']} at {place}"
            )
    found.numbers["calls"] = calls
    if args.use_vllm and args.vllm_mode == "server":
        place = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        found.asks.append(f"a vLLM server for the completions, at {place}")


def _tell_written(
    found: Forecast,
    script: OmniScriptArguments,
    args: Any,
    model: OmniModelConfig,
    steps: int | None,
    weights: int | None,
    replaces: bool,
) -> None:
    found.asks += [f"the tracker {name}" for name in args.report_to or [] if name != "tensorboard"]
    if args.push_to_hub:
        found.asks.append(f"the Hub, to upload to {args.hub_model_id or Path(args.output_dir).name}")
    trained = None if weights is None or model.use_peft else weights * (2 if model.dtype != "float32" else 4)
    states = None if trained is None else trained * (1 + _ADAM)
    kept = "an adapter" if model.use_peft else "the model" + ("" if trained is None else f" ({size_of(trained)})")
    removed = ", whose former results would be removed first" if replaces else ""
    found.writes.append(f"{args.output_dir}: {kept}, args.json, summary.json, metrics.jsonl, training.png{removed}")
    count = _checkpoints(args, steps)
    size = None if states is None or count is None else count * states
    if count:
        about = "" if states is None else f", about {size_of(states)} each"
        found.writes.append(f"{args.output_dir}/checkpoint-…: {many(count, 'checkpoint')}{about}")
    total = None if trained is None or size is None else trained + size
    found.numbers["bytes"] = total
    for option in ("summary_file", "metrics_file", "plot_file"):
        found.writes += [str(getattr(script, option))] if getattr(script, option) else []


def _checkpoints(args: Any, steps: int | None) -> int | None:
    """Return how many checkpoints stay."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy != "steps" or steps is None:
        return args.save_total_limit
    every = args.save_steps if args.save_steps >= 1 else max(1, int(steps * args.save_steps))
    count = -(-steps // int(every))
    return min(count, args.save_total_limit or count)


# Evaluation


def forecast_evaluation(job: EvalJob, split: str | None = None) -> Forecast:
    """
    Say what an evaluation would do.

    The evaluation's own checks are made as far as they load no model, make no file and need no network; of a table here,
    they are given its first rows.

    Args:
        split (`str`, *optional*): the split that is asked where the job names none.

    Raises:
        SetupError, EvaluationError: for what the evaluation itself would refuse before it loads anything.
    """
    from maple_trl.jobs.evaluate import check_described
    from maple_trl.jobs.scoring import scoring_server

    found = Forecast()
    check_described(job)
    if job.server is None:
        model = look_at_model(job.model_name_or_path)
        found.reads.append(model.told + (f", with the adapter {job.adapter}" if job.adapter else ""))
        found.asks += [f"the Hub, for the model {job.model_name_or_path}"] if model.fetched else []
    rows = _questions(found, job, split or "test")
    accesses = job.options.access
    completions = None if rows is None else rows * len(accesses) * job.options.samples
    tokens = None if completions is None else completions * job.options.max_new_tokens
    found.numbers |= {"rows": rows, "completions": completions, "tokens": tokens}
    found.computes.append(
        f"{many(rows, 'question')} x {len(accesses)} access ({', '.join(accesses)}) x {job.options.samples} samples: "
        f"{many(completions, 'completion')}, of {many(tokens, 'token')} at most"
    )
    calls: int | None = 0
    if job.server is not None:
        calls = completions
        found.asks.append(f"{many(calls, 'answer')} of {job.model_name_or_path} at {job.server}")
    judge = scoring_server(job)
    if judge is not None:
        calls = None if calls is None or completions is None else calls + completions
        found.asks.append(f"{many(completions, 'call')} at most of {judge[0]} at {judge[1] or _OPENAI}, to judge")
    found.numbers["calls"] = calls
    folder = Path(job.output_dir or ".")
    goes_on = ", where it goes on from what is answered" if (folder / "evaluation.json").is_file() else ""
    found.writes.append(f"{folder}: result.json, rows.parquet, run.json{goes_on}")
    if job.report is not None:
        found.writes.append(job.report or str(folder / "report.html"))
    return found


def _questions(found: Forecast, job: EvalJob, split: str) -> int | None:
    if job.benchmark is not None:
        from maple_trl.data.benchmarks import BENCHMARKS

        if job.benchmark not in BENCHMARKS:
            raise SetupError(f"there is no benchmark {job.benchmark!r}; there are {', '.join(BENCHMARKS)}")
        if not Path(job.dataset_name or "").exists():
            raise SetupError(f"benchmark {job.benchmark!r}: there is no folder {job.dataset_name}")
        found.reads.append(f"{job.dataset_name}, as the benchmark {job.benchmark}; its questions are not counted")
        return None if job.limit is None else job.limit
    named = job.dataset_test_split or split
    allowed = OmniScriptArguments(dataset_filter=job.dataset_filter).dataset_filter if job.dataset_filter else None
    splits = look_at_data(job.dataset_name, (named,), allowed)
    check_split(job.dataset_name, named, splits)
    rows = splits[named].rows
    found.reads.append(f"{splits[named].told}: {many(rows, 'row')}")
    found.asks += [f"the Hub, for the data set {job.dataset_name}"] if splits[named].fetched else []
    if splits[named].first is not None:
        _check_asked(job, splits[named], named)
    return min(rows, job.limit or rows) if rows is not None else job.limit


def _check_asked(job: EvalJob, split: Split, name: str) -> None:
    """Check what scores against the first rows, as the evaluation checks all."""
    from maple_trl.jobs.eval_presets import settle_template
    from maple_trl.jobs.evaluate import Questions, check_columns, check_media_root, check_scoring
    from maple_trl.rewards.measures import METRIC_COLUMN

    rows, name = split.first, f"{job.dataset_name}, split {name!r}"
    asked = len(rows) if job.limit is None else min(job.limit, len(rows))
    whole = split.whole or asked == job.limit
    settle_template(job, rows.column_names)
    check_columns(job, rows.column_names, name)
    root = media_root_of(job.dataset_name, job.media.media_root)
    check_media_root(root)
    if whole or METRIC_COLUMN not in rows.column_names:  # else rows that are not looked at may have other metrics
        check_scoring(job, Questions(rows.select(range(asked)).to_list(), root, {"name": name})).close()


def many(number: int | None, what: str) -> str:
    """Return a number with its noun; of one that is not known yet, this."""
    if number is None:
        return f"{what}s (how many is not known yet)"
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def size_of(count: float) -> str:
    """Return a number of bytes with a unit that suits it."""
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{count / 2 ** (10 * power):.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
