"""Curations by Ray Data, on a Ray of this machine alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_curation import clips  # noqa: F401


# Ray listens on all interfaces; here there is none but the loopback one.
ALONE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def alone() -> bool:
    words = [*ALONE, "true"]
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.long
def test_ray_gives_what_the_local_engine_gives(clips, tmp_path, refused):  # noqa: F811 (Ray looks which address it has)
    pytest.importorskip("ray")
    if not alone():
        pytest.skip("a network namespace without other interfaces (unshare -n, ip link) is not permitted here")
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray has its workers yield to all other processes, such as those of other tests.
    variables |= {"HOME": str(home), "RAY_TMPDIR": "/tmp", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    program = [*ALONE, sys.executable, str(Path(__file__).with_name("ray_run.py")), str(tmp_path)]
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["differences"] == [] and told["violations"] == []
    assert told["ray"] == told["local"] == told["again"]  # the same requests, each once
    assert told["same again"] and told["logs"] and "filter.jsonl" not in told["logs"]  # by processes of Ray
    assert told["mode"] == "token" and (home / ".ray" / "auth_token").stat().st_size > 0
