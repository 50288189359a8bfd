"""Uploads of models to the Hub: of the folder of a run, of one of its checkpoints, or of an export."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from maple_trl.hub.errors import PublishError, hub_errors, told
from maple_trl.hub.model_card import CARD, FACTS, CardFacts, is_edited, render_model_card
from maple_trl.hub.names import check_repository, is_repository, published_name
from maple_trl.hub.results import Measured


logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
PUBLISHED = (
    *("model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors", ADAPTER_CONFIG),
    *("config.json", "generation_config.json", "*tokenizer*.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "*processor_config.json", "chat_template*", "*.jinja"),
    *("spk_dict.pt", "training.png", "LICENSE*", CARD),
)
"""
Files of a model that are published, by their names. A run leaves others beside them: options with paths, completions with the
data that they are about, what was quarantined.
"""

NEVER = ("training_args.bin", FACTS)
"""Files that are not published with a checkpoint either, which is for going on with a run elsewhere."""


class Publisher(HfApi):
    """
    A client of the Hub that uploads of a folder what is meant for others.

    Transformers' trainer is handed it in the place of its own, and uploads whole folders.

    Attributes:
        failures: what went wrong in the background, in words.
    """

    def __init__(self, **options: Any):
        super().__init__(library_name="maple-trl", **options)
        self.failures: list[str] = []

    def upload_folder(  # type: ignore[override]
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        path_in_repo: str | None = None,
        run_as_future: bool = False,
        ignore_patterns: Any = None,
        **options: Any,
    ) -> Any:
        """
        Upload a model's files, or with `path_in_repo` a whole checkpoint, in one commit.

        `ignore_patterns` is not asked. Errors in the background are told and kept in `failures`, for nobody waits for them.
        """
        if run_as_future:
            return self.run_as_future(self._upload_aside, repo_id, folder_path, path_in_repo, options)
        return self.create_commit(repo_id, commit_operations(folder_path, path_in_repo), **options)

    def _upload_aside(
        self, repo_id: str, folder: str | Path, path_in_repo: str | None, options: dict[str, Any]
    ) -> Any:
        try:
            return self.create_commit(repo_id, commit_operations(folder, path_in_repo), **options)
        except Exception as error:
            self.failures.append(told(error))
            logger.warning("%s: an upload failed, and training goes on: %s", repo_id, told(error))
            raise


def commit_operations(folder: str | os.PathLike[str], path_in_repo: str | None = None) -> list[CommitOperationAdd]:
    """
    Return what is uploaded of a folder: of a model its published files, of a checkpoint (with `path_in_repo`) all but what never is.

    An adapter's config is uploaded with the public name of its model, and without one where there is none.
    """
    folder = Path(folder)
    start = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    if start:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [name for name in names if name not in NEVER and not name.startswith(".")]
    else:
        names = [
            path.name
            for path in sorted(folder.iterdir())
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PUBLISHED)
        ]
    return [CommitOperationAdd(f"{start}{name}", _content(folder / name)) for name in names]


def _content(path: Path) -> Path | bytes:
    if path.name != ADAPTER_CONFIG:
        return path
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if (path.parent / FACTS).is_file():
        base = CardFacts.read(path.parent).trained_from or base  # PEFT writes a relative path as it was given
    return _adapter_config(config, published_name(base))


def _adapter_config(config: dict[str, Any], base_model: str | None) -> bytes:
    return (json.dumps(config | {"base_model_name_or_path": base_model}, indent=2, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Pushed:
    """
    What was uploaded.

    Attributes:
        url: of the commit.
        repository: its id.
        files: paths in the repository.
        own_card: whether the card is one that a person has written or changed, which is uploaded as it is.
    """

    url: str
    repository: str
    files: tuple[str, ...]
    own_card: bool


def push_model(
    folder: str | os.PathLike[str],
    repository: str,
    private: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    measured: Sequence[Measured] = (),
    revision: str | None = None,
    message: str = "Upload model",
) -> Pushed:
    """
    Upload the model or adapter in a folder, with its card; the key is the one that the Hub's own tools use.

    The repository is made where there is none. What was uploaded before a connection broke is not sent again by the next call.
    Nothing in the folder is changed.

    Args:
        folder: of a run that has ended, of a checkpoint, or of an export.
        repository: `OWNER/NAME`.
        private: of a repository that is made.
        license: for the card, e.g. `apache-2.0`.
        base_model: the Hub id of the model that was trained, where the folder knows it by a path alone.
        measured: evaluations that are not within the folder.
        revision: a branch, which is made where there is none.
        message: of the commit.

    Raises:
        PublishError: when the folder holds no model, or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    found = check_upload(folder, repository)
    if base_model is not None and not is_repository(base_model):
        raise PublishError(f"base_model: {base_model!r} is no id on the Hub; write OWNER/NAME")
    operations = {operation.path_in_repo: operation for operation in found}
    facts = CardFacts.read(folder)
    facts = replace(facts, repository=repository, name=repository.rpartition("/")[2], license=license or facts.license)
    if base_model is not None:
        facts.trained_from = base_model
        if ADAPTER_CONFIG in operations:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            operations[ADAPTER_CONFIG] = CommitOperationAdd(ADAPTER_CONFIG, _adapter_config(config, base_model))
    own_card = is_edited(folder)
    if not own_card:
        card = render_model_card(facts, folder, measured)
        operations[CARD] = CommitOperationAdd(CARD, str(card).encode())
    with hub_errors(f"cannot upload to {repository}"):
        api = Publisher()
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(made.repo_id, list(operations.values()), commit_message=message, revision=revision)
    return Pushed(str(commit.commit_url), made.repo_id, tuple(sorted(operations)), own_card)


def check_upload(folder: str | os.PathLike[str], repository: str) -> list[CommitOperationAdd]:
    """
    Return what of a model's folder is uploaded, without its card; nothing is asked of the Hub.

    Raises:
        PublishError: for an id that is none, and a folder without a whole model.
    """
    folder = Path(folder)
    check_repository(repository)
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}")
    held = {path.name for path in folder.iterdir()}
    weights = {name for name in held if re.fullmatch(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors", name)}
    if not weights or not held & {"config.json", ADAPTER_CONFIG}:
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        there = f"; its checkpoints are: {', '.join(checkpoints)}" if checkpoints else ""
        raise PublishError(
            f"{folder} holds no model: there must be config.json or {ADAPTER_CONFIG}, and weights as safetensors{there}"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in held:
        from maple_trl.omni.checkpoints import CheckpointError, read_index

        try:
            missing = sorted(set(read_index(index).values()) - held)
        except CheckpointError as error:
            raise PublishError(str(error)) from error
        if missing:
            raise PublishError(f"{folder} lacks {missing[0]}, which {index.name} lists")
    return commit_operations(folder)
