"""Upload of a folder of shards to the Hub, with a card, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maple_trl.data.dataset_card import count_contents, is_rendered, render_card
from maple_trl.data.shards import find_shards
from maple_trl.data.validation import ValidationReport, tables_in, validate_tables
from maple_trl.hub.errors import PublishError, hub_errors
from maple_trl.hub.names import check_repository


if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FOLDER = "data"
CARD = "README.md"
_SHARD = re.compile(rf"{_FOLDER}/(?P<split>\w+(\.\w+)*)-\d{{5}}-of-\d{{5}}\.parquet")


class InvalidRowsError(PublishError):
    """
    Rows that have to be mended first.

    Attributes:
        report: what is wrong.
    """

    def __init__(self, folder: object, report: ValidationReport):
        counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.most_common())
        super().__init__(f"{folder}: {report.counts.total()} problems ({counts}); nothing was uploaded")
        self.report = report


@dataclass(frozen=True)
class Published:
    """
    What was uploaded.

    Attributes:
        url: of the commit.
        files: paths in the repository.
        removed: shards of the same splits of an earlier upload that are not part of this one.
        rows: how many.
        left_out: tables of the folder that are no shards.
        own_card: whether the repository has a card that a person has written or changed, which stays.
        kept: splits of an earlier upload that stay.
    """

    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    rows: int
    left_out: tuple[str, ...] = ()
    own_card: bool = False
    kept: tuple[str, ...] = ()


def publish(
    folder: str | os.PathLike[str],
    repository: str,
    private: bool = False,
    license: str | None = None,
    media_root: str | os.PathLike[str] | None = None,
    message: str = "Upload rows",
) -> Published:
    """
    Validate the shards of a folder and upload them; the key is the one that the Hub's own tools use.

    The repository is made where there is none. Shards of an earlier upload are removed in the same commit where they are of a
    split that is uploaded; other splits and files of the repository stay, and so does a card that a person has written or
    changed.

    Args:
        folder: as [`~maple_trl.data.shards.ShardWriter`] writes it.
        repository: `OWNER/NAME`.
        private: of a repository that is made.
        license: for the card, e.g. `cc-by-4.0`.
        media_root: where the rows' media must lie; only paths are checked without it.
        message: of the commit.

    Raises:
        InvalidRowsError: when a row has a problem.
        PublishError: when the Hub refuses or cannot be reached.
        ShardError: when the folder holds no whole set of shards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    shards, report = check_upload(folder, repository, media_root)
    local = {f"{_FOLDER}/{path.name}": path for paths in shards.values() for path in paths}
    contents = count_contents(shards)
    api = HfApi()
    with hub_errors(f"cannot upload to {repository}"):
        made = api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
        there = api.list_repo_files(made.repo_id, repo_type="dataset")
        own_card = CARD in there and not is_rendered(_read(api, made.repo_id, CARD))
        old = _old_shards(there, list(local), shards)
        kept = _other_splits(there, shards)
        operations = [CommitOperationAdd(name, path) for name, path in local.items()]
        operations += map(CommitOperationDelete, old)
        if not own_card:
            # Patterns, so that a card which a person changes later names the shards of later uploads too.
            files = {split: [f"{_FOLDER}/{split}-*-of-*.parquet"] for split in (*shards, *kept)}
            card = render_card(contents, files, repository, license, kept)
            operations.append(CommitOperationAdd(CARD, card.encode()))
        commit = api.create_commit(made.repo_id, operations, commit_message=message, repo_type="dataset")
    uploaded = (*local, *(() if own_card else (CARD,)))
    left_out = tuple(report.passed_over)
    return Published(str(commit.commit_url), uploaded, tuple(old), report.rows, left_out, own_card, tuple(kept))


def _read(api: HfApi, repository: str, name: str) -> str:
    path = api.hf_hub_download(repository, name, repo_type="dataset")
    return Path(path).read_bytes().decode("utf-8", errors="replace")  # line ends as they are


def check_upload(
    folder: str | os.PathLike[str], repository: str, media_root: str | os.PathLike[str] | None = None
) -> tuple[dict[str, list[Path]], ValidationReport]:
    """
    Return the shards of a folder by split, and what is known of their rows; nothing is asked of the Hub.

    Tables of the folder that are no shards, and so would not be uploaded, are named as passed over.

    Raises:
        InvalidRowsError, PublishError, ShardError: as [`publish`].
    """
    check_repository(repository)
    shards = find_shards(folder)
    files = [path for paths in shards.values() for path in paths]
    report = validate_tables(files, media_root)
    report.passed_over += [str(path) for path in tables_in(Path(folder)) if path not in files]
    if report.counts:
        raise InvalidRowsError(folder, report)
    return shards, report


def _old_shards(there: Sequence[str], new: Sequence[str], splits: Container[str]) -> list[str]:
    return [
        name for name in there if (found := _SHARD.fullmatch(name)) and found["split"] in splits and name not in new
    ]


def _other_splits(there: Sequence[str], splits: Container[str]) -> list[str]:
    found = dict.fromkeys(shard["split"] for name in there if (shard := _SHARD.fullmatch(name)))
    return [split for split in found if split not in splits]
