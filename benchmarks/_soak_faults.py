"""What a soak does to a run: one small function a fault. Each is called until it has struck, and says what it has done."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _soak_run import SLOW_CLIPS, Leg
from _soak_schedule import KINDS, Event

from maple_trl.trainers.common.checkpoint import complete_checkpoints, is_complete


Fault = Callable[[Leg, random.Random], dict[str, Any] | None]
FAULTS: dict[str, Fault] = {}
WATCHED = 0.2  # seconds in which a checkpoint is looked for, before the supervisor has its turn
FEWEST_BYTES = 1 << 16  # what a file may have where no small disk can be made
SMALL_LOSS = 2  # questions of the judge that are lost


def fault(function: Fault) -> Fault:
    """Register a fault under the function's name, which is that of a kind."""
    assert function.__name__ in KINDS
    FAULTS[function.__name__] = function
    return function


def strike(leg: Leg, event: Event) -> dict[str, Any] | None:
    """Let a fault strike, if its moment has come."""
    if KINDS[event.kind].ends_run and not _blames_are_saved(leg):
        return None
    return FAULTS[event.kind](leg, random.Random(event.seed))


# The run


@fault
def kill_rank(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    ranks = leg.ranks()
    if not ranks:
        return None
    rank = draw.randrange(len(ranks))
    os.kill(ranks[rank], signal.SIGKILL)
    return {"rank": rank}


@fault
def stop_rank(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    ranks = leg.ranks()
    if not ranks:
        return None
    rank = draw.randrange(len(ranks))
    leg.stop(ranks[rank], leg.options.stop_seconds)
    return {"rank": rank, "seconds": leg.options.stop_seconds}


@fault
def clock_jump(leg: Leg, draw: random.Random) -> dict[str, Any]:
    seconds = draw.choice((-1, 1)) * draw.randint(3600, 86400)
    scratch = leg.clock.with_suffix(".new")
    scratch.write_text(str(seconds))
    os.replace(scratch, leg.clock)
    return {"seconds": seconds}


# Checkpoints and disk


@fault
def kill_saving(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    """Kill the rank that writes a checkpoint, in its middle: stopped first, so that it is known to be unfinished."""
    end = time.monotonic() + WATCHED
    while time.monotonic() < end:
        begun = _unfinished(leg.out)
        ranks = leg.ranks() if begun else []
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        if begun and ranks and not is_complete(str(begun)):
            files = len(list(begun.iterdir()))
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            return {"checkpoint": begun.name, "files": files}
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        time.sleep(0.001)
    return None


def _unfinished(out: Path) -> Path | None:
    found = (path for path in out.glob("checkpoint-*") if not (path / "trainer_state.json").exists())
    return next(found, None)


@fault
def torn_checkpoint(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    """Kill a rank, and cut off the end of a file of the newest checkpoint, as a machine does that loses its power."""
    if len(complete_checkpoints(str(leg.out))) < 2:
        return None
    done = kill_rank(leg, draw)
    if done is None:
        return None
    name = draw.choice(("model.safetensors", "optimizer.pt", "rng_state_0.pth", "rows.json"))

    def tear() -> None:
        path = Path(complete_checkpoints(str(leg.out))[0], name)
        os.truncate(path, path.stat().st_size // 2)

    leg.at_exit.append(tear)
    return {**done, "file": name}


@fault
def disk_full(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    """Leave no byte on the disk of the output, until the run has ended by it."""
    if not os.path.ismount(leg.out.parent):
        for rank in leg.ranks():
            hard = resource.prlimit(rank, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (FEWEST_BYTES, hard))
        return {"limit": FEWEST_BYTES}
    ballast, written = leg.out.parent / "ballast", 0
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            written += file.write(bytes(4096))
    leg.at_exit.append(lambda: ballast.unlink(missing_ok=True))
    return {"bytes": written}


# Decoders


@fault
def kill_decoder(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    process = _idle_decoder(leg, draw)
    if process is None:
        return None
    os.kill(process, signal.SIGKILL)
    return {"process": process}


@fault
def hang_decoder(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    """Stop a decoder for good that has nothing to do; it is there, and takes no task."""
    process = _idle_decoder(leg, draw)
    return None if process is None else {"process": process}


def _idle_decoder(leg: Leg, draw: random.Random) -> int | None:
    """Stop a decoder that has waited for a task for a while and has not begun with one; return it."""
    decoders = leg.decoders()
    if not decoders:
        return None
    process = draw.choice(decoders)
    if not all(_sleeps(process) and time.sleep(0.01) is None for _ in range(3)):
        return None
    try:
        os.kill(process, signal.SIGSTOP)
        if not _reads(process, str(leg.media)):
            return process
        os.kill(process, signal.SIGCONT)
    except ProcessLookupError:
        pass
    return None


def _sleeps(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return False


def _reads(process: int, path: str) -> bool:
    """Whether a process has a file open, or one in a folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(path):
                    return True
    return False


@fault
def clip_kills_decoder(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _strike_reader(leg, signal.SIGKILL, "decoder-crashed")


@fault
def clip_hangs_decoder(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _strike_reader(leg, signal.SIGSTOP, "decode-timeout")


def _strike_reader(leg: Leg, number: int, reason: str) -> dict[str, Any] | None:
    """Strike a decoder while it reads a clip that takes long, which one row alone is fed."""
    clip = next(clip for clip in SLOW_CLIPS if clip not in _taken(leg))
    path = str((leg.media / clip).resolve())
    for process in leg.decoders():
        with contextlib.suppress(ProcessLookupError):
            if not _reads(process, path):
                continue
            os.kill(process, signal.SIGSTOP)
            if _reads(process, path):
                os.kill(process, number)
                return {"clip": clip, "rows": fed_rows(leg.media)[clip], "reasons": [reason], "blamed": True}
            os.kill(process, signal.SIGCONT)
    return None


def _blames_are_saved(leg: Leg) -> bool:
    """Whether the two newest checkpoints know the rows of struck decoders: else a run that goes back forgets them."""
    blamed = {done["clip"] for done in leg.struck if done.get("blamed")}
    if not blamed:
        return True
    saved = complete_checkpoints(str(leg.out))[:2]
    with contextlib.suppress(OSError, ValueError):
        known = [json.loads(Path(path, "rows.json").read_text())["train_dataset"]["quarantined"] for path in saved]
        return len(saved) == 2 and all(blamed <= {row["path"] for row in rows} for rows in known)
    return False


# Clips


@fault
def clip_removed(leg: Leg, draw: random.Random) -> dict[str, Any]:
    clip, rows = _draw_clip(leg, draw)
    (leg.media / clip).unlink()
    return {"clip": clip, "rows": rows, "reasons": ["not-found"]}


@fault
def clip_truncated(leg: Leg, draw: random.Random) -> dict[str, Any]:
    clip, rows = _draw_clip(leg, draw)
    path = leg.media / clip
    os.truncate(path, path.stat().st_size // 3)
    return {"clip": clip, "rows": rows, "reasons": ["unreadable", "truncated"]}


@fault
def clip_replaced(leg: Leg, draw: random.Random) -> dict[str, Any]:
    """Put another clip in the place of one. Its rows are not lost, and the run has to say that they show something else."""
    clip, rows = _draw_clip(leg, draw)
    harmed = {leg.media / name for name in (clip, *_taken(leg))}
    other = draw.choice([path for path in sorted(leg.media.glob("*/clip-*.mp4")) if path not in harmed])
    shutil.copyfile(other, leg.media / "other.mp4")
    os.replace(leg.media / "other.mp4", leg.media / clip)
    return {"clip": clip, "replaced_rows": rows}


def fed_rows(media: Path) -> dict[str, list[str]]:
    """Which rows are fed each clip, by their ids; a row of tag S is fed none."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(media / "train.parquet", columns=["id", "tag", "video"]).to_pylist():
        if set(row["tag"]) & {"V", "A"}:
            found.setdefault(row["video"], []).append(row["id"])
    return found


def _draw_clip(leg: Leg, draw: random.Random) -> tuple[str, list[str]]:
    """Draw one of the clips that few rows are fed, which nothing has struck yet."""
    clips = {clip: rows for clip, rows in fed_rows(leg.media).items() if clip not in (*SLOW_CLIPS, *_taken(leg))}
    few = sorted(clips, key=lambda clip: (len(clips[clip]), clip))
    clip = draw.choice(few[: max(4, len(few) // 2)])
    return clip, clips[clip]


def _taken(leg: Leg) -> set[str]:
    return {done["clip"] for done in leg.struck if "clip" in done}


# The judge


@fault
def kill_judge(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    if leg.judge.process.poll() is not None:
        return None
    leg.judge.process.kill()
    return {"process": leg.judge.process.pid}


def _order(leg: Leg, name: str, count: int) -> dict[str, Any] | None:
    return (
        None
        if leg.judge.ask("/fault", {"fault": name, "count": count}) is None
        else {"judge": name, "requests": count}
    )


@fault
def judge_rubbish(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _order(leg, "rubbish", 1)  # asked again once


@fault
def judge_429(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _order(leg, "429", draw.randint(2, 4))


@fault
def judge_hang(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _order(leg, "hang", 2)


@fault
def judge_reset(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _order(leg, "reset", draw.randint(2, 4))


@fault
def judge_lost(leg: Leg, draw: random.Random) -> dict[str, Any] | None:
    return _order(leg, "lost", SMALL_LOSS)
