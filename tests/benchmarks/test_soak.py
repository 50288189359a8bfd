"""The soak: what it schedules, what it takes for a loss, a leak or a difference, and itself, on a run that survives."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import programs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from _soak_faults import FAULTS  # noqa: E402
from _soak_judge import grade_of  # noqa: E402
from _soak_run import Judge, Leg, Options, marked_processes  # noqa: E402
from _soak_schedule import HARMLESS, KINDS, LOSSY, draw_schedule  # noqa: E402
from _soak_verdict import (  # noqa: E402
    Results,
    all_rows_drawn,
    back_to_start,
    finished,
    flat,
    losses_named,
    nothing_lost,
    same,
)
from soak import parse  # noqa: E402


PATIENCE = 1500  # seconds: a machine that does other things as well is several times slower


# The schedule


@given(
    seed=st.integers(0, 2**32),
    kinds=st.sets(st.sampled_from(sorted(KINDS)), min_size=1),
    save_steps=st.integers(2, 30),
    rounds=st.integers(1, 3),
    spare=st.integers(0, 500),
)
def test_a_schedule_has_each_fault_in_a_place_where_it_can_strike(seed, kinds, save_steps, rounds, spare):
    last = 10 + (4 * rounds + 3) * (save_steps + 1) + spare
    events = draw_schedule(seed, sorted(kinds), last, save_steps, rounds)
    assert sorted(event.kind for event in events) == sorted([*kinds] * rounds)
    assert all(1 <= event.step <= last for event in events)
    assert [event.step for event in events] == sorted(event.step for event in events)
    ending = [event for event in events if KINDS[event.kind].ends_run]
    for one, other in zip(ending, ending[1:], strict=False):
        assert other.step - one.step > save_steps  # a checkpoint is written between them
    for event in ending:
        assert event.step > KINDS[event.kind].checkpoints * save_steps or not KINDS[event.kind].checkpoints
    if "kill_saving" in kinds:
        assert ending[0].kind == "kill_saving" and ending[0].step < save_steps  # before there is a checkpoint


def test_a_seed_decides_the_schedule():
    drawn = [draw_schedule(seed, HARMLESS, 200, 6) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [event.kind for event in drawn[0]] != [event.kind for event in drawn[2]]


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"4 faults that end the run need \d+ steps, and there are 20"):
        draw_schedule(1, HARMLESS, 20, 6)
    with pytest.raises(ValueError, match="unknown faults kill_everything; there are kill_saving, "):
        draw_schedule(1, ["kill_everything"], 20, 6)


def test_each_kind_of_fault_is_one_function():
    assert set(FAULTS) == set(KINDS) == {*HARMLESS, *LOSSY}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hours", "-1"], "--hours: must be above 0, got -1.0"),
        (["--minutes", "nan"], "--minutes: must be above 0, got nan"),
        (["--steps", "0"], "--steps: the faults of a leg need 60 steps, got 0"),
        (["--steps", "23", "--faults", "clip_removed"], "--steps: the faults of a leg need 24 steps, got 23"),
        (
            ["--steps", "24", "--faults", "kill_saving,kill_rank,disk_full"],
            "--steps: 3 faults that end the run need 13 steps, and there are 6",
        ),
        (["--faults", "kill_everything"], "--faults: kill_everything is none of kill_rank, "),
        (["--legs", "harmles"], "--legs: harmles is none of undisturbed, harmless, lossy"),
        (["--folder", "FILE"], "--folder: FILE must be a folder that is empty or not there"),
        (["--folder", "USED"], "--folder: USED must be a folder that is empty or not there"),
        (["--json", "FILE/soak.json"], "--json: cannot write into FILE"),
        (["--json", "USED"], "--json: USED is a folder; name a file"),
    ],
)
def test_what_cannot_be_done_is_said_before_hours_of_it(words, message, tmp_path, capsys):
    places = {"FILE": str(tmp_path / "used" / "file"), "USED": str(tmp_path / "used")}
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    for name, place in places.items():
        words, message = [word.replace(name, place) for word in words], message.replace(name, place)
    with pytest.raises(SystemExit):
        parse(words)
    assert message in capsys.readouterr().err


# The judge


def ask(judge: Judge, text: str) -> str:
    body = {"messages": [{"role": "user", "content": f"{text}\n\nCheck the candidate answer.\n\nschema"}]}
    request = urllib.request.Request(f"{judge.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def wait_for(judge: Judge) -> None:
    end = time.monotonic() + 60
    while judge.ask("/") is None:
        judge.watch()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_the_judge_grades_by_the_request_alone_and_fails_as_it_is_told(tmp_path):
    judge = Judge(tmp_path)
    try:
        wait_for(judge)
        grades = {text: ask(judge, text) for text in "abcdefgh"}
        assert {json.loads(grade)["correct"] for grade in grades.values()} == {0.0, 1.0}
        judge.ask("/fault", {"fault": "429", "count": 1})
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(judge, "a")
        assert refused.value.code == 429 and refused.value.headers["Retry-After"] == "1"
        judge.ask("/fault", {"fault": "reset", "count": 1})
        with pytest.raises(OSError):
            ask(judge, "a")
        judge.ask("/fault", {"fault": "rubbish", "count": 1})
        assert ask(judge, "a") != grades["a"] == ask(judge, "a")  # once
        judge.ask("/fault", {"fault": "lost", "count": 1})
        assert ask(judge, "b") == ask(judge, "b") != grades["b"]  # for good
        judge.process.kill()
        judge.process.wait()
        wait_for(judge)
        assert judge.starts == 2 and len(judge.ask("/")["lost"]) == 1
        assert ask(judge, "b") != grades["b"] and ask(judge, "c") == grades["c"]
    finally:
        judge.close()
    assert grade_of("0" * 16) == 1.0


# The verdict


IDS = [f"row-{i}" for i in range(8)]


def line(rollout, row, **changes):
    return {
        "rollout": rollout,
        "id": IDS[row],
        "completion": "<answer>A</answer>",
        "prompt": "user: what",
        "solution": "A",
        "rewards": {"accuracy_reward": 1.0, "answer_judge": 0.0},
        "replayed": False,
        **changes,
    }


def results(**changes):
    """A run of two epochs: two prompts a rollout, eight rows."""
    lines = [line(i // 2, i % 8) for i in range(16)]
    log = [{"step": step, "loss": 0.5} for step in range(1, 9)]
    found = {"weights": {"w": "1"}, "state": {"m": "2"}, "log": log, "lines": lines, "quarantine": [], "left_out": []}
    return Results(**{**found, "ids": IDS, "questions": dict.fromkeys(IDS, "what"), **changes})


JUDGE = {"due": {}, "lost": [], "starts": 1}


def record(**changes):
    found = {"step": 8, "statuses": [0], "hangs": [], "struck": [], "not_struck": [], "said": [], "judge": JUDGE}
    return {**found, **changes}


def failing(checks):
    return {check.name for check in checks if not check.ok}


def test_a_run_that_was_not_disturbed_passes():
    run = results()
    checks = [*finished(record(), 8), *same(run, run), *nothing_lost(run), *all_rows_drawn(run, 2)]
    assert not failing([*checks, *losses_named(record(), run, run)])


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"step": 7}, "finished"),
        ({"statuses": [1]}, "finished"),
        ({"statuses": [1, 0]}, "ended as planned"),
        ({"hangs": [{"phase": "step"}]}, "no hang"),
        ({"not_struck": ["kill_rank"]}, "every fault struck"),
        ({"judge": JUDGE | {"due": {"429": 1}}}, "every fault struck"),
        ({"judge": JUDGE | {"starts": 2}}, "every fault struck"),
        ({"struck": [{"kind": "kill_judge"}]}, "every fault struck"),
        ({"struck": [{"kind": "disk_full"}]}, "every fault struck"),
    ],
)
def test_a_run_that_ends_otherwise_than_planned_is_found(changes, name):
    assert name in failing(finished(record(**changes), 8))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"weights": {"w": "2"}}, "same weights"),
        ({"weights": {}}, "same weights"),
        ({"state": {"m": "2", "n": "3"}}, "same optimizer and replay memory"),
        ({"log": [{"step": step, "loss": 0.5} for step in range(1, 8)]}, "same log"),
        ({"log": [{"step": step, "loss": 0.5 + (step == 3)} for step in range(1, 9)]}, "same log"),
        ({"lines": [line(i // 2, (i + (i == 5)) % 8) for i in range(16)]}, "same completions"),
    ],
)
def test_a_difference_from_the_undisturbed_run_is_found(changes, name):
    assert failing(same(results(**changes), results())) == {name}


def test_a_weight_that_differs_by_its_last_bit_is_found():
    from _soak_verdict import _digests

    weights = {"w": torch.linspace(0, 1, 8), "half": torch.ones(2, 2, dtype=torch.bfloat16), "step": torch.tensor(3.0)}
    for name, value in weights.items():
        other = weights | {name: torch.nextafter(value, torch.full_like(value, 9.0))}
        found = same(results(weights=_digests(other)), results(weights=_digests(weights)))
        assert failing(found) == {"same weights"}
    assert not failing(same(results(weights=_digests(dict(weights))), results(weights=_digests(weights))))


def test_a_row_that_is_passed_over_in_silence_is_found():
    lines = [line(i // 2, 1 if i % 8 == 0 else i % 8) for i in range(16)]
    (check,) = all_rows_drawn(results(lines=lines), 2)
    assert not check.ok and "row row-0 was passed over 2 times, and is named nowhere" in check.detail
    assert failing(losses_named(record(), results(lines=lines), results())) == {"no row lost else"}
    named = [{"rows": [0], "path": "a.mp4", "reason": "not-found"}]
    assert not failing(all_rows_drawn(results(lines=lines, quarantine=named), 2))
    assert failing(all_rows_drawn(results(lines=lines[:6]), 2)) == {"no silent loss"}  # not even an epoch


LOST = {"kind": "clip_removed", "clip": "a.mp4", "rows": ["row-0"], "reasons": ["not-found"]}
NAMED = {"rows": [0], "path": "a.mp4", "reason": "not-found"}
COUNTED = {"kind": "quarantined", "count": 1, "text": ""}


@pytest.mark.parametrize(
    "struck, quarantine, left_out, names",
    [
        ([LOST], [NAMED], [COUNTED], set()),
        ([LOST], [], [], {"lost rows named", "lost rows counted"}),
        ([LOST], [NAMED], [], {"lost rows counted"}),
        ([LOST], [NAMED | {"reason": "unreadable"}], [COUNTED], {"lost rows named"}),
        ([LOST], [NAMED | {"path": "b.mp4"}], [COUNTED], {"lost rows named"}),
        ([], [NAMED], [COUNTED], {"lost rows named", "lost rows counted"}),
        ([LOST], [NAMED | {"rows": [0, 1]}], [COUNTED | {"count": 2}], {"lost rows named", "lost rows counted"}),
    ],
)
def test_what_was_planted_is_held_against_what_is_named(struck, quarantine, left_out, names):
    found = results(quarantine=quarantine, left_out=left_out)
    assert failing(losses_named(record(struck=struck), found, results())) == names


def test_a_clip_that_was_replaced_has_to_be_named():
    struck = [{"kind": "clip_replaced", "clip": "a.mp4", "replaced_rows": ["row-0"]}]
    told = [{"kind": "changed_files", "files": ["a.mp4"], "count": 1, "text": ""}]
    assert not failing(losses_named(record(struck=struck), results(left_out=told), results()))
    assert failing(losses_named(record(struck=struck), results(), results())) == {"replaced clips named"}


def test_a_reward_that_is_missing_has_to_be_one_that_the_judge_lost():
    from _soak_verdict import _digest

    gone = line(3, 6, rewards={"accuracy_reward": 1.0, "answer_judge": None}, completion="<answer>B</answer>")
    lines = [*(line(i // 2, i % 8) for i in range(16) if i != 6), gone]
    lost = JUDGE | {"lost": [_digest(gone, dict.fromkeys(IDS, "what"))]}
    told = [{"kind": "unrewarded", "count": 1, "text": ""}]
    run = results(lines=lines, left_out=told)
    assert not failing(losses_named(record(judge=lost), run, results()))
    for changed, judge in (
        (results(lines=lines), lost),  # not counted
        (run, JUDGE),  # the judge has answered
        (results(left_out=told), lost),  # nothing is missing
    ):
        assert "lost rewards counted" in failing(losses_named(record(judge=judge), changed, results()))
    assert failing(nothing_lost(run)) == {"nothing lost"}


def samples(grows, steps=60, noise=2 << 20, seed=0, **changes):
    """Memory that rises while a run warms up, is noisy, and grows by so much a step."""
    draw = random.Random(seed)
    found = []
    for step in range(1, steps):
        warm = min(step, 12) * (4 << 20)
        sample = {"start": 1, "step": step, "rss": (2 << 30) + warm + step * grows + draw.randrange(noise)}
        found.append({**sample, "disk": {"rest": 10 << 20, "logs": step << 12}, "files": 80, "threads": 30, **changes})
    return record(samples=found)


@given(seed=st.integers(0, 2**32))
def test_noise_is_no_leak_and_a_leak_is_one(seed):
    assert not failing(flat(samples(0, seed=seed), 60)[0])
    assert failing(flat(samples(8 << 20, seed=seed), 60)[0]) == {"flat rss"}


def test_a_long_run_shows_a_small_leak():
    checks, told = flat(samples(100 << 10, steps=2000), 2000)
    assert failing(checks) == {"flat rss"} and told["rss"]["slope"] == pytest.approx(100 << 10, rel=0.01)
    assert told["rss"]["low"] <= told["rss"]["slope"] <= told["rss"]["high"]


def test_growth_of_the_rest_is_found_too():
    def growing(name):
        run = samples(0)
        for sample in run["samples"]:
            sample[name] = {"rest": sample["step"] << 16, "logs": 0} if name == "disk" else sample["step"]
        return failing(flat(run, 60)[0])

    assert [growing(name) for name in ("disk", "files", "threads")] == [
        {"flat disk"},
        {"flat files"},
        {"flat threads"},
    ]
    assert failing(flat(record(samples=[]), 60)[0]) == {"flat"}


def test_what_is_left_behind_is_found():
    clean = {"open": {"files": 5, "sockets": 1, "children": 0}, "marked": [], "segments": ["old"]}
    assert not failing(back_to_start(clean, clean | {"segments": []}))
    dirty = {"open": {"files": 6, "sockets": 1, "children": 0}, "marked": [7], "segments": ["old", "torch_1"]}
    assert failing(back_to_start(clean, dirty)) == {
        "no process left",
        "no file or socket left",
        "no shared memory left",
    }


# The supervisor


SMALL = Options(steps=60, save_steps=6, rows_per_tag=1, stop_seconds=1.0, rollouts=10, seed=1)


def watched(tmp_path, program: str, **bounds: float) -> dict:
    """What becomes of a program in the place of the run."""

    class Stub(Leg):
        command = property(lambda self: [sys.executable, "-S", "-c", program, str(self.out)])

    options = dataclasses.replace(SMALL, bounds={"start": 60.0, "step": 60.0, "end": 60.0, **bounds})
    leg = Stub("leg", tmp_path, tmp_path / "out", options, [], lambda leg, event: None)
    found = leg.run()
    assert not marked_processes()
    return found


LOGS = "import pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); file = out / 'metrics.jsonl'; "


@pytest.mark.slow
@pytest.mark.long
def test_a_run_without_progress_is_a_hang_in_its_phase(tmp_path):
    found = watched(tmp_path, "import time; time.sleep(600)", start=1.0)
    assert found["hangs"] == [{"phase": "start", "step": 0, "start": 1}] and found["statuses"] == [None]
    late = LOGS + "import time; time.sleep(.5); file.write_text('{\"step\": 3}\\n'); time.sleep(600)"
    found = watched(tmp_path / "late", late, step=2.0)
    assert found["hangs"] == [{"phase": "step", "step": 3, "start": 1}]
    assert failing(finished(found, 60)) == {"finished", "no hang"}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_ends_again_and_again_is_given_up(tmp_path):
    found = watched(tmp_path, "raise SystemExit(3)")
    assert found["statuses"] == [3, 3, 3] and not found["hangs"]
    assert failing(finished(found, 60)) == {"finished", "ended as planned"}


# The soak itself


def found_by(folder: Path, done: subprocess.CompletedProcess) -> tuple[int, dict, str]:
    """The exit status of a soak, what it found, and what it said."""
    assert (folder / "soak.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, json.loads((folder / "soak.json").read_text()), done.stdout


def soak(folder: Path, *words: str) -> tuple[int, dict, str]:
    """Run it as one would."""
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--json", str(folder / "soak.json"), *words]
    variables = {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=PATIENCE)
    return found_by(folder, done)


def soak_of_copies(folder: Path, *words: str) -> tuple[int, dict, str]:
    """The same, but ranks that start and start again are copies of a process, and no interpreters of a torchrun's."""
    command = [Path(programs.__file__).with_name("soak_copies.py"), "--json", folder / "soak.json", *words]
    return found_by(folder, programs.run(command, {"PYTHONPATH": str(BENCHMARKS.parent)}, timeout=PATIENCE))


