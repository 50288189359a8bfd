"""
Makes a folder that other programs load of what was trained: adapters merged, and of an Omni model the parts that speak again.

A trained Thinker is written as it saves itself, or as the full model that it was taken from: its weights below `thinker.`,
beside those of the original's talker and vocoder, which are copied bit by bit, with the original's config, generation config
and processor. That is the layout in which these models are published, which transformers' Omni classes and vLLM read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from maple_trl.omni.adapters import load_whole
from maple_trl.omni.checkpoints import SPEECH, checkpoint_dtype, names_in, reach, read_config, read_index, sizes_in
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, forward_position_ids
from maple_trl.omni.families import family_for, is_omni
from maple_trl.omni.layouts import name_in_files
from maple_trl.omni.loading import THINKERS, load_model, load_processor, resolve_checkpoint
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.quantization import is_quantized
from maple_trl.omni.serving import serve_media


Parts = Literal["thinker", "full"]

_COPIED = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "spk_dict.pt")
"""Files of an original that are copied as they are: all but weights, code, texts and pictures. `spk_dict.pt` holds its voices."""

_PREFIX = "thinker."
"""Before the names of a Thinker's weights in a full model."""

_NOT_COPIED = (
    SAFE_WEIGHTS_INDEX_NAME,
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "args.json",
    "option_changes.json",
    "summary.json",
)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Most by which log-probabilities of the next token may differ after a merge: adapters are added before rounding, not after."""


class ExportError(ValueError):
    """What was trained cannot be exported so; the message names the part and what would be right. Nothing was written."""


@dataclass(frozen=True)
class Exported:
    """
    What was written.

    Attributes:
        folder: where.
        parts: `thinker`, `full`, or `model` for a family that has no talker.
        architecture: the class that its config names.
        dtype: of the trained weights.
        files: of weights.
        merged: whether there was an adapter.
        difference: the largest difference of log-probabilities of the next token, over a prompt with every kind of media that
            the model reads, between the model that was exported and the folder, read again. 0 without an adapter.
    """

    folder: str
    parts: str
    architecture: str
    dtype: str
    files: tuple[str, ...]
    merged: bool
    difference: float


def export_model(
    source: str,
    output: str | os.PathLike[str],
    parts: Parts = "thinker",
    original: str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    revision: str = "main",
    original_revision: str = "main",
    finish: Callable[[Path, Exported], None] | None = None,
) -> Exported:
    """
    Write a model that was trained, adapters merged, into a new folder, which appears whole or not at all.

    What was written is read again, and must answer a prompt with media as the model that was exported does.

    Args:
        source: the folder of a run, of one of its checkpoints, or a Hub id; of a whole model or of an adapter.
        output: the folder to make.
        parts: of an Omni model the Thinker alone, or the full model; of every other the whole model is written.
        original: the full Omni model whose talker and vocoder are taken, a folder or Hub id; needed for `full`.
        base_model: the model that an adapter was trained on, where it does not say so itself.
        dtype: of the trained weights; `auto` is that of the source, and for `full` that of the original.
        max_shard_size: of a file of weights.
        revision, original_revision: on the Hub.
        finish (`Callable`, *optional*): is given the folder that is about to take its place, to write into, and what it holds.

    Raises:
        ExportError: naming what is missing or does not fit.
        CheckpointError: when a model cannot be read.
    """
    output = Path(output)
    check_output(output)
    donor = _Donor(original, original_revision) if parts == "full" else None
    model, processor = _load(source, base_model, revision, dtype, donor)
    merged = hasattr(model, "merge_and_unload")
    model.eval()
    prompt = _probe(model, processor)
    before = _next_token(model, prompt, processor)
    if merged:
        model = model.merge_and_unload()
    kind, architecture = model.config.model_type, type(model).__name__
    if donor is not None:
        donor.check(model, source)
    written_dtype = str(model.dtype).removeprefix("torch.")
    with new_folder(output) as scratch:
        if donor is None:
            model.save_pretrained(scratch, max_shard_size=max_shard_size)
            if kind in THINKERS:
                _without_prefix(scratch)
            processor.save_pretrained(scratch)
        else:
            with tempfile.TemporaryDirectory(dir=scratch.parent, prefix=f"{scratch.name}-thinker-") as own:
                model.save_pretrained(own, max_shard_size=max_shard_size)
                donor.write(Path(own), scratch, model.dtype)
            architecture = donor.architecture
        limit = _TOLERANCE.get(model.dtype, 0.25) if merged else 0.0
        del model
        again = load_model(str(scratch), dtype=written_dtype).eval()
        difference = (_next_token(again, prompt, load_processor(str(scratch))) - before).abs().max().item()
        if not difference <= limit:
            raise ExportError(
                f"{source}: read again, what was written answers otherwise: log-probabilities of the next token differ by up to "
                f"{difference:.3g} (allowed: {limit:g}). Nothing was kept"
            )
        files = tuple(sorted(path.name for path in scratch.glob("*.safetensors")))
        said = "model" if kind not in THINKERS else parts
        exported = Exported(str(output), said, architecture, written_dtype, files, merged, difference)
        if finish is not None:
            finish(scratch, exported)
    return exported


@dataclass(frozen=True)
class Planned:
    """
    What would be written, as far as files tell before their weights are read.

    Attributes:
        parts, architecture, dtype, merged: as of [`Exported`].
        files: of weights, how many.
        size: of all weights, in bytes.
        copied: of these, those that are taken from the original as they are.
    """

    parts: str
    architecture: str
    dtype: str
    merged: bool
    files: int
    size: int
    copied: int


def plan_export(
    source: str,
    output: str | os.PathLike[str],
    parts: Parts = "thinker",
    original: str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    revision: str = "main",
    original_revision: str = "main",
) -> Planned:
    """
    Say what [`export_model`] would write, of weights reading what files say of their shapes.

    Raises:
        ExportError, CheckpointError: as `export_model`, but for what weights alone show: numbers that are none, and answers
            that differ.
    """
    check_output(Path(output))
    donor = _Donor(original, original_revision) if parts == "full" else None
    with warnings.catch_warnings():
        # Of weights that have no memory: they are not to be copied.
        warnings.filterwarnings("ignore", message=".*parameter.* to a meta parameter")
        model, _ = _load(source, base_model, revision, dtype, donor, device_map="meta")
    merged = hasattr(model, "merge_and_unload")
    if merged:
        model = model.merge_and_unload()
    kind, architecture, copied = model.config.model_type, type(model).__name__, {}
    if donor is not None:
        donor.check(model, source)
        architecture, copied = donor.architecture, donor.sizes()
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}  # of tied weights one is written
    weights = {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}
    # Copies, for the parts of a fused weight would each count as all of it.
    written = {name: tensor.clone() for name, tensor in revert_weight_conversion(model, weights).items()}
    shards = split_torch_state_dict_into_shards(
        written, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return Planned(
        parts="model" if kind not in THINKERS else parts,
        architecture=architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        merged=merged,
        files=len(shards.filename_to_tensors) + len(copied),
        size=shards.metadata["total_size"] + sum(copied.values()),
        copied=sum(copied.values()),
    )


def check_output(output: Path) -> None:
    """Raise ExportError where a folder is there already, or cannot be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} is there already: name a folder that is not, or remove it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ExportError(f"{output} cannot be made: {above} is no folder that can be written into")


