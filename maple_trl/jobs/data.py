"""The rows of a training job: from the name of a data set to the splits that it trains and measures on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import OmniScriptArguments, template_columns
from maple_trl.jobs.tables import SUFFIXES, read_tables, stream_tables


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import ScriptArguments

    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig

BUILTIN_DATASETS = ("builtin:seven-tags", "builtin:seven-tags-hints")
_SHOWN = 20  # values of a column that an error lists
_STREAMING = ("omni_grpo", "omni_sft")
CHECKED_ROWS = 64
"""Rows of a stream that are checked before training, and those of a table before a dry run."""


def load_datasets(
    script_args: OmniScriptArguments | ScriptArguments, media_root: str = "."
) -> tuple[dict[str, Dataset], str]:
    """
    Load the splits of a job's data set that exist, with the folder to which their media paths are relative.

    Args:
        script_args ([`OmniScriptArguments`] or [`~trl.ScriptArguments`]):
            Names the data set, and the splits to read.
        media_root (`str`, *optional*, defaults to `"."`):
            The media root that the user set; at `"."` local data sets use their own folder.

    Returns:
        `tuple[dict[str, Dataset], str]`: data sets by split (the training split always, the test split where it
        exists), and the media root.

    Raises:
        SetupError: when there is no such data set or training split, listing what is there.
    """
    from maple_trl.omni.embedded import as_paths

    name = script_args.dataset_name
    if not name:
        raise SetupError("dataset_name is missing; for a first run: builtin:seven-tags")
    wanted = (script_args.dataset_train_split, script_args.dataset_test_split)
    streaming = script_args.dataset_streaming
    if name.startswith("builtin:"):
        if name not in BUILTIN_DATASETS:
            raise SetupError(f"there is no embedded data set {name!r}; embedded: {', '.join(BUILTIN_DATASETS)}")
        from maple_trl.data.synthetic import add_hints, default_folder, load_seven_tags

        folder, splits = default_folder(), load_seven_tags()
        if name.endswith("-hints"):
            splits = {split: add_hints(rows) for split, rows in splits.items()}
    elif Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        splits = _read_local(Path(name), wanted, streaming)
    elif name.startswith(("/", "./", "../", "~")) or Path(name).suffix.lower() in SUFFIXES:
        raise SetupError(f"dataset_name: there is no file or folder {name}")
    else:
        folder, splits = None, _read_hub(name, script_args.dataset_config)
    check_place(script_args, local=folder is not None)
    check_split(name, wanted[0], splits)
    root = media_root if folder is None or media_root != "." else str(folder.resolve())
    return {split: as_paths(splits[split]) for split in wanted if split in splits}, root


def check_place(script_args: OmniScriptArguments | ScriptArguments, local: bool) -> None:
    """Raise SetupError for options that have no effect with a data set of this machine, or of the Hub."""
    name = str(script_args.dataset_name)
    if script_args.dataset_config is not None and local:
        raise SetupError(f"dataset_config is for data sets of the Hub, and has no effect with {name}; leave it out")
    if script_args.dataset_streaming and (not local or name.startswith("builtin:")):
        raise SetupError(f"dataset_streaming reads local Parquet files, and {name} is none; leave it out")


def check_split(name: object, split: str, splits: Collection[str]) -> None:
    """Raise SetupError, naming the splits that there are, where one that is needed is not among them."""
    if split not in splits:
        raise SetupError(f"{name} has no split {split!r}; its splits: {', '.join(splits) or 'none'}")


def _read_hub(name: str, config: str | None) -> Mapping[str, Dataset]:
    """Load a data set of the Hub; where that cannot be reached, take what it gave before."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    from maple_trl.omni.checkpoints import hub_is_silent

    silent = hub_is_silent()
    libraries = (constants, datasets.config)
    before = [library.HF_HUB_OFFLINE for library in libraries]
    try:
        if silent is not None:  # else the library asks five times, for half a minute, before it looks there
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, config)
    except (OSError, ValueError, DatasetsError) as error:
        raise SetupError(
            f"cannot load the data set {name!r}: there is no such local folder, and as a Hub id: {silent or error}"
        ) from error
    finally:
        for library, offline in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = offline


