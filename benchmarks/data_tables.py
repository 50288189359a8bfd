"""
What conversion and validation of a published set cost: rows a second, and memory at a fifth of the rows and at all of them.

    python benchmarks/data_tables.py --json data_tables.json

Records in Video-R1's form are written to a JSON list, converted into shards, and the shards validated, media included (the files are
there, and empty). Each size runs in a process of its own, whose peak memory is compared with what it had once its imports were done.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


CLIPS = 500
_WORDS = "the man in the red coat opens a door and looks at what lies behind it while somebody calls from the street".split()


def write_records(path: Path, rows: int) -> None:
    """Write records in Video-R1's form, of about 700 bytes each."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            words = " ".join(_WORDS[(number + place) % len(_WORDS)] for place in range(40))
            record = {
                "problem_id": number,
                "problem": f"{words}?",
                "data_type": "video",
                "problem_type": "multiple choice",
                "options": [f"{letter}. {words[:40]} {number % 7}{letter}" for letter in "ABCD"],
                "process": "",
                "solution": f"<answer>{'ABCD'[number % 4]}</answer>",
                "path": f"./clips/{number % CLIPS}.mp4",
            }
            file.write(f"{'[' if number == 0 else ','}\n{json.dumps(record)}")
        file.write("\n]\n")


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """Convert and validate in this process."""
    from maple_trl.data.converters import convert
    from maple_trl.data.shards import find_shards
    from maple_trl.data.validation import validate_tables

    source = folder / "Video-R1-260k.json"
    write_records(source, rows)
    (folder / "clips").mkdir()
    for number in range(CLIPS):
        (folder / "clips" / f"{number}.mp4").touch()
    before, used = peak_bytes(), time.process_time()
    begun = time.perf_counter()
    summary = convert("video-r1", source, folder / "rows")
    converted = time.perf_counter()
    memory = {"convert": peak_bytes() - before}
    report = validate_tables([folder / "rows"], media_root=folder)
    validated = time.perf_counter()
    memory["both"] = peak_bytes() - before
    if report.counts or report.rows != rows or sum(summary.rows.values()) != rows:
        raise SystemExit(f"{report.rows} rows with {dict(report.counts)}: this measured something else")
    return {
        "rows": rows,
        "source_bytes": source.stat().st_size,
        "shards": len(find_shards(folder / "rows")["train"]),
        "seconds": {"convert": converted - begun, "validate": validated - converted, "both": validated - begun},
        "cpu_seconds": time.process_time() - used,
        "rows_a_second": {"convert": rows / (converted - begun), "validate": rows / (validated - converted)},
        "memory_before": before,
        "memory_added": memory,
    }


def apart(rows: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--worker", folder, "--rows", str(rows)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the larger set (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < 10:
        parser.error("--rows must be 10 or more")
    if arguments.worker:
        print(json.dumps(measure(arguments.rows, Path(arguments.worker))))
        return
    sizes = [apart(arguments.rows // 5), apart(arguments.rows)]
    small, large = sizes
    grown = large["memory_added"]["both"] - small["memory_added"]["both"]
    result = {"sizes": sizes, "bytes_a_row": grown / (large["rows"] - small["rows"]), "cores": os.cpu_count()}
    for size in sizes:
        seconds, pace = size["seconds"], size["rows_a_second"]
        print(
            f"{size['rows']:>9,} rows: {seconds['both']:6.1f} s, {size['cpu_seconds']:.1f} s of a core; conversion {pace['convert']:,.0f} rows/s, validation "
            f"{pace['validate']:,.0f} rows/s; memory added {size['memory_added']['both'] / 1e6:.0f} MB "
            f"(source {size['source_bytes'] / 1e6:.0f} MB)"
        )
    print(f"memory grows by {result['bytes_a_row']:.0f} bytes a row")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
