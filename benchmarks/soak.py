"""
Whether a run survives what goes wrong in days of training: a real one, under a seeded schedule of faults, judged by code.

    python benchmarks/soak.py --quick --seed 1                    # a few minutes
    python benchmarks/soak.py --hours 8 --seed 1 --json soak.json
    python benchmarks/soak.py --steps 24 --faults kill_rank,clip_removed     # legs of these faults alone, shorter than all need

Two processes train the embedded model by MAPO with replay, asking a judge server and reading clips through decoder processes.
There are three legs, each started again by its own command whenever it ends: one undisturbed; one whose faults change no
data, which has to be equal to it to the bit; and one whose faults cost rows and rewards, each of which has to be named and
counted. Faults strike at optimizer steps. `docs/soak.md` says what they are. The exit status is 0 where all checks hold.

With `--hours` or `--minutes` whole soaks follow each other, each with the next seed, until that time has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

from _soak_faults import FAULTS, strike
from _soak_plants import PLANTS
from _soak_run import JOB, PROCESSES, Leg, Options, marked_processes, open_here, unused_segments
from _soak_schedule import HARMLESS, KINDS, LOSSY, draw_schedule
from _soak_verdict import (
    Check,
    Results,
    all_rows_drawn,
    back_to_start,
    finished,
    flat,
    losses_named,
    nothing_lost,
    read_results,
    same,
)


LEGS = ("undisturbed", "harmless", "lossy")
ALL_FAULTS_NEED, SOME_NEED = 60, 24  # optimizer steps of a leg
PROMPTS = PROCESSES * JOB["per_device_train_batch_size"] // JOB["num_generations"]
TAGS = 7
DISK_BYTES = 96 << 20
SETTLE = 20.0  # seconds in which what a killed process held has to be gone
_APART = "MAPLE_TRL_SOAK_APART"
# In a short leg one start more is all there is time for.
QUICK_ENDINGS = {"harmless": ("kill_saving", "torn_checkpoint", "disk_full"), "lossy": ("kill_rank",)}
ENDINGS = {
    "harmless": ("kill_saving", "torn_checkpoint", "disk_full", "kill_rank"),
    "lossy": ("kill_saving", "kill_rank", "disk_full"),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, help="soaks follow each other for so long")
    length.add_argument("--minutes", type=float, help="the same")
    length.add_argument("--quick", action="store_true", help="one soak of 60 steps a leg")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule, the data and the runs (default 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a leg (default 2000, with --quick 60)")
    parser.add_argument("--legs", default=",".join(LEGS), help=f"of {', '.join(LEGS)}; the first one is always run")
    parser.add_argument("--faults", default="", help="these alone, of those of each leg; a leg may be shorter then")
    parser.add_argument(
        "--plant", default="", help=f"a fault of the run itself, which has to be found: {', '.join(PLANTS)}"
    )
    parser.add_argument(
        "--folder", type=Path, help="where all of it is kept; a temporary folder by default, then removed"
    )
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    options = parser.parse_args(words)
    options.legs = list(dict.fromkeys(["undisturbed", *options.legs.split(",")]))
    options.faults = [name for name in options.faults.split(",") if name]
    for given, known, name in (
        (options.legs, LEGS, "legs"),
        (options.plant.split(","), (*PLANTS, ""), "plant"),
        (options.faults, FAULTS, "faults"),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(filter(None, known))}")
    if options.steps is None:
        options.steps = 60 if options.quick else 2000
    least = ALL_FAULTS_NEED if options.legs[1:] and not options.faults else SOME_NEED
    if options.steps < least:
        parser.error(f"--steps: the faults of a leg need {least} steps, got {options.steps}")
    for leg in options.legs:
        try:
            schedule_of(leg, options, options.seed, sizes_of(options, options.seed))
        except ValueError as error:
            parser.error(f"--steps: {error}")
    for name in ("hours", "minutes"):
        given = getattr(options, name)
        if given is not None and not 0 < given < float("inf"):
            parser.error(f"--{name}: must be above 0, got {given}")
    if options.folder and options.folder.exists() and not _is_empty(options.folder):
        parser.error(f"--folder: {options.folder} must be a folder that is empty or not there")
    for name, folder in (("folder", options.folder), ("json", options.json and options.json.absolute().parent)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"--{name}: cannot write into {folder}: {error}")
    if options.json and options.json.is_dir():
        parser.error(f"--json: {options.json} is a folder; name a file")
    return options


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def with_own_mounts() -> bool:
    """Go on in a copy of this program that may mount a small disk of its own, which ends with it; whether it is one."""
    if os.environ.get(_APART):
        # Whatever is left in shared memory is this soak's, not that of others on this machine.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        return True
    for words in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        with tempfile.TemporaryDirectory() as folder:
            try:
                tried = subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
            except FileNotFoundError:
                return False
        if tried.returncode == 0:
            os.environ[_APART] = "1"
            os.execvp(words[0], [*words, sys.executable, *sys.argv])
    return False


def place_for(leg: str, folder: Path, mounts: bool) -> Path:
    """Return the run's output folder: on a small disk of its own where one can be mounted."""
    disk = folder / f"{leg}-disk"
    disk.mkdir(parents=True)
    if mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    return disk / "out"