def _load(
    source: str, base_model: str | None, revision: str, dtype: str, donor: _Donor | None, **options: Any
) -> tuple[Any, Any]:
    """Load what is exported, an adapter on its model, and its processor."""
    if dtype == "auto" and donor is not None:
        dtype = donor.dtype
    model, processor = load_whole(source, base_model, revision, dtype=dtype, **options)
    if is_quantized(model):
        raise ExportError(
            f"{source}: its weights have few bits, into which nothing can be merged without a loss: name the model that they "
            "were made of (base_model), in full precision"
        )
    return model, processor


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    Yield a scratch folder beside `output`, which takes its place at the end.

    Whatever ends the process, `output` is whole or not there. What a process that was killed has left of its scratch is
    removed by the next one.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.partial"
    for left in output.parent.glob(f"{scratch.name}*"):
        shutil.rmtree(left)
    scratch.mkdir()
    try:
        yield scratch
        os.replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _probe(model: Any, processor: Any) -> EncodedPrompt | None:
    """Return a prompt with a moment of each kind of media; `None` of a model of text."""
    if not is_omni(model):
        return None
    return PromptBuilder(family_for(model, processor), MediaLoader(tempfile.gettempdir(), backend="pyav")).probe()


@torch.no_grad()
def _next_token(model: Any, prompt: EncodedPrompt | None, processor: Any) -> Tensor:
    """Return the log-probabilities of the token after a prompt, of shape (vocabulary,), in float32."""
    if prompt is None:
        ids = torch.tensor([processor("The quick brown fox", add_special_tokens=False).input_ids])
        return model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
    family = family_for(model, processor)
    ids = prompt.input_ids[None]
    with serve_media(family, model, [prompt]):
        positions = forward_position_ids(batch_position_ids([prompt], len(prompt)))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    return logits[0, -1].float().log_softmax(-1)


