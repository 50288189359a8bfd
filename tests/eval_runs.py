"""Short evaluations through `maple-trl eval`, and a reward at which a process ends."""

import json
import sys
from contextlib import chdir, contextmanager

import pyarrow.parquet as pq
import pytest

from maple_trl import cli


SMALL = ["--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "14"]
MODEL = ["--model", "builtin:tiny-omni", *SMALL]

# Scores as usual, but ends its process at a call that the environment names: by SIGKILL, or by another signal.
ENDING = """
import os, signal
from maple_trl.rewards import accuracy_reward

calls = 0

def ending(completions, **columns):
    global calls
    calls += 1
    if os.environ.get("ENDED_AT") == str(calls):
        os.kill(os.getpid(), int(os.environ.get("ENDED_BY", signal.SIGKILL)))
    return accuracy_reward(completions=completions, **columns)
"""


@contextmanager
def folder_with_ending(folder, more=""):
    """Makes a folder the current one, in which `ending:ending` is a reward that may end its process."""
    (folder / "ending.py").write_text(ENDING + more)
    with chdir(folder):
        yield folder
    sys.modules.pop("ending", None)


def evaluate(*words):
    return cli.main(["eval", *map(str, words)])


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def lines_of(folder):
    return pq.read_table(folder / "rows.parquet").to_pylist()
