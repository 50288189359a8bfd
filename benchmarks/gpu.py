"""
What shared prompts save on a GPU, at the sizes of Qwen2.5-Omni-3B with random weights in bfloat16: one command, one table.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu --small    # runs everything, measures nothing

A prompt of 4096 and of 8192 tokens, seven eighths of them media, with 8 completions of 256 tokens. The sides:

- **rows**: a row for each completion, media once, as `shared_prefix="off"` has it;
- **shared**: prompt and media once; **cached**: the same, where what the frozen towers made of the media is known;
- **flex**: as cached, with `packed_attention="flex_attention"`.

The parts: attention by itself (as packed rows have it, with a mask instead, with FlexAttention, and a row for each completion);
training's forward and backward, with gradient checkpointing, and log-probabilities; generation; a whole step of the
trainer; and what a pass launches and waits for. In each part all sides run once, which compiles and warms up what they need and
gives their peak of memory, and then in turns. A side that fails is named and left out. Speed-ups stand beside their bound: the
fewest operations of the one divided by those of the other; TFLOP/s count those fewest operations, against `--peak`.

A part that is past its `--part-seconds` makes no further round of turns, and none begins past `--deadline`. The file
of `--json` is written anew after each part, so that what a broken-off run has measured is kept. The status is 1 where a part or a
side failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "4")  # before shared_prefix sets it to 1

import _shared_prefix_model as sizes
import _shared_prefix_passes as passes
import _shared_prefix_steps as steps
import shared_prefix as benchmark
import torch
import torch.nn.functional as F
import trl.trainer.utils
from _gpu_report import Report, Sides, Turns, against, launches, print_table, release
from datasets import Dataset
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

from maple_trl.data.tiny_omni import build_processor
from maple_trl.omni.prefix import packed_attention
from maple_trl.omni.prefix.packed_attention import PackedLayout, packed_flex, packed_sdpa
from maple_trl.planning.sizes import generation_work, plain_work, shared_work
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig


PARTS = ("attention", "passes", "generation", "step", "kernels")
DEFAULTS = {
    "prompts": ([4096, 8192], [256]),
    "completion": (256, 6),
    "generations": (8, 3),
    "repeats": (3, 1),
    "hidden": (2048, 64),
    "layers": (36, 2),
    "heads": (16, 4),
    "kv_heads": (2, 2),
    "vocab": (151_936, 512),
    "tower": (1280, 32),
    "tower_layers": (32, 1),
}
"""The model's real sizes, and those of `--small`."""


# Attention by itself