SHORT = ("--steps", "24", "--seed", "1")
PLANTED = (*SHORT, "--legs", "undisturbed", "--faults", "kill_rank", "--plant", "leak")


@pytest.mark.slow
@pytest.mark.long
def test_a_real_run_survives_some_faults(tmp_path):
    """Both legs end once: one goes on as if nothing had been, the other names the rows that it has lost."""
    going_on = {name for name in HARMLESS if not KINDS[name].ends_run}
    struck = {
        "harmless": {"kill_rank", *going_on},
        "lossy": {"kill_rank", "clip_removed", "clip_truncated", "judge_lost"},
    }
    status, told, said = soak_of_copies(tmp_path, *SHORT, "--faults", ",".join(set.union(*struck.values())))
    assert status == 0 and told["ok"], said
    (one,) = told["soaks"]
    for leg, kinds in struck.items():
        assert {done["kind"] for done in one["legs"][leg]["struck"]} == kinds and one["legs"][leg]["starts"] == 2
    names = {(check["leg"], check["name"]) for check in one["checks"]}
    assert {("harmless", "same weights"), ("lossy", "lost rows named"), ("undisturbed", "flat rss")} <= names


@pytest.mark.slow
@pytest.mark.long
def test_a_planted_leak_is_caught(tmp_path):
    status, told, said = soak_of_copies(tmp_path, *PLANTED)
    (one,) = told["soaks"]
    assert status == 1 and [check["name"] for check in one["checks"] if not check["ok"]] == ["flat rss"], said
    assert one["legs"]["undisturbed"]["growth"]["rss"]["slope"] > 8 << 20


@pytest.mark.long
def test_a_real_run_survives_all_faults(tmp_path):
    status, told, said = soak_of_copies(tmp_path, "--quick", "--seed", "1")
    assert status == 0 and told["ok"], said
    (one,) = told["soaks"]
    harmless, lossy = one["legs"]["harmless"], one["legs"]["lossy"]
    assert {done["kind"] for done in harmless["struck"]} == set(HARMLESS) - {"kill_rank"}
    assert {done["kind"] for done in lossy["struck"]} == {*LOSSY, "kill_rank"}
    assert harmless["starts"] == 4 and lossy["starts"] == 2


@pytest.mark.long
def test_a_planted_leak_and_a_planted_loss_are_caught(tmp_path):
    status, told, said = soak(tmp_path, "--quick", "--seed", "2", "--legs", "undisturbed", "--plant", "leak,loss")
    (one,) = told["soaks"]
    failed = {check["name"]: check["detail"] for check in one["checks"] if not check["ok"]}
    assert status == 1 and set(failed) == {"flat rss", "no silent loss"}, said
    assert "was passed over" in failed["no silent loss"] and "is named nowhere" in failed["no silent loss"]
    assert one["legs"]["undisturbed"]["growth"]["rss"]["slope"] > 8 << 20
