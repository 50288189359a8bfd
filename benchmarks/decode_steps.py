"""
What a decoding step, a prefill and a log-probability pass ask of a device: kernels, and times at which the host waits.

    python benchmarks/decode_steps.py --json decode_steps.json

On a GPU a decoding step of a few rows takes as long as launching its kernels does, and at each value that the host asks
for it waits until the device has come so far. Both are counted here on a CPU, with Qwen2.5-Omni's architecture at small
widths: they follow from the program and the number of layers.

- **kernels**: operations that PyTorch dispatches, but for views and new memory without values. A lower bound: an operation
  can launch several.
- **waits**: values that the host asks for (`item`, `bool`, `tolist`, `cpu`, `nonzero`, indexing by a mask), by the line that
  asks. One that asks a tensor which lies on the host anyway would not wait on a GPU; it is counted all the same.

Each is counted twice, in one process:

- **before**: every forward of a generation looks for placeholders kind by kind, the head reads all positions of a prefill whose
  prompts are not shared, and the weights of frozen towers are looked at in every pass that takes their features from the
  cache.
- **now**: as the trainers do it.

The passes are those of G rows of a prompt with video and sound: each row by itself (`rows`), sharing the prompt (`shared`),
and sharing it with the towers' features known (`cached`). Of a generation the prefill and the mean of the steps after
it are told apart, each with the sampling that follows it.

With the layers of Qwen2.5-Omni-3B, which are the default (torch 2.15.0, transformers 5.23.0):

                                 kernels           waits
                             before      now  before     now
    rows      log probs        3415     3414   211.0   209.0
    rows      prefill          3480     3479   214.0   212.0
    rows      decoding step    1339     1335     3.0     1.0
    shared    log probs        3785     3784   210.0   208.0
    shared    prefill          3627     3626   214.0   212.0
    shared    decoding step    1339     1335     3.0     1.0
    cached    log probs        2730     1713     7.0     3.0
    cached    prefill          2572     1555    11.0     7.0
    cached    decoding step    1339     1335     3.0     1.0
    positions of a row that the head reads in a prefill of rows: 256 before, 1 now

What is left of the waits is asked for by transformers: most of them by the towers' attention, which cuts its windows apart on
the host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _shared_prefix_model as sizes
import _shared_prefix_passes as passes
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils.logging import disable_progress_bar

from maple_trl.omni import serving
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.towers import TowerCache


PACKAGES = ("torch", "transformers", "trl", "accelerate")
SIDES = ("rows", "shared", "cached")
WAYS = ("before", "now")
LIBRARY = str(Path(torch.__file__).parent)

# What the host asks for: below Python, and by methods of a tensor that reach no operation on a CPU.
ASKING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::_unique2"}
COPYING = {Tensor.tolist, Tensor.cpu}
# They launch nothing.
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::lift_fresh",
    "aten::detach",
}
FREE |= {"aten::_local_scalar_dense", "aten::_unsafe_view", "aten::_reshape_alias"}


# Counting


class Counts:
    """Kernels, and waits by the line that asks."""

    def __init__(self) -> None:
        self.kernels = 0
        self.waits: Counter[str] = Counter()

    def note_wait(self) -> None:
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename.startswith(LIBRARY) or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename) if frame else Path("?")
        self.waits[f"{path.name}:{frame.f_code.co_name}" if frame else "?"] += 1


class _Kernels(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ASKING or (name == "aten::index" and any(_is_mask(value) for value in args[1])):
            self.counts.note_wait()
        self.counts.kernels += name not in FREE and not _is_view(func)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPYING:
            self.counts.note_wait()
        return func(*args, **(kwargs or {}))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what is run inside this context."""
    counts = Counts()
    with _Copies(counts), _Kernels(counts):
        yield counts


# Before


@contextmanager
def looking_at_each_step(core: nn.Module, family: OmniFamily) -> Iterator[None]:
    """Look for placeholders in every forward, kind by kind, and where there are some count them kind by kind."""
    kinds = family.placeholder_ids

    def count(family: OmniFamily, ids: Tensor) -> dict[str, list[int]]:
        if not any(bool((ids == token).any()) for token in kinds.values()):
            return dict.fromkeys(kinds, [0] * len(ids))
        return {kind: (ids == token).sum(1).tolist() for kind, token in kinds.items()}

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("input_ids") is not None and kwargs["input_ids"].size(1) == 1:
            count(family, kwargs["input_ids"])

    counts_now, serving._count_placeholders = serving._count_placeholders, count
    handle = core.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        serving._count_placeholders = counts_now
        handle.remove()


