"""What may be said in public: Hub ids and options, but no path of this machine, no address of a server and no key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from maple_trl.hub.errors import PublishError
from maple_trl.omni.loading import BUILTIN_PREFIX
from maple_trl.records.options import is_key


PATH, ADDRESS = "<local path>", "<address>"
"""What stands in the place of a value that is not published."""

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
# A folder of the Hub's cache, of a repository and one of its commits.
_CACHED = re.compile(r"(models|datasets)--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+")
_PATH_WITHIN = re.compile(r"(?:^|[\s\"'=:,(\[])(?:~?/|\.\.?/|[A-Za-z]:[\\/])[^\s\"'<>/\\]+(?:[/\\]|\.\w)")
_URL = re.compile(r"^\w+://")


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a Hub id with an owner, OWNER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and name[0] not in "./~"


def check_repository(name: str) -> None:
    """Raise PublishError for what is no id of a repository."""
    if not is_repository(name):
        raise PublishError(f"{name!r} is no id of a repository; write OWNER/NAME")


def published_name(name: str | None) -> str | None:
    """
    Return the name under which others find what a local name stands for; `None` where there is none.

    That is a Hub id itself; `builtin:NAME` of an embedded model or set; of a folder in the Hub's cache the repository; and of
    the folder of a model with a card, the base model that the card names, so that a run which went on from another run is
    said to be of the model that began it.
    """
    if not name or name.startswith(BUILTIN_PREFIX):
        return name or None
    if not os.path.exists(name):
        return name if is_repository(name) else None
    path = Path(name).resolve()
    if path.parent == _ASSETS:
        return BUILTIN_PREFIX + path.name
    # Links within the cache lead from the snapshot to the content, so the name is asked as it was given, too.
    for text in (os.path.abspath(name), str(path)):
        if found := _CACHED.search(text.replace(os.sep, "/")):
            return f"{found['owner']}/{found['name']}"
    card = path / "README.md"
    if card.is_file():
        base = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
        if isinstance(base, str) and is_repository(base):
            return base
    return None


def is_private(value: str) -> bool:
    """Return whether a text names a place on this machine, or a server."""
    return bool(_URL.match(value) or _PATH_WITHIN.search(value)) or _is_here(value)


def _is_here(value: str) -> bool:
    return "\n" not in value and len(value) < 1000 and "/" in value and os.path.exists(value)


def located(value: Any) -> Any:
    """
    Return options with the absolute paths of what they name by a relative one.

    `runs/first` has the form of a Hub id too: seen from another folder nothing would tell that it is none.
    """
    if isinstance(value, Mapping):
        return {key: located(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [located(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and _is_here(value) else value


def shareable(value: Any, name: str = "") -> Any:
    """Return options as they may be published: keys left out, and paths and addresses replaced by what they are."""
    if isinstance(value, Mapping):
        return {key: shareable(item, str(key)) for key, item in value.items() if not is_key(str(key), item)}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    if not isinstance(value, str) or not is_private(value):
        return value
    if _URL.match(value):
        return ADDRESS
    return published_name(value) or PATH
