"""
What `maple-trl plan` computes against what this machine measures: memory of training, time of passes, decoding of clips.

    python benchmarks/plan_points.py --json plan_points.json
    python benchmarks/plan_points.py --parts clips --clips Daily-Omni/Videos

**Memory** is what PyTorch's allocator holds at most during forward and backward of GRPO's loss (its own profiler counts
every allocation), against the largest of the moments that the plan counts. Nothing is fitted to it. TRL's head makes copies
of its tile of logits on a CPU that a GPU has not; they are counted here. Pixels lie in memory before the pass begins and are
in neither figure.

**Time** is of the processor, in turns over all points. A CPU's two constants (operations per second, and time of a layer and
pass) are fitted to the points that the output calls `fitted`, as the plan's are to published figures, and so are two for
decoding (time of a layer and step, bytes per second). What is held against the others is the ratio of times: how much longer a pass takes than the mean of the fitted ones. Of each
point the least of the runs counts.

**Clips**: processor seconds to decode a clip, pictures and sound, with the default limits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _shared_prefix_model as shapes
import _shared_prefix_passes as passes
import numpy as np
import torch
import trl.trainer.utils
from scipy.optimize import nnls
from torch.profiler import ProfilerActivity, profile

from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.planning.catalogue import GPUS
from maple_trl.planning.duration import pass_operations
from maple_trl.planning.memory import micro_batch, training_moments
from maple_trl.planning.setup import Setup
from maple_trl.planning.sizes import Media, ModelSizes, generation_work, read_sizes


MODELS = {
    "small": {"hidden": 192, "layers": 3, "heads": 6, "vocab": 2048, "tower": 64, "tower_layers": 2},
    "scaled": {"hidden": 256, "layers": 5, "heads": 4, "vocab": 4096, "tower": 128, "tower_layers": 3},
}
TILES_OF_A_CPU = 6
"""Copies of its tile of logits that TRL's head makes without Triton (`_backward_tile`)."""


@dataclass(frozen=True)
class Shape:
    """
    A point.

    Attributes:
        model: key of `MODELS`.
        side: as in `_shared_prefix_passes.SIDES`.
        prompt, completion, group: tokens, and completions.
        checkpointing: gradient checkpointing.
        fitted: whether constants are fitted to it.
    """

    model: str
    side: str
    prompt: int
    completion: int
    group: int
    checkpointing: bool = False
    fitted: bool = False

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.model:<6} {self.side:<6} {self.prompt:>4} + {self.completion:<3} x {self.group}{more}"


def memory_shapes() -> list[Shape]:
    sizes = ((256, 32, 4), (512, 32, 4), (512, 64, 8), (256, 64, 16))
    return [
        Shape(model, side, *size, checkpointing)
        for model in MODELS
        for side in ("rows", "shared", "cached")
        for checkpointing in (False, True)
        for size in sizes
    ]


def time_shapes() -> list[Shape]:
    fitted = ((256, 32, 4), (512, 48, 4))
    held = ((1024, 32, 4), (512, 96, 4), (256, 32, 8), (512, 64, 8), (256, 16, 2))
    return [
        Shape("scaled", side, *size, fitted=size in fitted)
        for side in ("rows", "shared", "cached")
        for size in (*fitted, *held)
    ]


def make_group(shape: Shape) -> passes.Group:
    options = MODELS[shape.model] | {"kv_heads": 2, "real": False, "seed": 0, "device": "cpu", "train_towers": False}
    args = argparse.Namespace(**options, checkpointing=shape.checkpointing)
    group = passes.Group.make(args, shape.prompt, shape.completion, shape.group)
    group.model.train(shape.checkpointing)
    if shape.side == "cached":
        passes.PASSES["encode"](group, shape.side)
    return group