class WatchfulCache(TowerCache):
    """Looks at a value of each weight of a tower whenever its features are asked for."""

    def features(self, family, core, kind, prompts):
        scopes = {"video": "vision", "audio": "audio"}[kind], "projectors"
        weights = [weight for name, weight in core.named_parameters() if family.scope_of(name) in scopes]
        torch.stack([weight.detach().flatten()[weight.numel() // 2].double() for weight in weights]).cpu()
        return super().features(family, core, kind, prompts)


# Passes


def count_log_probs(group: passes.Group, side: str) -> dict[str, Any]:
    """Count a pass of log-probabilities without gradients."""
    with counting() as counts:
        passes.PASSES["log_probs"](group, side)
    return _told([counts])


def count_generation(group: passes.Group, side: str) -> dict[str, Any]:
    """Count a generation's prefill, what precedes it included, and its decoding steps."""
    steps: list[Counts] = []
    positions: list[int] = []
    with ExitStack() as stack, counting() as counts:

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            steps.append(_take(counts))

        # Before the hooks of the pass, which are registered later.
        stack.callback(group.core.register_forward_pre_hook(begin, with_kwargs=True, prepend=True).remove)
        head = group.model.get_output_embeddings()
        stack.callback(head.register_forward_pre_hook(lambda m, args: positions.append(args[0].size(1))).remove)
        passes.PASSES["generate"](group, side)
        steps.append(_take(counts))
    before, prefill, *decoding = steps
    prefill.kernels += before.kernels
    prefill.waits += before.waits
    # The last step lacks nothing, but what ends the generation is in it.
    return {"prefill": _told([prefill]) | {"head_positions": positions[0]}, "decoding_step": _told(decoding[:-1])}


def _take(counts: Counts) -> Counts:
    """Return what was counted, and begin anew."""
    taken = Counts()
    taken.kernels, taken.waits = counts.kernels, counts.waits
    counts.kernels, counts.waits = 0, Counter()
    return taken


def _told(parts: list[Counts]) -> dict[str, Any]:
    """Return the mean of some parts."""
    waits: Counter[str] = sum((part.waits for part in parts), Counter())
    return {
        "kernels": sum(part.kernels for part in parts) / len(parts),
        "waits": sum(waits.values()) / len(parts),
        "waits_by_line": {line: count / len(parts) for line, count in waits.most_common()},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Count every pass of every side, both ways."""
    result: dict[str, Any] = {}
    for way in WAYS:
        group = passes.Group.make(args, args.prompt, args.tokens, args.generations)
        cache = WatchfulCache if way == "before" else TowerCache
        group.cache = cache(passes.CACHE_BYTES, clock=int)  # always 0: no optimizer step lies between the passes
        passes.PASSES["log_probs"](group, "cached")  # the features are known from here on
        group.whole_prefill = way == "before"
        with looking_at_each_step(group.core, group.family) if way == "before" else ExitStack():
            result[way] = {
                side: {"log_probs": count_log_probs(group, side)} | count_generation(group, side) for side in SIDES
            }
    return result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", type=int, default=256, help=f"tokens of the prompt, a multiple of {sizes.PROMPT_UNIT}")
    add("--tokens", type=int, default=12, help="tokens of a completion, at least 3")
    add("--generations", type=int, default=8, help="completions of the prompt (G)")
    add("--layers", type=int, default=36, help="layers of the language model")
    add("--tower-layers", type=int, default=32, help="layers of both towers")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    if args.prompt < 1 or args.prompt % sizes.PROMPT_UNIT:
        parser.error(f"--prompt must be a multiple of {sizes.PROMPT_UNIT}, got {args.prompt}")
    if args.tokens < 3:
        parser.error(f"--tokens must be at least 3, of which one is a decoding step to count, got {args.tokens}")
    small = {"hidden": 96, "heads": 6, "kv_heads": 2, "vocab": 1024, "tower": 64}
    fixed = {"real": False, "device": "cpu", "checkpointing": False, "train_towers": False}
    return argparse.Namespace(**vars(args) | small | fixed)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    result = {
        "benchmark": "decode_steps",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "options": {name: value for name, value in vars(args).items() if name != "json"},
        **measure(args),
    }
    print(f"{'':26}{'kernels':>18}{'waits':>16}")
    print(f"{'':26}{'before':>9}{'now':>9}{'before':>8}{'now':>8}")
    for side in SIDES:
        for name in ("log_probs", "prefill", "decoding_step"):
            before, now = (result[way][side][name] for way in WAYS)
            cells = f"{before['kernels']:9.0f}{now['kernels']:9.0f}{before['waits']:8.1f}{now['waits']:8.1f}"
            print(f"{side:<10}{name.replace('_', ' '):<16}{cells}")
    heads = [result[way]["rows"]["prefill"]["head_positions"] for way in WAYS]
    print(f"positions of a row that the head reads in a prefill of rows: {heads[0]} before, {heads[1]} now")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