class _Donor:
    """
    A full Omni model, of which all but the Thinker's weights is taken.

    Attributes:
        folder: with its small files, and those with weights of parts that speak.
        speech: the file of each weight of these.
        dtype: of its Thinker.
        architecture: the class that its config names.
    """

    def __init__(self, name: str | None, revision: str):
        if name is None:
            raise ExportError(
                "parts='full' needs the Omni model whose talker and vocoder are taken, e.g. original='Qwen/Qwen2.5-Omni-7B'"
            )
        self.name = name
        path = resolve_checkpoint(name)
        options = reach(path, {"revision": revision})
        self.config = read_config(path, options)
        thinker = getattr(self.config, "thinker_config", None)
        if thinker is None:
            raise ExportError(
                f"original: {name} is a {self.config.model_type}, not a full Omni model: it has no talker. Name the one that the "
                "Thinker was taken from, e.g. Qwen/Qwen2.5-Omni-7B"
            )
        self.thinker = thinker
        self.folder = Path(path)
        if not self.folder.is_dir():
            self.folder = Path(snapshot_download(path, allow_patterns=list(_COPIED), **options))
        places = self._places(path, options)
        self.speech = {weight: file for weight, file in places.items() if weight.startswith(SPEECH)}
        if not self.speech:
            raise ExportError(
                f"original: {name} has no weights of parts that speak ({', '.join(SPEECH)}): it was saved without them. Name the "
                "model that was published, e.g. Qwen/Qwen2.5-Omni-7B"
            )
        files = sorted(set(self.speech.values()))
        if not Path(path).is_dir():
            snapshot_download(path, allow_patterns=files, **options)
        for file in files:
            if not (self.folder / file).is_file():
                raise ExportError(f"original: {name} lacks {file}, in which weights of parts that speak stand")
            lacking = {weight for weight, held in self.speech.items() if held == file} - set(
                names_in(self.folder / file)
            )
            if lacking:
                raise ExportError(
                    f"original: {self.folder / file} lacks {min(lacking)!r}, which its index says is there"
                )
        self.dtype = checkpoint_dtype(path, {"revision": revision})
        written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self.architecture = (written.get("architectures") or [type(self.config).__name__])[0]

    def _places(self, path: str, options: Mapping[str, Any]) -> dict[str, str]:
        if (self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            return read_index(self.folder / SAFE_WEIGHTS_INDEX_NAME)
        if not Path(path).is_dir():
            snapshot_download(path, allow_patterns=[SAFE_WEIGHTS_NAME], **options)
        if not (self.folder / SAFE_WEIGHTS_NAME).is_file():
            raise ExportError(
                f"original: {self.name} has no weights as safetensors: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
            )
        return dict.fromkeys(names_in(self.folder / SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the weights that are taken, by their file."""
        return {
            file: sum(size for name, size in sizes_in(self.folder / file).items() if self.speech.get(name) == file)
            for file in set(self.speech.values())
        }

    def check(self, model: PreTrainedModel, source: str) -> None:
        """Raise ExportError where the trained Thinker is not one that fits into this model, by its weights' shapes."""
        kind = model.config.model_type
        if self.thinker.model_type != kind:
            hint = "" if kind in THINKERS else ", which has no talker: leave parts='full' out"
            raise ExportError(f"original: {self.name} has a {self.thinker.model_type}, and {source} is a {kind}{hint}")
        with torch.device("meta"):
            own = {name: tuple(tensor.shape) for name, tensor in type(model)(self.thinker).state_dict().items()}
        trained = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in sorted(own.keys() | trained.keys()):
            if own.get(name) != trained.get(name):
                raise ExportError(
                    f"original: {self.name} is another model than {source} was trained from: {name_in_files(name)} has the shape "
                    f"{own.get(name)} there, and {trained.get(name)} here"
                )

    def write(self, own: Path, scratch: Path, dtype: torch.dtype) -> None:
        """Write the full model: the Thinker that saved itself in `own`, and everything else of this one."""
        for pattern in _COPIED:
            for path in self.folder.glob(pattern):
                if path.name not in _NOT_COPIED:
                    shutil.copyfile(path, scratch / path.name)  # of the Hub's cache they are links
        if str(dtype).removeprefix("torch.") != self.dtype:
            _set_dtype(scratch / "config.json", str(dtype).removeprefix("torch."))
        shards = [(own / file, None) for file in sorted(path.name for path in own.glob("*.safetensors"))]
        shards += [(self.folder / file, file) for file in sorted(set(self.speech.values()))]
        places, size = {}, 0
        for number, (path, of_speech) in enumerate(shards, 1):
            with safe_open(path, framework="pt") as opened:
                if of_speech is None:
                    tensors = {_PREFIX + name.removeprefix(_PREFIX): opened.get_tensor(name) for name in opened.keys()}
                else:
                    names = [name for name, file in self.speech.items() if file == of_speech]
                    tensors = {name: opened.get_tensor(name) for name in names}
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(tensors, scratch / name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (scratch / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if f"{_PREFIX}lm_head.weight" in places:
            _untie(scratch / "config.json")


def _without_prefix(folder: Path) -> None:
    """Give the weights of a Thinker their own names: one that was read from a full model saves itself under that one's."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            if not any(name.startswith(_PREFIX) for name in opened.keys()):
                continue
            tensors = {name.removeprefix(_PREFIX): opened.get_tensor(name) for name in opened.keys()}
        path.unlink()  # the tensors may be views of it
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))
        found["weight_map"] = {name.removeprefix(_PREFIX): file for name, file in found["weight_map"].items()}
        index.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _untie(path: Path) -> None:
    """
    Write into a full model's config that the head has weights of its own, where it says otherwise.

    transformers 5 writes a default into the language model's part, and does not ask it; vLLM does.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config["thinker_config"]["text_config"]
    if text.get("tie_word_embeddings") is not False:
        text["tie_word_embeddings"] = config["thinker_config"]["tie_word_embeddings"] = False
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(path: Path, dtype: str) -> None:
    """Write the precision of the Thinker into a full model's config, by the name that stands there."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["thinker_config"]):
        part["torch_dtype" if "torch_dtype" in part else "dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
