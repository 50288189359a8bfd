"""
What it saves to pass a group's prompt once: each completion by itself against all that share a prompt together.

    python benchmarks/shared_prefix.py --json shared_prefix.json
    python benchmarks/shared_prefix.py --sweep prompt group --json sweep.json --plot sweep.png

The sides, in one process with the same weights, prompt, seed and number of threads, in turns:

- **trl**: a row for each of the G completions, whose media the model is handed once per row, as with TRL and
  transformers alone;
- **rows**: a row for each completion, but media once, as `shared_prefix="off"` has it;
- **shared**: prompt and media once; **cached**: the same, where what the frozen towers made of the media is known.

Timed are the passes by themselves (training's forward and backward, log-probabilities without gradients, generation,
towers alone), and a whole step of the trainer: the rollout, the reference's log-probabilities, forward and backward.
A step of `rows` and of `shared` begins with an empty cache of what frozen towers made, as for a clip never seen. Before
anything is timed the sides must agree: on log-probabilities, gradients, sampled tokens, and the step's loss.

The bound is the operations of a baseline divided by those of sharing at its best: each prompt once, its media once, or
not at all where they are known, and each token of a completion once. They are counted by formulas (multiplications in
weights, in attention over the half of each square that is looked at, in the head over completions). `share_of_bound` is
the smallest, over passes of training and of log-probabilities, both lengths, both baselines and both of ours, of what
was measured as a part of its bound. It can exceed 1: large batches of long rows also run slower per operation.

On a GPU TRL's head reads completions alone, on a CPU all tokens. Here it reads completions alone on both, which favours
the baselines; `--head all` leaves it as it is. All rows are of one length, which favours the baselines too. On a CPU
TRL's head also makes several copies of the logits of up to 4096 tokens at a time, equally many on all sides, of which a
GPU has none. So memory is measured with a head that reads 256 tokens at a time; `--memory-head-tile 4096` leaves it as it is.

Times are of the processor, which does not count what else the machine does. On a GPU they are of the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _shared_prefix_model as sizes
import _shared_prefix_passes as passes
import _shared_prefix_steps as steps
import numpy as np
import torch
import trl.trainer.utils
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count
from transformers.utils.logging import disable_progress_bar
from trl.kernels import chunked_logprob

from maple_trl.planning.sizes import Work


PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")
TIMED_PASSES = {"train": "train", "log_probs": "log-probs", "generate": "generation", "encode": "towers alone"}
BOUND_PASSES = ("train", "log_probs")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
SWEEP_SIDES = ("rows", "shared")


# Measuring


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of processor and wall for each side, every other round in the opposite order."""
    seconds: dict[str, dict[str, list[float]]] = {side: {"cpu": [], "wall": []} for side in sides}
    for repeat in range(repeats):
        for side in list(sides)[:: -1 if repeat % 2 else 1]:
            gc.collect()
            wait_for(device)
            wall, cpu = time.perf_counter(), time.process_time()
            sides[side]()
            wait_for(device)
            seconds[side]["cpu"].append(time.process_time() - cpu)
            seconds[side]["wall"].append(time.perf_counter() - wall)
    return seconds


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(values)}