def _read_local(path: Path, wanted: Sequence[str], streaming: bool = False) -> Mapping[str, Dataset | IterableDataset]:
    from datasets import DatasetDict, load_from_disk

    if streaming and (path / "dataset_info.json").is_file():
        raise SetupError(f"dataset_streaming reads Parquet alone, and {path} was made by save_to_disk; leave it out")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        stored = load_from_disk(str(path))
        return stored if isinstance(stored, DatasetDict) else {wanted[0]: stored}
    return {
        split: stream_tables(files) if streaming and split == wanted[0] else read_tables(files)
        for split, files in find_tables(path, wanted).items()
    }


def find_tables(path: Path, wanted: Sequence[str]) -> dict[str, list[Path]]:
    """
    Return the files of the splits that a local data set has; a single file is the first of them.

    Raises:
        SetupError: when there is none for the first split, or a shard is missing.
    """
    from maple_trl.data.shards import ShardError, split_files

    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise SetupError(f"{path}: a data file is one of {', '.join(SUFFIXES)}")
        return {wanted[0]: [path]}
    # Not load_dataset(folder): it would take the media files beside the tables for the data.
    try:
        files = {split: split_files(path, split, SUFFIXES) for split in wanted}
    except ShardError as error:
        raise SetupError(str(error)) from error
    if not files[wanted[0]]:
        there = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        raise SetupError(
            f"{path} holds no {', '.join(wanted[0] + suffix for suffix in SUFFIXES[:-1])} or {wanted[0]}{SUFFIXES[-1]}"
            + (f"; it has {', '.join(there)}" if there else " and no other table either")
        )
    return {split: shards for split, shards in files.items() if shards}


def filter_rows(dataset: Dataset, allowed: Mapping[str, Sequence], name: str, strict: bool = True) -> Dataset:
    """
    Keep the rows whose columns have one of the values allowed there.

    Args:
        name (`str`): how errors call the data set.
        strict (`bool`, *optional*, defaults to `True`): refuse a value that no row has.

    Raises:
        SetupError: for a column that is not there, a value that no row has, and when no row is left.
    """
    kept = set(range(len(dataset)))
    for column, values in allowed.items():
        if column not in dataset.column_names:
            raise SetupError(
                f"dataset_filter: {name} has no column {column!r}; its columns: {', '.join(dataset.column_names)}"
            )
        cells = list(dataset[column])
        missing = [value for value in values if value not in cells]
        if missing and strict:
            found = list(dict.fromkeys(map(repr, cells)))
            raise SetupError(
                f"dataset_filter: no row of {name} has {missing[0]!r} in column {column!r}; it has "
                f"{', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''}"
            )
        kept &= {i for i, cell in enumerate(cells) if cell in values}
    if not kept:
        raise SetupError(f"dataset_filter: no row of {name} is left by {dict(allowed)}")
    return dataset.select(sorted(kept))


def add_completions(dataset: Dataset, template: str, name: str) -> Dataset:
    """
    Add a column `completion`, built from other columns.

    Args:
        template (`str`): text with names of columns in braces.
        name (`str`): how errors call the data set.

    Raises:
        SetupError: when a column is missing or empty in a row, or the data set has a column `completion` already.
    """
    columns = template_columns(template)
    if "completion" in dataset.column_names:
        raise SetupError(f"completion_template: {name} has a column 'completion' already; leave the template out")
    for column in columns:
        if column not in dataset.column_names:
            raise SetupError(
                f"completion_template: {name} has no column {column!r}; its columns: {', '.join(dataset.column_names)}"
            )
    cells = {column: list(dataset[column]) for column in columns}
    for column, values in cells.items():
        empty = next((i for i, value in enumerate(values) if value is None or value == ""), None)
        if empty is not None:
            raise SetupError(f"completion_template: {name}, row {empty}: column {column!r} is empty")
    texts = [template.format(**dict(zip(columns, row, strict=True))) for row in zip(*cells.values(), strict=True)]
    return dataset.add_column("completion", texts)


