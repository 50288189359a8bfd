"""What commands that prepare data would read, ask and write: told without a network, and without writing a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.jobs.data import check_split
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.forecasts import Forecast, look_at_data, many, size_of


if TYPE_CHECKING:
    from maple_trl.data.converters import ConvertOptions
    from maple_trl.data.qa_plus import QAPlusOptions


def forecast_conversion(
    name: str, source: str | os.PathLike[str], output: str | os.PathLike[str], options: ConvertOptions
) -> Forecast:
    """
    Say what [`~maple_trl.data.converters.convert`] would do.

    Raises:
        ConversionError: for an unknown set, and one whose tables are not there.
        SetupError: when the output holds something, or there is no media root, and for files of less than one row.
    """
    from maple_trl.data.converters import CONVERTERS
    from maple_trl.data.converters.convert import ConversionError, find_files
    from maple_trl.data.shards import ShardError, ShardWriter

    try:
        converter = CONVERTERS.find(name)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    files = [file for file, _ in find_files(converter, Path(source))]
    if options.media_root is not None and not Path(options.media_root).is_dir():
        raise SetupError(f"media_root: there is no folder {options.media_root}")
    try:
        ShardWriter(output, shard_rows=options.shard_rows)  # which writes nothing before it is entered
    except ShardError as error:
        raise SetupError(str(error)) from error
    size = sum(file.stat().st_size for file in files)
    return Forecast(
        reads=[f"{file} ({size_of(file.stat().st_size)})" for file in files],
        computes=[f"rows of {converter.title}; how many is known when the records are read"],
        writes=[f"{output}: a folder of Parquet shards"],
        numbers={"files": len(files), "bytes": size},
    )


def forecast_qa_plus(
    source: str, output: str, split: str, options: QAPlusOptions, overwrite: bool = False
) -> Forecast:
    """
    Say what [`~maple_trl.data.qa_plus.build_qa_plus`] would do.

    Raises:
        SetupError: for a source or split that is not there, and an output that holds the split already.
    """
    from maple_trl.data.shards import shards_of
    from maple_trl.modalities import STRATA

    there = shards_of(Path(output), split)
    if there and not overwrite:
        raise SetupError(f"{there[0]} is there already; name another folder, or replace the split with --overwrite")
    splits = look_at_data(source, (split,))
    check_split(source, split, splits)
    found = splits[split]
    if options.evaluation:
        rows, what = None if found.rows is None else 7 * found.rows, "each question with all seven inputs"
    else:
        sizes = [options.sizes[stratum] for stratum in STRATA]
        sizes = [found.rows if size is None else size for size in sizes]
        rows = None if None in sizes else sum(sizes)
        what = ", ".join(f"{many(size, f'{stratum} row')}" for size, stratum in zip(sizes, STRATA, strict=True))
    return Forecast(
        reads=[f"{found.told}: {many(found.rows, 'row')}"],
        computes=[f"{many(rows, 'row')} at most: {what}"],
        asks=[f"the Hub, for the data set {source}"] if found.fetched else [],
        writes=[
            f"{output}: {split}-….parquet, qa_plus-{split}.json, left_out-{split}.jsonl"
            + (", in the place of those that are there" if there else "")
        ],
        numbers={"questions": found.rows, "rows": rows},
    )


def forecast_upload(folder: str, repository: str, media_root: str | None = None) -> Forecast:
    """
    Validate a folder of shards, and say what [`~maple_trl.data.publish.publish`] would upload.

    Raises:
        InvalidRowsError: when a row has a problem.
        PublishError, ShardError: for an id that is none, and a folder without a whole set of shards.
    """
    from maple_trl.data.publish import check_upload

    shards, report = check_upload(folder, repository, media_root)
    files = [path for paths in shards.values() for path in paths]
    size = sum(path.stat().st_size for path in files)
    counts = ", ".join(f"{split} in {many(len(paths), 'shard')}" for split, paths in shards.items())
    return Forecast(
        reads=[f"{folder}: {many(report.rows, 'row')}, {counts}; no problem found"]
        + [f"not uploaded, as it is no shard: {path}" for path in report.passed_over],
        asks=[
            f"the Hub, for {repository}: upload of {many(len(files), 'shard')} ({size_of(size)}) and a card, in one commit; what "
            f"an earlier upload has there of {', '.join(shards)} is removed, other splits stay, and so does a README.md that a "
            "person has written or changed"
        ],
        numbers={"rows": report.rows, "files": len(files), "bytes": size},
    )


def forecast_model_upload(folder: str, repository: str) -> Forecast:
    """
    Say what [`~maple_trl.hub.publish.push_model`] would upload.

    Raises:
        PublishError: for an id that is none, and a folder without a whole model.
    """
    from maple_trl.hub.publish import check_upload

    operations = check_upload(folder, repository)
    names = [operation.path_in_repo for operation in operations]
    size = sum(operation.upload_info.size for operation in operations)
    return Forecast(
        reads=[f"{folder}: {', '.join(names)}"],
        asks=[
            f"the Hub, for {repository}: upload of {many(len(names), 'file')} ({size_of(size)}) with a card, in one commit"
        ],
        numbers={"files": len(names), "bytes": size},
    )
