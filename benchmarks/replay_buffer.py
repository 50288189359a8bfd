"""
What the replay buffer costs when it is full: memory, and the time to add, to sample, to save and to load.

    python benchmarks/replay_buffer.py --json replay_buffer.json

The buffer holds 10 000 completions of 2048 tokens, of 1250 prompts. Then it takes batches of 64 new ones, and draws 4
for each of 64 prompts. Timed by themselves are checking and copying the new completions (`make`), filing them with
eviction (`add`), drawing with the dropping of what is too old (`sample`), and moving what is stored between tiers
after the baselines of 8 prompts changed (`retier`).

Bytes are those that the process grew by while the buffer filled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from maple_trl.algorithms import Experience, StratifiedReplayBuffer, Vcrs


BATCH = 64
REPLAYED = 4
PER_PROMPT = 8


def resident_bytes() -> int | None:
    """Memory of this process now; `None` where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stream:
    """Completions of prompts chosen at random, as a trainer would hand them over: rows of padded tensors."""

    def __init__(self, prompts: int, tokens: int, seed: int):
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.prompts = [f"row-{i}#VAS" for i in range(prompts)]
        self.ids = torch.randint(0, 150_000, (BATCH, tokens), generator=self.generator)
        self.logps = -torch.rand(BATCH, tokens, generator=self.generator)
        self.vcrs = Vcrs()

    def rewards(self, prompt: str, count: int) -> list[float]:
        """A prompt is the easier, the higher its number."""
        chance = self.prompts.index(prompt) / len(self.prompts)
        return [float(self.draw.random() < chance) for _ in range(count)]

    def batch(self, step: int) -> Callable[[], list[Experience]]:
        """Rewards are observed here; the function returned makes the experiences."""
        chosen = self.draw.sample(self.prompts, BATCH // PER_PROMPT)
        rows = []
        for prompt in chosen:
            rewards = self.rewards(prompt, PER_PROMPT)
            self.vcrs.observe(prompt, rewards)
            rows += [(prompt, reward) for reward in rewards]

        def make() -> list[Experience]:
            return [
                Experience(prompt, 0, self.ids[i], self.logps[i], reward, step, rewards={"accuracy": reward})
                for i, (prompt, reward) in enumerate(rows)
            ]

        return make


class Times:
    """Milliseconds by name: on the wall, and of the processor, which does not count what else the machine does."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu.setdefault(name, []).append((time.process_time() - cpu) * 1e3)
        self.wall.setdefault(name, []).append((time.perf_counter() - wall) * 1e3)
        return result

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        return {name: {"wall": spread(self.wall[name]), "cpu": spread(self.cpu[name])} for name in self.wall}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "p95": statistics.quantiles(values, n=20)[-1],
        "max": max(values),
        "n": len(values),
    }


def measure(capacity: int, tokens: int, repeats: int, seed: int, folder: str) -> dict[str, Any]:
    stream = Stream(max(capacity // PER_PROMPT, BATCH), tokens, seed)
    for prompt in stream.prompts:
        stream.vcrs.observe(prompt, stream.rewards(prompt, PER_PROMPT))
    buffer = StratifiedReplayBuffer(capacity, seed=seed)
    before, step = resident_bytes(), 0
    while len(buffer) < capacity:
        step += 1
        buffer.add(stream.batch(step)(), stream.vcrs)
        if step > 20 * capacity // BATCH:
            raise RuntimeError(f"the buffer holds {buffer.sizes()} of {buffer.capacities} and does not fill up")
    after = resident_bytes()
    result: dict[str, Any] = {
        "capacity": capacity,
        "tokens": tokens,
        "tensor_bytes": capacity * tokens * 8,
        "bytes": None if after is None or before is None else after - before,
    }

    # Some experiences are too old at every step from now on.
    buffer.max_age = int(buffer.metrics()["replay/age_max"])
    times = Times()
    for _ in range(repeats):
        step += 1
        new = times.take("make", stream.batch(step))
        times.take("add", lambda new=new: buffer.add(new, stream.vcrs))
        asked = [(stream.draw.choice(stream.prompts), [0.0] * REPLAYED) for _ in range(BATCH)]
        times.take(
            "sample", lambda asked=asked, at=step: [buffer.sample(p, REPLAYED, fresh, at) for p, fresh in asked]
        )
    result["at_the_end"] = buffer.metrics()
    for _ in range(repeats):
        stream.batch(step)
        times.take("retier", lambda: buffer.retier(stream.vcrs))
    result["milliseconds"] = times.summary()

    peak, disk = peak_bytes(), Times()
    disk.take("save", lambda: buffer.save(folder, "benchmark"))
    result["peak_growth_of_saving"] = peak_bytes() - peak
    result["file_bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
    restored = StratifiedReplayBuffer(capacity, max_age=buffer.max_age, seed=seed)
    disk.take("load", lambda: restored.load(folder, "benchmark"))
    if restored.metrics() != buffer.metrics():
        raise RuntimeError("the loaded buffer is not the saved one")
    return result | {"seconds": {name: disk.wall[name][0] / 1e3 for name in disk.wall}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--capacity", type=int, default=10_000, help="experiences")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=200, help="batches that are timed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as folder:
        result = measure(args.capacity, args.tokens, args.repeats, args.seed, folder)
    print(f"{args.capacity} experiences of {args.tokens} tokens, batches of {BATCH}, {REPLAYED} replayed per prompt\n")
    names = {
        "make": f"make {BATCH} experiences",
        "add": f"add {BATCH}",
        "sample": f"sample for {BATCH} prompts",
        "retier": "move between tiers",
    }
    print(f"{'ms':<24}{'median':>8}{'p95':>8}{'max':>8}{'CPU: median':>14}{'p95':>8}")
    for name, values in result["milliseconds"].items():
        wall, cpu = values["wall"], values["cpu"]
        print(f"{names[name]:<24}{wall['median']:>8.2f}{wall['p95']:>8.2f}{wall['max']:>8.2f}", end="")
        print(f"{cpu['median']:>14.2f}{cpu['p95']:>8.2f}")
    grown = result["bytes"]
    print(f"\nmemory: {'unknown' if grown is None else f'{grown / 1e6:.0f} MB'}", end="")
    print(f" (tokens and log-probabilities alone {result['tensor_bytes'] / 1e6:.0f} MB)", end="")
    print(f", while saving {result['peak_growth_of_saving'] / 1e6:.0f} MB more")
    print(f"save {result['seconds']['save']:.2f} s, load {result['seconds']['load']:.2f} s", end="")
    print(f", {result['file_bytes'] / 1e6:.0f} MB on disk")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
