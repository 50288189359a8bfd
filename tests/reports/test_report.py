"""`maple-trl report`: its data from runs that ended, go on or broke off, and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path

import av
import media_files as files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_runs import MODEL, evaluate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maple_trl import cli
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.modalities import SUBTITLE_SUFFIXES
from maple_trl.records.evaluations import LINES
from maple_trl.records.rollouts import write_rollout
from maple_trl.reports import ReportError, write_report
from maple_trl.reports.embeddings import text_vectors, write_embeddings
from maple_trl.reports.folders import RunData, read_run
from maple_trl.reports.lengths import length_gains
from maple_trl.reports.media import MediaTable
from maple_trl.reports.projection import principal_components
from maple_trl.reports.report import _evaluation_facts, comparison
from maple_trl.reports.rollouts import packed, rollouts_of
from maple_trl.reports.sections import near_perfect
from maple_trl.reports.series import series_of, thinned


TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"]
ROOT = Path(__file__).resolve().parents[2]
EVAL = [*MODEL, "--data", "builtin:seven-tags", "--limit", "12", "--samples", "2", "--quiet"]


def write_log(folder, entries, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def line(step, tag, group, text, reward, **others):
    return {
        "rollout": step,
        "step": step,
        "group": f"g{group}",
        "row": group,
        "id": f"row-{group}",
        "tag": tag,
        "prompt": f"user: question {group}",
        "completion": text,
        "solution": "A",
        "rewards": {"accuracy_reward": reward},
        "reward": reward,
        "advantage": 0.0,
        "tokens": 3,
        "replayed": False,
        "hinted": False,
    } | others


def training_run(folder, steps=10, finished=True):
    """A small run by hand: tag V gets better from 0 to 1, tag A stays at one half."""
    entries = []
    (folder / "rollouts").mkdir(parents=True)
    for step in range(steps):
        entries.append(
            {"loss": 0.1, "reward": 0.5, "tag/V/reward": step / 10, "tag/V/accuracy": step / 10, "step": step + 1}
        )
        entries[-1] |= {"tag/A/accuracy": 0.5}
        good = float(step >= steps // 2)
        lines = [line(step, "V", 0, f"sees {i}", good) for i in range(4)]
        lines += [line(step, "A", 1, f"hears {i}", float(i % 2)) for i in range(4)]
        write_rollout(folder / "rollouts", step, lines, str(folder))
    if finished:
        entries.append({"train_runtime": 3.0, "step": steps})
    write_log(folder, entries)
    return folder


def report(tmp_path, *folders, **options):
    """The JSON data of a report."""
    write_report(folders, tmp_path / "report.html", tmp_path / "report.json", **options)
    return json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


# Training runs


def test_what_a_run_is_said_to_be(tmp_path):
    (found,) = report(tmp_path, training_run(tmp_path / "run"))["runs"]
    assert found["name"] == "run" and found["kind"] == "training" and found["finished"] is True
    assert ["last step logged", 10] in found["facts"] and ["completions kept", 80] in found["facts"]
    assert found["curves"]["metrics"]["tag/V/reward"] == {
        "step": [float(step) for step in range(1, 11)],
        "value": [step / 10 for step in range(10)],
    }


def test_rewards_are_held_against_a_nearly_perfect_tag(tmp_path):
    """Difficulties against closed forms: a share p of right answers, and Beta(100, 1) whose distribution is x^100."""
    data = report(tmp_path, training_run(tmp_path / "run"))
    (found,) = data["runs"]
    tags = found["rewards"]["tags"]
    assert list(tags) == ["V", "A"] and found["rewards"]["reward"] == "accuracy_reward"
    assert tags["V"]["first fifth"]["mean"] == 0 and tags["V"]["last fifth"]["mean"] == 1
    assert tags["V"]["first fifth"]["steps"] == [0, 1] and tags["V"]["last fifth"]["steps"] == [8, 9]
    assert tags["A"]["first fifth"]["count"] == 8
    p, near = 0.5, 100 / 101
    expected = p * math.log(p / near) + (1 - p) * math.log((1 - p) / (1 - near))
    assert tags["A"]["last fifth"]["kl_binary"] == pytest.approx(expected)
    assert tags["A"]["last fifth"]["share"] == [0.5] + [0.0] * 48 + [0.5]
    assert sum(data["near_perfect"]["share"]) == pytest.approx(1)
    draws = np.random.default_rng(0).beta(100, 1, 200_000)
    assert near_perfect()["share"][-1] == pytest.approx((draws >= 0.98).mean(), abs=3e-3)


def test_disparity_before_and_after(tmp_path):
    folder = training_run(tmp_path / "run")
    (live,) = report(tmp_path, folder)["runs"]
    # Without a summary: the accuracies of the first and the last fifth of the log.
    first, last = live["disparity"]["panels"]
    assert first["accuracy"] == pytest.approx({"V": 0.05, "A": 0.5}) and first["matrix"][0][1] == pytest.approx(0.45)
    assert last["matrix"][1][0] == pytest.approx(0.35) and last["matrix"][0][2] is None
    before, after = ({"V": 0.2, "A": 0.7, "all": 0.4}, {"V": 0.6, "A": 0.7, "all": 0.6})
    (folder / "summary.json").write_text(json.dumps({"before": before, "after": after}))
    (found,) = report(tmp_path, folder)["runs"]
    assert [panel["title"] for panel in found["disparity"]["panels"]] == ["before training", "after training"]
    assert [panel["matrix"][0][1] for panel in found["disparity"]["panels"]] == pytest.approx([0.5, 0.1])


def test_the_curriculum_is_read_from_completions(tmp_path):
    (found,) = report(tmp_path, training_run(tmp_path / "run"))["runs"]
    assert found["curriculum"]["tags"] == ["V", "A"] and found["curriculum"]["step"] == list(range(10))
    assert found["curriculum"]["share"] == [[0.5] * 10] * 2


def test_a_part_without_data_says_so(tmp_path):
    write_log(tmp_path / "bare", [{"loss": 1.0, "step": 1}])
    (found,) = report(tmp_path, tmp_path / "bare")["runs"]
    why = {name: part["missing"] for name, part in found.items() if isinstance(part, dict) and "missing" in part}
    assert set(why) == set(
        "rewards weights curriculum disparity positions replay ratios accuracy projection rollouts "
        "advantages lengths distances critical efficiency configuration left_out".split()
    )
    assert "rollout_log_size" in why["rollouts"] and "loss_profile" in why["positions"]
    assert "AvatarTrainer" in why["replay"] and "evaluate_before_after" in why["accuracy"]
    # Negative control: a run with completions lacks neither them nor their rewards.
    (other,) = report(tmp_path, training_run(tmp_path / "run"))["runs"]
    assert not {"rewards", "rollouts", "projection", "curriculum", "disparity", "advantages", "lengths"} & {
        name for name, part in other.items() if isinstance(part, dict) and "missing" in part
    }


def test_rewards_outside_of_the_unit_interval_are_not_compared(tmp_path):
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    lines = [line(0, "V", 0, "x", 3.0, rewards={"length": 3.0}) for _ in range(4)]
    write_rollout(tmp_path / "run" / "rollouts", 0, lines, ".")
    (found,) = report(tmp_path, tmp_path / "run")["runs"]
    assert found["rewards"]["missing"].startswith("Beta(100, 1) is a distribution over [0, 1]")
    assert "goes from 3 to 3" in found["rewards"]["missing"]


# Runs that are going on


def test_a_run_that_is_going_on(tmp_path):
    folder = training_run(tmp_path / "run", finished=False)
    (folder / "summary.json").write_text(json.dumps({"before": {"V": 0.0}, "after": {"V": 1.0}}))  # of an earlier run
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"loss": 0.2, "st')
    (folder / "rollouts" / ".00000010.parquet.77.partial").write_bytes(b"half")
    (folder / "rollouts" / "00000011.parquet").write_bytes(b"damaged")
    (found,) = report(tmp_path, folder)["runs"]
    assert found["finished"] is False and found["rollouts"]["count"] == 80
    assert found["notes"] == ["1 files of rollouts cannot be read and are left out: 00000011.parquet"]
    assert found["disparity"]["panels"][0]["title"] == "first fifth"
    assert max(found["curves"]["metrics"]["loss"]["step"]) == 10
    assert "is not finished" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_log_of_a_checkpoint_stands_in(tmp_path):
    """A trainer without the live log leaves its log in checkpoints: the newest one counts."""
    for step in (2, 10):
        state = {"log_history": [{"loss": 1.0, "step": i} for i in range(1, step + 1)]}
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "run" / "checkpoint-12").mkdir()  # being written
    (found,) = report(tmp_path, tmp_path / "run")["runs"]
    assert found["curves"]["source"] == "checkpoint-10/trainer_state.json"
    assert len(found["curves"]["metrics"]["loss"]["step"]) == 10
    # An older file of a run before it does not hide it, a newer one does.
    write_log(tmp_path / "run", [{"loss": 1.0, "step": 1}])
    os.utime(tmp_path / "run" / "metrics.jsonl", (1, 1))
    assert report(tmp_path, tmp_path / "run")["runs"][0]["curves"]["source"].startswith("checkpoint-10")
    write_log(tmp_path / "run", [{"loss": 1.0, "step": 1}])
    os.utime(tmp_path / "run" / "checkpoint-10" / "trainer_state.json", (1, 1))
    os.utime(tmp_path / "run" / "checkpoint-2" / "trainer_state.json", (1, 1))
    assert report(tmp_path, tmp_path / "run")["runs"][0]["curves"]["source"] == "metrics.jsonl"


def test_long_curves_are_thinned_by_means():
    log = [{"step": step, "loss": float(step), "bad": math.nan, "flag": True} for step in range(2500)]
    curves, per_point = thinned(series_of(log))
    assert set(curves) == {"loss"} and per_point == 3 and len(curves["loss"]["step"]) == 834
    assert curves["loss"]["value"][:2] == [1.0, 4.0] and curves["loss"]["value"][-1] == 2499.0


def test_what_went_wrong_is_said(tmp_path):
    """Each by a log that has it; a sound one is the control."""
    sound = [{"step": i, "reward": 0.5 + i / 100, "grad_norm": 1.0, "rewards/a/mean": 0.5} for i in range(1, 21)]
    sound = [entry | {"tag/all/zero_variance": 0.5, "completions/clipped_ratio": 0.1} for entry in sound]
    late = [{"rewards/a/mean": 0.0 if entry["step"] > 12 else 0.5} for entry in sound]
    cases = {
        "sound": ([{}] * 20, []),
        "zero": ([{"reward": 0.0}] * 20, [r"The reward \(weighted sum\) was 0 for every completion, in all 20"]),
        "since": (late, ["a has been 0 for every completion since step 13"]),
        "alike": ([{"rewards/a/mean": 0.2, "rewards/a/std": 0.0}] * 20, ["a was 0.2 for every completion, in all 20"]),
        "equal": ([{"tag/all/zero_variance": 0.95}] * 20, ["95 % of the groups had equal rewards"]),
        "nan": ([{}] * 19 + [{"grad_norm": None}], ["grad_norm was not a finite number in 1 of 20 log entries"]),
        "cut": ([{"completions/clipped_ratio": 0.8}] * 20, ["80 % of the completions were cut"]),
        "lost": ([{"tag/all/unscorable": 0.3}] * 20, ["30 % of the completions could not be scored"]),
    }
    for name, (changes, _) in cases.items():
        write_log(tmp_path / name, [a | b for a, b in zip(sound, changes, strict=True)])
    found = report(tmp_path, *(tmp_path / name for name in cases))["runs"]
    for run, (_, wanted) in zip(found, cases.values(), strict=True):
        assert len(run["alerts"]) == len(wanted), run["alerts"]
        assert all(re.search(*pair) for pair in zip(wanted, run["alerts"], strict=True)), run["alerts"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a has been 0 for every completion since step 13" in text.split("<noscript>")[1]


def test_a_prompt_that_is_drawn_twice_makes_two_groups():
    """Apart from each other in a rollout, and next to each other; replayed ones fill the groups up."""
    drawn = ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["c"] * 8
    lines = [line(0, "V", group, f"{group}{i}", 1.0) for i, group in enumerate(drawn)]
    table = pa.Table.from_pylist(lines)
    rollouts = rollouts_of(table, "training", 100, {"num_generations": 4})
    assert np.bincount(rollouts.groups).tolist() == [4] * 5 and rollouts.visits[::4].tolist() == [1, 1, 2, 1, 2]
    assert rollouts.columns["completion"][8:12] == [f"a{i}" for i in range(8, 12)]
    # Without the options, what most draws of the rollout have.
    assert np.bincount(rollouts_of(table, "training", 100).groups).tolist() == [4] * 5
    # The control: a prompt that comes in two rollouts is drawn once in each.
    later = pa.Table.from_pylist([line(step, "V", "a", "x", 1.0) for step in (0, 0, 1, 1)])
    assert rollouts_of(later, "training", 100, {"num_generations": 2}).visits.tolist() == [1] * 4
    # Half of a group is replayed: that one of the same prompt is full says where the next one belongs.
    lines = [line(0, "V", group, f"{i}", 1.0) for i, group in enumerate("aabbaa")]
    lines += [line(0, "V", group, f"{group}{i}", 1.0, replayed=True) for i, group in enumerate("abaaaz")]
    options = {"num_generations": 4, "replayed_generations": 2, "replay_scope": "tiers"}
    found = rollouts_of(pa.Table.from_pylist(lines), "training", 100, options)
    by_group = [
        [t for t, g in zip(found.columns["completion"], found.groups, strict=True) if g == i] for i in range(4)
    ]
    assert by_group == [["0", "1", "a0", "a2"], ["2", "3", "b1"], ["4", "5", "a3", "a4"], ["z5"]]


# A run that is watched


class Hours:
    """Stands for the time between two looks: each call is the next thing that happens to the run."""

    def __init__(self, *events):
        self.events, self.slept = list(events), []

    def __call__(self, seconds):
        self.slept.append(seconds)
        self.events.pop(0)()


def live_of(page):
    return json.loads(re.search(r'id="report-live">(.*?)</script>', page.read_text(encoding="utf-8"))[1])


def test_a_run_is_watched_to_its_end(tmp_path, monkeypatch, capsys):
    """From before it is there: the page is written when something is new, and not when nothing is."""
    folder, page, seen = tmp_path / "run", tmp_path / "page.html", []

    def step(number, entry):
        def happens():
            seen.append((page.stat().st_mtime_ns, live_of(page)) if page.exists() else None)
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry | {"step": number}) + "\n" if entry else "")

        return happens

    first, summary = step(1, {"reward": 0.1}), step(3, {})
    hours = Hours(
        lambda: (folder.mkdir(), (folder / "args.json").write_text("{}"), first()),
        step(2, {}),
        step(2, {"reward": 0.2}),
        step(3, {"train_runtime": 1.0}),
        lambda: (summary(), (folder / "summary.json").write_text("{}")),  # the job evaluates before it writes this
    )
    monkeypatch.setattr("maple_trl.reports.watch.time.sleep", hours)
    words = ["report", str(folder), "--watch", "--interval", "2", "--output", str(page)]
    assert cli.main(words) == 0 and hours.events == []
    assert seen[0] is None and seen[1] == seen[2] and len({time for time, _ in filter(None, seen)}) == 3
    assert all(live == {"interval": 2.0} for _, live in filter(None, seen)) and live_of(page) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("waiting for a run: there is no folder") and said[-1].endswith(", the end)")
    assert len(said) == 5 and min(hours.slept) >= 2


def test_ctrl_c_ends_the_watch_and_leaves_the_page(tmp_path, monkeypatch, capsys):
    folder = training_run(tmp_path / "run", steps=2, finished=False)
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr("maple_trl.reports.watch.time.sleep", Hours(interrupt))
    assert cli.main(["report", str(folder), "--watch"]) == 0
    assert live_of(folder / "report.html") is None and "no longer watched" in capsys.readouterr().out
    write_report(folder, tmp_path / "other.html")  # the same but for the times
    texts = [
        re.sub(r"2\d{3}-\d\d-\d\dT[\d:+]+", "", p.read_text())
        for p in (folder / "report.html", tmp_path / "other.html")
    ]
    assert len(texts[0]) == pytest.approx(len(texts[1]), abs=200)
    monkeypatch.setattr("maple_trl.reports.watch.time.sleep", Hours(interrupt))
    assert cli.main(["report", str(tmp_path / "nowhere"), "--watch"]) == 130  # nothing had been written


# Evaluations


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    for name, seed in (("first", 0), ("second", 1)):
        assert evaluate(*EVAL, "--access", "required,all", "--seed", seed, "--output", folder / name) == 0
    return folder


def test_two_evaluations_are_compared_question_by_question(evaluations, tmp_path):
    data = report(tmp_path, evaluations / "first", evaluations / "second", evaluations / "first")
    compared, again = data["comparisons"]  # each with the first
    assert [compared["run"], again["run"]] == [1, 2]
    assert all(found["difference"] == found["better"] == found["worse"] == 0 for found in again["accesses"].values())
    rows = [pq.read_table(evaluations / name / "rows.parquet").to_pylist() for name in ("first", "second")]
    for access in ("required", "all"):
        means = []
        for lines in rows:
            scores = {}
            for entry in lines:
                if entry["access"] == access:
                    scores.setdefault(entry["id"], []).append(entry["score"])
            means.append({name: sum(values) / len(values) for name, values in scores.items()})
        first, second = means
        found = compared["accesses"][access]
        assert found["count"] == 12 and found["left_out"] == 0
        assert found["difference"] == pytest.approx(sum(second[name] - first[name] for name in first) / 12)
        assert found["better"] == sum(second[name] > first[name] for name in first)
        clips = {entry["clip"] for entry in rows[0]}
        assert None not in clips and found["clips"] == len(clips)
        assert found["low"] <= found["difference"] <= found["high"] and 0 < found["p_value"] <= 1
    assert list(compared["accesses"]) == ["required", "all"] and compared["same_data"]
    for run, name in zip(data["runs"], ("first", "second", "first"), strict=True):
        result = json.loads((evaluations / name / "result.json").read_text())
        assert run["accuracy"]["accesses"] == result["accesses"]
        assert ["asking.seed", str(int(name == "second"))] in run["accuracy"]["decided_by"]
        assert run["rollouts"]["count"] == 48 and len(run["rollouts"]["completions"]["completion"]) == 48
        assert set(run["projection"]["tag"]) <= set(TAGS)


def evaluated(rows, sha256, ids=None, columns=LINES.names):
    """An evaluation of rows given as (question, score); without ids their numbers stand in for these."""
    lines = [
        dict.fromkeys(LINES.names)
        | {"id": str(i) if ids is None else ids[i], "row": i, "tag": "V", "access": "required", "status": "scored"}
        | {"sample": 0, "completion": "", "completion_tokens": 4, "score": score, "notes": []}
        | {"prompt": text, "solution": "A", "video": ["a.mp4"], "clip": "a.mp4"}
        for i, (text, score) in enumerate(rows)
    ]
    result = {"accesses": {"required": {}}, "data": {"sha256": sha256}}
    table = pa.Table.from_pylist(lines, LINES).select(list(columns))
    return RunData(Path("."), "run", "evaluation", True, "", table=table, result=result)


def test_rows_without_ids_are_paired_by_what_they_ask():
    """A table and a part of it, as `--dataset_filter` leaves it: all its rows have other numbers."""
    rows = [(f"question {i}", float(i % 3 == 0)) for i in range(20)]
    whole, part = evaluated(rows, "whole"), evaluated(rows[10:], "part")
    for pair in ((whole, part), (part, whole)):
        compared = comparison(*pair)
        found = compared["accesses"]["required"]
        assert (found["count"], found["left_out"], found["better"], found["worse"]) == (10, 10, 0, 0)
        assert not compared["by_name"] and not compared["same_data"]
        (gained,) = length_gains(pair)
        assert [(one["count"], one["difference"]) for one in gained["bins"]] == [(10, 0.0)]
    # Of two rows that are alike in all that they ask, the mean counts.
    twice = comparison(whole, evaluated([rows[0], (rows[0][0], 0.0)], "twice"))["accesses"]["required"]
    assert (twice["count"], twice["difference"]) == (1, -0.5)


def test_numbers_of_other_rows_are_not_compared():
    rows = [(f"question {i}", 1.0) for i in range(4)]
    older = [name for name in LINES.names if name != "prompt"]  # as folders of an older version
    others = [evaluated([(f"another {text}", 0.0) for text, _ in rows], "b"), evaluated(rows[1:], "b", columns=older)]
    for other in others:
        compared = comparison(evaluated(rows, "a"), other)
        told = compared.get("missing") or compared["accesses"]["required"]["missing"]
        assert "rows are told by their number alone" in told and "column id" in told
        assert length_gains([evaluated(rows, "a"), other]) == [{"run": 1, "missing": told}]


def test_names_and_numbers_of_the_same_rows_are_kept_when_prompts_differ():
    """Another template asks the same questions."""
    rows = [(f"question {i}", float(i < 2)) for i in range(4)]
    asked = [(f"Please: {text}", score) for text, score in rows]
    names = ["d", "c", "b", "a"]
    named = comparison(evaluated(rows, "a", names), evaluated(asked[1:], "b", names[1:]))
    numbered = comparison(evaluated(rows, "a"), evaluated(asked, "a"))
    assert named["by_name"] and numbered["by_name"]
    assert [one["accesses"]["required"]["count"] for one in (named, numbered)] == [3, 4]
    assert [one["accesses"]["required"]["difference"] for one in (named, numbered)] == [0, 0]
    # Names of one table may be numbers of another.
    mixed = comparison(evaluated(rows, "a"), evaluated(rows[1:], "b", ["0", "7", "8"]))
    assert not mixed["by_name"] and mixed["accesses"]["required"]["difference"] == 0


def test_an_evaluation_that_is_going_on(evaluations, tmp_path):
    """Batches that are done are counted as `result.json` counts them in the end."""
    live = tmp_path / "live"
    (live / "batches").mkdir(parents=True)
    shutil.copy(evaluations / "first" / "evaluation.json", live)
    whole = pq.read_table(evaluations / "first" / "rows.parquet")
    pq.write_table(whole, live / "batches" / "00000.parquet")
    (found,) = report(tmp_path, live)["runs"]
    assert found["finished"] is False and "not finished" in found["notes"][0]
    result = json.loads((evaluations / "first" / "result.json").read_text())
    assert found["accuracy"]["accesses"] == result["accesses"]
    pq.write_table(whole.slice(0, 8), live / "batches" / "00000.parquet")
    (less,) = report(tmp_path, live)["runs"]
    assert less["rollouts"]["count"] == 8


def test_an_evaluation_shows_prompts_and_clips(evaluations, tmp_path):
    """While it is going on, too: the media lie where its data set does."""
    rows = {row["id"]: row for row in load_seven_tags()["test"]}
    (found,) = report(tmp_path, evaluations / "first")["runs"]
    shown = found["rollouts"]["completions"]
    for i, name in enumerate(shown["id"]):
        row, signals = rows[name], rows[name]["tag"] if shown["access"][i] == "required" else "VAS"
        assert shown["prompt"][i] == f"user: {row['prompt'][0]['content']}"
        assert shown["video"][i] == ([row["video"]] if "V" in signals else [])
        assert shown["audio"][i] == ([row["video"]] if "A" in signals else [])
        assert shown["subtitle"][i] == (row["subtitle"] if "S" in signals else None)
    live = tmp_path / "live"
    (live / "batches").mkdir(parents=True)
    for name in ("evaluation.json", "run.json"):
        shutil.copy(evaluations / "first" / name, live)
    shutil.copy(evaluations / "first" / "rows.parquet", live / "batches" / "00000.parquet")
    for folder in (live, evaluations / "first"):
        run = read_run(folder)
        assert Path(run.media_root) == default_folder()
        table = MediaTable(run.media_root, tmp_path, 10)
        packed(rollouts_of(run.table, run.kind, 100), table)
        kinds = {entry["kind"] for entry in table.entries if "href" in entry}
        assert kinds == {"video", "audio", "subtitle"} and not any("why" in entry for entry in table.entries)


def test_a_training_run_beside_an_evaluation(evaluations, tmp_path):
    data = report(tmp_path, training_run(tmp_path / "run"), evaluations / "first")
    assert "two evaluations" in data["comparisons"][0]["missing"]
    assert [run["kind"] for run in data["runs"]] == ["training", "evaluation"]


# Damage


def foreign(path):
    pq.write_table(pa.table({"x": [1]}), path)


def remove_last(folder, *names):
    for name in names:
        (folder / name).unlink()


EVALUATION_DAMAGE = [
    (lambda f: (f / "rows.parquet").write_bytes(b"PAR1 half"), r"rows.parquet cannot be read \(.*\) and is left out"),
    (lambda f: foreign(f / "rows.parquet"), "rows.parquet has other columns than `maple-trl eval` writes"),
    (lambda f: (f / "evaluation.json").write_text("{"), "evaluation.json cannot be read"),
    (
        lambda f: ((f / "evaluation.json").write_text("{}"), remove_last(f, "result.json")),
        "evaluation.json is none of",
    ),
    (lambda f: (f / "result.json").write_text('{"accesses": 3}'), "result.json is none of `maple-trl eval`"),
    (lambda f: (f / "result.json").write_text('{"accesses": {"required": {}}}'), "result.json is none of"),
    (lambda f: (f / "result.json").write_text("{}"), "result.json is none of"),
    (lambda f: (f / "run.json").write_text("{"), "run.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "note"), EVALUATION_DAMAGE)
@pytest.mark.matrix(cases=5)
def test_an_evaluation_that_is_damaged_is_shown_as_far_as_it_goes(evaluations, tmp_path, damage, note):
    shutil.copytree(evaluations / "first", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    (found,) = report(tmp_path, tmp_path / "damaged")["runs"]
    assert any(re.search(note, text) for text in found["notes"]), found["notes"]
    assert ("missing" in found["rollouts"]) == ("rows.parquet" in note)
    assert ("missing" in found["accuracy"]) == ("evaluation.json is none" in note)


def test_a_batch_that_is_damaged_is_left_out(evaluations, tmp_path):
    (tmp_path / "live" / "batches").mkdir(parents=True)
    shutil.copy(evaluations / "first" / "evaluation.json", tmp_path / "live")
    whole = pq.read_table(evaluations / "first" / "rows.parquet")
    pq.write_table(whole.slice(0, 8), tmp_path / "live" / "batches" / "00000.parquet")
    (tmp_path / "live" / "batches" / "00001.parquet").write_bytes(b"PAR1")
    (found,) = report(tmp_path, tmp_path / "live")["runs"]
    assert found["rollouts"]["count"] == 8 and "00001.parquet cannot be read" in found["notes"][0]


def log_of(*lines):
    return lambda f: (f / "metrics.jsonl").write_text("\n".join([*lines, ""]))


TRAINING_DAMAGE = [
    (log_of('{"step": 1, "reward": 1}', "what", "[1]", "{", "no"), "metrics.jsonl: 3 lines, the first 2, are no JSON"),
    (log_of("what", '{"step": 1, "reward": 1}'), "metrics.jsonl: line 1 is no JSON and left out"),
    (log_of('{"step": "x", "reward": 1}', '{"step": 1, "reward": "a", "loss_profile/0": "x"}', '{"reward": 1}'), None),
    (log_of('{"step": 1, "loss_profile/0": 1}', '{"step": null, "loss": 1}'), None),
    (lambda f: (remove_last(f, "metrics.jsonl"), (f / "trainer_state.json").write_text('{"log_history": 3}')), None),
    (
        lambda f: (
            remove_last(f, "metrics.jsonl"),
            (f / "trainer_state.json").write_text('{"log_history": [3, {"step": 1}]}'),
        ),
        None,
    ),
    (lambda f: (f / "summary.json").write_text('{"before": 3, "after": 4}'), "summary.json is none of a training job"),
    (
        lambda f: (f / "summary.json").write_text('{"before": {"V": "x"}, "after": {"V": 1}}'),
        "summary.json is none of a training job",
    ),
    (lambda f: foreign(f / "rollouts" / "00000099.parquet"), "1 files of rollouts cannot be read.*00000099.parquet"),
    (lambda f: foreign(f / "embeddings.parquet"), None),
    (lambda f: (f / "embeddings.parquet").write_bytes(b"x"), None),
    (lambda f: pq.write_table(pa.table({"tag": ["V"], "embedding": [["x"]]}), f / "embeddings.parquet"), None),
]


@pytest.mark.parametrize(("damage", "note"), TRAINING_DAMAGE)
@pytest.mark.matrix(cases=5)
def test_a_run_that_is_damaged_is_shown_as_far_as_it_goes(tmp_path, damage, note):
    damage(training_run(tmp_path / "run"))
    (found,) = report(tmp_path, tmp_path / "run")["runs"]
    assert found["notes"] == [] if note is None else any(re.search(note, text) for text in found["notes"])
    assert found["rollouts"]["count"] == 80
    odd = (tmp_path / "run" / "embeddings.parquet").exists()
    assert odd == ("embeddings.parquet cannot be read" in found["projection"].get("missing", ""))


@pytest.mark.parametrize("write", [foreign, lambda path: path.write_text("{}")])
def test_files_of_others_are_no_run(tmp_path, write):
    (tmp_path / "rollouts").mkdir()
    write(tmp_path / "rollouts" / "00000000.parquet")
    with pytest.raises(
        ReportError, match=r"holds no run: 1 files of rollouts cannot be read.*; neither metrics.jsonl"
    ):
        write_report(tmp_path, tmp_path / "x.html")
    (tmp_path / "result.json").write_text('{"results": {"task": 0.5}}')
    with pytest.raises(ReportError, match="holds no run: result.json is none of `maple-trl eval`"):
        write_report(tmp_path, tmp_path / "x.html")


# Ratios


def test_ratios_of_the_first_and_the_last_steps(tmp_path):
    """By hand: of ten entries the first two and the last two, of those that have replayed tokens at all."""
    entries = [{"step": 0, "reward": 0.5}]
    for step in range(1, 11):
        near = 1 - step / 100
        shares = {f"replay/ratio_share/{i}": {5: near, 6: 1 - near}.get(i, 0.0) for i in range(11)}
        entries.append({"step": step, "replay/ratio_p50": 1.0} | shares)
    write_log(tmp_path / "run", entries)
    (found,) = report(tmp_path, tmp_path / "run")["runs"]
    histogram = found["ratios"]["histogram"]
    assert histogram["edges"] == pytest.approx([1 / 4, 1 / 2, 0.8, 0.9, 0.95, 1 / 0.95, 1 / 0.9, 1.25, 2, 4], rel=1e-5)
    assert histogram["phases"] == {
        "steps up to 2": pytest.approx([0] * 5 + [0.985, 0.015] + [0] * 4),
        "from step 9": pytest.approx([0] * 5 + [0.905, 0.095] + [0] * 4),
    }
    # A run of before there were histograms.
    write_log(tmp_path / "old", [{"step": 1, "replay/ratio_p50": 1.0}])
    assert report(tmp_path, tmp_path / "old")["runs"][0]["ratios"] == {
        "quantiles": ["replay/ratio_p50"],
        "effective": [],
    }


# Completions


def test_groups_stay_whole_when_there_are_too_many(tmp_path):
    training_run(tmp_path / "run", steps=50)
    data = report(tmp_path, tmp_path / "run", max_rollouts=100)
    found = data["runs"][0]["rollouts"]
    assert found["total"] == 400 and found["count"] == 100 and found["groups"] == 25
    columns = found["completions"]
    assert set(np.bincount(columns["group_number"]).tolist()) == {4}
    assert min(columns["step"]) == 0 and max(columns["step"]) == 49


def test_replayed_completions_join_their_group():
    """They are written behind all fresh ones."""
    lines = [line(0, "V", group, f"{group}", 1.0) for group in (0, 1, 0)]
    lines[2] |= {"replayed": True, "completion": "replayed"}
    rollouts = rollouts_of(pa.Table.from_pylist(lines), "training", 100)
    assert rollouts.groups.tolist() == [0, 0, 1] and rollouts.columns["completion"] == ["0", "replayed", "1"]


def test_media_are_linked_only_below_their_root(tmp_path):
    """Addresses of a network, files outside and missing ones are named, not linked to."""
    clip = load_seven_tags()["test"][0]["video"]
    root = tmp_path / "media root"
    (root / "train").mkdir(parents=True)
    shutil.copy(default_folder() / clip, root / "train" / "a #1.mp4")
    (tmp_path / "secret.mp4").write_bytes(b"x")
    os.symlink(tmp_path / "secret.mp4", root / "link.mp4")
    (root / "words.srt").write_text("<b>dog</b>")
    table = MediaTable(root, tmp_path / "page", thumbnails=1)
    for kind, name in [
        ("video", "train/a #1.mp4"),
        ("video", "https://example.org/a.mp4"),
        ("video", "../secret.mp4"),
        ("video", "link.mp4"),
        ("audio", "missing.wav"),
        ("subtitle", "words.srt"),
        ("subtitle", "said <script>"),
    ]:
        table.add(kind, name)
    good, address, outside, link, gone, file, text = table.entries
    assert good["href"] == "../media%20root/train/a%20%231.mp4"
    assert good["thumb"].startswith("data:image/jpeg;base64,") and len(good["thumb"]) < 20_000
    assert "href" not in address and "network" in address["why"]
    assert "href" not in outside and outside["why"] == link["why"] == "outside of the media root"
    assert gone["why"].startswith("not found")
    assert file["text"] == "<b>dog</b>" and text["text"] == "said <script>" and "href" not in text
    assert table.add("video", "train/a #1.mp4") == 0 and len(table.entries) == 7
    unknown = MediaTable(None, tmp_path, 1)
    unknown.add("video", "a.mp4")
    assert "--media-root" in unknown.entries[0]["why"]


@pytest.mark.parametrize("suffix", SUBTITLE_SUFFIXES)
def test_a_subtitle_file_of_each_kind_is_linked_to(tmp_path, suffix):
    (tmp_path / f"words{suffix}").write_text("a dog")
    table = MediaTable(tmp_path, tmp_path, thumbnails=0)
    for name in (f"words{suffix}", f"I said\nwords{suffix}"):
        table.add("subtitle", name)
    file, text = table.entries
    assert (file["href"], file["text"]) == (f"words{suffix}", "a dog")
    assert text["text"] == f"I said\nwords{suffix}" and "href" not in text


def test_a_script_that_poses_as_a_clip_gives_no_picture(tmp_path):
    """FFmpeg would follow it to a file outside of the root, as the control shows."""
    secret = files.write_video(tmp_path / "secret.ts", format="mpegts")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.ts").symlink_to(secret)
    (root / "clip.mp4").write_text("ffconcat version 1.0\nfile 'link.ts'\n")
    table = MediaTable(root, tmp_path, thumbnails=2)
    table.add("video", "clip.mp4")
    assert "thumb" not in table.entries[0]
    with av.open(str(root / "clip.mp4")) as container:
        assert next(container.decode(video=0)).width == 64


# Projection


@given(arrays(np.float64, st.tuples(st.integers(3, 12), st.integers(1, 6)), elements=st.integers(-5, 5).map(float)))
def test_projection_is_that_of_the_singular_values(vectors):
    points, explained = principal_components(vectors)
    centred = vectors - vectors.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    total = (values**2).sum()
    expected = np.zeros(2)
    expected[: min(2, len(values))] = (values**2 / total if total > 1e-12 else values * 0)[:2]
    assert explained == pytest.approx(expected, abs=1e-8)
    assert (points**2).sum(axis=0) == pytest.approx(expected * total, abs=1e-6)


def test_wording_is_what_text_vectors_show():
    parts = text_vectors([["the red circle", "the red circle!"], ["a low tone"]])
    same, other = (float(parts[0][0] @ vector) for vector in (parts[0][1], parts[1][0]))
    assert same > 0.8 > 0.2 > other
    assert np.linalg.norm(np.concatenate(parts), axis=1) == pytest.approx(1)


def test_vectors_of_a_file_are_drawn_instead(tmp_path):
    folder = training_run(tmp_path / "run")
    (plain,) = report(tmp_path, folder)["runs"]
    assert "wording" in plain["projection"]["method"]
    embeddings = np.eye(4)[[0, 0, 1, 1]] + 0.1
    write_embeddings(folder, embeddings, ["V", "V", "A", "A"], ["a", "b", "c", "d"])
    (found,) = report(tmp_path, folder)["runs"]
    assert found["projection"]["method"] == "vectors of embeddings.parquet"
    x = found["projection"]["x"]
    assert x[0] == x[1] and x[2] == x[3] and x[0] == pytest.approx(-x[2], abs=1e-3)
    assert found["projection"]["explained"][0] == pytest.approx(1)
    assert found["projection"]["spread"]["dispersion"] == pytest.approx(0, abs=1e-9)


def test_hidden_states_are_means_over_tokens(tmp_path):
    """Against one text at a time, without padding, and through the command."""
    import torch

    from maple_trl.omni.loading import load_model, load_processor
    from maple_trl.reports.embeddings import mean_hidden_states

    texts = ["red circle", "", "a much longer text about a blue circle <answer>A</answer>"]
    found = mean_hidden_states("builtin:tiny-omni", texts, batch_size=3)
    model, tokenizer = load_model("builtin:tiny-omni").eval(), load_processor("builtin:tiny-omni").tokenizer
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text or " ", add_special_tokens=False)])
        with torch.no_grad():
            alone = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double().mean(dim=0)
        assert row == pytest.approx(alone.numpy(), abs=1e-4)
    folder = training_run(tmp_path / "run")
    words = ["report", str(folder), "--embeddings", "builtin:tiny-omni", "--json", str(tmp_path / "data.json")]
    assert cli.main(words) == 0
    (run,) = json.loads((tmp_path / "data.json").read_text())["runs"]
    assert "hidden states of builtin:tiny-omni" in run["projection"]["method"]


# The page as text


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.links, self.tags = 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "action", "poster")]


def test_nothing_is_loaded_and_nothing_of_a_run_is_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    folder = tmp_path / "run<b>"
    (folder / "rollouts").mkdir(parents=True)
    rewards = {f"r{evil}": 1.0}
    lines = [line(0, "V", 0, evil, 1.0, prompt=evil, solution=evil, id=evil, rewards=rewards, subtitle=evil)]
    write_rollout(folder / "rollouts", 0, lines, ".")
    write_log(folder, [{f"rewards/{evil}/mean": 1.0, "step": 1}])
    write_report(folder, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        evil not in text and "<script>alert" not in text and "<img" not in text.split("<body>")[1].split("<script")[0]
    )
    assert "img" not in page.tags and page.tags.count("b") == 0
    assert all(link.startswith("#") for link in page.links), page.links
    # Two that run, four of data, one of a chunk of completions.
    assert page.tags.count("script") == 7 and "connect-src" not in text and "default-src 'none'" in text


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_of_tags_and_runs_stand_out_from_the_page():
    """Against the panel, light and dark, each has the contrast of 3:1 that WCAG asks of graphics; texts have 4.5:1."""
    text = (ROOT / "maple_trl" / "assets" / "report" / "report.css").read_text()
    colors = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", text)
    for theme in (0, 1):
        own = {name: both[theme] for name, *both in colors}
        tags = {name: color for name, color in own.items() if re.match("(tag|run)-", name)}
        assert len(tags) == 16 and len(set(tags.values())) == 16

        def contrast(color, panel=own["panel"]):
            low, high = sorted(map(luminance, (color, panel)))
            return (high + 0.05) / (low + 0.05)

        assert {name: color for name, color in tags.items() if contrast(color) < 2.95} == {}
        assert min(contrast(own[name]) for name in ("ink", "soft", "link")) >= 4.5
        assert contrast(own["warn-ink"], own["warn"]) >= 4.5 > contrast(own["line"])  # the last is the control


# The command


def test_the_command(tmp_path, capsys):
    folder = training_run(tmp_path / "run")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 1e6
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    other = [
        "report",
        str(folder),
        str(folder),
        "--output",
        str(tmp_path / "two.html"),
        "--json",
        str(tmp_path / "two.json"),
    ]
    assert cli.main(other) == 0
    assert [run["name"] for run in json.loads((tmp_path / "two.json").read_text())["runs"]] == ["run (A)", "run (B)"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere"], "there is no folder"),
        (["parent"], r"holds no run: neither metrics.jsonl.*Folders in it that do: run"),
        (["parent/run"] * 9, "on 1 to 8 runs, got 9"),
        (["parent/run", "--output", "parent"], "parent is a folder; name a file in it"),
        (["parent/run", "--json", "parent"], "--json: parent is a folder; name a file in it"),
        (["parent/run", "--output", "/proc/x.html"], "/proc/x.html cannot be written: No such file"),
        (["parent/run", "--media-root", "none"], "media root: there is no folder none"),
        (["parent/run", "--embeddings", "builtin:none"], "--embeddings builtin:none: There is no embedded model"),
        (["parent/run/metrics.jsonl", "--output", "x.html"], "metrics.jsonl is a file; name its folder"),
        (["parent/run", "--max-rollouts", "0"], "--max-rollouts must be 1 or more, got 0"),
        (["parent/run", "--watch", "--interval", "0"], "--interval must be 1 or more, got 0"),
    ],
)
def test_a_wrong_command_says_why(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    training_run(tmp_path / "parent" / "run", steps=2)
    assert cli.main(["report", *words]) == 2
    assert re.search(why, capsys.readouterr().err)
    assert not list(tmp_path.glob("**/*.html"))


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline"])
def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys, package):
    training_run(tmp_path / "run", steps=2)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert 'pip install "maple-trl[report]"' in capsys.readouterr().err


def test_an_empty_list_of_runs(tmp_path):
    with pytest.raises(ReportError, match="on 1 to 8 runs, got 0"):
        write_report([], tmp_path / "x.html")


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    """At a size far too small to measure anything, and without a browser."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = __import__("report")
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    options = ["--questions", "21", "--completions", "160", "--entries", "4", "--json", str(tmp_path / "bench.json")]
    benchmark.main(options)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["evaluation"]["questions"] == 21 and found["run"]["completions"] == 160
    assert found["run"]["bytes"] > 1e6 and "browser" not in found
    assert "no Chromium was found" in capsys.readouterr().out


def test_the_time_of_an_evaluation_that_went_on_is_that_of_its_last_start():
    def facts(**times):
        run = RunData(Path("e"), "e", "evaluation", True, "now", summary={"seconds": 60.0, **times})
        return dict(_evaluation_facts(run))

    assert facts(batches_done_before=3)["time of the last start"] == facts(batches_done_before=0)["time"] == "60 s"
    assert "time" not in facts(batches_done_before=3)
