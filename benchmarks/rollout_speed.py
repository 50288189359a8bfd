"""
How fast a group is sampled: by transformers with a shared prefill, by transformers row by row, and by vLLM.

    .venv-vllm/bin/python benchmarks/rollout_speed.py --json rollout_speed.json      (make test-vllm makes the environment)

The same model and prompt of video, sound and text on each side, in one process, in turns; completions have a fixed length. vLLM
gets the trainer's encoding (`vllm_mode: colocate`) and its weights before the first turn. Its caches of prefixes and clips are
emptied before each turn, as they are in a run before each rollout; so is the trainer's cache of tower features.

Says nothing about a GPU: there vLLM launches graphs and pages its cache, which is what it is made for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import _shared_prefix_model as sizes
import _shared_prefix_passes as passes
import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from maple_trl.rollout.vllm_engine import generation_class


SIDES = ("rows", "shared", "vllm")
PACKAGES = ("torch", "transformers", "trl")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--vocab", type=int, default=8192)
    add("--tower", type=int, default=128, help="width of the towers")
    add("--tower-layers", type=int, default=2)
    add("--prompt", type=int, default=1024, help=f"tokens, a multiple of {sizes.PROMPT_UNIT}")
    add("--completion", type=int, default=64)
    add("--group", type=int, default=8)
    add("--repeats", type=int, default=5)
    add("--seed", type=int, default=0)
    add("--without-vllm", action="store_true", help="compare the others alone")
    add("--json", type=Path)
    args = parser.parse_args(words)
    args.device, args.real, args.train_towers, args.checkpointing = "cpu", False, False, False
    return args


def vllm_side(args: argparse.Namespace, group: passes.Group) -> Callable[[], int]:
    """Return what samples the group with vLLM, and counts its tokens."""
    generation = generation_class("colocate")(
        model=group.model,
        accelerator=Accelerator(cpu=True),
        processing_class=group.family.processor,
        family=group.family,
        ends=[],
        run_seed=args.seed,
        engine_options={},
        max_model_length=args.prompt + args.completion,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion, "suppress_tokens": group.family.suppressed_ids},
    )
    generation.sync_weights()

    def sample() -> int:
        generation.empty_caches()
        _, completions, *_ = generation.generate([group.prompt] * args.group, None, args.group)
        assert not generation.failed
        return sum(map(len, completions))

    return sample


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of each side, in each turn."""
    group = passes.Group.make(args, args.prompt, args.completion, args.group)
    sample: dict[str, Callable[[], int]] = {
        side: lambda side=side: passes.generate(group, side).numel() for side in SIDES[:2]
    }
    if args.without_vllm or find_spec("vllm") is None:
        print("without vLLM")
    else:
        sample["vllm"] = vllm_side(args, group)
    speeds: dict[str, list[float]] = {side: [] for side in sample}
    with torch.no_grad():
        for turn in range(args.repeats + 1):
            for side, act in sample.items():
                start = time.perf_counter()
                tokens = act()
                seconds = time.perf_counter() - start
                assert tokens == args.group * args.completion, f"{side} sampled {tokens} tokens"
                if turn:  # the first one compiles and fills caches
                    speeds[side].append(tokens / seconds)
    return speeds


def main(words: list[str] | None = None) -> None:
    disable_progress_bar()
    args = parse_args(words)
    speeds = measure(args)
    print(
        f"prompt {args.prompt} + {args.completion} tokens, {args.group} completions, {args.layers} layers of {args.hidden}, "
        f"float32, {torch.get_num_threads()} thread(s), medians of {args.repeats} turns [least, most]"
    )
    found: dict[str, Any] = {}
    for side, values in speeds.items():
        found[side] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    for side, value in found.items():
        times = value["median"] / found["rows"]["median"]
        print(
            f"{side:8s} {value['median']:8.1f} tokens/s [{value['least']:.1f}, {value['most']:.1f}]   {times:5.2f} x rows"
        )
    if args.json:
        packages = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"options": options, "packages": packages, "speeds": speeds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
