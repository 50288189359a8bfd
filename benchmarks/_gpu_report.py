"""What `gpu.py` measures with and writes to: sides in turns, parts with a deadline each, a table at the end."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shared_prefix as benchmark
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maple_trl.files import write_atomically


VIEWS = ("view", "slice", "transpose", "expand", "select", "unsqueeze", "squeeze", "split", "detach", "alias", "t")
Sides = dict[str, Callable[[], Any]]


class Report:
    """Runs one part after the other, and keeps what is known in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.began = time.monotonic()
        self.failed = 0
        self.parts: dict[str, Any] = {}
        self.result = {
            "benchmark": "gpu",
            "says_something_about_gpus": args.device == "cuda" and not args.small,
            "versions": {name: benchmark.version(name) for name in benchmark.PACKAGES},
            "machine": benchmark.machine(args.device),
            "options": {name: value for name, value in vars(args).items() if name != "json"},
            "parts": self.parts,
        }
        self.write()

    def write(self) -> None:
        if self.args.json:
            write_atomically(Path(self.args.json), json.dumps(self.result, indent=2) + "\n")

    def part(self, name: str, measure: Callable[[Turns], dict[str, Any]]) -> None:
        """Measure a part unless it is too late, and note how it failed if it does."""
        begun = time.monotonic() - self.began
        if self.args.deadline is not None and begun > self.args.deadline:
            self.parts[name] = {"skipped": f"after {begun:.0f} s, past --deadline {self.args.deadline:g}"}
            print(f"\n{name}: {self.parts[name]['skipped']}", flush=True)
            return self.write()
        print(f"\n{name} [{begun:.0f} s]", flush=True)
        try:
            self.parts[name] = measure(Turns(self.args))
        except Exception as error:  # what other parts measure is not lost for it
            self.parts[name] = {"failed": told(error), "traceback": traceback.format_exc()[-4000:]}
            print(f"  failed: {told(error)}", flush=True)
        self.failed += failures(self.parts[name])
        self.parts[name]["took_s"] = round(time.monotonic() - self.began - begun, 2)
        release(self.args.device)
        return self.write()


class Turns:
    """Measures the sides of a part: each once for itself, then all in turns while there is time."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.until = time.monotonic() + args.part_seconds

    def measure(self, sides: Sides) -> dict[str, dict[str, Any]]:
        """Seconds of each side, its peak of memory, and how it failed where it did."""
        found: dict[str, dict[str, Any]] = {side: self._first(run) for side, run in sides.items()}
        working = {side: run for side, run in sides.items() if "failed" not in found[side]}
        seconds: dict[str, list[float]] = {side: [] for side in working}
        for repeat in range(self.args.repeats):
            if repeat and time.monotonic() > self.until:
                break
            for side, spent in benchmark.in_turns(turned(working, repeat), 1, self.args.device).items():
                seconds[side] += spent["wall"]
        for side, values in seconds.items():
            found[side]["seconds"] = benchmark.spread(values)
        return found

    def _first(self, run: Callable[[], Any]) -> dict[str, Any]:
        cuda = self.args.device == "cuda"
        release(self.args.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            begun = time.perf_counter()
            run()
            benchmark.wait_for(self.args.device)
        except Exception as error:
            release(self.args.device)
            return {"failed": told(error)}
        first = {"first_s": time.perf_counter() - begun}
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            first |= {"peak_gb": peak / 1e9, "added_gb": (peak - before) / 1e9}
        return first


def failures(found: dict[str, Any]) -> int:
    """Count the parts or sides that failed in what a part has found."""
    return ("failed" in found) + sum(failures(value) for value in found.values() if isinstance(value, dict))


def turned(sides: Sides, repeat: int) -> Sides:
    return dict(list(sides.items())[:: -1 if repeat % 2 else 1])


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def against(args: argparse.Namespace, found: dict, operations: dict[str, float], base: str = "rows") -> dict[str, Any]:
    """Add operations per second, and each side's speed-up against a base beside its bound; print it."""
    for side, entry in found.items():
        if "failed" in entry:
            print(f"  {side:<10} failed: {entry['failed']}", flush=True)
            continue
        median = entry["seconds"]["median"]
        line = f"  {side:<10} {median * 1e3:10.2f} ms"
        if side in operations:
            entry["tflop"] = operations[side] / 1e12
            entry["tflop_per_s"] = entry["tflop"] / median
            entry["share_of_peak"] = entry["tflop_per_s"] / args.peak
            line += f" {entry['tflop_per_s']:8.1f} TFLOP/s ({entry['share_of_peak']:4.0%} of {args.peak:g})"
        if "added_gb" in entry:
            line += f" {entry['added_gb']:7.2f} GB more at its peak"
        if side != base and "seconds" in found.get(base, {}):
            entry["speedup"] = found[base]["seconds"]["median"] / median
            line += f"   x{entry['speedup']:.2f}"
            if operations.get(side) and base in operations:
                entry["bound"] = operations[base] / operations[side]
                entry["share_of_bound"] = entry["speedup"] / entry["bound"]
                line += f" of {entry['bound']:.2f} ({entry['share_of_bound']:.0%})"
            if entry.get("added_gb") and "added_gb" in found[base]:
                entry["memory_ratio"] = found[base]["added_gb"] / entry["added_gb"]
        print(line, flush=True)
    return found


class Launches(TorchDispatchMode):
    """Counts operations that are a kernel or more on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.overloadpacket.__name__.lstrip("_").startswith((*VIEWS, "empty", "reshape_alias"))
        return function(*args, **(kwargs or {}))


def launches(run: Callable[[], Any]) -> int:
    with Launches() as counted:
        run()
    return counted.count


def print_table(report: Report) -> None:
    """One line for each side that has a speed-up."""
    print(f"\n{'':<34}{'ms':>10}{'TFLOP/s':>10}{'of peak':>9}{'times':>8}{'bound':>8}{'share':>7}{'memory':>8}")
    for part, found in report.parts.items():
        groups = {"": found} if part.startswith("step") else found
        for name, sides in groups.items():
            for side, entry in sides.items() if isinstance(sides, dict) else ():
                if isinstance(entry, dict) and "speedup" in entry:
                    label = "/".join(filter(None, (part, name, side)))
                    cells = [
                        f"{entry['seconds']['median'] * 1e3:10.2f}",
                        *(
                            f"{entry[key]:{form}}" if key in entry else " " * int(form.split(".")[0])
                            for key, form in CELLS
                        ),
                    ]
                    print(f"{label:<34}" + "".join(cells))


CELLS = (
    ("tflop_per_s", "10.1f"),
    ("share_of_peak", "9.0%"),
    ("speedup", "8.2f"),
    ("bound", "8.2f"),
    ("share_of_bound", "7.0%"),
    ("memory_ratio", "8.2f"),
)
