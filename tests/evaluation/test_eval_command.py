"""`maple-trl eval` on the embedded model: its numbers, interruptions, several processes, broken rows, wrong commands."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from eval_runs import MODEL, evaluate, folder_with_ending, lines_of, result_of, run_of
from forks import start, status_of

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation.evaluator import Evaluator


TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"]
ASKED = [*MODEL, "--data", "builtin:seven-tags", "--limit", "24", "--samples", "3", "--batch-size", "4"]
ASKED += ["--access", "required,all", "--judge", "ending:ending", "--quiet"]
BATCHES = 12  # of 24 rows under two accesses

JUDGES = """
def of_ten(completions, **columns):
    return [7.0] * len(completions)

def broken(completions, **columns):
    raise RuntimeError("no judge today")

def lengths(completions, **columns):
    return [len(completion[0]["content"]) / 100 for completion in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder of all commands, with the scoring functions."""
    with folder_with_ending(tmp_path_factory.mktemp("eval"), JUDGES) as folder:
        yield folder


@pytest.fixture(scope="module")
def base(folder):
    assert evaluate(*ASKED, "--output", "base") == 0
    return folder / "base"


@pytest.fixture(scope="module")
def killed(folder):
    """An evaluation that was ended by SIGKILL within its sixth batch."""

    def ends():
        os.environ["ENDED_AT"] = "6"
        return evaluate(*ASKED, "--output", "killed")

    sys.modules.pop("ending", None)  # in which calls are counted
    assert status_of(start(ends)) == -signal.SIGKILL
    return folder / "killed"


# Numbers


def letter(text):
    """The answer of a completion, found in another way than the library finds it."""
    found = re.findall(r"<answer>\s*([A-D])\s*</answer>", text)
    return found[0] if len(found) == 1 else None


def recount(lines, access):
    """Scores of each question by its row, and the tag of each row, graded anew."""
    scores, tags = defaultdict(list), {}
    for line in lines:
        if line["access"] == access and line["sample"] is not None:
            scores[line["row"]].append(float(letter(line["completion"]) == line["solution"]))
            tags[line["row"]] = line["tag"]
    return scores, tags


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("access", ["required", "all"])
def test_accuracies_follow_from_the_completions(base, access):
    scores, tags = recount(lines_of(base), access)
    assert len(scores) == 24 and all(len(values) == 3 for values in scores.values())
    found = result_of(base)["accesses"][access]
    by_tag = {
        tag: mean(mean(scores[row]) for row in scores if tags[row] == tag) for tag in TAGS if tag in tags.values()
    }
    accuracy = found["accuracy"]
    assert {tag: estimate["value"] for tag, estimate in accuracy["per_tag"].items()} == pytest.approx(by_tag)
    assert list(accuracy["per_tag"]) == [tag for tag in TAGS if tag in by_tag]
    assert accuracy["missing_tags"] == [tag for tag in TAGS if tag not in by_tag]
    assert accuracy["sample_mean"]["value"] == pytest.approx(mean(map(mean, scores.values())))
    assert accuracy["tag_mean"]["value"] == pytest.approx(mean(by_tag.values()))
    assert accuracy["sample_mean"]["low"] < accuracy["sample_mean"]["value"] < accuracy["sample_mean"]["high"]
    assert found["bounds"]["sample_mean"]["low"] == found["bounds"]["sample_mean"]["high"]
    for k in (1, 2, 3):
        some = mean(mean(map(max, itertools.combinations(values, k))) for values in scores.values())
        assert found["pass_at_k"][str(k)]["value"] == pytest.approx(some)
    assert found["counts"]["questions"] == found["counts"]["scored"] == 24
    assert found["completions"]["all"] == 72


def test_a_model_that_learned_each_tag_needs_its_signals(base):
    """The embedded model was trained on each tag's signals alone."""
    found = result_of(base)["accesses"]
    assert (
        found["required"]["accuracy"]["sample_mean"]["value"] > found["all"]["accuracy"]["sample_mean"]["value"] + 0.1
    )
    fed = {name: sum(line[f"{name}_tokens"] > 0 for line in lines_of(base)) for name in ("video", "audio", "subtitle")}
    rows = load_seven_tags()["test"].select(range(24))
    for name, sign in (("video", "V"), ("audio", "A"), ("subtitle", "S")):
        assert fed[name] == 3 * (24 + sum(sign in tag for tag in rows["tag"]))


def test_samples_differ_and_are_named(base):
    lines = lines_of(base)
    assert [line["sample"] for line in lines] == [0, 1, 2] * 48
    assert {line["id"] for line in lines} == set(load_seven_tags()["test"].select(range(24))["id"])
    of_question = defaultdict(set)
    for line in lines:
        of_question[line["row"], line["access"]].add(line["completion"])
        assert line["answer"] is None or line["answer"] in line["completion"]
        assert line["finish"] == ("end" if line["completion_tokens"] < 14 else line["finish"])
    assert max(map(len, of_question.values())) == 3


def test_lines_say_what_was_fed(base):
    """A report shows it; where the files lie is beside the numbers, not in them."""
    rows = load_seven_tags()["test"].select(range(24)).to_list()
    for line in lines_of(base):
        row = rows[line["row"]]
        signals = row["tag"] if line["access"] == "required" else "VAS"
        assert line["prompt"] == f"user: {row['prompt'][0]['content']}"
        assert [line["video"], line["audio"]] == [[row["video"]] if s in signals else [] for s in "VA"]
        assert line["subtitle"] == (row["subtitle"] if "S" in signals else None)
    assert Path(run_of(base)["media_root"]) == default_folder()
    assert str(default_folder()) not in (base / "result.json").read_text()


def test_what_decides_the_numbers_is_written_down(base):
    found = result_of(base)
    assert found["asking"]["samples"] == 3 and found["asking"]["seed"] == 0 and found["asking"]["batch_size"] == 4
    assert found["media"]["num_frames"] == 4 and found["media"]["max_pixels"] == 3136
    assert found["scoring"]["score"]["name"] == "ending:ending"
    assert found["scoring"]["parser"]["name"] == "maple_trl.rewards.answers:extract_answer"
    digests = [found["model"]["sha256"], found["data"]["sha256"], found["prompt"]["sha256"], found["inputs_sha256"]]
    digests += [
        found["prompt"]["chat_template_sha256"],
        *(part["source_sha256"] for part in found["scoring"].values()),
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests) and len(set(digests)) == len(digests)
    assert found["versions"]["torch"] and found["versions"]["transformers"]
    assert str(base) not in (base / "result.json").read_text()


# Interruptions and processes


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(base, killed, folder, capsys):
    shutil.copytree(killed, folder / "mended")
    assert len(list((killed / "batches").glob("*.parquet"))) == 5 and not (killed / "rows.parquet").exists()
    assert evaluate(*ASKED, "--output", "mended") == 0
    assert run_of(folder / "mended")["batches_done_before"] == 5
    for name in ("result.json", "rows.parquet"):
        assert (folder / "mended" / name).read_bytes() == (base / name).read_bytes()
    assert not (folder / "mended" / "batches").exists()


def test_a_finished_evaluation_is_not_asked_again(base, folder, capsys):
    before = (base / "result.json").read_bytes()
    stamp = (base / "rows.parquet").stat().st_mtime_ns
    assert evaluate(*ASKED, "--output", "base", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert (base / "result.json").read_bytes() == before
    assert (base / "rows.parquet").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_another_evaluation_is_not_mixed_in(base, folder, capsys):
    before = (base / "result.json").read_bytes()
    assert evaluate(*ASKED, "--output", "base", "--seed", "1", "--temperature", "0.5") == 2
    told = capsys.readouterr().err
    assert "asking.seed: 0, not 1" in told and "asking.temperature: 1.0, not 0.5" in told and "--overwrite" in told
    assert (base / "result.json").read_bytes() == before
    # Negative control: another seed gives other completions, so that equal bytes above mean something.
    assert evaluate(*ASKED, "--output", "other", "--seed", "1") == 0
    other = [line["completion"] for line in lines_of(folder / "other")]
    assert other != [line["completion"] for line in lines_of(base)]
    assert evaluate(*ASKED, "--output", "other", "--overwrite") == 0
    assert (folder / "other" / "result.json").read_bytes() == before


def test_a_benchmark_is_read_with_its_media(folder, tmp_path):
    clip = tmp_path / "Videos" / "one" / "one_video.mp4"
    clip.parent.mkdir(parents=True)
    shutil.copy(default_folder() / load_seven_tags()["test"][0]["video"], clip)
    question = {"Type": "AV Event Alignment", "Question": "Which?", "Choice": list("ABCD"), "Answer": "B"}
    rest = ("content_parent_category", "content_fine_category", "video_category", "video_duration")
    question |= dict.fromkeys(rest, "30s")
    records = [question | {"video_id": name} for name in ("one", "two")]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    words = [*MODEL, "--benchmark", "daily-omni", "--data", tmp_path, "--samples", "1", "--quiet"]
    assert evaluate(*words, "--access", "required,V,S", "--output", tmp_path / "out") == 1
    found = result_of(tmp_path / "out")
    assert {error["reason"] for error in found["errors"]} == {"not-found"}
    assert {error["row"] for error in found["errors"]} == {1}
    counts = {access: found["accesses"][access]["counts"] for access in ("required", "V", "S")}
    assert [counts[access]["scored"] for access in counts] == [1, 1, 0] and counts["S"]["lacking"] == 2
    assert found["accesses"]["required"]["accuracy"]["per_category"]
    assert evaluate(*words, "--missing-media", "leave_out", "--output", tmp_path / "less") == 0
    less = result_of(tmp_path / "less")
    assert less["data"]["left_out"] == {"missing": 1} and less["left_out"][0]["cause"] == "missing"
    assert less["data"]["prompt_style"]["digest"]


def test_answers_in_brackets_are_asked_for_and_read(folder, tmp_path, monkeypatch):
    question = {"Type": "AV Event Alignment", "Question": "Which?", "Choice": list("ABCD"), "Answer": "B"}
    rest = ("content_parent_category", "content_fine_category", "video_category", "video_duration")
    (tmp_path / "qa.json").write_text(json.dumps([question | dict.fromkeys(rest, "30s") | {"video_id": "one"}]))
    clip = tmp_path / "Videos" / "one" / "one_video.mp4"
    clip.parent.mkdir(parents=True)
    shutil.copy(default_folder() / load_seven_tags()["test"][0]["video"], clip)
    said = iter(["I see it. [B]", "[A] or [B]", "<answer>B</answer>", "<think>[A]</think> **[B]** the second"])
    answers = Evaluator._answers

    def scripted(self, prompts, batch):
        return {
            number: [dataclasses.replace(answer, text=next(said)) for answer in own]
            for number, own in answers(self, prompts, batch).items()
        }

    monkeypatch.setattr(Evaluator, "_answers", scripted)
    words = [*MODEL, "--benchmark", "daily-omni", "--data", tmp_path, "--samples", "4", "--quiet"]
    assert evaluate(*words, "--prompt-style", "brackets", "--output", tmp_path / "out") == 0
    lines, found = lines_of(tmp_path / "out"), result_of(tmp_path / "out")
    assert lines[0]["prompt"].endswith("in this form: [LETTER]")
    assert [line["answer"] for line in lines] == ["B", None, None, "B"]
    assert [line["score"] for line in lines] == [1.0, 0.0, 0.0, 1.0] and lines[0]["clip"] == "Videos/one/one_video.mp4"
    assert found["scoring"]["score"]["entry"] == {"reward": "accuracy_reward", "answer_format": "brackets"}
    assert found["scoring"]["score"]["name"] == "maple_trl.rewards.accuracy:AccuracyReward"
    assert found["scoring"]["parser"]["name"] == "maple_trl.rewards.answers:extract_bracketed"
    # As a template the style asks the same; a template wins over a style.
    monkeypatch.undo()
    for template, end in (
        ("brackets", lines[0]["prompt"]),
        ("maple-qa", "end your answer with its letter in square brackets."),
    ):
        given = ["--prompt_template", template, "--prompt-style", "think", "--samples", "1"]
        assert evaluate(*words, *given, "--output", tmp_path / template) == 0
        told = result_of(tmp_path / template)
        assert lines_of(tmp_path / template)[0]["prompt"].endswith(end)
        assert told["prompt"]["template"]["name"] == template and told["data"]["prompt_style"] is None
        assert told["scoring"]["score"]["entry"] == found["scoring"]["score"]["entry"]


# Rows that are broken, lack a signal, or cannot be graded


@pytest.fixture(scope="module")
def mixed(folder):
    """Twelve rows under every access; some are broken, one each way."""
    media = default_folder()
    rows = [dict(row) for row in load_seven_tags()["test"].select(range(40)).to_list()]
    by_tag = {tag: [row for row in rows if row["tag"] == tag] for tag in TAGS}
    rows = [by_tag[tag][0] for tag in TAGS] + [by_tag["S"][1], by_tag["A"][1], by_tag["V"][1], by_tag["VAS"][1]]
    data = folder / "mixed"
    (data / "test").mkdir(parents=True)
    for row in rows:
        for name in ("video", "subtitle"):
            shutil.copy(media / row[name], data / row[name])
    whole = (data / rows[9]["video"]).read_bytes()
    (data / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    rows[9]["video"] = "broken.mp4"  # tag V
    rows[7]["video"] = None  # tag S: nothing but its subtitle
    rows[8]["solution"] = rows[8]["answer"] = None  # tag A: cannot be graded
    rows[10] |= {"tag": None, "id": "untagged"}
    rows.append({**rows[0], "id": "no-question", "prompt": []})
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*MODEL, "--data", data, "--samples", "2", "--batch-size", "8", "--access", ",".join(["required", *TAGS])]
    assert evaluate(*words, "--output", "mixed-out", "--quiet") == 1
    return rows, words, folder / "mixed-out"


def test_broken_rows_are_errors_by_name(mixed):
    rows, _, out = mixed
    found = result_of(out)
    named = {(error["id"], error["access"]): error for error in found["errors"]}
    broken = rows[9]["id"]
    accesses = ["required", *TAGS]
    assert {access for name, access in named if name == broken} == {a for a in accesses if a == "required" or a != "S"}
    assert named[broken, "V"]["path"] == "broken.mp4" and named[broken, "V"]["reason"] in ("unreadable", "truncated")
    assert {access for name, access in named if name == "no-question"} == set(accesses)
    assert named["no-question", "V"]["reason"] == "invalid-row" and "prompt" in named["no-question", "V"]["detail"]
    assert len({name for name, _ in named}) == 2
    for line in lines_of(out):
        assert (line["score"] is None) == (line["status"] != "scored")


def test_errors_stay_out_of_the_accuracy_and_bound_it(mixed):
    rows, _, out = mixed
    found = result_of(out)["accesses"]["required"]
    assert found["counts"] == {"questions": 12, "scored": 9, "unscored": 1, "errors": 2, "lacking": 0} | {
        "per_tag": found["counts"]["per_tag"]
    }
    assert found["counts"]["per_tag"]["V"] == {"questions": 3, "scored": 1, "unscored": 0, "errors": 2, "lacking": 0}
    assert found["counts"]["per_tag"][""]["scored"] == 1
    scores, _ = recount([line for line in lines_of(out) if line["status"] == "scored"], "required")
    value = found["accuracy"]["sample_mean"]["value"]
    assert value == pytest.approx(mean(map(mean, scores.values()))) and found["accuracy"]["sample_mean"]["count"] == 9
    assert found["bounds"]["sample_mean"]["low"] == pytest.approx(9 * value / 12)
    assert found["bounds"]["sample_mean"]["high"] == pytest.approx((9 * value + 3) / 12)
    assert found["reasons"] == {"invalid-row": 1, "no-score": 1, result_of(out)["errors"][0]["reason"]: 1}


def test_rows_without_a_signal_are_counted_under_its_accesses(mixed):
    rows, _, out = mixed
    found = result_of(out)["accesses"]
    lacking = {access: found[access]["counts"]["lacking"] for access in TAGS}
    assert lacking == {"V": 1, "A": 1, "S": 0, "VA": 1, "VS": 1, "AS": 1, "VAS": 1}
    (line,) = [line for line in lines_of(out) if line["row"] == 7 and line["access"] == "VS"]
    assert line["status"] == "lacking" and line["sample"] is None and "video" in line["detail"]
    # The same signals and the same sample: what a row's own tag asks for is the access of that name.
    own = {(line["row"], line["sample"]): line["inputs"] for line in lines_of(out) if line["access"] == line["tag"]}
    required = [line for line in lines_of(out) if line["access"] == "required" and line["tag"] and line["inputs"]]
    assert required and all(own[line["row"], line["sample"]] == line["inputs"] for line in required)


def test_the_fusion_gain_is_over_rows_that_were_scored_under_all_tags(mixed):
    _, _, out = mixed
    lines = lines_of(out)
    means = {access: {row: mean(values) for row, values in recount(lines, access)[0].items()} for access in TAGS}
    whole = [row for row in range(12) if row != 8 and all(row in means[access] for access in TAGS)]
    better = [
        max(means[a][row] for a in ("VA", "VS", "AS", "VAS")) > max(means[a][row] for a in ("V", "A", "S")) + 1e-9
        for row in whole
    ]
    gain = result_of(out)["fusion_gain"]
    assert gain["value"] == pytest.approx(mean(map(float, better)))
    assert (gain["count"], gain["left_out"]) == (len(whole), 12 - len(whole)) == (8, 4)


def test_the_superset_macro_follows_from_the_completions(mixed):
    _, _, out = mixed
    means, tags = defaultdict(dict), {}
    for access in TAGS:
        scores, more = recount([line for line in lines_of(out) if line["status"] == "scored"], access)
        tags |= more
        for row, values in scores.items():
            if tags[row] is not None and set(tags[row]) <= set(access):
                means[row][access] = mean(values)
    by_tag = defaultdict(list)
    for row, by_input in means.items():
        by_tag[tags[row]].append(mean(by_input.values()))
    found = result_of(out)["superset_macro"]
    assert found["value"] == pytest.approx(mean(map(mean, by_tag.values())))
    assert found["count"] == len(means) and {t: e["count"] for t, e in found["per_tag"].items()} == {
        tag: len(by_tag[tag]) for tag in TAGS if tag in by_tag
    }


def test_rows_that_ask_one_question_with_several_inputs(folder, capsys):
    """`tag` is then what is fed, `required_tag` what the question requires; a clip is named by its column."""
    (row,) = load_seven_tags()["test"].filter(lambda row: row["tag"] == "V").select(range(1)).to_list()
    rows = [
        {
            **row,
            "id": f"{name}-{tag}",
            "question_id": name,
            "tag": tag,
            "required_tag": "V",
            "stratum": stratum,
            "clip": f"clip-{name}",
        }
        for name in ("one", "two")
        for tag, stratum in (("V", "exact"), ("av", "superset"), ("A", "deficit"))
    ]
    (folder / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*MODEL, "--data", "inputs.jsonl", "--split", "train", "--samples", "2", "--quiet"]
    words += ["--media-root", default_folder(), "--output", "inputs"]
    assert evaluate(*words) == 0
    assert "superset macro" in capsys.readouterr().out
    lines, found = lines_of(folder / "inputs"), result_of(folder / "inputs")
    assert [line["tag"] for line in lines] == ["V"] * 12
    assert [line["fed"] for line in lines] == [fed for fed in ("V", "VA", "A") * 2 for _ in range(2)]
    assert [line["clip"] for line in lines] == ["clip-one"] * 6 + ["clip-two"] * 6
    assert all((line["video_tokens"] > 0) == ("V" in line["fed"]) for line in lines)
    scores = [float(letter(line["completion"]) == line["solution"]) for line in lines]
    macro = found["superset_macro"]
    assert macro["value"] == pytest.approx(mean(scores[0:4] + scores[6:10])) and macro["inputs"] == {"2": 2}
    assert macro["clips"] == found["accesses"]["required"]["accuracy"]["sample_mean"]["clips"] == 2
    assert found["over_inputs"]["per_tag"]["V"]["value"] == pytest.approx(mean(scores))
    strata = {name: own["per_tag"]["V"]["value"] for name, own in found["strata"].items()}
    exact, superset, deficit = (mean(scores[i : i + 2] + scores[i + 6 : i + 8]) for i in (0, 2, 4))
    assert strata == pytest.approx({"exact": exact, "superset": superset, "deficit": deficit})
    # Without that column, rows of a clip with the same question and required tag are one question.
    bare = [{name: value for name, value in row.items() if name != "question_id"} for row in rows]
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert evaluate(*("bare.jsonl" if word == "inputs.jsonl" else word for word in words[:-1]), "bare") == 0
    assert result_of(folder / "bare")["superset_macro"] == macro
    assert len({line["question"] for line in lines_of(folder / "bare")}) == 2


def test_errors_may_be_allowed(mixed, capsys):
    _, words, out = mixed
    before = (out / "result.json").read_bytes()
    assert evaluate(*words, "--output", out, "--max-errors", "1") == 1
    assert "2 rows have errors, more than --max-errors 1" in capsys.readouterr().err
    assert evaluate(*words, "--output", out, "--max-errors", "2") == 0
    assert "broken.mp4" in capsys.readouterr().out
    assert (out / "result.json").read_bytes() == before


def test_what_is_printed_of_an_error_says_why_and_stays_short(folder, capsys):
    words = [*MODEL, "--data", "builtin:seven-tags", "--limit", "1", "--samples", "1", "--quiet"]
    assert evaluate(*words, "--max-prompt-length", "1", "--output", "short", "--overwrite") == 1
    told = capsys.readouterr()
    assert re.search(
        r"prompt-too-long: test/clip-052.mp4: the prompt has \d+ tokens and max_prompt_length is 1", told.out
    )
    assert "1 row has errors, more than --max-errors 0" in told.err
    # Nor is there progress of other libraries.
    assert "%|" not in told.err and "examples/s" not in told.err
    row = {"prompt": [{"role": "user", "content": "?"}], "solution": "A", "tag": "V", "video": "x" * 5000 + ".mp4"}
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n")
    words = [*MODEL, "--data", "long.jsonl", "--split", "train", "--samples", "1", "--quiet"]
    assert evaluate(*words, "--output", "long") == 1
    assert max(map(len, capsys.readouterr().out.splitlines())) < 400


def test_an_output_that_is_no_folder(folder, capsys):
    assert evaluate(*ASKED, "--output", "ending.py") == 2
    assert "--output: ending.py cannot be made a folder: " in capsys.readouterr().err


def test_undefined_values_say_why(folder, capsys):
    words = [*MODEL, "--data", "builtin:seven-tags", "--samples", "1", "--quiet", "--output", "few"]
    assert evaluate(*words, "--filter", '{"tag": ["V", "VA"]}', "--limit", "4", "--access", "S,required") == 0
    found = result_of(folder / "few")
    assert "missing: A, S, VS, AS, VAS" in found["accesses"]["required"]["modality_gap"]["sample"]["undefined"]
    assert "not asked: V, A, VA" in found["fusion_gain"]["undefined"]
    assert found["accesses"]["S"]["accuracy"]["missing_tags"] == ["A", "S", "VS", "AS", "VAS"]


def test_when_nothing_can_be_scored(folder, capsys):
    (folder / "broken").mkdir()
    (folder / "broken" / "clip.mp4").write_bytes(b"no clip")
    row = {"prompt": [{"role": "user", "content": "color?"}], "video": "clip.mp4", "tag": "V", "solution": "A"}
    (folder / "broken" / "test.jsonl").write_text(json.dumps(row) + "\n")
    words = [*MODEL, "--data", "broken", "--output", "nothing", "--quiet"]
    assert evaluate(*words, "--max-errors", "5") == 1
    assert "no question could be scored" in capsys.readouterr().err
    found = result_of(folder / "nothing")
    assert "None of 1 questions has a score" in found["accesses"]["required"]["accuracy"]["undefined"]
    assert found["accesses"]["required"]["bounds"]["sample_mean"] == {"low": 0.0, "high": 1.0}
    assert found["errors"][0]["reason"] == "not-media"


# Wrong commands


@pytest.mark.parametrize(
    "words, message",
    [
        (["--access", "required,Q"], "access 'Q' is neither 'required', 'all' nor a tag (V, A, S"),
        (["--access", "VA,AV"], "access VA is given twice"),
        (["--samples", "0"], "samples must be 1 or more, got 0"),
        (["--temperature", "0"], "temperature 0 gives 5 times the same sample: set samples to 1"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--generation", '{"num_beams": 4}'], "generation: num_beams cannot be set here"),
        (["--generation", '{"temperature": 0.5}'], "generation: temperature is set by --temperature"),
        (["--generation", '{"repetition_penalti": 2}'], "GenerationConfig has no option 'repetition_penalti'"),
        (["--video-fps", "2", "--num-frames", "4"], "set exactly one of num_frames and video_fps"),
        (["--subtitle-template", "none"], "subtitle_template must hold '{subtitle}'"),
        (["--limit", "0"], "limit must be 1 or more, got 0"),
        (["--confidence", "95"], "confidence must be strictly between 0 and 1, e.g. 0.95, got 95.0"),
        (["--max-errors", "-1"], "--max-errors must be 0 or more, got -1"),
        (["--model", ""], "--model_name_or_path is missing"),
        (["--benchmark", "daily"], "there is no benchmark 'daily'; there are daily-omni"),
        (["--judge", "accurate"], "unknown reward 'accurate'; there are"),
        (["--judge", "ending:of_ten"], "row 0: the scoring function gave 7.0; scores must lie in [0, 1]"),
        (["--split", "dev"], "has no split 'dev'; its splits: train, test"),
        (["--data", "builtin:eight-tags"], "embedded: builtin:seven-tags"),
        (["--filter", '{"tag": ["X"]}'], "has 'X' in column 'tag'"),
        (["--model", "builtin:huge"], "There is no embedded model 'builtin:huge'"),
        (["--adapter", "nowhere"], "adapter: nowhere holds no adapter_config.json"),
        (["--dtype", "float63"], "dtype 'float63' is unknown"),
        (["--generation", '{"repetition_penalty": -1}'], "generation: `penalty` has to be a strictly positive float"),
        (
            ["--generation", '{"penalty_alpha": "x"}'],
            "generation: penalty_alpha='x' is not supported: completions are sampled",
        ),
    ],
)
def test_a_wrong_command_is_refused(folder, tmp_path, capsys, words, message):
    asked = ["--model", "builtin:tiny-omni", "--data", "builtin:seven-tags", "--max-new-tokens", "2", "--quiet"]
    assert evaluate(*asked, "--batch-size", "2", "--limit", "2", *words, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told and "maple-trl eval: " in told.splitlines()[-1]
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "holds no row"),
        ([{"question": "color?"}], "has no column 'prompt'; its columns: question"),
        ([{"prompt": "color?", "tag": "VX"}], "row 0, field 'tag': 'VX' is not a modality tag"),
        ([{"prompt": "color?", "videos": "clip.mp4"}], "has the column 'videos', which is not read"),
        ([{"prompt": "color?", "tag": "V"}], "row 0: tag V needs video or image, but the row has no such field"),
    ],
)
def test_wrong_data_are_refused(folder, tmp_path, capsys, rows, message):
    from datasets import Dataset

    rows = [{**row, "solution": "A"} for row in rows]  # whose absence would be told first
    table = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []})
    table.to_parquet(tmp_path / "rows.parquet")
    assert evaluate(*MODEL, "--data", tmp_path / "rows.parquet", "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_scoring_function_that_fails_loses_nothing(folder, tmp_path, capsys):
    words = [*MODEL, "--data", "builtin:seven-tags", "--limit", "2", "--samples", "1", "--quiet", "--judge"]
    assert evaluate(*words, "ending:broken", "--output", tmp_path) == 1
    assert "RuntimeError: no judge today; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
    assert evaluate(*words, "ending:lengths", "--output", tmp_path / "scored") == 0
    lines = lines_of(tmp_path / "scored")
    assert [line["score"] for line in lines] == [len(line["completion"]) / 100 for line in lines]


def test_a_folder_that_is_in_use_is_left_alone(folder, tmp_path, capsys):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        assert evaluate(*MODEL, "--data", "builtin:seven-tags", "--limit", "1", "--output", tmp_path) == 2
    assert "another evaluation is writing into" in capsys.readouterr().err
    (tmp_path / "rows.parquet").write_bytes(b"somebody's")
    assert evaluate(*MODEL, "--data", "builtin:seven-tags", "--limit", "1", "--output", tmp_path) == 2
    assert "no evaluation.json" in capsys.readouterr().err
    assert (tmp_path / "rows.parquet").read_bytes() == b"somebody's"


def test_help_answers_at_once():
    call = "import sys\nfrom maple_trl.cli import main\ntry:\n    main(['eval', '--help'])\nexcept SystemExit: pass\n"
    call += "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'numpy', 'av'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120)
    assert shown.stdout.splitlines()[-1] == "HEAVY []", shown.stderr
    for option in ("--access", "--samples", "--adapter", "--benchmark", "--max_errors", "--judge"):
        assert option in shown.stdout