def setup_of(shape: Shape, model: ModelSizes) -> Setup:
    patch = model.vision.patch
    return Setup(
        model,
        GPUS["H100"],  # its speed is of no use here
        prompt=shape.prompt,
        completion=shape.completion,
        media=Media(shape.prompt * 3 / 4, shape.prompt / 8, shapes.GRID[0] * patch, shapes.GRID[1] * patch),
        num_generations=shape.group,
        per_device_train_batch_size=shape.group,
        shared_prefix=shape.side != "rows",
        encoder_cache=shape.side == "cached",
        gradient_checkpointing=shape.checkpointing,
        trained=("llm", "head"),
        dtype="float32",
        compute="float32",
    )


# Memory


def peak_of(run: Callable[[], Any]) -> int:
    """The bytes that a call allocates at most at once."""
    gc.collect()  # what was left before would else be freed, and counted, meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def predicted_peak(setup: Setup) -> float:
    """What the plan counts, with the copies that a CPU makes and without the pixels, which were there before."""
    micro, vision = micro_batch(setup), setup.model.vision
    pixels = vision.patches(micro.media) * vision.patch_values * 4
    tiles = TILES_OF_A_CPU * micro.suffix * setup.model.text.vocab * 4
    return max(
        sum(parts.values()) - pixels + (tiles if moment == "head" else 0)
        for moment, parts in training_moments(setup).items()
    )


def measure_memory() -> Iterator[dict[str, Any]]:
    for shape in memory_shapes():
        group = make_group(shape)
        passes.PASSES["train"](group, shape.side)
        group.model.zero_grad(set_to_none=True)
        measured = peak_of(lambda g=group, s=shape: passes.PASSES["train"](g, s.side))
        predicted = predicted_peak(setup_of(shape, read_sizes(group.model.config.to_dict())))
        print(
            f"  {str(shape):<46}{measured / 1e6:>9.1f}{predicted / 1e6:>9.1f} MB {predicted / measured - 1:>+8.1%}",
            flush=True,
        )
        yield {"shape": asdict(shape), "measured": measured, "predicted": predicted}


# Time


def features(shape: Shape, setup: Setup, name: str) -> tuple[float, float]:
    """Operations of a pass, and how often a layer runs in it."""
    text, towers = setup.model.text, setup.model.tower_operations(setup.media)
    own = 0 if shape.side == "cached" else towers
    tower_layers = 0 if shape.side == "cached" else setup.model.vision.layers + setup.model.audio.layers
    if name == "generate":
        work = generation_work(shape.prompt, 1, shape.group, shape.side != "rows")
        return text.operations(work) + own, text.layers + tower_layers
    times = 3 if name == "train" else 1
    return pass_operations(setup, train=name == "train"), times * text.layers + tower_layers


def decode_features(shape: Shape, setup: Setup) -> tuple[float, float]:
    """How often a layer runs in decoding, and the bytes of weights and cache that are read."""
    text, steps = setup.model.text, shape.completion - 1
    weights = text.active + text.vocab * text.hidden
    cache = shape.group * text.cache_values * (shape.prompt + shape.completion / 2)
    return text.layers * steps, 4 * (weights + cache) * steps


def fit(rows: list[tuple[float, ...]], seconds: list[float]) -> np.ndarray:
    """The constants, none below 0, that make the relative errors least."""
    target = np.array(seconds)
    return nnls(np.array(rows) / target[:, None], np.ones(len(target)))[0]


