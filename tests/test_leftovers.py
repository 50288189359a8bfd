"""A suite that is stopped or killed leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


SUITE = """
import pathlib, subprocess, sys, time

def test_that_goes_on():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path("child.partial").write_text(str(child.pid))
    pathlib.Path("child.partial").rename("child")
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
@pytest.mark.matrix(cases=2)
def test_what_a_stopped_suite_had_started_ends(tmp_path, ended_by):
    """Where nothing watches (`None`), what a killed suite has started goes on."""
    guarded = ended_by is not None
    (tmp_path / "conftest.py").write_text("import leftovers\nleftovers.watch()\n" if guarded else "")
    (tmp_path / "test_on.py").write_text(SUITE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cov", "-p", "no:cacheprovider"]
    suite = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        child = int(_content(tmp_path / "child", suite))
        suite.send_signal(ended_by or signal.SIGKILL)
        suite.wait(timeout=60)
        end = time.monotonic() + (60 if guarded else 1)
        while alive(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert alive(child) is not guarded
    finally:
        suite.kill()
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


def _content(path: Path, writer: subprocess.Popen) -> str:
    end = time.monotonic() + 60
    while not path.exists():
        assert writer.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return path.read_text()
