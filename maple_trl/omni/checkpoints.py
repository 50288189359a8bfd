"""What is wrong with a checkpoint is said before its weights are read, and whether the Hub can be asked for it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash

from maple_trl.omni.families import registered_types


_WAIT = 5.0
"""Seconds in which the Hub must answer; the library below tries five times and says nothing meanwhile."""

PICKLES = (
    "pickled ones (pytorch_model.bin) are not read, since reading a pickle can run code. Where you trust them, load them with "
    "transformers and save them again: `model.save_pretrained(FOLDER)` writes safetensors"
)
PROCESSOR = (
    "take that of the model that it was trained from (processor_name_or_path; --processor of maple-trl eval), "
    "e.g. Qwen/Qwen2.5-Omni-7B"
)
SPEECH = ("talker.", "token2wav.", "code2wav.")
"""Beginnings of the names of weights that belong to parts of an Omni model that speak, which no prompt passes."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_JSON = (*_TOKENIZERS, *_PROCESSORS, "added_tokens.json", "special_tokens_map.json")  # read with the processor
_SHOWN = 6  # files of a folder that an error lists
ELSEWHERE = ("subfolder", "variant", "gguf_file", "state_dict", "config")  # arguments by which other files are read


_reached: set[str] = set()
"""Addresses of the Hub that have answered this process."""


class CheckpointError(ValueError):
    """There is no such model, or it cannot be read. The message says what is missing, and what would be right."""


def check_checkpoint(name: str, options: Mapping[str, Any], processor: bool = True, text: bool = True) -> None:
    """
    Check a model's files without reading its weights.

    Args:
        name: a folder or Hub id; names of embedded models have been resolved.
        options: what `from_pretrained` is given besides; see [`reach`].
        processor: whether its processor is read from there too.
        text: whether a model of text alone will do.

    Raises:
        CheckpointError: naming what is wrong.
    """
    folder = Path(name) if os.path.exists(name) else None
    if folder is not None:
        _check_folder(folder)
    config = read_config(name, options)
    _check_kind(config, name, text)
    if folder is not None and not any(options.get(argument) for argument in ELSEWHERE):
        check_weights(folder)
        if processor:
            _check_processor(folder, config)


def read_config(name: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    """
    Read the config of a checkpoint.

    Raises:
        CheckpointError: when there is none, or it is of no model that transformers knows.
    """
    if os.path.exists(name) and not any(options.get(argument) for argument in ELSEWHERE):
        _check_folder(Path(name))
    try:
        # Where nothing is said, transformers asks at the terminal whether to run code that the checkpoint brings.
        return AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **options})
    except Exception as error:  # the config's class checks its fields, each library with errors of its own
        kind = _model_type(name)
        if kind is not None:
            raise CheckpointError(
                f"{name} is of model type {kind!r}, which the installed transformers cannot read; {_supported()}"
            ) from error
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error


def checkpoint_dtype(name: str, options: Mapping[str, Any]) -> str:
    """Return the precision that a checkpoint's config names, e.g. `bfloat16`; `float32` where it names none."""
    config = read_config(name, reach(name, options))
    thinker = getattr(config, "thinker_config", config)
    parts = (thinker, thinker.get_text_config(), config)
    found = next((part.dtype for part in parts if part.dtype is not None), "float32")
    return str(found).removeprefix("torch.")


def _model_type(name: str) -> str | None:
    """Return the model type that a folder's config names, where transformers has none of this name."""
    from transformers import CONFIG_MAPPING

    try:
        found = json.loads(Path(name, "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and found not in CONFIG_MAPPING else None


# Local folders


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file; name the folder of a model (with config.json and weights) or a Hub id"
        )
    config = folder / "config.json"
    if not config.is_file():
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if (path / "config.json").is_file())
        there = f"its checkpoints are models: {', '.join(checkpoints)}" if checkpoints else f"it has {_listed(folder)}"
        raise CheckpointError(f"{folder} holds no model: there is no config.json in it; {there}")
    found = _read_json(config)
    for path in sorted(folder.glob("*.json")):
        if path.name in _JSON:
            _read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise CheckpointError(f"{config} does not say which model it is of: it has no model_type")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error}); copy it again") from error


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "") or "no file at all"


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where files of weights are missing, damaged or pickles."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        names_in(single)
        return
    if not index.is_file():
        pickled = f"; {PICKLES}" if any(folder.glob("pytorch_model*.bin")) else ""
        raise CheckpointError(
            f"{folder} holds no weights: it has config.json, but neither {single.name} nor {index.name}; it has "
            f"{_listed(folder)}{pickled}"
        )
    places = read_index(index)
    files = needed_files(places)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} files of weights that {index.name} lists, e.g. {missing[0]}"
        )
    _check_places(folder, {file: names_in(folder / file) for file in files}, places)


