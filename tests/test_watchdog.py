"""A rank that does not come to a collective call is named, within seconds."""

from pathlib import Path

import pytest
from programs import Ranks


pytestmark = pytest.mark.slow


JOB = Path(__file__).parent / "jobs" / "collective_job.py"


def told(tmp_path, odd, how):
    """The exit status, and a line of the watchdog."""
    log = tmp_path / "log"
    ranks = Ranks(3, [JOB, str(odd), how], log)
    status = ranks.wait(timeout=60)
    lines = [line for line in log.read_text().splitlines() if line.startswith("watchdog:")]
    return status, lines[0].removeprefix("watchdog: ").split("; rank ") if lines else []


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.matrix(cases=1)
def test_a_rank_that_never_comes_is_named(tmp_path, odd):
    status, of_ranks = told(tmp_path, odd, "sleeps")
    assert status == 1 and len(of_ranks) == 3
    assert [rank for rank, said in enumerate(of_ranks) if said.endswith("did not come")] == [odd]


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_skips_a_call_is_named(tmp_path, odd):
    status, of_ranks = told(tmp_path, odd, "skips")
    assert status == 1 and len(of_ranks) == 3
    calls = ["made 4 collective calls" in said for said in of_ranks]
    assert calls == [rank == odd for rank in range(3)]


def test_ranks_that_all_come_end_in_silence(tmp_path):
    assert told(tmp_path, 3, "sleeps") == (0, [])
