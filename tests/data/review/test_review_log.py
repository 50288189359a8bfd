"""The log of a review: what it says after any order of actions by several reviewers, torn lines, and killed processes."""

import errno
import itertools
import json
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import forks
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maple_trl.data.review.entries import Entry, read_entry
from maple_trl.data.review.log import ReviewLog
from maple_trl.data.review.replay import Replay
from maple_trl.data.review.rows import ReviewError


REVIEWERS, ROWS = ("ann", "bea", "Çem"), ("r0", "r1", "r2")
_numbers = itertools.count()


def entry(reviewer="ann", row="r0", action="accept", decision="accepted", **values) -> Entry:
    changes = values.pop("changes", {})
    number = next(_numbers)
    return Entry(
        id=f"e{number}",
        time=f"2026-01-01T00:00:00.{number:06}+00:00",
        reviewer=reviewer,
        row=row,
        digest="0" * 16,
        action=action,
        before={"decision": "undecided"},
        after={"decision": decision, **changes},
        **values,
    )


def undo(reviewer, target) -> Entry:
    made = entry(reviewer, target.row if target else "r0", "undo", undoes=target.id if target else "none")
    return replace(made, after={})


class Model:
    """What a reviewer's decisions are, told another way: a list of their actions, from which an undo takes the last."""

    def __init__(self):
        self.done = {reviewer: [] for reviewer in REVIEWERS}

    def decisions(self):
        found = {}
        for reviewer, actions in self.done.items():
            for made in actions:
                found[made.row, reviewer] = made.after
        return found


def decisions(replay: Replay):
    return {(row, name): made.after for row in replay.rows for name, made in replay.decisions(row).items()}


steps = st.lists(
    st.tuples(
        st.sampled_from(REVIEWERS),
        st.sampled_from(ROWS),
        st.sampled_from(["accept", "retag", "edit", "reject", "undo", "undo", "torn", "garbage", "reopen"]),
        st.integers(1, 60),
    ),
    max_size=40,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_order_of_actions_undo_and_torn_lines(tmp_path, steps):
    """Two open logs take turns; a line of each is cut now and then, as a kill leaves it."""
    path = tmp_path / f"{next(_numbers)}.log"
    logs, model, damaged = [ReviewLog(path), ReviewLog(path)], Model(), 0
    for number, (reviewer, row, action, cut) in enumerate(steps):
        log = logs[number % 2]
        if action == "torn":
            line = entry(reviewer, row).line()
            with open(path, "ab") as file:
                file.write(
                    (b"\n" if path.stat().st_size and not path.read_bytes().endswith(b"\n") else b"") + line[:cut]
                )
            damaged += 1
        elif action == "garbage":
            with open(path, "ab") as file:
                file.write(
                    b"\xff\x00{]\n" if path.read_bytes().endswith(b"\n") or not path.stat().st_size else b"\n[]\n"
                )
            damaged += 1
        elif action == "reopen":
            logs[number % 2] = ReviewLog(path)
        elif action == "undo":
            made = log.append(lambda replay, reviewer=reviewer: _undo_last(replay, reviewer))
            assert (made is None) == (not model.done[reviewer])
            if made is not None:
                assert model.done[reviewer].pop().id == made.undoes
        else:
            made = log.append(
                lambda replay, a=(reviewer, row, action): entry(*a, changes={"tag": str(len(replay.rows))})
            )
            model.done[reviewer].append(made)
    again = ReviewLog(path)
    for log in logs:
        with log.held() as replay:
            assert decisions(replay) == decisions(again.replay) == model.decisions()
            assert len(log.damaged) == len(again.damaged)
    assert len(again.damaged) == damaged and all("does not count" in str(line) for line in again.damaged)
    assert again.replay.undone == sum(1 for made in entries(path) if made.action == "undo")


def _undo_last(replay, reviewer):
    last = replay.last(reviewer)
    return None if last is None else undo(reviewer, last)


def entries(path):
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(read_entry(line))
        except ValueError:
            continue
    return found


def test_the_model_is_no_copy(tmp_path):
    """Negative control: a replay that forgets what an undo takes back differs from the model."""
    log = ReviewLog(tmp_path / "log")
    made = log.append(lambda replay: entry(decision="retagged", changes={"tag": "VA"}))
    log.append(lambda replay: undo("ann", made))
    forgetful = Replay(made for made in entries(log.path) if made.action != "undo")
    assert decisions(log.replay) == {} != decisions(forgetful)


def test_nobody_undoes_anothers_action():
    first = entry("ann")
    replay = Replay([first, undo("bea", first), entry("bea", decision="rejected", action="reject")])
    assert {name: made.decision for name, made in replay.decisions("r0").items()} == {
        "ann": "accepted",
        "bea": "rejected",
    }


def test_logs_that_are_joined_count_each_line_once(tmp_path):
    one = [entry("ann"), entry("ann", "r1")]
    other = [entry("bea"), undo("ann", one[1])]
    joined = tmp_path / "joined.log"
    joined.write_bytes(b"".join(made.line() for made in [*one, *other, *one]))
    assert set(decisions(ReviewLog(joined).replay)) == {("r0", "ann"), ("r0", "bea")}


def test_a_torn_last_line_is_named_and_kept(tmp_path):
    path = tmp_path / "review.log"
    whole, torn = entry("ann").line(), entry("bea", "r1").line()[:-9]
    path.write_bytes(whole + torn)
    log = ReviewLog(path)
    assert [str(line) for line in log.damaged] == [
        f"line 2 ({len(torn)} bytes) was not written to its end, and does not count: {log.damaged[0].why}"
    ]
    assert set(decisions(log.replay)) == {("r0", "ann")}
    log.append(lambda replay: entry("bea", "r2"))
    assert path.read_bytes().startswith(whole + torn + b"\n"), "nothing is ever taken out"
    assert set(decisions(ReviewLog(path).replay)) == {("r0", "ann"), ("r2", "bea")}


def test_a_line_that_lacks_its_line_break_alone_is_whole(tmp_path):
    path = tmp_path / "review.log"
    path.write_bytes(entry("ann").line().rstrip(b"\n"))
    log = ReviewLog(path)
    log.append(lambda replay: entry("bea"))
    again = ReviewLog(path)
    assert not log.damaged and not again.damaged
    assert decisions(log.replay).keys() == decisions(again.replay).keys() == {("r0", "ann"), ("r0", "bea")}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1]", "no JSON object"),
        (b'{"id": "a"}', "no field time"),
        (json.dumps(json.loads(entry().line()) | {"action": "delete"}).encode(), "which is none of accept"),
        (json.dumps(json.loads(entry().line()) | {"action": "undo"}).encode(), "does not say of what"),
        (json.dumps(json.loads(entry().line()) | {"after": {}}).encode(), "no decision in after"),
        (b"\xff\xfe", "no JSON"),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path, line, why):
    (tmp_path / "review.log").write_bytes(line + b"\n" + entry().line())
    (damaged,) = ReviewLog(tmp_path / "review.log").damaged
    assert damaged.number == 1 and why in str(damaged)


