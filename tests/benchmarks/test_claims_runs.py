"""Runs of claims are carried out in processes, and a stop at any moment loses nothing but what was under way."""

import copy
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import programs
import pytest
from claim_sets import CLAIMS, known_tasks, write_register
from evidence import Evidence, forgotten
from register import read_register
from runner import lock
from tasks import PACKAGES


pytestmark = pytest.mark.slow

LIMIT = 240  # seconds, of what takes some


def add_broken(topic):
    """A variant whose job is right and whose reward is nowhere, in a claim of its own."""
    topic["variants"]["broken"] = topic["variants"]["new"] | {"options": {"reward_funcs": ["nowhere:reward"]}}
    claim = copy.deepcopy(topic["claims"]["sooner"])
    claim["number"], claim["measures"]["completions"]["of"] = 3, "broken"
    topic["claims"]["broken"] = claim


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_register(tmp_path_factory.mktemp("claims") / "register", add_broken)
    known_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """What runners start in the place of an interpreter, so that runs need not import everything anew."""
    return {"PYTHON_EXEC": str(programs.write_stand_in(tmp_path_factory.mktemp("python")))}


@pytest.fixture
def evidence(folder, tmp_path):
    return Evidence(read_register(folder), tmp_path / "results")


def words(evidence, *more):
    folder = evidence.register.folder
    return [
        CLAIMS,
        "run",
        "--register",
        folder,
        "--cache",
        folder.parent / "cache",
        "--results",
        evidence.results,
        *more,
    ]


def results(evidence):
    return sorted(file for file in evidence.results.glob("probe/*.json") if not file.name.startswith("questions"))


def wait_for(what):
    end = time.monotonic() + LIMIT
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
    return found


def is_free(evidence, variant, seed):
    handle = lock(evidence.run(variant, seed)[1])
    if handle is not None:
        os.close(handle)
    return handle is not None


# One run


@pytest.fixture(scope="module")
def three(folder, tmp_path_factory):
    """Results of seed 0 by a process of its own, and by one that has carried out seed 1 before, whose result is the last."""
    place = tmp_path_factory.mktemp("three")
    register, runs = read_register(folder), []
    for number, seed in enumerate((0, 0, 1)):
        run = register.variants["new"].run(seed)
        described = place / f"{number}.json"
        fields = {name: getattr(run, name) for name in ("task", "recipe", "seed", "options", "instruments")}
        described.write_text(json.dumps(fields))
        runs.append((described, place / f"results-{number}" / "probe" / f"{run.key()}.json"))
    for together in ([runs[0]], [runs[2], runs[1]]):
        words = ["--tasks", folder / "tasks", "--cache", folder.parent / "cache", *itertools.chain(*together)]
        done = programs.run([CLAIMS / "worker.py", *words])
        assert done.returncode == 0, done.stderr
    return [file for _, file in runs]


def without_seconds(told):
    if isinstance(told, dict):
        return {
            name: without_seconds(one) for name, one in told.items() if "seconds" not in name and name != "minutes"
        }
    return [without_seconds(one) for one in told] if isinstance(told, list) else told


@pytest.mark.long
def test_the_same_seed_gives_the_same_result_whatever_its_process_did_before(three):
    first, again, other = (json.loads(file.read_text()) for file in three)
    assert without_seconds(first) == without_seconds(again)
    assert first["cost"]["cpu_seconds"] > 0 and first["log"]["grad_norm"] != other["log"]["grad_norm"]
    assert without_seconds(first)["curve"] != without_seconds(other)["curve"] or first["after"] != other["after"]
    assert set(first["packages"]) == {"python", *PACKAGES} and len(first["start"]) == len(first["source"]) == 12
    assert first["cost"]["completions"] == 2 * 4 and first["recipe"] == "tiny/mapo_token"