def prepare_data(
    script_args: OmniScriptArguments, training_args: OmniGRPOConfig | OmniSFTConfig
) -> tuple[Dataset, Dataset | None]:
    """
    Load the training split of a job and its test split, if any; set `media_root` to the folder of their media.

    A test split that cannot be used counts as none where nothing is measured on it.

    Raises:
        SetupError: when a data set, split or column that the arguments name is not there.
    """
    if script_args.dataset_streaming:
        check_streaming(script_args, training_args)
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    measures = evaluates(training_args) or script_args.evaluate_before_after
    if measures and test not in splits:
        raise SetupError(
            f"{script_args.dataset_name} has no split {test!r} to evaluate on; name another with dataset_test_split, or "
            "switch off evaluate_before_after and eval_strategy"
        )
    for split in list(splits):
        try:
            makes_prompt = training_args.prompt_template is not None
            splits[split] = prepare_rows(splits[split], script_args, split, split == train, makes_prompt)
        except SetupError:
            if split == train or measures:
                raise
            del splits[split]
    return splits[train], splits.get(test)


def prepare_rows(
    dataset: Dataset, script_args: OmniScriptArguments, split: str, strict: bool, makes_prompt: bool
) -> Dataset:
    """
    Filter the rows of a split, and add completions.

    Args:
        split (`str`): its name, for errors.
        strict (`bool`): as of [`filter_rows`].
        makes_prompt (`bool`): a template makes the column `prompt` of others.

    Raises:
        SetupError: for a column that is missing or misspelt, and what the filter refuses.
    """
    from datasets import IterableDataset

    from maple_trl.trainers.common.rows import check_spelling

    name = f"{script_args.dataset_name}, split {split!r}"
    try:
        check_spelling(dataset.column_names, name, makes_prompt)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if isinstance(dataset, IterableDataset):
        dataset = _prepared_stream(dataset, script_args, name)
    else:
        if script_args.dataset_filter is not None:
            dataset = filter_rows(dataset, script_args.dataset_filter, name, strict)
        if script_args.completion_template is not None:
            dataset = add_completions(dataset, script_args.completion_template, name)
    return dataset


def check_streaming(script_args: OmniScriptArguments, training_args: OmniGRPOConfig | OmniSFTConfig) -> None:
    """Raise SetupError for a job that cannot read its rows as they are needed."""
    if script_args.trainer not in _STREAMING:
        why = (
            "batches rows by their tags"
            if script_args.trainer == "mapo"
            else "finds the rows of what it replays again"
        )
        raise SetupError(
            f"dataset_streaming is for {' and '.join(_STREAMING)}: {script_args.trainer} {why}, for which it needs the whole table"
        )
    if training_args.max_steps <= 0:
        raise SetupError("dataset_streaming needs max_steps: how many rows a stream has is known at its end alone")


def _prepared_stream(dataset: IterableDataset, script_args: OmniScriptArguments, name: str) -> IterableDataset:
    """Filter a stream, and add completions, row by row."""
    columns = dataset.column_names or []
    allowed, template = script_args.dataset_filter or {}, script_args.completion_template
    needed = [("dataset_filter", column) for column in allowed]
    needed += [("completion_template", column) for column in (template_columns(template) if template else [])]
    for option, column in needed:
        if column not in columns:
            raise SetupError(f"{option}: {name} has no column {column!r}; its columns: {', '.join(columns)}")
    if template and "completion" in columns:
        raise SetupError(f"completion_template: {name} has a column 'completion' already; leave the template out")
    if allowed:
        dataset = dataset.filter(lambda row: all(row[column] in values for column, values in allowed.items()))
    if not template:
        return dataset
    from datasets import Features, Value

    def add(row: dict) -> dict:
        empty = next((column for column in template_columns(template) if row[column] in (None, "")), None)
        if empty is not None:
            raise ValueError(f"completion_template: {name}: column {empty!r} of row {row.get('id')!r} is empty")
        return row | {"completion": template.format(**row)}

    return dataset.map(add, features=Features({**dataset.features, "completion": Value("string")}))


def first_rows(dataset: Dataset | IterableDataset, at_least: int) -> Dataset:
    """
    Return the rows that are checked before training: all of a table, the first of a stream.

    Args:
        at_least (`int`): how many one batch takes.

    Raises:
        SetupError: when a stream gives none, or cannot be read.
    """
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset
    try:
        rows = list(dataset.take(max(CHECKED_ROWS, at_least)))
    except (ValueError, OSError) as error:
        raise SetupError(f"train_dataset: {error}") from error
    if not rows:
        raise SetupError("dataset_streaming: no row is left of the stream; does dataset_filter let one through?")
    return Dataset.from_list(rows, features=dataset.features)


def evaluates(training_args: OmniGRPOConfig | OmniSFTConfig) -> bool:
    """Return whether a job evaluates on its test split during training."""
    return str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
