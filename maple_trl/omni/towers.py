"""What the vision and audio towers make of prompts, kept while the towers do not change."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from maple_trl.omni.encoded import EncodedPrompt, Features, MediaMismatchError, tensor_bytes
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.host_memory import host_memory
from maple_trl.omni.quantization import named_scales


logger = logging.getLogger(__name__)

PARTIAL = ".partial"
_ABANDONED = 600
"""Seconds after which nobody is still writing a file."""
_TOWER_SCOPES = {"image": "vision", "video": "vision", "audio": "audio"}


def run_tower(family: OmniFamily, core: nn.Module, kind: str, prompts: Sequence[EncodedPrompt]) -> list[Features]:
    """Run a tower once over the media of some prompts."""
    counts = [prompt.media_tokens[kind] for prompt in prompts]
    layers = family.tower_outputs(core, kind, prompts)
    if len(layers["tokens"]) != sum(counts):
        raise MediaMismatchError(
            f"the tower gave {len(layers['tokens'])} features ({kind}) for {sum(counts)} placeholders"
        )
    split = {name: features.split(counts) for name, features in layers.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(prompts))]


@dataclass(frozen=True)
class _Seen:
    """
    A tower's parameters and buffers, with those of its projector, as they were when somebody looked.

    Attributes:
        time: when that was.
        parameters: by name.
        marks: of each its identity, place and version, which takes no look at values; `None` while one is trained.
        probe: digest of one value of each: some writers (`.data`) change nothing but values.
        digest: of all values and of the tower's configuration.
    """

    time: object
    parameters: list[tuple[str, Tensor]]
    marks: list[tuple[int, int, int]] | None = None
    probe: bytes = b""
    digest: str = ""


class TowerCache:
    """
    Features of clips that frozen towers have seen, in memory and, where a folder is given, on disk.

    A tower is frozen while no parameter of it and of its projector is trained; those of another are never kept. What
    decides an entry is its content: the tower's weights, and the tensors that it reads, which frames, sizes and rates have
    gone into.

    Args:
        max_bytes (`int`): in memory, at most, and within the process's budget; 0 keeps none.
        folder (`str`, *optional*): for entries on disk; several processes may share it.
        max_disk_bytes (`int`): on disk, at most; the entries not used for longest go first.
        clock (`Callable`, *optional*):
            Tells the time. Parameters that are replaced or written to behind autograd's back, as `.data` allows, are noticed
            at the next time that is another: it takes a kernel for each to look. By default every call is another time.

    Attributes:
        hits, misses (`int`): prompts that were found and that a tower had to read, of frozen towers.
    """

    def __init__(
        self,
        max_bytes: int,
        folder: str | os.PathLike | None = None,
        max_disk_bytes: int = 8 << 30,
        clock: Callable[[], object] = object,
    ):
        self._memory = host_memory().cache("encoder", max_bytes, _size)
        self.folder = None if folder is None else Path(folder)
        self.max_disk_bytes = max_disk_bytes
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in _leftovers(self.folder):
                with suppress(OSError):  # another process was faster, or the folder may only be read
                    path.unlink()
        self._clock = clock
        self._seen: WeakKeyDictionary[nn.Module, dict[str, _Seen]] = WeakKeyDictionary()
        self._pins = False
        self._disk_fails = False
        self.hits = self.misses = 0

    def features(
        self, family: OmniFamily, core: nn.Module, kind: str, prompts: Sequence[EncodedPrompt]
    ) -> list[Features]:
        """Return the features of prompts with media of a kind; of a frozen tower, those not known yet are computed."""
        weights = self._weights_digest(family, core, kind)
        if weights is None:
            return run_tower(family, core, kind, prompts)
        device = core.get_input_embeddings().weight.device
        self._pins = device.type == "cuda"
        keys = [f"{weights}-{_precision(device)}-{prompt.media_digest(kind)}" for prompt in prompts]
        found = {key: self._read(key) for key in dict.fromkeys(keys)}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if found[key] is None}
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        for key, prompt in missing.items():
            # Alone: in a batch, rounding would depend on what else is not known yet, and a resumed run knows less.
            (found[key],) = run_tower(family, core, kind, [prompt])
            self._keep(key, {name: values.detach().cpu() for name, values in found[key].items()})
        # Copies, so that nobody writes to what is kept.
        return [
            {name: values.to(device, copy=True, non_blocking=self._pins) for name, values in found[key].items()}
            for key in keys
        ]

    def _weights_digest(self, family: OmniFamily, core: nn.Module, kind: str) -> str | None:
        """Digest a tower's weights and configuration; `None` while any of it is trained."""
        known, now = self._seen.setdefault(core, {}), self._clock()
        seen = known.get(kind)
        current = seen is not None and seen.time == now
        parameters = seen.parameters if current else _tower_parameters(family, core, kind)
        # An adapter that is switched off for a reference pass asks for no gradient either, but will be trained on.
        if any(parameter.requires_grad or "lora_" in name for name, parameter in parameters):
            known[kind] = _Seen(now, parameters)
            return None
        marks = [(id(parameter), parameter.data_ptr(), parameter._version) for _, parameter in parameters]
        if current and seen.marks == marks:
            return seen.digest
        probe = _probe([parameter for _, parameter in parameters])
        if seen is not None and (seen.marks, seen.probe) == (marks, probe):
            digest = seen.digest
        else:
            digest = _digest(kind, getattr(family.config, f"{_TOWER_SCOPES[kind]}_config"), parameters)
        known[kind] = _Seen(now, parameters, marks, probe, digest)
        return digest

    def _read(self, key: str) -> Features | None:
        kept = self._memory.get(key)  # in one step: threads that decode may push it out
        if kept is not None or self.folder is None:
            return kept
        path = self.folder / f"{key}.safetensors"
        try:
            # In one piece: what another process removes must not vanish between two looks at it.
            features = load(path.read_bytes())
        except (OSError, SafetensorError):  # missing, or half gone: it is computed again
            return None
        with suppress(OSError):  # it is another user's, or gone since
            os.utime(path)
        self._remember(key, features)
        return features

    def _keep(self, key: str, features: Features) -> None:
        self._remember(key, features)
        if self.folder is None:
            return
        scratch = self.folder / f"{uuid4().hex}{PARTIAL}"
        try:
            scratch.write_bytes(save({name: values.contiguous() for name, values in features.items()}))
            scratch.replace(self.folder / f"{key}.safetensors")
            self._shrink()
        except OSError as error:  # a full disk must not end a run
            with suppress(OSError):
                scratch.unlink()
            if not self._disk_fails:
                logger.warning("The encoder cache cannot write into %s; going on without it: %s", self.folder, error)
            self._disk_fails = True

    def _remember(self, key: str, features: Features) -> None:
        if sum(values.nbytes for values in features.values()) <= self._memory.maxsize:
            # From pinned memory the host need not wait for a copy to the device.
            self._memory[key] = {name: v.pin_memory() for name, v in features.items()} if self._pins else features

    def _shrink(self) -> None:
        entries = []
        for path in (*self.folder.glob("*.safetensors"), *_leftovers(self.folder)):
            try:
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        excess = sum(size for _, size, _ in entries) - self.max_disk_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _tower_parameters(family: OmniFamily, core: nn.Module, kind: str) -> list[tuple[str, Tensor]]:
    """
    Return the parameters of a tower and its projector, and their buffers; projectors of both kinds count for either.

    Some towers scale by buffers of a checkpoint. Weights of few bits say nothing without their scales, which are no parameters.
    """
    wanted = (_TOWER_SCOPES[kind], "projectors")
    every = (*core.named_parameters(), *core.named_buffers(), *named_scales(core))
    return [(name, tensor) for name, tensor in every if family.scope_of(name) in wanted]


def _probe(parameters: list[Tensor]) -> bytes:
    """Digest one value of each weight."""
    middles = [parameter.detach().flatten()[parameter.numel() // 2 :][:1] for parameter in parameters]
    return hashlib.blake2b(tensor_bytes(torch.cat(middles))).digest()


def _digest(kind: str, config: PreTrainedConfig, parameters: list[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(f"{kind} {config.to_json_string()}".encode(), digest_size=12)
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()


def _precision(device: torch.device) -> str:
    """Return what the towers compute in, where it is not what their weights are kept in."""
    enabled = torch.is_autocast_enabled(device.type)
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if enabled else "own"


def _leftovers(folder: Path) -> list[Path]:
    """Find files of processes that were killed while writing, long enough ago that none still writes."""
    found = []
    for path in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # gone since
            if time.time() - path.stat().st_mtime > _ABANDONED:
                found.append(path)
    return found


def _size(key: str, features: Features) -> int:
    """Return the bytes of an entry; of pinned memory PyTorch takes powers of two."""
    sizes = [(values.nbytes, values.is_pinned()) for values in features.values()]
    return sum(1 << (size - 1).bit_length() if pinned and size else size for size, pinned in sizes)