def read_index(index: Path) -> dict[str, str]:
    """
    Return the file of each weight, as an index of files lists them.

    Raises:
        CheckpointError: when it is no such index, saying why.
    """
    found = _read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(found.get("metadata"), dict):
        raise CheckpointError(
            f'{index} is no index of weights: it must be {{"metadata": {{…}}, "weight_map": {{WEIGHT: FILE, …}}}}; copy it again'
        )
    for weight, file in places.items():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {weight!r} must be in a .safetensors file beside it, not in {file!r}")
    return places


def _check_places(folder: Path, names: Mapping[str, list[str]], places: Mapping[str, str]) -> None:
    """Raise CheckpointError where files do not hold what their index says, or hold a weight twice."""
    for weight, file in places.items():
        if weight not in names.get(file, [weight]):
            raise CheckpointError(f"{folder / file} lacks {weight!r}, which its index says is there; copy both again")
    holders: dict[str, str] = {}
    for file, held in names.items():
        for weight in held:
            first = holders.setdefault(weight, file)
            if first != file:
                raise CheckpointError(
                    f"{folder} has {weight!r} twice, in {first} and in {file}: copy the checkpoint again"
                )


def needed_files(places: Mapping[str, str]) -> list[str]:
    """Return the files of an index in which other weights stand than those of parts that speak; all, where none does."""
    needed = {file for name, file in places.items() if not name.startswith(SPEECH)}
    return sorted(needed or set(places.values()))


def names_in(file: Path) -> list[str]:
    """Return the names of the weights in a file; raise CheckpointError where it is damaged."""
    with file.open("rb") as opened:
        start = opened.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file} is a pointer of Git LFS, not the weights themselves: `git lfs pull` fetches them"
        )
    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}; copy it again") from error


def _check_processor(folder: Path, config: PreTrainedConfig) -> None:
    reads_media = config.get_text_config() is not config or hasattr(config, "thinker_config")
    for names, what in ((_TOKENIZERS, "tokenizer"), (_PROCESSORS, "processor")):
        if what == "processor" and not reads_media:
            continue
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(
                f"{folder} holds a model without its {what}: there is no {names[0]}; {PROCESSOR}, or copy its files into the "
                "folder (`AutoProcessor.from_pretrained(MODEL).save_pretrained(FOLDER)`)"
            )


# What is supported


def _check_kind(config: PreTrainedConfig, name: str, text: bool) -> None:
    kind = config.model_type
    if {kind, f"{kind}_thinker"} & set(registered_types()):
        return
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    text_only = config.get_text_config() is config and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and generates
    if not text_only:
        raise CheckpointError(f"{name} is of the family {kind!r}, which is not supported; {_supported()}")
    if not text:
        raise CheckpointError(f"{name} is a model of text alone ({kind}), which reads no media; {_supported()}")


def _supported() -> str:
    names = dict.fromkeys(kind.removesuffix("_thinker") for kind in registered_types())
    return f"supported are {', '.join(sorted(names))}"


# The Hub


def reach(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the options with which a name can be read: where the Hub cannot be reached, from what it gave before.

    Raises:
        CheckpointError: when the name is neither a folder nor a Hub id, or the Hub is needed and does not answer.
    """
    options = dict(options)
    if os.path.exists(name):
        return options
    check_hub_id(name, "model")
    silent = hub_is_silent() if not options.get("local_files_only") else "local_files_only is set"
    if silent is None:
        return options
    places = {key: options[key] for key in ("cache_dir", "revision") if options.get(key)}
    if not isinstance(try_to_load_from_cache(name, "config.json", **places), str):
        raise CheckpointError(
            f"there is no folder {name}, and it cannot be fetched from the Hub: {silent}. Name a folder, or fetch it where "
            f"there is a network: `hf download {name}`"
        )
    return options | {"local_files_only": True}


def commit_of(name: str, options: Mapping[str, Any]) -> str | None:
    """Return the commit of a model on the Hub whose config is read; `None` of a folder, and where it cannot be told."""
    if os.path.exists(name):
        return None
    try:
        return extract_commit_hash(cached_file(name, "config.json", **options), None)
    except OSError:  # which reading the config will tell
        return None


def check_hub_id(name: str, what: str) -> None:
    """Raise CheckpointError for a name that is no Hub id, or can only be meant as a path, and nothing is there."""
    if name.startswith("~"):
        raise CheckpointError(f"there is no folder {name}: ~ is not replaced here, write the path from / on")
    if name.startswith(("/", "./", "../", ".\\")) or name.count("/") > 1 or name.endswith("/"):
        raise CheckpointError(f"there is no folder {name}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a folder that is there nor the Hub id of a {what} (OWNER/NAME)"
        ) from error


def hub_is_silent() -> str | None:
    """Return why the Hub cannot be asked; `None` where it answers."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if constants.ENDPOINT in _reached:
        return None
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_WAIT)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time-out of its own
    thread.start()
    thread.join(_WAIT)
    if thread.is_alive():
        return f"{constants.ENDPOINT} did not answer in {_WAIT:.0f} s"
    if failures:
        return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(failures[0]).split())})"
    _reached.add(constants.ENDPOINT)
    return None