def compared(
    seconds: dict[str, dict[str, list[float]]],
    operations: dict[str, float],
    baselines: tuple[str, ...],
    ours: tuple[str, ...],
    clock: str,
) -> dict[str, Any]:
    """Spread per side, and for each baseline against each of ours the ratio of medians beside its bound."""
    result: dict[str, Any] = {
        "seconds": {side: {name: spread(values) for name, values in both.items()} for side, both in seconds.items()},
        "operations": operations,
        "against": {},
    }
    for baseline in (side for side in baselines if side in seconds):
        for own in (side for side in ours if side in seconds):
            slow, fast = seconds[baseline][clock], seconds[own][clock]
            speedup = float(np.median(slow) / np.median(fast))
            entry = {"speedup": speedup, "pairs": spread([a / b for a, b in zip(slow, fast, strict=True)])}
            if operations[own] > 0:
                bound = operations[baseline] / operations[own]
                entry |= {"bound": bound, "share_of_bound": speedup / bound}
            result["against"][f"{baseline}/{own}"] = entry
    return result


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of two sets of tensors, by the length of their difference."""
    difference = sum(float((theirs[name] - ours[name]).double().square().sum()) for name in theirs)
    return (difference / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# Passes


def sides_of(args: argparse.Namespace, name: str) -> tuple[str, ...]:
    sides = [side for side in passes.SIDES if not (args.train_towers and side == "cached")]
    return tuple(side for side in sides if not (name == "encode" and side == "rows"))  # there it is what `shared` is


def check_passes(group: passes.Group, args: argparse.Namespace) -> dict[str, Any]:
    """
    Runs every pass on every side, which warms them up, and compares their results with those of `trl`.

    Raises:
        AssertionError: where they differ by more than rounding explains.
    """
    kind = str(group.core.get_input_embeddings().weight.dtype).removeprefix("torch.")
    report: dict[str, Any] = {"tolerance": TOLERANCE[kind]}
    reference = passes.PASSES["train"](group, "trl")
    gradients = gradients_of(group.model)
    for side in sides_of(args, "train")[1:]:
        values = passes.PASSES["train"](group, side)
        own = gradients_of(group.model)
        assert own.keys() == gradients.keys(), f"{side} has gradients for other parameters than trl"
        report[side] = {
            "log_probs": float((values - reference).abs().max()),
            "log_probs_without_gradient": float((passes.PASSES["log_probs"](group, side) - reference).abs().max()),
            "gradient": relative_difference(own, gradients),
        }
    group.model.zero_grad(set_to_none=True)
    sampled = {side: passes.PASSES["generate"](group, side) for side in sides_of(args, "generate")}
    for side in sides_of(args, "generate")[1:]:
        report[side]["same_tokens"] = float((sampled[side] == sampled["trl"]).double().mean())
    for side in sides_of(args, "train")[1:]:
        numbers = {name: value for name, value in report[side].items() if name != "same_tokens"}
        assert max(numbers.values()) <= TOLERANCE[kind], f"{side} and trl differ: {json.dumps(report)}"
        # A token that rounding tips changes all that follow it in its row; in half precision some will.
        assert kind != "float32" or report[side]["same_tokens"] == 1, f"{side} sampled other tokens: {report}"
    return report


def check_operations(args: argparse.Namespace) -> dict[str, float]:
    """
    The formulas against PyTorch's own count of a forward, on a small prompt; returns counted / computed.

    PyTorch counts whole squares of attention, and what is run, which is a token of the prompt per completion more.

    Raises:
        AssertionError: where they differ by more than 2 %.
    """
    small = argparse.Namespace(**vars(args) | {"real": False, "device": "cpu", "checkpointing": False})
    prompt, length, count = 2 * sizes.PROMPT_UNIT, 16, 4
    group = passes.Group.make(small, prompt, length, count)
    config, prefix = group.model.config, prompt - 1
    towers = sizes.tower_operations(config, group.prompt)
    heads = count * (prompt + length - 1 if args.head == "all" else length)
    rows = Work(count * (prompt + length), count * (prompt + length) ** 2, heads)
    packed = Work(prefix + count * length, prefix**2 + count * length * (prefix + length), count * length)
    computed = {
        "trl": count * towers + sizes.language_operations(config, rows),
        "rows": towers + sizes.language_operations(config, rows),
        "shared": towers + sizes.language_operations(config, packed),
    }
    ratios = {}
    for side, expected in computed.items():
        with FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
            passes.PASSES["log_probs"](group, side)
        ratios[side] = counter.get_total_flops() / expected
    assert all(abs(ratio - 1) <= 0.02 for ratio in ratios.values()), f"operations differ, counted/computed: {ratios}"
    return ratios


def _uncounted() -> dict[Any, Any]:
    """Return how to count the operations of CPUs' attention kernel, which torch knows from version 2.15 on."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return {} if kernel in flop_registry else {kernel: count_operations}


def measure_passes(args: argparse.Namespace, prompt: int) -> dict[str, Any]:
    group = passes.Group.make(args, prompt, args.completions[0], args.generations)
    clock = "wall" if args.device == "cuda" else "cpu"
    result: dict[str, Any] = {"agreement": {}, **{name: {} for name in TIMED_PASSES}}
    for length in args.completions:
        group = group.with_completions(length, args.seed)
        result["agreement"][str(length)] = check_passes(group, args)
        for name in TIMED_PASSES:
            if name == "encode" and length != args.completions[0]:
                continue  # it does not depend on completions
            sides = {side: lambda s=side, n=name, g=group: passes.PASSES[n](g, s) for side in sides_of(args, name)}
            seconds = in_turns(sides, args.repeats, args.device)
            group.model.zero_grad(set_to_none=True)
            work = {
                side: passes.operations(group, name, side, args.train_towers, args.checkpointing) for side in sides
            }
            result[name][str(length)] = entry = compared(seconds, work, passes.BASELINES, passes.OURS, clock)
            print_row(TIMED_PASSES[name], length, entry, clock)
    return result


