"""Layouts of checkpoints of Omni models: of a full one the Thinker's weights are read, and what does not fit is named."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files

from maple_trl.omni.checkpoints import PICKLES, SPEECH, CheckpointError, names_in, needed_files, read_index


logger = logging.getLogger(__name__)

RENAMINGS = {
    r"^(?:thinker\.)?(visual|audio_tower)\.": r"model.\1.",
    r"^(?:thinker\.)?model\.(?!(?:language_model|visual|audio_tower)\.)": "model.language_model.",
    r"^thinker\.": "",
}
"""Names of files and of the full model to those of a Thinker's class: the first that fits."""

_WRAPPERS = {
    "base_model.model.": "PEFT's: merge the adapter into its model (`merge_and_unload()`) and save that",
    "_fsdp_wrapped_module.": "FSDP's: save the model inside, with `save_pretrained`",
    "_orig_mod.": "those of a compiled model: save the model inside, with `save_pretrained`",
    "module.": "those of a wrapper: save the model inside, with `save_pretrained`",
}
_EXPECTED = (
    "Read are the weights of a full Omni model (thinker.model…, thinker.visual…, thinker.audio_tower…, thinker.lm_head) and "
    "of its Thinker alone (model…, visual…, audio_tower…, lm_head)"
)
_SHOWN = 3  # names in an error
_told: set[str] = set()


def name_in_files(name: str) -> str:
    """Return the name that a weight of a Thinker's class has in files."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", name)


def name_in_class(name: str) -> str:
    """Return the name in a Thinker's class of a weight or module, by the name of files or of the full model."""
    for pattern, replacement in RENAMINGS.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


# Files


@contextmanager
def thinker_files(name: str, hub: Mapping[str, Any], whole: bool = False) -> Iterator[tuple[str, list[str]]]:
    """
    Yield a folder or Hub id to read a Thinker's weights from, and the names of all weights in its files.

    Files in which nothing but the parts that speak stands are neither fetched nor needed: where there are such, the folder
    is a temporary one that links to the others.

    Args:
        name: a folder or Hub id.
        hub: where and how it is found on the Hub.
        whole: yield the checkpoint itself in any case, for a model whose weights stay in its files.

    Raises:
        CheckpointError: when it has no weights as safetensors.
    """
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME, hub)
    single = _find(name, SAFE_WEIGHTS_NAME, hub)
    if single is not None:  # which transformers prefers
        yield name, names_in(single)
        return
    if index is None:
        raise CheckpointError(
            f"{name} has no weights as safetensors: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; {PICKLES}"
        )
    places = read_index(index)
    needed = needed_files(places)
    if whole or len(needed) == len(set(places.values())):
        yield name, list(places)
        return
    files = cached_files(name, needed, **hub)
    with tempfile.TemporaryDirectory(prefix="thinker-") as folder:
        for file, found in zip(needed, files or (), strict=True):
            Path(folder, file).symlink_to(os.path.realpath(found))
        kept = {weight: file for weight, file in places.items() if file in needed}
        Path(folder, SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps({"metadata": {}, "weight_map": kept}), encoding="utf-8"
        )
        generation = _find(name, "generation_config.json", hub)
        if generation is not None:
            Path(folder, generation.name).symlink_to(os.path.realpath(generation))
        yield folder, list(places)


def _find(name: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


# What was read


def check_names(name: str, names: Collection[str]) -> None:
    """Raise CheckpointError where a checkpoint has a Thinker's weight under two names, of which one would win in silence."""
    first: dict[str, str] = {}
    for found in names:
        other = first.setdefault(name_in_class(found), found)
        if other != found:
            raise CheckpointError(
                f"{name} has a weight twice, as {other!r} and as {found!r}: two layouts were mixed. Save the model once more "
                "into an empty folder"
            )


def check_thinker(name: str, model: PreTrainedModel, info: Mapping[str, Any], names: Collection[str]) -> None:
    """
    Check that a Thinker got every weight, and that every weight in its files was of it, or of a part that speaks.

    Args:
        name: of the checkpoint, for messages.
        info: what `from_pretrained` found.
        names: the names of the weights in its files; none where they are not known.

    Raises:
        CheckpointError: naming weights that are missing, of another shape, or foreign.
    """
    architecture = type(model).__name__
    missing = sorted(map(name_in_files, info["missing_keys"]))
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} weights of {architecture} are not in the checkpoint, e.g. {_some(missing)}; "
            f"{_there(names)}. {_EXPECTED}{_hint(missing, names)}"
        )
    mismatched = sorted(
        (name_in_files(key), tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]
    )
    if mismatched:
        key, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{name}: {len(mismatched)} weights have not the shape that config.json says, e.g. {key!r} has {found}, not "
            f"{wanted}: config.json is of another model than the weights"
        )
    foreign = sorted(name_in_files(key) for key in info["unexpected_keys"] if not key.startswith(SPEECH))
    if foreign and getattr(model.config, "quantization_config", None) is None:
        raise CheckpointError(
            f"{name}: {len(foreign)} of its weights are none of {architecture} as its config.json describes it, e.g. "
            f"{_some(foreign)}: config.json is of another model than the weights, or a part was added to this one. {_EXPECTED}"
        )


def _some(names: Collection[str]) -> str:
    shown = [repr(name) for name in list(names)[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")


def _there(names: Collection[str]) -> str:
    others = sorted(name for name in names if not name.startswith(SPEECH))
    if names and not others:
        return f"it holds {len(names)} weights, all of parts that speak (talker, vocoder)"
    return f"it holds {len(others)}, e.g. {_some(others)}" if others else "it holds none"


def _hint(missing: Collection[str], names: Collection[str]) -> str:
    for prefix, meaning in _WRAPPERS.items():
        if any(name.startswith(prefix) for name in names):
            return f". Names that begin with {prefix} are {meaning}"
    if list(missing) == ["lm_head.weight"]:
        return '. A head that shares the weights of the embedding needs "tie_word_embeddings": true in config.json'
    return ""


def tell_unread(name: str, names: Collection[str]) -> None:
    """Tell once how many weights of parts that speak are left unread."""
    parts = Counter(weight.partition(".")[0] for weight in names if weight.startswith(SPEECH))
    if parts and name not in _told:
        _told.add(name)
        counts = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
        logger.info("%s: %d weights of parts that speak are not read (%s)", name, sum(parts.values()), counts)