def measure_attention(args: argparse.Namespace, prompt: int, ragged: bool, turns: Turns) -> dict[str, Any]:
    """One layer's attention over a packed row, forward and backward, and without gradients."""
    heads, key_heads, size = args.heads, args.kv_heads, args.hidden // args.heads
    count, longest = args.generations, args.completion
    lengths = tuple(max(longest * (i + 1) // count, 1) if ragged else longest for i in range(count))
    layout = PackedLayout(((prompt - 1, lengths),))
    states, gradient = _drawn(args, (1, len(layout)), heads, key_heads, size)
    rows, row_gradient = _drawn(args, (count, prompt - 1 + longest), heads, key_heads, size)

    def packed(attend: Callable) -> Tensor:
        return attend(None, nn.Module(), *states, layout)[0]

    def masked() -> Tensor:
        with without_merging():
            return packed(packed_sdpa)

    def apart() -> Tensor:
        options = {"is_causal": True, "enable_gqa": heads != key_heads}
        return F.scaled_dot_product_attention(*rows, **options).transpose(1, 2)

    forwards: Sides = {"rows": apart, "merged": lambda: packed(packed_sdpa), "masked": masked}
    if args.device == "cuda":  # on a CPU it has no backward pass
        forwards["flex"] = lambda: packed(packed_flex)
    trained = {
        side: lambda run=run, of=of, wanted=wanted: torch.autograd.grad(run(), of, wanted)
        for side, run in forwards.items()
        for of, wanted in [(rows, row_gradient) if side == "rows" else (states, gradient)]
    }
    pairs = (prompt - 1) ** 2 / 2 + sum(length * (prompt - 1) + length**2 / 2 for length in lengths)
    work = dict.fromkeys(forwards, 4 * heads * size * pairs) | {
        "rows": 4 * heads * size * count * (prompt - 1 + longest) ** 2 / 2
    }
    result: dict[str, Any] = {"layout": [prompt - 1, *lengths]}
    for name, sides, times in (
        ("log_probs", {s: torch.no_grad()(r) for s, r in forwards.items()}, 1),
        ("train", trained, 3.5),
    ):
        print(f" {name}, completions of {sorted(set(lengths))}", flush=True)
        result[name] = against(args, turns.measure(sides), {side: times * value for side, value in work.items()})
    result["launches"] = {side: launches(trained[side]) for side in ("merged", "masked")}
    finer = torch.float32 if args.device == "cuda" else torch.float64
    with torch.no_grad():
        exact = packed_sdpa(None, nn.Module(), *(x.to(finer) for x in states), layout)[0]
        result["error"] = {
            side: float((run().to(finer) - exact).norm() / exact.norm())
            for side, run in forwards.items()
            if side != "rows" and "failed" not in result["log_probs"][side]
        }
    print(f"  launches of a layer, forward and backward: {result['launches']}; error: {result['error']}", flush=True)
    return result


def _drawn(
    args: argparse.Namespace, shape: tuple, heads: int, key_heads: int, size: int
) -> tuple[list[Tensor], Tensor]:
    """States as a model makes them, (B, heads, L, size) with a token's heads together, and a gradient of the output."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    options = {"device": args.device, "dtype": dtype}
    states = [torch.randn(*shape, n, size, **options).transpose(1, 2) for n in (heads, key_heads, key_heads)]
    return [x.requires_grad_() for x in states], torch.randn(*shape, heads, size, **options)


@contextlib.contextmanager
def without_merging() -> Iterator[None]:
    """Have packed rows computed with a mask, as where no kernel returns the logarithms of its sums."""
    original = packed_attention.can_split
    packed_attention.can_split = lambda *states: False
    try:
        yield
    finally:
        packed_attention.can_split = original


# Passes of the model


def checkpointed(group: passes.Group, on: bool) -> None:
    """Set train mode and gradient checkpointing as in the trainer's loss, or what other passes have."""
    if on:
        group.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        group.model.gradient_checkpointing_disable()
    group.model.train(on)


def sides_of(args: argparse.Namespace, group: passes.Group, name: str) -> Sides:
    sides: Sides = {side: lambda side=side: passes.PASSES[name](group, side) for side in ("rows", "shared", "cached")}
    if args.device == "cuda":
        flex = replace(group, attention="flex_attention")
        sides["flex"] = lambda: passes.PASSES[name](flex, "cached")
    return sides


def measure_passes(args: argparse.Namespace, group: passes.Group, turns: Turns) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("train", "log_probs"):
        print(f" {name}", flush=True)
        checkpointed(group, name == "train")
        sides = sides_of(args, group, name)
        work = {
            side: passes.operations(group, name, "cached" if side == "flex" else side, False, True) for side in sides
        }
        result[name] = against(args, turns.measure(sides), work)
        group.model.zero_grad(set_to_none=True)
    checkpointed(group, True)
    result["agreement"] = agreement(group)
    print(f"  shared against rows: {result['agreement']}", flush=True)
    return result


def agreement(group: passes.Group) -> dict[str, float]:
    """How far log-probabilities and gradients of `shared` are from those of `rows`."""
    values = passes.PASSES["train"](group, "rows")
    gradients = benchmark.gradients_of(group.model)
    difference = (passes.PASSES["train"](group, "shared") - values).abs()
    own = {name: value.grad for name, value in group.model.named_parameters() if value.grad is not None}
    found = {"log_probs_max": float(difference.max()), "log_probs_mean": float(difference.mean())}
    found["gradient"] = benchmark.relative_difference(own, gradients)
    group.model.zero_grad(set_to_none=True)
    return found


def measure_generation(args: argparse.Namespace, group: passes.Group, turns: Turns) -> dict[str, Any]:
    """A rollout of the group, and one of a single token: what reading the prompt takes, and what a further token."""
    checkpointed(group, False)
    result: dict[str, Any] = {}
    for name, length in (("first_token", 1), ("whole", args.completion)):
        print(f" {name}", flush=True)
        of_length = group.with_completions(length, args.seed)
        sides: Sides = {
            side: lambda s=side, g=of_length: passes.PASSES["generate"](g, s) for side in ("rows", "shared")
        }
        work = {side: passes.operations(of_length, "generate", side, False, False) for side in sides}
        result[name] = against(args, turns.measure(sides), work)
    for side, entry in result["whole"].items():
        if "failed" in entry or "failed" in result["first_token"][side]:
            continue
        whole, first = (result[name][side]["seconds"]["median"] for name in ("whole", "first_token"))
        entry["tokens_per_s"] = args.generations * args.completion / whole
        entry["ms_per_further_token"] = (whole - first) / max(args.completion - 1, 1) * 1e3
        told_of = (
            f"{entry['tokens_per_s']:.0f} tokens/s, {entry['ms_per_further_token']:.2f} ms for a further token of each"
        )
        print(f"  {side:<10} {told_of}", flush=True)
    return result


# A step of the trainer


def make_trainer(args: argparse.Namespace, prompt: int, folder: Path) -> steps.BenchmarkTrainer:
    model, _ = sizes.make_model(args)
    config = OmniGRPOConfig(
        str(folder),
        shared_prefix="on",
        media_prefetch=False,
        per_device_train_batch_size=args.generations,
        gradient_accumulation_steps=1,
        num_generations=args.generations,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion},
        beta=0.0,
        seed=args.seed,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Question {i}"}]} for i in range(args.generations)]
    )
    trainer = steps.BenchmarkTrainer(
        model, steps.distinct_tokens, config, train_dataset=rows, processing_class=build_processor()
    )
    trainer.prompt = sizes.make_prompt(trainer.model.base_model, trainer.family, prompt, args.seed)
    return trainer


def measure_step(args: argparse.Namespace, prompt: int, turns: Turns) -> dict[str, Any]:
    """A step up to the optimizer: rollout, rewards, forward and backward; a clip that no tower has seen."""
    with tempfile.TemporaryDirectory(prefix="maple-gpu-") as folder:
        trainer = make_trainer(args, prompt, Path(folder))
        trainer.model.train()
        begun = time.perf_counter()
        trainer._agree_on_sharing()
        benchmark.wait_for(args.device)
        result: dict[str, Any] = {"comparing_both_ways_s": time.perf_counter() - begun}
        seconds: dict[str, Counter] = {"rows": Counter(), "shared": Counter()}

        def step(side: str) -> None:
            trainer._sharing = side == "shared"
            with clocked(trainer, "_generate_single_turn", seconds[side], args.device):
                steps.step(trainer, args.seed)
            seconds[side]["steps"] += 1

        sides: Sides = {side: lambda side=side: step(side) for side in seconds}
        work = {side: step_operations(trainer, shared=side == "shared") for side in sides}
        result |= against(args, turns.measure(sides), work)
        for side, spent in seconds.items():
            if "failed" not in result[side]:
                result[side]["generating_s"] = spent["_generate_single_turn"] / spent["steps"]
                print(f"  {side:<10} of which {result[side]['generating_s'] * 1e3:.0f} ms generate", flush=True)
    print(f"  comparing both ways before the first step took {result['comparing_both_ways_s']:.2f} s", flush=True)
    return result


@contextlib.contextmanager
def clocked(owner: Any, name: str, seconds: Counter, device: str) -> Iterator[None]:
    original = getattr(owner, name)

    def run(*args, **kwargs):
        benchmark.wait_for(device)
        begun = time.perf_counter()
        found = original(*args, **kwargs)
        benchmark.wait_for(device)
        seconds[name] += time.perf_counter() - begun
        return found

    setattr(owner, name, run)
    try:
        yield
    finally:
        delattr(owner, name)


def step_operations(trainer: steps.BenchmarkTrainer, shared: bool) -> float:
    """Of the rollout, and of the loss with gradient checkpointing; what the towers make is known after the rollout."""
    config, prompt, group = trainer.model.config, len(trainer.prompt), trainer.num_generations
    length = trainer.args.max_completion_length
    work = (shared_work if shared else plain_work)(prompt, length, group)
    rollout = generation_work(prompt, length, group, shared)
    return (
        sizes.tower_operations(config, trainer.prompt)
        + sizes.language_operations(config, rollout)
        + 4 * sizes.language_operations(config, work)
    )


# What is launched and waited for


def measure_kernels(args: argparse.Namespace, group: passes.Group, turns: Turns) -> dict[str, Any]:
    """Of a pass of each side: operations, and on a GPU its kernels, how busy it is, and where the host waits for it."""
    result: dict[str, Any] = {}
    for name in ("train", "log_probs", "generate"):
        checkpointed(group, name == "train")
        few = group.with_completions(9, args.seed) if name == "generate" else group
        for side in ("rows", "shared", "cached"):
            run = lambda n=name, g=few, s=side: passes.PASSES[n](g, s)  # noqa: E731
            if args.device == "cuda" or side == "cached":  # which first keeps what the towers make
                run()
            entry: dict[str, Any] = {"operations": launches(run)}
            if args.device == "cuda":
                entry |= kernels_of(run) | {"waits": waits_of(run)}
            result[f"{name}/{side}"] = entry
            shown = {key: value for key, value in entry.items() if key not in ("top", "waits")}
            print(f"  {name}/{side}: {shown}", flush=True)
            group.model.zero_grad(set_to_none=True)
    return result


def kernels_of(run: Callable[[], Any], top: int = 15) -> dict[str, Any]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begun
    spent, number = Counter(), Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us() / 1e3
            number[event.name] += 1
    busy = sum(spent.values())
    return {
        "wall_ms": wall * 1e3,
        "busy_ms": busy,
        "busy": busy / wall / 1e3,
        "kernels": sum(number.values()),
        "top": [[name[:120], number[name], ms] for name, ms in spent.most_common(top)],
    }


def waits_of(run: Callable[[], Any]) -> dict[str, Any]:
    """How often the host waits for the GPU, and the lines of this project that make it."""
    lines: Counter = Counter()

    def note(message, category, filename, lineno, file=None, line=None):
        frames = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != warnings.__file__]
        own = [frame for frame in frames if "maple_trl" in frame.filename] or frames
        lines[f"{Path(own[-1].filename).name}:{own[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"count": sum(lines.values()), "lines": lines.most_common(20)}


# The command


def measured_peak() -> float:
    """TFLOP/s of a large product of matrices in bfloat16."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        one @ other
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (begin.elapsed_time(end) / 1e3) / 1e12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if cuda else "cpu",
        help="default: a GPU where there is one",
    )
    add("--small", action="store_true", help="tiny sizes, once: whether it runs; always on a CPU")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--prompts", type=int, nargs="+", metavar="P", help="tokens of the prompt, times 128 (default: 4096 8192)")
    add("--completion", type=int, metavar="R", help="tokens of a completion (default: 256)")
    add("--generations", type=int, metavar="G", help="completions of a prompt (default: 8)")
    add("--repeats", type=int, help="rounds of turns (default: 3)")
    add(
        "--peak",
        type=float,
        default=790.0,
        help="TFLOP/s that a share is told of; 790 is what an H100 reaches in bfloat16",
    )
    add("--deadline", type=float, metavar="S", help="seconds after which no part begins")
    add("--part-seconds", type=float, default=60.0, metavar="S", help="seconds of a part after which no round begins")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write what is known into this file after each part")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch finds no GPU here")
    args.small |= args.device == "cpu"
    for name, (real, small) in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, small if args.small else real)
    bad = [prompt for prompt in args.prompts if prompt < sizes.PROMPT_UNIT or prompt % sizes.PROMPT_UNIT]
    if bad:
        parser.error(f"--prompts must be multiples of {sizes.PROMPT_UNIT}, got {bad[0]}")
    if min(args.generations - 1, args.completion, args.repeats) < 1:
        parser.error("--generations must be at least 2, --completion and --repeats at least 1")
    args.real, args.train_towers, args.checkpointing = not args.small, False, False
    return args


def run(args: argparse.Namespace) -> Report:
    if args.device == "cpu":
        print("On a CPU: this shows that everything runs. Its times say nothing about a GPU.")
        trl.trainer.utils._use_triton = lambda device: True  # decides there that the head reads completions alone
    report = Report(args)
    if args.device == "cuda":
        report.result["measured_tflop_per_s"] = measured_peak()
        print(f"{report.result['machine']['gpu']}: {report.result['measured_tflop_per_s']:.0f} TFLOP/s in a product")
    if "attention" in args.parts:
        for prompt in args.prompts:
            for kind in ("equal", "ragged"):
                ragged = kind == "ragged"
                report.part(
                    f"attention/{prompt}/{kind}",
                    lambda turns, p=prompt, r=ragged: measure_attention(args, p, r, turns),
                )
    of_group = {"passes": measure_passes, "generation": measure_generation, "kernels": measure_kernels}
    made: list[passes.Group] = []

    def group_of(prompt: int) -> passes.Group:
        if not made:
            made.append(passes.Group.make(args, prompt, args.completion, args.generations))
        own = sizes.make_prompt(made[0].core, made[0].family, prompt, args.seed)
        cache = passes.TowerCache(passes.CACHE_BYTES)
        return replace(made[0], prompt=own, cache=cache).with_completions(args.completion, args.seed)

    for name in (name for name in of_group if name in args.parts):
        for prompt in args.prompts if name == "passes" else args.prompts[:1]:
            report.part(f"{name}/{prompt}", lambda turns, n=name, p=prompt: of_group[n](args, group_of(p), turns))
    made.clear()
    release(args.device)
    if "step" in args.parts:
        report.part(f"step/{args.prompts[0]}", lambda turns: measure_step(args, args.prompts[0], turns))
    return report


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    disable_progress_bar()
    gc.freeze()  # what is imported need not be looked at again before each turn
    report = run(args)
    gc.unfreeze()
    print_table(report)
    if args.device == "cpu":
        print("\nTimes of a CPU: they say nothing about a GPU.")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
