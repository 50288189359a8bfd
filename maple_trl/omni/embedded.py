"""
Media that a table holds itself: columns of `datasets.Image()`, `Video()` and `Audio()`, and plain bytes.

Their bytes are written once, under their digest, to a folder of this machine's Hugging Face cache, and the column
becomes one of texts: `embedded:<digest>/<name>` for bytes, and the path for a cell that has only that. Nothing is
decoded, so torchcodec is not needed; a path has to lie below the media root, as in any other row.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import HF_HOME

from maple_trl.modalities import IMAGE_COLUMNS


if TYPE_CHECKING:  # processes that only decode need not load it
    from datasets import Dataset, IterableDataset


FOLDER = Path(HF_HOME) / "maple_trl" / "media"

_REFERENCE = re.compile(r"embedded:([0-9a-f]{64})/([^/\\\0]*)")
_BATCH = 16  # rows whose bytes are in memory at once


def stored_path(reference: str) -> str | None:
    """Return the file of a reference to embedded bytes; `None` for any other text."""
    match = _REFERENCE.fullmatch(reference)
    return str(FOLDER / f"{match[1]}{Path(match[2]).suffix.lower()}") if match else None


def store(data: bytes, name: str | None) -> str:
    """Keep the bytes of a medium on this machine, and return the reference to them."""
    name = re.sub(r"[^\w.\- ]", "_", os.path.basename((name or "").replace("\\", "/")))
    reference = f"embedded:{hashlib.sha256(data).hexdigest()}/{name}"
    path = Path(stored_path(reference))
    if not path.is_file() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # other processes may write the same
            file.write(data)
        os.replace(file.name, path)
    return reference


def as_paths(dataset: Dataset | IterableDataset | Any) -> Dataset | IterableDataset | Any:
    """
    Write embedded media as texts that [`~maple_trl.omni.media.loader.MediaLoader`] reads; keep any other data set.

    Args:
        dataset (`Dataset` or `IterableDataset`): a streamed one is changed row by row, as it is read.
    """
    from datasets import Dataset, Features, IterableDataset

    features = getattr(dataset, "features", None)
    if not isinstance(dataset, (Dataset, IterableDataset)) or features is None:
        return dataset
    undecoded = Features({name: _undecoded(feature) for name, feature in features.items()})
    for name, feature in undecoded.items():
        if feature != features[name]:
            dataset = dataset.cast_column(name, feature)  # of a column itself, this copies nothing
    names = [name for name in (*IMAGE_COLUMNS, "video", "audio") if _embeds(undecoded.get(name))]
    if not names:
        return dataset
    texts = {name: _texts(undecoded[name]) for name in names}
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            lambda row: row | {name: _reference(row[name]) for name in names},
            features=Features({**undecoded, **texts}),
        )
    for name in names:
        batches = dataset.select_columns([name]).iter(batch_size=_BATCH)
        values = [_reference(value) for batch in batches for value in batch[name]]
        dataset = dataset.remove_columns([name]).add_column(name, values, feature=texts[name])
    return dataset


def _undecoded(feature: Any) -> Any:
    from datasets import Audio, Image, LargeList, List, Video

    for kind in (Image, Video, Audio):
        if isinstance(feature, kind):
            return kind(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(member) for name, member in feature.items()}
    return feature


def _embeds(feature: Any) -> bool:
    """Return whether a column holds bytes, or paths as those features store them."""
    from datasets import Audio, Image, LargeList, List, Value, Video

    if isinstance(feature, (List, LargeList)):
        return _embeds(feature.feature)
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, (Image, Video, Audio))


def _texts(feature: Any) -> Any:
    from datasets import LargeList, List, Value

    return List(_texts(feature.feature)) if isinstance(feature, (List, LargeList)) else Value("string")


def _reference(value: Any) -> Any:
    if isinstance(value, list):
        return [_reference(item) for item in value]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    return path if data is None else store(data, path)
