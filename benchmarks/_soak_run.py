"""The run that is soaked: its job, its judge, and the supervisor that starts it again by its own command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from _soak_schedule import KINDS, Event


HERE = Path(__file__).resolve().parent
MARK, OWN = "MAPLE_TRL_SOAK", uuid.uuid4().hex  # in the environment of all that this process starts
PROCESSES = 2
DECODER = "maple_trl.omni.media.decoder_process"
POLL = 0.02
SAID = ("No space left on device", "File too large", "is passed over")  # what the log is searched for
SLOW_CLIPS, SLOW_FRAMES = ("train/slow-0.mp4", "train/slow-1.mp4"), 120
JUDGE_RESTART = 0.5  # seconds until whoever watches over the judge starts it again
MAPO_AND_REPLAY = {
    "trainer": "avatar",
    "method": "mapo",
    "loss_aggregation": "sample",
    "tag_weights": "adaptive",
    "curriculum": "none",
    "replayed_generations": 2,
    "replay_scope": "tiers",
    "replay_capacity": 64,
    "replay_draw": "balanced",
    "tas_lambda": 0.5,
}
JOB = {
    **MAPO_AND_REPLAY,
    "model_name_or_path": "builtin:tiny-omni",
    "dtype": "float32",
    "num_frames": 4,
    "max_pixels": 3136,
    "max_prompt_length": 128,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 14,
    "learning_rate": 5.0e-5,
    "lr_scheduler_type": "constant",
    "beta": 0.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "evaluate_before_after": False,
    "media_cache_bytes": 1 << 20,  # less than an epoch needs, so that decoders have work to the end
    "media_decode_timeout": 5.0,
    "max_quarantined_share": 0.99,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "logging_steps": 1,
    "report_to": "none",
    "resume_from_checkpoint": "auto",
}
JUDGE = {"max_attempts": 12, "retry_wait": 0.5, "retry_wait_max": 4.0, "timeout": 4.0}


@dataclass(frozen=True)
class Options:
    """
    Sizes of a soak.

    Attributes:
        steps, save_steps: of each leg.
        rows_per_tag: rows of the data set.
        stop_seconds: how long a process is stopped.
        bounds: seconds without progress that are a hang, of each phase of the run.
        rollouts: files of completions that a run keeps.
        slow_clips: whether two clips take long to decode, which a busy machine may not do in time.
    """

    steps: int
    save_steps: int
    rows_per_tag: int
    stop_seconds: float
    rollouts: int
    seed: int
    plant: str = ""
    slow_clips: bool = True
    bounds: dict[str, float] = field(default_factory=lambda: {"start": 600.0, "step": 300.0, "end": 300.0})


def write_data(folder: Path, options: Options) -> None:
    """Write the data set: the seven tags, where asked with two clips that take long to decode, each the only one of a row."""
    from maple_trl.data.synthetic import write_seven_tags

    rows = write_seven_tags(folder, options.rows_per_tag, seed=options.seed, splits=("train",), clips_per_pair=1)
    slow_clips = SLOW_CLIPS if options.slow_clips else ()
    rows, slow = rows["train"].to_list(), iter(slow_clips)
    for row in rows:
        clip = next(slow, None) if row["tag"] == "V" else None
        if clip is not None:
            row["video"] = row["clip"] = clip
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    for number, clip in enumerate(slow_clips):
        write_slow_clip(folder / clip, number)


def write_slow_clip(path: Path, seed: int) -> None:
    """Write a short clip that takes a decoder a good while: its frames are noise, and each one needs all before it."""
    draw = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SLOW_FRAMES // 4, options={"g": "10000", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 192, 192, "yuv420p"
        for _ in range(SLOW_FRAMES):
            noise = draw.integers(0, 255, (192, 192, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


class Judge:
    """The judge server: a process that is started again whenever it has gone."""

    def __init__(self, folder: Path):
        self.port, self.log = free_port(), folder / "judge.jsonl"
        self.starts, self._due = 0, 0.0
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-S", str(HERE / "_soak_judge.py"), str(self.port), str(self.log)]
        self.process = subprocess.Popen(command, env={**os.environ, MARK: OWN})
        self.starts += 1

    def watch(self) -> None:
        """Start it again where it has gone, a little later."""
        if self.process.poll() is None:
            self._due = 0.0
        elif not self._due:
            self._due = time.monotonic() + JUDGE_RESTART
        elif time.monotonic() >= self._due:
            self.start()

    def ask(self, path: str, body: dict | None = None) -> dict | None:
        """Return what it says; `None` while it is not there."""
        data = None if body is None else json.dumps(body).encode()
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=5) as reply:
                return json.load(reply)
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Leg:
    """
    A run under a schedule of faults, watched until it has ended well.

    Args:
        name: of the leg; its results go into a folder of that name in `folder`.
        place: the folder for the run's own output, whose disk is as small as `disk` says, where it could be made so.
        events: what strikes, and when.
        strike: strikes: called with this and an event again and again, until it returns what it has done.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        place: Path,
        options: Options,
        events: list[Event],
        strike: Callable[[Leg, Event], dict | None],
        judge_options: dict[str, Any] | None = None,
    ):
        self.name, self.folder, self.options, self.events, self._strike = name, folder / name, options, events, strike
        self.out, self.media = place, self.folder / "data"
        self.folder.mkdir(parents=True)
        write_data(self.media, options)
        self.judge = Judge(self.folder)
        self.clock, self.scratch = self.folder / "clock", self.folder / "tmp"
        self.clock.write_text("0")
        self.scratch.mkdir()
        self.log_path, self.job = self.folder / "run.log", self.folder / "job.yaml"
        self._write_job({**JUDGE, **(judge_options or {})})
        self.at_exit: list[Callable[[], None]] = []
        self.starts, self.statuses, self.hangs = 0, [], []
        self.samples: list[dict[str, Any]] = []
        self.struck: list[dict[str, Any]] = []
        self.stopped: list[tuple[float, int]] = []  # when processes that are stopped go on
        self._seen: tuple = ()

    def _write_job(self, judge: dict[str, Any]) -> None:
        rewards = [
            {"reward": "accuracy_reward"},
            {
                "reward": "answer_judge",
                "max_failure_rate": None,
                "server": {"model": "soak", "base_url": self.judge.url + "/v1", **judge},
            },
        ]
        job = {
            **JOB,
            "dataset_name": str(self.media),
            "output_dir": str(self.out),
            "reward_funcs": rewards,
            "reward_weights": [1.0, 0.5],
            "max_steps": self.options.steps,
            "save_steps": self.options.save_steps,
            "rollout_log_size": self.options.rollouts,
            "seed": self.options.seed,
        }
        if self.options.plant:
            job["reward_funcs"], job["reward_weights"] = [*rewards, "_soak_plants:planted"], [1.0, 0.5, 0.0]
        self.job.write_text(yaml.safe_dump(job, sort_keys=False))

    # Processes

    @property
    def command(self) -> list[str]:
        """The words that start the run, and start it again."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
        return [sys.executable, *launcher, "-m", "maple_trl.cli", "train", "--config", str(self.job)]

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of the run has beyond that of the supervisor."""
        path = os.pathsep.join(
            [str(HERE / "_soak_site"), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        )
        return {
            "PYTHONPATH": path.rstrip(os.pathsep),
            "SOAK_CLOCK": str(self.clock),
            "SOAK_PLANT": self.options.plant,
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            MARK: OWN,
        }

    def launch(self) -> subprocess.Popen:
        environment = {**os.environ, **self.variables}
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def start(self) -> None:
        self.starts += 1
        self.process = self.launch()
        self._begun = self._ending = False
        self._log_at_start = self._metrics_stamp()

    def tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def ranks(self) -> list[int]:
        """Processes that train, once all are there."""
        found = [
            process.pid
            for process in self.tree()[1:]
            if _words(process.pid)[-1:] == [str(self.job)] and "torch.distributed.run" not in _words(process.pid)
        ]
        return sorted(found) if len(found) == PROCESSES else []

    def decoders(self) -> list[int]:
        return sorted(
            process.pid for process in self.tree()[1:] if any(DECODER in word for word in _words(process.pid))
        )

    # Progress

    def step(self) -> int:
        """The last optimizer step that the run has logged, of this start or one before."""
        return max((line["step"] for line in metrics_lines(self.out) if "step" in line), default=0)

    def _metrics_stamp(self) -> tuple:
        try:
            status = os.stat(self.out / "metrics.jsonl")
            return status.st_mtime_ns, status.st_size
        except OSError:
            return ()

    def _note_progress(self) -> None:
        stamp = self._metrics_stamp()
        if stamp == self._seen:
            return
        self._seen, self._waited = stamp, 0.0
        self._begun = self._begun or stamp != self._log_at_start
        step = self.step()
        if step and self._begun:
            self.samples.append({"start": self.starts, "step": step, **self._measured()})
        self.now = step

    def _measured(self) -> dict[str, Any]:
        found = {"rss": 0, "files": 0, "threads": 0, "processes": 0}
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                found["rss"] += process.memory_info().rss
                found["files"] += process.num_fds()
                found["threads"] += process.num_threads()
                found["processes"] += 1
        return {
            **found,
            "disk": disk_bytes(self.out),
            "shared_memory": len(os.listdir("/dev/shm")),
            "at": time.monotonic(),
        }

    def phase(self) -> str:
        return "start" if not self._begun else "end" if self.now >= self.options.steps else "step"

    # The run

    def run(self) -> dict[str, Any]:
        """Run until it has ended well, hangs, or ends more often than its faults explain."""
        began = time.monotonic()
        most = 2 + sum(1 for event in self.events)
        due = list(self.events)
        self.now = 0
        try:
            while self.starts <= most:
                self.start()
                self._waited = 0.0
                status = self._watch(due)
                self.statuses.append(status)
                for act in self.at_exit:
                    act()
                self.at_exit.clear()
                if status == 0 or self.hangs:
                    break
        finally:
            self._kill()
            self.judge_state = self.judge.ask("/") or {}
            self.judge.close()
        return {
            "name": self.name,
            "seconds": round(time.monotonic() - began, 1),
            "starts": self.starts,
            "statuses": self.statuses,
            "hangs": self.hangs,
            "step": self.step(),
            "struck": self.struck,
            "not_struck": [event.kind for event in due],
            "judge": {"starts": self.judge.starts, **self.judge_state},
            "samples": self.samples,
            "said": [text for text in SAID if text in self.log_path.read_text(encoding="utf-8", errors="replace")],
            "left_in_tmp": sum(1 for _ in self.scratch.iterdir()),
        }

    def _watch(self, due: list[Event]) -> int | None:
        """Watch one start of the run until it ends; `None` where it hangs."""
        looked = time.monotonic()
        while self.process.poll() is None:
            self.judge.watch()
            self._note_progress()
            self._go_on()
            self._strike_due(due)
            # A machine that stands still is no hang of the run: what this process misses does not count.
            self._waited += min(time.monotonic() - looked, 1.0)
            looked = time.monotonic()
            if self._waited > self.options.bounds[self.phase()]:
                self.hangs.append({"phase": self.phase(), "step": self.now, "start": self.starts})
                self._kill()
                return None
            time.sleep(POLL)
        return self.process.returncode

    def _strike_due(self, due: list[Event]) -> None:
        """Let every fault strike whose step has come; none where one has struck that ends the run."""
        for event in [event for event in due if self._begun and self.now >= event.step]:
            if self._ending:
                return
            done = self._strike(self, event)
            if done is not None:
                due.remove(event)
                self._ending = KINDS[event.kind].ends_run
                known = {"kind": event.kind, "due": event.step, "step": self.now, "start": self.starts}
                self.struck.append({**known, **done})
                print(f"  {self.name}: step {self.now}: {event.kind} {_short(done)}", flush=True)

    def stop(self, process: int, seconds: float) -> None:
        """Stop a process for some seconds."""
        os.kill(process, signal.SIGSTOP)
        self.stopped.append((time.monotonic() + seconds, process))

    def _go_on(self) -> None:
        for end, process in [entry for entry in self.stopped if time.monotonic() >= entry[0]]:
            self.stopped.remove((end, process))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def _kill(self) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def _words(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _short(done: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in done.items())[:100]


def metrics_lines(out: Path) -> Iterator[dict[str, Any]]:
    """The log of a run; the last line may be incomplete."""
    try:
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def disk_bytes(folder: Path) -> dict[str, int]:
    """Bytes below a folder: of logs and completions, which grow with each step, and of all else."""
    found = {"logs": 0, "rest": 0}
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.is_file():
                grows = path.name in ("metrics.jsonl", "trainer_state.json") or path.parent.name == "rollouts"
                found["logs" if grows else "rest"] += path.stat().st_size
    return found


# What is left behind


def marked_processes() -> list[int]:
    """Processes that a soak has started and that still are there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get(MARK) == OWN
                and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
    return found


def unused_segments() -> set[str]:
    """Segments of shared memory that no process has open or mapped."""
    used: set[str] = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            used |= {
                word for word in Path(f"/proc/{process}/maps").read_text().split() if word.startswith("/dev/shm/")
            }
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    used.add(os.readlink(entry.path))
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in used}


def open_here() -> dict[str, int]:
    """What the supervisor itself holds open."""
    own = psutil.Process()
    return {
        "files": own.num_fds(),
        "sockets": len(own.net_connections()),
        "children": len(own.children(recursive=True)),
    }