def schedule_of(leg: str, options: argparse.Namespace, seed: int, sizes: Options) -> list:
    """Draw the faults of a leg."""
    if leg == "undisturbed":
        return []
    endings = (QUICK_ENDINGS if options.quick and not options.faults else ENDINGS)[leg]
    others = [name for name in (HARMLESS if leg == "harmless" else LOSSY) if name not in ENDINGS["harmless"]]
    epoch = TAGS * sizes.rows_per_tag // PROMPTS
    last = sizes.steps - (epoch + sizes.save_steps if leg == "lossy" else sizes.save_steps)
    kinds = [name for name in (*endings, *others) if not options.faults or name in options.faults]
    assert set(kinds) <= set(FAULTS)
    rounds = 1 if leg == "lossy" else max(1, sizes.steps // 250)
    return draw_schedule(seed, kinds, last, sizes.save_steps, rounds)


def sizes_of(options: argparse.Namespace, seed: int) -> Options:
    quick, short = options.steps < 500, options.steps < ALL_FAULTS_NEED
    return Options(
        steps=options.steps,
        save_steps=4 if short else 6 if quick else 25,
        rows_per_tag=4,
        stop_seconds=3.0 if quick else 30.0,
        rollouts=16 * options.steps,  # all of them
        seed=seed,
        plant=options.plant,
        slow_clips=not options.faults or any(KINDS[name].waits for name in options.faults),
    )


def soak(options: argparse.Namespace, seed: int, folder: Path, mounts: bool) -> dict[str, Any]:
    """Run the legs one after another, and judge them."""
    sizes = sizes_of(options, seed)
    told: dict[str, Any] = {"seed": seed, "legs": {}, "checks": []}
    undisturbed: Results | None = None
    for name in options.legs:
        before = what_is_open()
        events = schedule_of(name, options, seed, sizes)
        leg = Leg(name, folder, place_for(name, folder, mounts), sizes, events, strike)
        print(f"{name}: {sizes.steps} steps, {len(events)} faults", flush=True)
        record = leg.run()
        results = read_results(leg.out, leg.media)
        checks = [*finished(record, sizes.steps), *checks_of(name, record, results, undisturbed)]
        growing, growth = flat(record, sizes.steps) if name == "undisturbed" else ([], {})
        checks += [*growing, *back_to_start(before, once_settled(before))]
        if name == "undisturbed":
            undisturbed = results
        told["legs"][name] = {**record, "growth": growth, "disk_mounted": mounts}
        told["checks"] += [{"leg": name, **check.as_dict()} for check in checks]
        show(name, record, checks)
        if mounts:
            if options.folder:
                shutil.copytree(leg.out, leg.folder / "out", ignore=shutil.ignore_patterns("*.pt", "ballast"))
            subprocess.run(["umount", "--lazy", str(leg.out.parent)], check=True)
    told["ok"] = all(check["ok"] for check in told["checks"])
    return told


def checks_of(name: str, record: dict, results: Results, undisturbed: Results | None) -> list[Check]:
    if name == "undisturbed":
        return [*nothing_lost(results), *all_rows_drawn(results, PROMPTS)]
    if name == "harmless":
        return [*same(results, undisturbed), *nothing_lost(results), *all_rows_drawn(results, PROMPTS)]
    return [*losses_named(record, results, undisturbed), *all_rows_drawn(results, PROMPTS)]


def what_is_open() -> dict[str, Any]:
    return {"open": open_here(), "marked": marked_processes(), "segments": sorted(unused_segments())}


def once_settled(before: dict[str, Any]) -> dict[str, Any]:
    """Look what is open, once more and again until all is gone or time is up."""
    end = time.monotonic() + SETTLE
    while True:
        after = what_is_open()
        if all(check.ok for check in back_to_start(before, after)) or time.monotonic() > end:
            return after
        time.sleep(0.5)


def show(name: str, record: dict, checks: list[Check]) -> None:
    print(f"{name}: {record['seconds']:.0f} s, {record['starts']} starts")
    for check in checks:
        print(f"  {'ok  ' if check.ok else 'FAIL'}  {check.name:28} {check.detail}")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    mounts = with_own_mounts()
    began = time.monotonic()
    seconds = 3600 * options.hours if options.hours else 60 * options.minutes if options.minutes else 0.0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="maple-soak-"))
    soaks: list[dict[str, Any]] = []
    try:
        while not soaks or (time.monotonic() - began < seconds and soaks[-1]["ok"]):
            seed = options.seed + len(soaks)
            soaks.append(soak(options, seed, folder / f"seed-{seed}", mounts))
            if options.json:
                write(options, soaks, time.monotonic() - began)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [check for told in soaks for check in told["checks"] if not check["ok"]]
    print(
        f"{len(soaks)} soaks in {time.monotonic() - began:.0f} s: "
        + (f"{len(failed)} checks FAILED" if failed else "all checks hold")
    )
    return 1 if failed else 0


def write(options: argparse.Namespace, soaks: list[dict[str, Any]], seconds: float) -> None:
    known = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(options).items()}
    found = {
        "benchmark": "soak",
        "options": known,
        "seconds": round(seconds, 1),
        "ok": all(told["ok"] for told in soaks),
        "soaks": soaks,
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing of it is left running
    sys.exit(main())