def measure_memory(args: argparse.Namespace, prompt: int) -> dict[str, Any]:
    """Bytes that a pass of training takes at its peak, beyond the model; on the CPU each in a process of its own."""
    result: dict[str, Any] = {}
    for length in args.completions:
        found = {}
        for side in sides_of(args, "train"):
            if args.device == "cuda":
                found[side] = peak_of(side, args, prompt, length)
            else:  # forked before this process computes anything, so before there are threads that a fork would lose
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
                    found[side] = process.submit(peak_of, side, args, prompt, length).result()
        ratios = {
            f"{baseline}/{own}": found[baseline] / found[own]
            for baseline in passes.BASELINES
            for own in passes.OURS
            if own in found
        }
        result[str(length)] = {"bytes": found, "ratio": ratios}
        cells = "  ".join(f"{side} {value / 1e6:.0f}" for side, value in found.items())
        print(f"{'peak of train, MB':<18}{length:>5}  {cells}   smallest ratio {min(ratios.values()):.2f}", flush=True)
    return result


def peak_of(side: str, args: argparse.Namespace, prompt: int, length: int) -> int:
    """Bytes that one pass of training adds at its peak, gradients with it."""
    group = passes.Group.make(args, prompt, length, args.generations)
    if side == "cached":
        passes.PASSES["encode"](group, side)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes.PASSES["train"](group, side)
        return torch.cuda.max_memory_allocated() - before
    chunked_logprob.TOKEN_CHUNK_SIZE = args.memory_head_tile
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, for the pass to take it anew
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status("VmRSS")
    passes.PASSES["train"](group, side)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not say {name}")


# Steps


