"""
What a process holds while it runs, and whether that grows.

`measure()` takes a sample after what is garbage has gone and free pages have been given back. `trends(samples)` fits a line through
the samples of each quantity: Theil and Sen's slope, which single jumps do not move, with its 95 % interval. A quantity *grows* where
all of the interval is above what is noise, and is *flat* where all of it is below; where neither is so, there were too few samples.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import theilslopes

from maple_trl.omni.machine_memory import children_of, resident_bytes


NOISE = {
    "rss": 2.0 * 2**20,
    "rss_children": 16.0 * 2**20,
    "blocks": 4000.0,
    "tensors": 16.0,
    "prompts": 2.0,
    "files": 2.0,
    "threads": 2.0,
    "children": 2.0,
    "shared": 2.0,
}
"""
Growth from the first to the last sample that counts as none, in bytes or things, however many steps lie between: allocators keep
pieces. `blocks` are Python's own, of 512 bytes at most.
"""
PROMPT = "EncodedPrompt"


def measure() -> dict[str, float]:
    """Count what this process holds."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    kinds = Counter(map(type, gc.get_objects()))
    children = children_of(os.getpid())
    return {
        "rss": float(resident_bytes(os.getpid()) or 0),
        "rss_children": float(sum(resident_bytes(child) or 0 for child in children)),
        "blocks": float(sys.getallocatedblocks()),
        "tensors": float(sum(count for kind, count in kinds.items() if issubclass(kind, torch.Tensor))),
        "prompts": float(sum(count for kind, count in kinds.items() if kind.__name__ == PROMPT)),
        "files": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(threading.active_count()),
        "children": float(len(children)),
        "shared": float(_shared_segments()),
    }


def _shared_segments() -> int:
    """Count the segments of shared memory that are mapped."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return len({line.split()[4] for line in file if "/dev/shm/" in line or "/memfd:" in line})


@dataclass(frozen=True)
class Trend:
    """
    A line through samples.

    Attributes:
        slope, low, high: growth per step, and its 95 % interval.
        allowed: growth per step that is noise.
        first, last: means of the first and last fifth of the samples.
    """

    slope: float
    low: float
    high: float
    allowed: float
    first: float
    last: float

    @property
    def grows(self) -> bool:
        """Whether it surely grows by more than noise."""
        return self.low > self.allowed

    @property
    def flat(self) -> bool:
        """Whether it surely does not."""
        return self.high <= self.allowed


def trends(samples: Sequence[tuple[int, dict[str, float]]], noise: dict[str, float] | None = None) -> dict[str, Trend]:
    """
    Fit a line through the samples of each quantity.

    Args:
        samples: step and what [`measure`] found, at least five.
        noise: growth from the first sample to the last that counts as none, by quantity; [`NOISE`] where it says nothing.
    """
    if len(samples) < 5:
        raise ValueError(f"a trend needs at least 5 samples, got {len(samples)}")
    steps, fifth = [step for step, _ in samples], max(len(samples) // 5, 1)
    limits, span, found = NOISE | (noise or {}), steps[-1] - steps[0], {}
    for name in samples[0][1]:
        values = [sample[name] for _, sample in samples]
        line = theilslopes(values, steps)
        ends = [sum(part) / fifth for part in (values[:fifth], values[-fifth:])]
        low, high = (0.0, 0.0) if len(set(values)) == 1 else (float(line.low_slope), float(line.high_slope))
        found[name] = Trend(float(line.slope), low, high, limits.get(name, 0.0) / span, *ends)
    return found


def verdict(found: dict[str, Trend]) -> dict[str, Any]:
    """Return trends as JSON, with the names of those that grow and of those that are not surely flat."""
    return {
        "grows": [name for name, trend in found.items() if trend.grows],
        "unsure": [name for name, trend in found.items() if not trend.grows and not trend.flat],
        "trends": {name: asdict(trend) for name, trend in found.items()},
    }


def table(found: dict[str, Trend]) -> str:
    """Return trends as lines for people."""
    lines = [f"{'':14}{'first':>14}{'last':>14}{'a step':>12}{'95 % interval':>26}{'allowed':>10}"]
    for name, trend in found.items():
        said = "  grows" if trend.grows else "" if trend.flat else "  unsure"
        interval = f"{trend.low:.4g} to {trend.high:.4g}"
        lines.append(
            f"{name:14}{trend.first:14.0f}{trend.last:14.0f}{trend.slope:12.4g}{interval:>26}{trend.allowed:10.4g}{said}"
        )
    return "\n".join(lines)
