"""
What a report costs: the metrics and the page of an evaluation of 10 000 questions, and the page of a run of 100 000
completions, in Chromium too where there is one.

    python benchmarks/report.py --json report.json

The evaluation has 5 samples a question; its metrics have bootstrap intervals of 2000 resamples. The run has 12 500
rollouts of 8 completions of about 100 words, 10 000 log entries and no clips. In the browser, times are those from the
opening of the file until its first completions stand there, from a click to the next page, from a change of a filter
until the page shows what fits, and of a search through all texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.evaluation import evaluation_results
from maple_trl.modalities import ModalityTag
from maple_trl.records.evaluations import LINES as EVALUATION_LINES
from maple_trl.records.rollouts import ROLLOUTS, write_rollout
from maple_trl.reports import write_report


TAGS = [str(tag) for tag in ModalityTag]
SAMPLES = 5
GROUP = 8
WORDS = "the red circle moves left while a low tone sounds and someone says dog then it stops before two".split()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def evaluation_lines(questions: int, draw: random.Random) -> pa.Table:
    """Samples of questions whose difficulty differs, with short texts."""
    lines = []
    for row in range(questions):
        tag, chance = TAGS[row % 7], draw.random()
        for sample in range(SAMPLES):
            right = draw.random() < chance
            thought = " ".join(draw.choices(WORDS, k=40))
            lines.append(
                {
                    "id": f"question-{row:05}",
                    "row": row,
                    "tag": tag,
                    "solution": "A",
                    "access": "required",
                    "status": "scored",
                    "sample": sample,
                    "completion": f"<think>{thought}</think><answer>{'A' if right else 'B'}</answer>",
                    "answer": "A" if right else "B",
                    "score": float(right),
                    "finish": "end",
                    "completion_tokens": 60,
                    "prompt_tokens": 300,
                    "video_tokens": 200 * ("V" in tag),
                    "audio_tokens": 50 * ("A" in tag),
                    "subtitle_tokens": 20 * ("S" in tag),
                    "notes": [],
                }
            )
    return pa.Table.from_pylist(lines, EVALUATION_LINES)


def write_evaluation(folder: Path, questions: int, draw: random.Random) -> dict[str, float]:
    """The files of an evaluation; returns the seconds that its metrics took."""
    lines = evaluation_lines(questions, draw)
    results, seconds = timed(lambda: evaluation_results(lines, ["required"], SAMPLES))
    folder.mkdir(parents=True)
    pq.write_table(lines, folder / "rows.parquet")
    identity = {"asking": {"access": ["required"], "samples": SAMPLES}, "data": {"name": "made up", "sha256": "0"}}
    (folder / "evaluation.json").write_text(json.dumps(identity), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(identity | {"confidence": 0.95} | results), encoding="utf-8")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return seconds


def write_run(folder: Path, completions: int, entries: int, draw: random.Random) -> None:
    """The files of a training run: a log by tag, and completions of groups of eight, sixteen groups a file."""
    (folder / ROLLOUTS).mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(entries):
            values = {
                f"tag/{tag}/{name}": draw.random() for tag in TAGS for name in ("reward", "accuracy", "kl", "weight")
            }
            file.write(json.dumps(values | {"reward": draw.random(), "loss": draw.random(), "step": step}) + "\n")
    per_file = 16
    for number in range(-(-completions // (GROUP * per_file))):
        lines = []
        for group in range(number * per_file, min((number + 1) * per_file, completions // GROUP)):
            tag, chance = TAGS[draw.randrange(7)], draw.random()
            for _ in range(GROUP):
                right = float(draw.random() < chance)
                text = f"<think>{' '.join(draw.choices(WORDS, k=100))}</think><answer>A</answer>"
                lines.append(
                    {
                        "rollout": number,
                        "step": number,
                        "group": f"{group % 4000:016x}",
                        "row": group % 4000,
                        "tag": tag,
                        "prompt": f"user: What is seen in clip {group % 4000}?",
                        "completion": text,
                        "solution": "A",
                        "rewards": {"format_reward": 1.0, "accuracy_reward": right},
                        "reward": 0.1 + right,
                        "advantage": right - chance,
                        "tokens": 120,
                        "replayed": False,
                        "hinted": False,
                    }
                )
        write_rollout(folder / ROLLOUTS, number, lines, ".")


def browser_times(path: Path, chromium: str, home: str) -> dict[str, Any]:
    """Seconds, as a reader waits for them."""
    from playwright.sync_api import sync_playwright

    arguments = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    with sync_playwright() as driver:
        environment = {**os.environ, "HOME": home}
        browser = driver.chromium.launch(executable_path=chromium, args=arguments.split(), env=environment)
        page = browser.new_page()
        drawn = 1

        def after(act: Callable[[], Any]) -> float:
            nonlocal drawn
            drawn += 1

            def wait() -> None:
                act()
                page.wait_for_selector(f"#rollout-list[data-drawn='{drawn}']", timeout=120_000)

            return timed(wait)[1]

        def choose(name: str, value: str) -> float:
            return after(lambda: (page.fill(f"#filter-{name}", value), page.press(f"#filter-{name}", "Enter")))

        _, opened = timed(
            lambda: (page.goto(path.as_uri()), page.wait_for_selector("#rollout-list article", timeout=120_000))
        )
        times = {
            "open": opened,
            "next_page": after(lambda: page.click("button[data-go=next] >> nth=0")),
            "last_page": after(lambda: page.click("button[data-go=last] >> nth=0")),
            "filter_reward": choose("least", "1"),
            "filter_tag": after(lambda: page.uncheck("#tag-V")),
            "sort": after(lambda: page.select_option("#filter-sort", "high")),
            "search_all_texts": choose("text", "dog then dog then"),
        }
        heap = page.evaluate("performance.memory.usedJSHeapSize")
        browser.close()
    return {"seconds": times, "heap_bytes": heap}


def measure(questions: int, completions: int, entries: int, seed: int, chromium: str | None) -> dict[str, Any]:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as name:
        folder = Path(name)
        metrics = write_evaluation(folder / "evaluation", questions, draw)
        _, page = timed(lambda: write_report(folder / "evaluation", folder / "evaluation.html"))
        result: dict[str, Any] = {
            "evaluation": {
                "questions": questions,
                "samples": SAMPLES,
                "seconds": {"metrics": metrics, "report": page, "both": metrics + page},
                "bytes": (folder / "evaluation.html").stat().st_size,
            }
        }
        write_run(folder / "run", completions, entries, draw)
        _, page = timed(lambda: write_report(folder / "run", folder / "run.html"))
        _, both = timed(lambda: write_report(folder / "run", folder / "run.html", folder / "run.json"))
        result["run"] = {
            "completions": completions,
            "seconds": {"report": page, "report_and_json": both},
            "bytes": (folder / "run.html").stat().st_size,
            "json_bytes": (folder / "run.json").stat().st_size,
        }
        if chromium is not None:
            result["browser"] = browser_times(folder / "run.html", chromium, name)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--questions", type=int, default=10_000, help="of the evaluation")
    parser.add_argument("--completions", type=int, default=100_000, help="of the run")
    parser.add_argument("--entries", type=int, default=10_000, help="of the run's log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chromium", metavar="FILE", help="the browser (chromium on the PATH; none: no times of one)")
    args = parser.parse_args(argv)
    chromium = args.chromium or shutil.which("chromium") or shutil.which("chromium-browser")
    found = measure(args.questions, args.completions, args.entries, args.seed, chromium)
    result = {
        "benchmark": "report",
        "seed": args.seed,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **found,
    }
    evaluation, run = result["evaluation"], result["run"]
    print(f"evaluation of {args.questions} questions, {SAMPLES} samples each")
    for name, seconds in evaluation["seconds"].items():
        print(f"  {name:<18}{seconds:>8.2f} s")
    print(f"  page{evaluation['bytes'] / 1e6:>22.1f} MB\n")
    print(f"run of {args.completions} completions")
    for name, seconds in run["seconds"].items():
        print(f"  {name:<18}{seconds:>8.2f} s")
    print(f"  page{run['bytes'] / 1e6:>22.1f} MB, JSON {run['json_bytes'] / 1e6:.1f} MB\n")
    if "browser" in result:
        print("in the browser")
        for name, seconds in result["browser"]["seconds"].items():
            print(f"  {name:<18}{seconds:>8.2f} s")
        print(f"  memory{result['browser']['heap_bytes'] / 1e6:>20.0f} MB")
    else:
        print("no Chromium was found: the page was not opened")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