def measure_times(repeats: int) -> Iterator[dict[str, Any]]:
    forward = np.zeros(2)
    points = time_shapes()
    groups = [make_group(shape) for shape in points]
    setups = [
        setup_of(shape, read_sizes(group.model.config.to_dict())) for shape, group in zip(points, groups, strict=True)
    ]
    for name in ("train", "log_probs", "generate"):
        seconds: list[list[float]] = [[] for _ in points]
        for repeat in range(repeats + 1):  # the first warms up
            for i in range(len(points))[:: -1 if repeat % 2 else 1]:
                before = time.process_time()
                passes.PASSES[name](groups[i], points[i].side)
                groups[i].model.zero_grad(set_to_none=True)
                if repeat:
                    seconds[i].append(time.process_time() - before)
        least = [min(values) for values in seconds]  # what else the machine does only adds
        rows = [features(shape, setup, name) for shape, setup in zip(points, setups, strict=True)]
        chosen = [i for i, shape in enumerate(points) if shape.fitted]
        known = np.zeros(len(points))
        if name == "generate":  # its prefill is a pass like that of log-probabilities
            known = np.array(rows) @ forward
            rows = [decode_features(shape, setup) for shape, setup in zip(points, setups, strict=True)]
        constants = fit([rows[i] for i in chosen], [least[i] - known[i] for i in chosen])
        forward = constants
        predicted = (np.array(rows) @ constants + known).tolist()
        mean = float(np.exp(np.mean(np.log([least[i] for i in chosen]))))
        expected_mean = float(np.exp(np.mean(np.log([predicted[i] for i in chosen]))))
        print(f"\n{name}: fitted constants {', '.join(f'{value:.3g}' for value in constants)}")
        for i, shape in enumerate(points):
            ratio, expected = least[i] / mean, predicted[i] / expected_mean
            mark = "fitted" if i in chosen else f"{expected / ratio - 1:+.1%}"
            print(f"  {str(shape):<46}{least[i]:>8.3f} s  ratio {ratio:>6.2f}{expected:>7.2f} {mark:>8}", flush=True)
            yield {
                "pass": name,
                "shape": asdict(shape),
                "fitted": i in chosen,
                "seconds": least[i],
                "predicted_seconds": predicted[i],
                "ratio": ratio,
                "predicted_ratio": expected,
            }


# Clips


def measure_clips(folder: str) -> dict[str, Any]:
    files = sorted(path for path in Path(folder).rglob("*.mp4"))[:6]
    if not files:
        raise SystemExit(f"--clips {folder}: there is no .mp4 below it")
    limits = MediaLimits(num_frames=8)
    found = []
    for path in files:
        with MediaLoader(path.parent, limits, cache_bytes=1, workers=0) as loader:
            length = loader.probe(path.name).duration
            before = time.process_time()
            loader.video(path.name)
            loader.audio(path.name)
            found.append({"seconds": time.process_time() - before, "length": length})
            print(f"  a clip of {length or 0:.0f} s: {found[-1]['seconds']:.2f} s of a processor", flush=True)
    return {"clips": found, "median": statistics.median(clip["seconds"] for clip in found)}


def summary(errors: list[float]) -> dict[str, float]:
    sizes = sorted(abs(error) for error in errors)
    return {"points": len(sizes), "median_error": statistics.median(sizes), "greatest_error": sizes[-1]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("memory", "time", "clips"), default=["memory", "time"])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of a point")
    parser.add_argument("--clips", metavar="DIR", help="a folder of .mp4 files to decode, with --parts clips")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if "clips" in args.parts and not args.clips:
        parser.error("--parts clips needs --clips DIR")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trl.trainer.utils._use_triton = lambda device: True  # decides there which tokens the head reads, and no more
    result: dict[str, Any] = {}
    if "memory" in args.parts:
        print("memory of a training pass: measured, computed, error (nothing is fitted)")
        result["memory"] = list(measure_memory())
        result["memory_error"] = summary([p["predicted"] / p["measured"] - 1 for p in result["memory"]])
        print(f"  {result['memory_error']}")
    if "time" in args.parts:
        result["time"] = list(measure_times(args.repeats))
        held = [p["predicted_ratio"] / p["ratio"] - 1 for p in result["time"] if not p["fitted"]]
        result["time_error"] = summary(held)
        print(f"\nratios of times, held out: {result['time_error']}")
    if "clips" in args.parts:
        print("\nclips")
        result["clips"] = measure_clips(args.clips)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
