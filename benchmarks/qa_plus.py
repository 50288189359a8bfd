"""
What QA+ costs: seconds and memory of `maple-trl data qa-plus` over the number of questions.

    python benchmarks/qa_plus.py --json qa_plus.json

The questions are made here, with the tags in the shares of MAPLE's benchmark. Each size runs in a process of its own, of which
wall-clock time, processor time and the most memory are taken, imports included; one question shows what a process costs that
does nothing. `growth` is the memory of the largest size over that of the smallest, per row of the source.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.data.benchmarks.prompts import PROMPT_STYLES
from maple_trl.data.schema import ROW_FEATURES


SIZES = {"V": 552, "A": 75, "S": 76, "VA": 1145, "VS": 1784, "AS": 171, "VAS": 1198}
WORDS = "a red car drives slowly past the old house while somebody sings about the rain and two dogs bark".split()
_MODES = {"training": [], "evaluation": ["--evaluation", "true"]}
_BATCH = 5000

# Runs the command that follows, and tells how much memory it took at most.
_MEASURED = """
import json, resource, sys, time
from maple_trl import cli
if cli.main(sys.argv[1:]):
    sys.exit(1)
print(json.dumps({"cpu": time.process_time(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def write_questions(path: Path, count: int, seed: int) -> None:
    """Write a Parquet file of `count` questions with four options of some words each."""
    draw = random.Random(seed)
    schema = ROW_FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, _BATCH):
            rows = list(_questions(range(start, min(start + _BATCH, count)), draw))
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _questions(numbers: range, draw: random.Random) -> Iterator[dict[str, Any]]:
    for number in numbers:
        asked = f"What happens when {' '.join(draw.sample(WORDS, 8))}?"
        options = [f"{' '.join(draw.sample(WORDS, 7))} {letter}" for letter in "wxyz"]
        yield {
            **dict.fromkeys(ROW_FEATURES),
            "id": f"q{number:07}",
            "clip": f"clip-{number // 7}",
            "source": "made",
            "split": "train",
            "tag": draw.choices(list(SIZES), list(SIZES.values()))[0],
            "question": asked,
            "options": options,
            "answer": "ABCD"[number % 4],
            "solution": "ABCD"[number % 4],
            "prompt": [{"role": "user", "content": PROMPT_STYLES["think"].render(asked, options, "option")}],
            "video": f"clip-{number // 7}.mp4",
            "subtitle": f"clip-{number // 7}.srt",
        }


def measure(source: Path, output: Path, words: list[str]) -> dict[str, Any]:
    """Run the command in a process of its own."""
    command = [
        "data",
        "qa-plus",
        str(source),
        str(output),
        "--check_files",
        "false",
        "--json",
        "--split",
        "train",
        *words,
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(output) + ".cache", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, check=True, env=environment
    )
    wall = time.monotonic() - start
    summary, _, last = done.stdout.rstrip().rpartition("\n")
    found = json.loads(last)
    counts = json.loads(summary)
    rows = sum(sum(by_tag.values()) for by_tag in counts["rows"].values())
    size = sum(path.stat().st_size for path in output.glob("*.parquet"))
    return {"wall": wall, "cpu": found["cpu"], "peak_bytes": found["peak"], "rows": rows, "bytes": size}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 10_000, 100_000])
    parser.add_argument("--modes", nargs="+", choices=list(_MODES), default=list(_MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON")
    options = parser.parse_args(argv)
    results = []
    for count in options.questions:
        for mode in options.modes:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "train.parquet")
                write_questions(source, count, options.seed)
                found = measure(source, Path(folder, "out"), _MODES[mode])
            results.append({"questions": count, "mode": mode, **found})
            print(
                f"{mode:10} {count:>9,} questions {found['rows']:>9,} rows {found['wall']:6.1f} s "
                f"({found['cpu']:.1f} s of processor) "
                f"{found['peak_bytes'] / 2**20:7.0f} MiB {found['bytes'] / 2**20:7.1f} MiB written"
            )
    growth = {mode: _growth([found for found in results if found["mode"] == mode]) for mode in options.modes}
    for mode, per_row in growth.items():
        print(f"{mode}: memory grows by {per_row:.0f} bytes a question")
    told = {"benchmark": "qa_plus", "seed": options.seed, "results": results, "growth": growth}
    if options.json:
        Path(options.json).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return told


def _growth(results: list[dict[str, Any]]) -> float:
    smallest, largest = results[0], results[-1]
    return (largest["peak_bytes"] - smallest["peak_bytes"]) / max(largest["questions"] - smallest["questions"], 1)


if __name__ == "__main__":
    main()