def test_a_run_is_carried_out_once_more_where_its_pair_began_from_another_start(three, folder, tmp_path):
    """As where results come from another machine, on which the task's model is another one by rounding."""
    own = write_register(tmp_path / "register")
    rules = own / "register.yaml"
    rules.write_text(rules.read_text().replace("looks: [5, 10]", "looks: [5]"))
    evidence = Evidence(read_register(own), tmp_path / "results")
    result = json.loads(three[0].read_text())
    for variant in ("new", "old"):
        for seed in range(5):
            file = evidence.run(variant, seed)[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            elsewhere = {"start": "elsewhere"} if (variant, seed) == ("old", 3) else {}
            file.write_text(json.dumps(result | elsewhere))
    shutil.copy(three[0].with_name("questions-3.json"), file.parent)
    again = evidence.run("old", 3, result["start"])[1]
    cache = folder.parent / "cache"
    command = [CLAIMS, "run", "better", "--register", own, "--cache", cache, "--results", evidence.results]
    done = programs.run(command, timeout=LIMIT)
    assert done.returncode == 0 and "[1/1] old, seed 3, once more: " in done.stdout, done.stderr
    assert json.loads(again.read_text())["start"] == result["start"] and again.stem.endswith(f"-{result['start']}")
    measure = evidence.register.claims["better"].measure("accuracy")
    assert evidence.pair(measure, 3) == (evidence.run("new", 3)[1], again)
    assert "once more" not in programs.run(command, timeout=LIMIT).stdout


def test_a_result_is_small_and_its_questions_are_told_once(three):
    assert all(file.stat().st_size < 8000 for file in three)
    questions = json.loads((three[0].parent / "questions-3.json").read_text())
    assert questions["tags"] == "V A S VA VS AS VAS".split() and len(set(questions["ids"])) == 7
    exam = json.loads(three[0].read_text())["after"]["trained"]
    assert len(exam["digits"]) == 7 and (exam["of"], exam["samples"]) == (2, 2)
    assert exam["accuracy"]["all"] == pytest.approx(sum(map(int, exam["digits"])) / 14, abs=1e-4)
    # MAPO feeds what a tag requires, so that the two accesses are one.
    assert json.loads(three[0].read_text())["after"]["required"] == exam


# Many


@pytest.mark.long
def test_a_runner_that_is_killed_goes_on_and_two_share_the_runs(evidence, python, tmp_path):
    outputs = [tmp_path / f"output-{number}" for number in range(3)]
    one = programs.Program(words(evidence, "sooner", "--seeds", "0-1", "--workers", "1"), outputs[0], variables=python)
    wait_for(lambda: results(evidence))
    one.send_signal(signal.SIGKILL)
    one.process.join()
    before = {file: file.stat().st_mtime_ns for file in results(evidence)}
    assert 0 < len(before) < 4
    wait_for(lambda: all(is_free(evidence, name, seed) for name in ("new", "old") for seed in (0, 1)))
    before = {file: file.stat().st_mtime_ns for file in results(evidence)}  # one may just have been written
    two = [
        programs.Program(words(evidence, "sooner", "--seeds", "0-1", "--workers", "1"), output, variables=python)
        for output in outputs[1:]
    ]
    assert [program.wait(LIMIT) for program in two] == [0, 0], outputs[1].read_text() + outputs[2].read_text()
    assert len(results(evidence)) == 4 and not forgotten(evidence)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    said = outputs[1].read_text() + outputs[2].read_text()
    assert said.count(" min\n") == 4 - len(before)  # each by one of the two
    assert said.count("4 runs are done, 0 failed, 0 are left") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_runs_and_leaves_nothing(evidence, python, tmp_path, number):
    output = tmp_path / "output"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    variables = python | {"TMPDIR": str(temporary)}
    program = programs.Program(
        words(evidence, "sooner", "--seeds", "0", "--workers", "1"), output, variables=variables
    )
    wait_for(lambda: list(evidence.results.glob(".locks/*")) and not is_free(evidence, "new", 0))
    program.send_signal(number)
    assert program.wait(LIMIT) == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in output.read_text()
    wait_for(lambda: is_free(evidence, "new", 0))  # the system lets go of a run's lock a moment after its end
    assert not list(evidence.results.glob("*/.*.json*"))
    assert not list(temporary.glob("claims-runs-*"))


@pytest.mark.long
def test_a_run_that_fails_is_named_and_does_not_stop_the_others(evidence, python):
    done = programs.run(words(evidence, "broken", "--seeds", "0"), python)
    assert done.returncode == 1
    assert "broken, seed 0: FAILED" in done.stdout and "1 runs are done, 1 failed, 0 are left" in done.stdout
    assert "broken, seed 0 FAILED:" in done.stderr and "nowhere" in done.stderr and "(exit status 1)" in done.stderr
    assert len(results(evidence)) == 1


def test_time_that_is_over_leaves_runs(evidence, python):
    done = programs.run(words(evidence, "sooner", "--hours", "0"), python)
    assert done.returncode == 0 and "0 runs are done, 0 failed, 10 are left" in done.stdout


@pytest.mark.long
def test_quick_runs_are_no_evidence(evidence, python):
    done = programs.run(words(evidence, "--quick"), python)
    assert done.returncode == 1  # the broken one
    assert "broken, seed 1 FAILED:" in done.stderr and "4 runs are done, 2 failed" in done.stdout
    assert "better: accuracy: " in done.stdout and "sooner: completions: × " in done.stdout
    assert done.stdout.endswith("They are no evidence for any claim, or against one.\n")
    assert len(forgotten(evidence)) == 4  # of no run of the register
    assert not evidence.seeds(["new"]) and Path(evidence.results, "probe", "questions-3-quick.json").exists()


def test_a_mistake_in_the_register_ends_before_any_run(evidence):
    done = programs.run(words(evidence, "soner"))
    assert done.returncode == 2 and "error: no claim 'soner'; did you mean sooner" in done.stderr
    assert not evidence.results.exists()
