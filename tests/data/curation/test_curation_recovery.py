"""Curations that are killed: at every stage, between its rows, within a row, and while files are written."""

import os
import signal
import threading
from pathlib import Path

import forks
import pytest
from aiohttp import web
from curation_server import CurationServer, kind_of
from test_curation import clips, files_of, write_config  # noqa: F401

from maple_trl import cli
from maple_trl.data.curation import curate, read_config
from maple_trl.data.curation.logs import GrowingLog


SECTIONS = {"tags": ["VA", "AS"], "run": {"chunk": 1}}

# By which it is killed, and when: after rows of a stage, at a call of a kind, before a file gets its name.
POINTS = [
    ("rows", "collect", 1),
    ("name", "sound.wav", 1),
    ("rows", "split", 2),
    ("call", "annotate-audio", 1),
    ("rows", "annotate", 1),
    ("call", "annotate-subtitle", 1),
    ("call", "align", 2),
    ("call", "caption", 3),
    ("rows", "captions", 5),
    ("call", "questions", 2),
    ("rows", "questions", 2),
    ("call", "answer", 7),
    ("rows", "filter", 5),
    ("call", "answer", 9),
    ("name", "test-00000-of-00001.parquet", 1),
    ("name", "clips.jsonl", 1),
    ("name", "dropped.jsonl", 1),
    ("name", "summary.json", 1),
]


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Kills the copy of this process that runs a curation."""

    def __init__(self, server: CurationServer):
        self.server, self.known, self.process = server, threading.Event(), None

    def run(self, path: Path, what: str, name: str, number: int) -> int:
        left = number

        def before(_, body):
            nonlocal left
            left -= what == "call" and kind_of(body)[0] == name
            if what == "call" and left == 0:
                self.known.wait()
                os.kill(self.process, signal.SIGKILL)
                raise web.HTTPServiceUnavailable

        self.server.before = before
        self.known.clear()
        self.process = forks.start(lambda: self._curate(path, what, name, number))
        self.known.set()
        return forks.status_of(self.process)

    def _curate(self, path: Path, what: str, name: str, number: int) -> int:
        replace = os.replace
        if what == "name":
            os.replace = lambda source, target: die() if Path(target).name == name else replace(source, target)

        def progress(stage, done, rows):
            if what == "rows" and (stage, done) == (name, number):
                die()

        curate(read_config(path), progress=progress)
        return 0


@pytest.mark.slow
def test_killed_at_every_stage(clips, tmp_path):  # noqa: F811
    (clips / "river.mp4").unlink()
    with CurationServer() as server:
        curate(read_config(write_config(tmp_path, server.url, output="whole", **SECTIONS)))
        calls = server.answered.copy()
    assert max(calls.values()) == 1
    with CurationServer() as server:
        path, killer = write_config(tmp_path, server.url, **SECTIONS), Killer(server)
        config = read_config(path)
        for point in POINTS:
            assert killer.run(path, *point) == -signal.SIGKILL, point
            with open(GrowingLog(config.work, "annotate").path, "a") as file:
                file.write('{"key": "not written to its en')
        assert not (tmp_path / "out" / "summary.json").exists()
        assert killer.run(path, "none", "", 0) == 0
        assert server.answered == calls  # each once
        assert server.violations == []
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob(".*"))  # nothing half written is left


@pytest.mark.slow
def test_what_was_answered_malformed_is_not_paid_for_again(clips, tmp_path):  # noqa: F811
    """The malformed answer, its repair, and a row that was dropped for good."""
    for name in ("river", "door"):
        (clips / f"{name}.mp4").unlink()
    sections = {"tags": ["V"], "run": {"chunk": 1}}

    def spoil(number, body):
        again = any(message["role"] == "assistant" for message in body["messages"])
        return "no" if kind_of(body)[0] == "annotate-video" and not again or kind_of(body)[0] == "caption" else None

    with CurationServer(spoil=spoil) as server:
        curate(read_config(write_config(tmp_path, server.url, output="whole", **sections)))
        calls = server.answered.copy()
    assert server.kinds["annotate-video"] == server.kinds["caption"] == 2
    with CurationServer(spoil=spoil) as server:
        path, killer = write_config(tmp_path, server.url, **sections), Killer(server)
        for point in (("call", "annotate-video", 2), ("call", "caption", 2), ("rows", "captions", 1)):
            assert killer.run(path, *point) == -signal.SIGKILL, point
        assert killer.run(path, "none", "", 0) == 0
        assert server.answered == calls and set(calls.values()) == {1}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_interrupted(clips, tmp_path, capfd):  # noqa: F811
    """An interrupt is told from a fault, and the same command goes on."""
    with CurationServer() as server:
        path = write_config(tmp_path, server.url, **SECTIONS)
        known = threading.Event()

        def before(_, body):
            if kind_of(body)[0] == "caption" and known.wait():
                os.kill(process, signal.SIGINT)
                raise web.HTTPServiceUnavailable

        server.before = before
        process = forks.start(lambda: cli.main(["data", "curate", "--config", str(path)]))
        known.set()
        assert forks.status_of(process) == 130
        told = capfd.readouterr().err
        assert told.splitlines()[-1] == "maple-trl data curate: stopped; the same command goes on from here"
        assert "Traceback" not in told
        server.before = lambda number, body: None
        assert (
            cli.main(["data", "curate", "--config", str(path), "--only", "collect", "split", "annotate", "align"]) == 0
        )
        assert set(server.answered.values()) == {1} and server.kinds["align"] == 3
