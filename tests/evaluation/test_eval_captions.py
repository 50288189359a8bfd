"""Captions of a clip from each of the seven inputs: judged against the clip's reference for what was fed."""

import dataclasses
import json
import re

import pytest
from chat_server import ChatServer, say
from eval_runs import MODEL, evaluate, lines_of, result_of

from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation.captions import CaptionRows
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.modalities import ModalityTag


TAGS = [str(tag) for tag in ModalityTag]
CLIPS = ("one", "two", "three")
# What the judge thinks of a caption of a clip from a tag's signals: of the second clip the best comes from one signal.
GRADES = {
    "one": {"V": 0.4, "A": 0.2, "S": 0.2, "VA": 0.8, "VS": 0.2, "AS": 0.2, "VAS": 0.6},
    "two": {"V": 0.8, "A": 0.2, "S": 0.2, "VA": 0.6, "VS": 0.8, "AS": 0.2, "VAS": 0.2},
    "three": {"V": 0.2, "A": 0.2, "S": 0.4, "VA": 0.2, "VS": 0.2, "AS": 0.6, "VAS": 0.2},
}
REFERENCES = {"V": "reference_v", "A": "reference_a", "S": "reference_s"}


def gain_of(grades):
    """The share of clips whose best caption needs several signals, written out."""
    together = [
        max(of[tag] for tag in TAGS if len(tag) > 1) > max(of[tag] for tag in TAGS if len(tag) == 1) for of in grades
    ]
    return sum(together) / len(together)


def told(clip, tag):
    return f"reference of clip {clip} from {tag}."


def judging(number, body):
    """Grades by the reference that the judge was shown, and so tells which one it was."""
    text = body["messages"][-1]["content"]
    (clip, tag), *rest = dict.fromkeys(re.findall(r"reference of clip (\w+) from (\w+)\.", text))
    # Of single signals, only those of the tag; of a tag of one signal, none beside its own.
    assert {other for _, other in rest} == (set(tag) if len(tag) > 1 else set()) and {c for c, _ in rest} <= {clip}
    return say(json.dumps(dict.fromkeys(("missing", "errors", "fusion"), GRADES[clip][tag])))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Seven rows of each clip; the prompts differ by tag, as MAPLE's do."""
    folder = tmp_path_factory.mktemp("captions")
    media = load_seven_tags()["test"].select(range(3)).to_list()
    rows = [
        {
            "id": f"{clip}-{tag}",
            "clip": clip,
            "tag": tag,
            "prompt": [{"role": "user", "content": f"Describe what {tag} tells."}],
            "reference": told(clip, tag),
            **{column: told(clip, signal) for signal, column in REFERENCES.items()},
            "video": source["video"],
            "subtitle": source["subtitle"],
        }
        for clip, source in zip(CLIPS, media, strict=True)
        for tag in TAGS
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*MODEL, "--data", folder, "--media-root", default_folder(), "--samples", "1", "--quiet"]


@pytest.fixture
def run(table, tmp_path):
    def go(*words, output="out"):
        with ChatServer(judging) as server:
            judge = ["--judge", "caption_judge", "--judge-model", "m", "--judge-server", server.url]
            status = evaluate(*table, *judge, *words, "--output", tmp_path / output)
        return status, result_of(tmp_path / output), lines_of(tmp_path / output)

    return go


def spoken(monkeypatch):
    """The tiny model may write nothing that could be graded."""
    answers = Evaluator._answers

    def scripted(self, prompts, batch):
        return {
            number: [dataclasses.replace(answer, text="A disc moves.") for answer in own]
            for number, own in answers(self, prompts, batch).items()
        }

    monkeypatch.setattr(Evaluator, "_answers", scripted)


def test_seven_rows_of_a_clip_give_its_gain(run, monkeypatch):
    spoken(monkeypatch)
    status, found, lines = run("--preset", "maple-caption")
    assert (
        status == 0 and found["asking"]["temperature"] == 0.7 and found["preset"]["set"]["max_prompt_length"] == 8192
    )
    assert {line["id"]: line["score"] for line in lines} == pytest.approx(
        {f"{clip}-{tag}": GRADES[clip][tag] for clip in CLIPS for tag in TAGS}
    )
    gain = found["fusion_gain"]
    assert gain["value"] == pytest.approx(gain_of(GRADES.values())) == 2 / 3
    assert (gain["count"], gain["clips"], gain["left_out"]) == (3, 3, 0)


@pytest.mark.long
@pytest.mark.slow
def test_an_access_is_judged_against_the_clips_reference_for_it(run, monkeypatch):
    """Every row under every access: J(V) of a clip is against its reference from V, whichever row asked."""
    spoken(monkeypatch)
    words = ("--access", ",".join(TAGS), "--batch-size", "21")
    status, found, lines = run(*words)
    assert status == 0 and len(lines) == 3 * 49
    for line in lines:
        assert line["score"] == pytest.approx(GRADES[line["clip"]][line["access"]])
    gain = found["fusion_gain"]
    assert (gain["value"], gain["count"], gain["clips"]) == (pytest.approx(2 / 3), 3, 3)
    # Negative control: each by its own row's reference, all accesses of a row earn the same, and none gains.
    monkeypatch.setattr(CaptionRows, "of", lambda self, number, fed: self.rows[number])
    _, before, lines = run(*words, "--limit", "7", output="before")
    assert before["fusion_gain"]["value"] == 0.0
    assert {line["score"] for line in lines if line["id"] == "one-VAS"} == {GRADES["one"]["VAS"]}


def test_all_that_a_row_has_is_judged_against_the_reference_of_that(run, monkeypatch):
    spoken(monkeypatch)
    _, _, lines = run("--access", "all")
    assert {line["clip"]: line["score"] for line in lines} == pytest.approx({c: GRADES[c]["VAS"] for c in CLIPS})


def test_inputs_without_a_reference_are_counted(run, monkeypatch):
    """With the rows of all three signals alone, single signals have references of their own, and pairs have none."""
    spoken(monkeypatch)
    _, found, lines = run("--filter", '{"tag": ["VAS"]}', "--access", ",".join(TAGS))
    scores = {line["access"]: line["score"] for line in lines if line["clip"] == "one"}
    alone = {"V": 0.4, "A": 0.2, "S": 0.2, "VAS": 0.6}
    assert scores == pytest.approx(alone | dict.fromkeys(["VA", "VS", "AS"]))
    assert found["accesses"]["VA"]["reasons"] == {"no-reference": 3}
    assert "none of 3 rows was scored under all tags" in found["fusion_gain"]["undefined"]