def test_an_entry_comes_back_as_it_was():
    made = entry("Çem", reason="no “clip”", answer="B", revealed=True, looked=("VA", "S"), seconds=1.5)
    assert read_entry(replace(made, seconds=0.0).line()).seconds == 0.0
    assert read_entry(made.line()) == made and b"\n" not in made.line()[:-1]


def test_a_log_that_is_cut_or_removed_meanwhile(tmp_path):
    log = ReviewLog(tmp_path / "review.log")
    for row in ROWS:
        log.append(lambda replay, row=row: entry(row=row))
    log.path.write_bytes(entry("bea").line())
    with log.held() as replay:
        assert set(decisions(replay)) == {("r0", "bea")}
    log.path.unlink()
    with pytest.raises(ReviewError, match="has been removed"), log.held():
        pass


def test_a_log_has_a_place(tmp_path):
    with pytest.raises(ReviewError, match="is a folder"):
        ReviewLog(tmp_path)
    with pytest.raises(ReviewError, match="there is no folder"):
        ReviewLog(tmp_path / "gone" / "review.log")


def write_many(path: Path, reviewer: str, count: int) -> int:
    log = ReviewLog(path)
    for number in range(count):
        log.append(lambda replay, number=number: _own(reviewer, number))
    return 0


def _own(reviewer, number):
    return replace(entry(reviewer, f"r{number}"), id=f"{reviewer}-{number}")


def test_processes_and_threads_write_at_once(tmp_path):
    """Four processes of two threads each: every line is whole, and everybody's decisions are all there."""
    path = tmp_path / "review.log"

    def both(name):
        threads = [threading.Thread(target=write_many, args=(path, f"{name}{i}", 25)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    processes = [forks.start(lambda name=name: both(name)) for name in "abcd"]
    assert [forks.status_of(process) for process in processes] == [0] * 4
    log = ReviewLog(path)
    assert not log.damaged and len(path.read_bytes().splitlines()) == 200
    assert len(decisions(log.replay)) == 200


def test_processes_that_are_killed_while_they_write(tmp_path):
    """What `append` has returned for is in the log, whenever the process is killed."""
    path = tmp_path / "review.log"

    def write(told):
        log = ReviewLog(path)
        for number in range(10_000):
            log.append(lambda replay, number=number: _own("ann", number))
            os.write(told, f"{number}\n".encode())
        return 0

    reading, told = os.pipe()
    process = forks.start(lambda: write(told))
    os.close(told)
    time.sleep(0.3)
    os.kill(process, signal.SIGKILL)
    assert forks.status_of(process) == -signal.SIGKILL
    with os.fdopen(reading, "rb") as file:
        said = [int(line) for line in file.read().split(b"\n")[:-1]]
    log = ReviewLog(path)
    written = {row for row, _ in decisions(log.replay)}
    assert said and {f"r{number}" for number in said} <= written and len(written) <= len(said) + 1
    log.append(lambda replay: entry("bea"))  # the lock went with the process


def test_a_full_disk_is_said_and_spoils_nothing(tmp_path):
    """A limit on the size of files stands for it: the line that does not fit is torn, and the log goes on."""
    path = tmp_path / "review.log"
    ReviewLog(path).append(lambda replay: _own("ann", 0))

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = ReviewLog(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, resource.RLIM_INFINITY))
        try:
            log.append(lambda replay: _own("ann", 1))
        except OSError as error:
            assert error.errno == errno.EFBIG
        else:
            return 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.append(lambda replay: _own("ann", 2))
        return 0

    assert forks.status_of(forks.start(write)) == 0
    log = ReviewLog(path)
    assert set(decisions(log.replay)) == {("r0", "ann"), ("r2", "ann")}
    (damaged,) = log.damaged
    assert damaged.torn and damaged.number == 2