def measure_step(
    args: argparse.Namespace, prompt: int, length: int, count: int, folder: Path, names: tuple[str, ...]
) -> dict[str, Any]:
    """
    A step of the trainer on each of some sides.

    Raises:
        AssertionError: when they sample other completions, or differ in loss or gradient by more than 1e-4.
    """
    trainers = {side: steps.make_trainer(side, args, prompt, length, count, folder) for side in names}
    losses, gradients = {}, {}
    for side, trainer in trainers.items():
        losses[side] = steps.step(trainer, args.seed)
        gradients[side] = gradients_of(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
    agreement = {}
    for side in names[1:]:
        own, theirs = trainers[side], trainers[names[0]]
        agreement[side] = report = {
            "same_tokens": torch.equal(own.sampled, theirs.sampled),
            "loss": abs(losses[side] - losses[names[0]]) / abs(losses[names[0]]),
            "gradient": relative_difference(gradients[side], gradients[names[0]]),
        }
        assert report["same_tokens"], f"{side} and {names[0]} sampled different completions"
        assert max(report["loss"], report["gradient"]) <= TOLERANCE["float32"], f"{side} differs: {report}"
    del gradients
    seconds = in_turns(
        {side: lambda t=trainer: steps.step(t, args.seed) for side, trainer in trainers.items()}, args.repeats, "cpu"
    )
    work = {side: steps.operations(trainer, args, side) for side, trainer in trainers.items()}
    return compared(seconds, work, steps.BASELINES, (steps.OURS,), "cpu") | {"agreement": agreement}


def measure_steps(args: argparse.Namespace, prompt: int, folder: Path) -> dict[str, Any]:
    result = {}
    for length in args.completions:
        result[str(length)] = entry = measure_step(args, prompt, length, args.generations, folder, steps.SIDES)
        print_row("whole step", length, entry, "cpu")
    return result


def measure_sweep(args: argparse.Namespace, kind: str, folder: Path) -> list[dict[str, Any]]:
    """Steps at the first completion length, over prompt lengths or over group sizes."""
    length, points = args.completions[0], []
    for value in args.sweep_prompts if kind == "prompt" else args.sweep_groups:
        prompt, count = (value, args.generations) if kind == "prompt" else (args.prompt[0], value)
        entry = measure_step(args, prompt, length, count, folder, SWEEP_SIDES)
        points.append({"prompt": prompt, "generations": count, "completion": length, **entry})
        print_row(f"step P {prompt} G {count}", length, entry, "cpu")
    return points


# Report


def headline(result: dict[str, Any], lengths: list[int]) -> dict[str, float]:
    """The smallest of each kind of figure: over both baselines, and what else it names."""
    shares = [
        entry["share_of_bound"]
        for passes_of_prompt in result.get("passes", {}).values()
        for name in BOUND_PASSES
        for of_length in passes_of_prompt[name].values()
        for entry in of_length["against"].values()
    ]
    top = {"share_of_bound": min(shares)} if shares else {}
    for length in lengths if "steps" in result else ():
        against = result["steps"][str(length)]["against"].values()
        top[f"step_speedup_{length}"] = min(entry["speedup"] for entry in against)
    ratios = [
        ratio
        for memory in result.get("memory", {}).values()
        for of_length in memory.values()
        for ratio in of_length["ratio"].values()
    ]
    return top | ({"train_memory_ratio": min(ratios)} if ratios else {})


def print_row(name: str, length: int, entry: dict[str, Any], clock: str) -> None:
    cells = []
    for side, both in entry["seconds"].items():
        cell = both[clock]
        cells.append(f"{side} {cell['median']:.3f} ({cell['p10']:.3f}-{cell['p90']:.3f})")
    print(f"{name:<18}{length:>5}  " + "  ".join(cells), flush=True)
    for pair, figures in entry["against"].items():
        bound = f", bound {figures['bound']:.2f}, share {figures['share_of_bound']:.0%}" if "bound" in figures else ""
        span = f"{figures['pairs']['p10']:.2f}-{figures['pairs']['p90']:.2f}"
        print(f"{'':25}{pair}: x{figures['speedup']:.2f} ({span}){bound}", flush=True)


def draw(sweeps: dict[str, list[dict[str, Any]]], file: str) -> None:
    """Seconds of a step and the speed-up beside its bound, a row of panels for each sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"prompt": "tokens of the prompt", "generations": "completions per prompt"}
    names = {"rows": "each completion by itself", "shared": "prompt shared"}
    figure, panels = plt.subplots(len(sweeps), 2, figsize=(9, 3.6 * len(sweeps)), squeeze=False)
    for (kind, points), (times, ratios) in zip(sweeps.items(), panels, strict=True):
        axis = "prompt" if kind == "prompt" else "generations"
        x = [point[axis] for point in points]
        for side, marker in zip(SWEEP_SIDES, "os", strict=True):
            cells = [point["seconds"][side]["cpu"] for point in points]
            times.plot(x, [cell["median"] for cell in cells], marker=marker, label=names[side])
            times.fill_between(x, [cell["p10"] for cell in cells], [cell["p90"] for cell in cells], alpha=0.2)
        against = [point["against"]["/".join(SWEEP_SIDES)] for point in points]
        ratios.plot(x, [entry["speedup"] for entry in against], marker="o", label="measured")
        ratios.plot(
            x, [entry["bound"] for entry in against], linestyle="--", color="grey", label="bound by operations"
        )
        times.set(yscale="log", ylabel="CPU seconds of a step")
        ratios.set(ylabel="times faster", ylim=(0, None))
        for panel in (times, ratios):
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [str(value) for value in x])
            panel.set_xlabel(labels[axis])
            panel.grid(alpha=0.3)
            panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def machine(device: str) -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", type=int, nargs="+", help="tokens of the prompt; 1024, with --real 4096 and 8192")
    add("--completions", type=int, nargs="+", help="tokens of a completion; 64 and 256, with --real 256")
    add("--generations", type=int, default=8, help="completions per prompt (G)")
    add("--repeats", type=int, default=5, help="timed runs per side")
    add("--parts", nargs="+", choices=("passes", "steps", "memory"), default=["passes", "steps", "memory"])
    add("--sweep", nargs="+", choices=("prompt", "group"), help="measure steps over these instead")
    add("--sweep-prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    add("--sweep-groups", type=int, nargs="+", default=[2, 4, 8, 16])
    add("--hidden", type=int, default=384, help="hidden size of the language model")
    add("--layers", type=int, default=4, help="layers of the language model")
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--vocab", type=int, default=8192)
    add("--tower", type=int, default=128, help="hidden size of both towers")
    add("--tower-layers", type=int, default=4, help="layers of both towers")
    add("--train-towers", action="store_true", help="train the towers as well; then nothing of theirs is kept")
    add("--checkpointing", action="store_true", help="gradient checkpointing; always with --real")
    add("--head", choices=("completions", "all"), default="completions", help="tokens that TRL's head reads")
    add(
        "--head-tile",
        type=int,
        default=chunked_logprob.TOKEN_CHUNK_SIZE,
        help="tokens that TRL's head reads at a time",
    )
    add("--memory-head-tile", type=int, default=256, help="the same, while memory is measured on a CPU")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--real", action="store_true", help="the sizes of Qwen2.5-Omni-3B in bfloat16, passes and memory; needs a GPU")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=int(os.environ["OMP_NUM_THREADS"]), help="of torch")
    add("--json", metavar="FILE", help="write the results here as well")
    add("--plot", metavar="FILE", help="draw the sweeps into this file")
    args = parser.parse_args(argv)
    args.prompt = args.prompt or ([4096, 8192] if args.real else [1024])
    args.completions = args.completions or ([256] if args.real else [64, 256])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; leave the option out to measure on the CPU")
    if args.real and args.device != "cuda":
        parser.error("--real needs --device cuda: a model of this size takes hours on a CPU")
    for name in ("prompt", "sweep_prompts"):
        bad = [value for value in getattr(args, name) if value < 128 or value % sizes.PROMPT_UNIT]
        if bad:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {sizes.PROMPT_UNIT}, got {bad[0]}")
    if min([args.generations, *args.sweep_groups]) < 2:
        parser.error("--generations and --sweep-groups must be at least 2: GRPO compares completions")
    if min([*args.completions, args.repeats, args.threads, args.head_tile, args.memory_head_tile]) < 1:
        parser.error("--completions, --repeats, --threads and the head's tiles must be at least 1")
    if args.hidden % args.heads or (args.hidden // args.heads) % 2 or args.heads % args.kv_heads:
        parser.error("--hidden must be an even multiple of --heads, and --heads a multiple of --kv-heads")
    if args.plot and not args.sweep:
        parser.error("--plot draws sweeps: add --sweep prompt, group or both")
    if args.device == "cuda" and args.sweep:
        parser.error("--sweep measures the trainer's steps, on the CPU only")
    if args.device == "cuda":
        args.parts = [part for part in args.parts if part != "steps"]
    elif "memory" in args.parts and not sys.platform.startswith("linux"):
        parser.error("memory is read from Linux's /proc: measure the others with --parts passes steps")
    args.checkpointing = args.checkpointing or args.real
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    chunked_logprob.TOKEN_CHUNK_SIZE = args.head_tile
    if args.head == "completions":
        trl.trainer.utils._use_triton = lambda device: True  # decides there which tokens the head reads, and no more
    result: dict[str, Any] = {
        "benchmark": "shared_prefix",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": machine(args.device),
        "clock": "wall" if args.device == "cuda" else "cpu",
        "options": {name: value for name, value in vars(args).items() if name not in ("json", "plot")},
    }
    print(json.dumps({name: result[name] for name in ("versions", "machine", "options")}))
    if "memory" in args.parts and not args.sweep:
        result["memory"] = {str(prompt): measure_memory(args, prompt) for prompt in args.prompt}
    result["operations_counted_by_torch"] = check_operations(args)
    print(f"operations, counted by PyTorch / by formula: {result['operations_counted_by_torch']}\n")
    print(f"{result['clock']} seconds: median (p10 - p90); speed-up of the medians (p10 - p90 of neighbouring runs)\n")
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as scratch:
        folder = Path(scratch)
        if args.sweep or "steps" in args.parts:
            steps.save_model(args, folder / "model")
        if args.sweep:
            result["sweeps"] = {kind: measure_sweep(args, kind, folder) for kind in args.sweep}
            return result
        if "passes" in args.parts:
            result["passes"] = {str(prompt): measure_passes(args, prompt) for prompt in args.prompt}
        if "steps" in args.parts:
            result["steps"] = measure_steps(args, args.prompt[0], folder)
    result["load_average_at_end"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    return headline(result, args.completions) | result


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    result = run(args)
    print("\n" + "\n".join(f"{name}: {value:.2f}" for name, value in headline(result, args.completions).items()))
    if args.plot:
        draw(result["sweeps"], args.plot)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
