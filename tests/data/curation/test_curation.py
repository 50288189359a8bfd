"""Curations against a server that answers by what a request holds: what comes out, what is dropped, and what is refused."""

import asyncio
import functools
import json
import random
import re
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer, in_turn, say, status
from curation_server import WORD, CurationServer, kind_of, question_key, servers, signals_in, subsets, violation
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from media_files import cut, tone, write_video

from maple_trl import cli
from maple_trl.chat import ChatOptions, ChatRequest
from maple_trl.chat.messages import request_body
from maple_trl.data.curation import CurationError, curate, make_config, read_config
from maple_trl.data.curation.asking import Ask, Asker, DroppedError
from maple_trl.data.curation.config import Asr
from maple_trl.data.curation.evidence import show
from maple_trl.data.curation.logs import GrowingLog
from maple_trl.data.curation.prompts import ALIGN_FORM, PROMPTS, QUESTION_TYPES, REPAIR, SEE
from maple_trl.data.curation.stages.filter import reason_to_drop
from maple_trl.data.curation.stages.questions import shuffled_letters
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.media.loader import MediaLoader


SRT = "1\n00:00:00,000 --> 00:00:01,000\n{}\n"


@functools.cache
def _written() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="clips-")
    root = Path(folder.name)
    for number, name in enumerate(["bell", "door", "river"]):
        write_video(root / f"{name}.mp4", frames=6 + number, fps=6, audio=tone(1.0, 16000, (300.0 + 100 * number,)))
        (root / f"{name}.srt").write_text(SRT.format(f"{name} {WORD}"))
    return folder


@pytest.fixture
def clips(tmp_path):
    """Three clips with all signals: names to add others to."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in Path(_written().name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_config(folder: Path, url: str, voters: int = 1, output: str = "out", **sections) -> Path:
    content = {
        "source": {"path": "clips"},
        "output": output,
        "servers": servers(url, voters, retry_wait=0.0, prompt_price=1.0, completion_price=2.0),
        "split": {"frames": 2, "workers": 0},
        "questions": {"types": list(QUESTION_TYPES)[:2]},
        "splits": {"test_share": 0.34},
    }
    content |= sections
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(path: Path, *words: str) -> int:
    return cli.main(["data", "curate", "--config", str(path), "--json", *words])


def rows_of(folder: Path, kind: str, split: str) -> list[dict]:
    files = sorted(str(path) for path in (folder / kind).glob(f"{split}-*.parquet"))
    return load_dataset("parquet", data_files=files, split="train").to_list() if files else []


def all_rows(folder: Path, kind: str) -> list[dict]:
    return [row for split in ("train", "test") for row in rows_of(folder, kind, split)]


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a curation writes for others, less the media."""
    names = [*folder.glob("*/*.parquet"), *folder.glob("*.json*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# What comes out


@pytest.mark.slow
def test_questions_and_captions_of_seven_tags(clips, tmp_path, capsys):
    with CurationServer() as server:
        path = write_config(tmp_path, server.url, questions={})
        assert run(path) == 0, capsys.readouterr().err
        summary = json.loads(capsys.readouterr().out)
        out, calls = tmp_path / "out", len(server.calls)
        assert server.violations == []
        before = files_of(out)
        assert run(path) == 0 and len(server.calls) == calls  # all is known
        assert files_of(out) == before and json.loads(before["summary.json"]) == summary
    expected = {"annotate-video": 3, "annotate-audio": 3, "annotate-subtitle": 3, "align": 3, "caption": 21}
    # Votes without signals, with all, and with what is between: 2, 4 and 8 subsets of one, two and three signals.
    expected |= {"questions": 21, "answer": 3 * 6 * (3 * 2 + 3 * 4 + 8)}
    assert server.kinds == expected and calls == sum(expected.values())
    assert summary["written"]["questions"] == {
        "train": {tag.value: 12 for tag in ModalityTag},
        "test": {tag.value: 6 for tag in ModalityTag},
    }
    assert sum(entry["calls"] for entry in summary["spent"]) == calls
    assert summary["cost"] == pytest.approx(calls * (100 * 1.0 + 10 * 2.0) / 1e6)

    questions, captions = all_rows(out, "questions"), all_rows(out, "captions")
    check_questions(questions, out)
    assert len(captions) == 21 and {row["source"] for row in questions + captions} == {"curated"}
    for row in captions:
        assert (
            set(row) == set(ROW_FEATURES)
            and row["question"] is None
            and f"caption of {row['tag']}" in row["reference"]
        )
        for letter, name in (("V", "reference_v"), ("A", "reference_a"), ("S", "reference_s")):
            alone = next(r for r in captions if (r["clip"], r["tag"]) == (row["clip"], letter))
            assert row[name] == (alone["reference"] if letter in row["tag"] else None)
        fields = {entry["field"] for entry in row["provenance"]}
        cues = {"audio_cues"} if "A" in row["tag"] else set()
        assert fields == {"reference", *(f"reference_{letter.lower()}" for letter in row["tag"])} | cues
    by_split = [{row["clip"] for row in questions + captions if row["split"] == s} for s in ("train", "test")]
    assert not by_split[0] & by_split[1] and len(by_split[1]) == 1


def check_questions(questions: list[dict], out: Path) -> None:
    assert len({row["id"] for row in questions}) == len(questions)
    for row in questions:
        assert set(row) == set(ROW_FEATURES)
        assert row["options"]["ABCD".index(row["answer"])].startswith("right") and row["solution"] == row["answer"]
        assert row["question"] in row["prompt"][0]["content"] and row["prompt"][0]["role"] == "user"
        assert all((out / row[name]).is_file() for name in ("video", "audio", "subtitle"))
        told = {(entry["field"], entry["model"]) for entry in row["provenance"]}
        assert {(name, "text-model") for name in ("question", "options", "answer", "solution")} <= told
        assert ("tag", "voter-1") in told
        # What a model heard is told to no row that is fed no sound.
        assert (row["audio_cues"] is not None) == (("audio_cues", "audio-model") in told) == ("A" in row["tag"])
        hashes = {entry["prompt_hash"][:12] for entry in row["provenance"]}
        assert hashes <= {prompt.digest for prompt in PROMPTS}
    kinds = Counter((row["tag"], row["question_type"]) for row in questions)
    assert set(kinds) == {(tag.value, name) for tag in ModalityTag for name in QUESTION_TYPES}


def test_letters_are_balanced_and_seeded():
    for count in (1, 6, 7, 12):
        letters = [shuffled_letters(count, 0, f"clip-{i}", ModalityTag.VA) for i in range(400)]
        assert all(max(often := [row.count(x) for x in "ABCD"]) - min(often) <= 1 for row in letters)
        total = Counter("".join(map("".join, letters)))
        assert all(abs(total[x] / (400 * count) - 0.25) < 0.08 / count**0.5 for x in "ABCD")
    assert shuffled_letters(6, 0, "a", ModalityTag.V) == shuffled_letters(6, 0, "a", ModalityTag.V)
    assert len({tuple(shuffled_letters(6, seed, "a", ModalityTag.V)) for seed in range(20)}) > 10


def test_a_request_that_is_not_isolated_is_noticed(clips, tmp_path):
    """Negative control of the server's check, and of the cut by tags."""
    with CurationServer() as server:
        config = read_config(write_config(tmp_path, server.url))
        curate(config, only=["collect", "split", "annotate"])
        row = next(entry["rows"][0] for entry in GrowingLog(config.work, "annotate").entries())
    options, out = ChatOptions("m", server.url), Path(config.output)
    for shown, seen in (("V", {"V"}), ("VS", {"V", "S"}), ("VA", {"V", "A"}), ("VAS", {"V", "A", "S"})):
        content = show(out, row, [Modality(letter) for letter in shown], "both")
        body = request_body(ChatRequest(Ask(SEE, content, ALIGN_FORM, None).messages), options, False)
        assert signals_in(body) == (seen, seen)
        assert (violation(body) is None) == (shown == "V")
        assert row["clip"] not in json.dumps(body["messages"][0])


# The filter


def brute_force(tag: str, voters: int, quorum: int, knows) -> bool:
    """Whether a question stays, from the votes of all voters on all subsets."""

    def answered(shown) -> bool:
        return sum(knows(voter, "".join(shown)) for voter in range(voters)) >= quorum

    return answered(tag) and not any(answered(subset) for subset in subsets(tag))


@given(st.sampled_from(list(ModalityTag)), st.randoms(use_true_random=False), st.floats(0, 1))
def test_reasons_to_drop_against_all_subsets(tag, rng, known):
    table = {subset: rng.random() < known for subset in [tuple(tag.value), *subsets(tag.value)]}
    table[tuple(tag.value)] = rng.random() < 0.8
    told = []

    async def solved(subset):
        told.append(subset)
        return table[tuple(letter.value for letter in subset)]

    reason = asyncio.run(reason_to_drop(tag, solved))
    assert (reason is None) == brute_force(tag.value, 1, 1, lambda _, shown: table[tuple(shown)])
    assert len(told) == len(set(told))
    if reason is None:
        assert len(told) == 2 ** len(tag)


def test_what_a_part_answers_goes_by_name(clips, tmp_path):
    """Negative controls: questions that need less than their tag, nothing at all, or what is not there."""
    spoiled = {
        ("VA", "Event Sequence"): "V",
        ("VAS", "Reasoning"): "AS",
        ("VS", "Context"): "",
        ("A", "Inference"): "?",
    }

    def needs(tag, name):
        return spoiled.get((tag, name), tag)

    with CurationServer(needs) as server:
        sections = {"tags": ["A", "VA", "VS", "VAS"], "questions": {"types": sorted({name for _, name in spoiled})}}
        summary = curate(read_config(write_config(tmp_path, server.url, **sections)))
    out = tmp_path / "out"
    kept = Counter((row["tag"], row["question_type"]) for row in all_rows(out, "questions"))
    assert set(kept).isdisjoint(spoiled) and len(kept) == 4 * 4 - 4
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(d["name"], d["reason"], d["detail"]) for d in dropped if d["stage"] == "filter"} == {
        (f"{clip}-{name}", reason, detail)
        for clip in ("bell", "door", "river")
        for name, reason, detail in (
            ("VA-event-sequence-1", "smaller-tag", "it is answered with V alone"),
            ("VAS-reasoning-1", "smaller-tag", "it is answered with AS alone"),
            ("VS-context-1", "trivial", "it is answered without any signal"),
            ("A-inference-1", "unsolved", "it is not answered with A"),
        )
    }
    (account,) = [account for account in summary.accounts if account.stage == "filter"]
    assert account.dropped == {"smaller-tag": 6, "trivial": 3, "unsolved": 3} and account.rows_in == 48


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("quorum", [1, 2])
@pytest.mark.matrix(cases=1)
def test_votes_of_several_models(clips, tmp_path, quorum):
    """Voters that know this and that: what stays is what a count over all subsets says."""

    def knows(question, voter, shown):
        whole = len(shown) == len(question.split("needs [")[1].split("]")[0])
        return random.Random(f"{question} {voter} {shown}").random() < (0.8 if whole else 0.1)

    with CurationServer(knows=knows) as server:
        config = read_config(write_config(tmp_path, server.url, voters=3, filter={"quorum": quorum}))
        curate(config)
    questions = [row for entry in GrowingLog(config.work, "questions").entries() for row in entry["rows"]]
    expected = {
        row["id"]
        for row in questions
        if brute_force(
            row["tag"], 3, quorum, lambda i, shown, row=row: knows(row["question"], f"voter-{i + 1}", shown)
        )
    }
    kept = {row["id"] for entry in GrowingLog(config.work, "filter").entries() for row in entry["rows"]}
    assert kept == expected and 5 < len(kept) < len(questions) - 5


# Malformed answers, broken clips, servers that fail


def spoiled_text(text: str, kind: int) -> str:
    """An answer with one of the faults that models have."""
    data = json.loads(text)
    if kind == 0:
        return text[: len(text) // 2]
    if kind == 1:
        return "I'm afraid that this is all that I can say."
    if kind == 2:
        data.pop(next(iter(data)))
    elif "questions" in data:
        data["questions"][0]["wrong"][0] = data["questions"][0]["right"]
    else:
        data["more"] = 1
    return json.dumps(data)


@pytest.mark.slow
@pytest.mark.long
def test_one_in_a_hundred_answers_is_malformed(clips, tmp_path):
    """Each is repaired, or its row goes by name; no other row is touched."""
    spoiled, lost = set(), set()

    def spoil(number, body):
        first = question_key(body)
        again = any(message["role"] == "assistant" for message in body["messages"])
        if random.Random(first).random() >= 0.01 and not first.startswith("00"):
            return None
        hopeless = random.Random(f"again {first}").random() < 0.5
        spoiled.add(first)
        if again and not hopeless:
            assert REPAIR.split("{")[0] in json.dumps(body["messages"][-1])
            return None
        lost.update([first] if again else [])
        return spoiled_text(json.dumps(server.answer(body)), random.Random(f"kind {first}").randrange(4))

    with CurationServer() as server:
        whole = curate(read_config(write_config(tmp_path, server.url, output="whole", questions={})))
        calls = len(server.calls)
    with CurationServer(spoil=spoil) as server:
        summary = curate(read_config(write_config(tmp_path, server.url, questions={})))
        assert server.violations == []
    assert 3 <= len(spoiled) <= 0.03 * calls and 1 <= len(lost) < len(spoiled)
    notes = sum((account.notes for account in summary.accounts), Counter())
    dropped = sum((account.dropped for account in summary.accounts), Counter())
    assert set(dropped) <= {"malformed", "unsolved", "balance", "no-reference"}
    # A voter that says nothing usable has no vote, and is counted.
    assert notes["repaired"] == len(spoiled) - len(lost)
    assert dropped["malformed"] + notes["no vote: malformed"] >= len(lost)
    before = {row["id"]: row for kind in ("questions", "captions") for row in all_rows(tmp_path / "whole", kind)}
    after = {row["id"]: row for kind in ("questions", "captions") for row in all_rows(tmp_path / "out", kind)}
    assert set(after) < set(before) and len(after) > 0.8 * len(before)
    assert whole.accounts[0].rows_in == summary.accounts[0].rows_in


def test_a_question_that_stays_malformed_goes_alone(clips, tmp_path):
    def spoil(number, body):
        if "Write" not in body["messages"][0]["content"] or "Write the questions" not in json.dumps(body):
            return None
        return spoiled_text(json.dumps(server.answer(body)), 3)

    with CurationServer(spoil=spoil) as server:
        summary = curate(read_config(write_config(tmp_path, server.url, tags=["V"])))
    (account,) = [account for account in summary.accounts if account.stage == "questions"]
    assert account.dropped == {"malformed": 3} and account.rows_out == 3
    dropped = (tmp_path / "out" / "dropped.jsonl").read_text()
    assert "bell-V-av-event-alignment-1" in dropped and "two options are the same" in dropped


@pytest.mark.parametrize(
    ("second", "finish", "outcome"),
    [
        ('{"conflicts": [], "consistent": true}', "stop", True),
        ('{"conflicts": [], "consistent": false}', "length", False),  # which ends with its object
        ('Perhaps {"conflicts": [], "consistent": true}, or', "length", "truncated"),
        ("<think>{}", "length", "truncated"),
        ("<think>{}", "stop", "malformed"),
    ],
)
def test_what_was_only_thought_of_is_asked_for_again(clips, tmp_path, second, finish, outcome):
    draft = say('<think>First {"conflicts": [], "consistent": false}, but then', finish_reason="length")
    with ChatServer(in_turn(draft, say(second, finish_reason=finish))) as server:
        asker = Asker(read_config(write_config(tmp_path, server.url)))
        question = Ask(PROMPTS[3], [{"type": "text", "text": "descriptions"}], ALIGN_FORM, {})
        try:
            for _ in range(2):  # the second time from what was kept
                try:
                    found = asyncio.run(asker.ask("align", "judge", question)).data["consistent"]
                except DroppedError as error:
                    found = error.reason
                assert found == outcome and len(server.calls) == 2
        finally:
            asker.close()
        assert "cut at the token limit" in server.calls[1].text


def test_a_caption_goes_with_one_of_its_references(clips, tmp_path):
    with CurationServer(spoil=lambda number, body: "no" if kind_of(body) == ("caption", "A") else None) as server:
        summary = curate(read_config(write_config(tmp_path, server.url, tags=["V", "VA"])))
    (account,) = [account for account in summary.accounts if account.stage == "captions"]
    assert account.rows_in == 9 and account.dropped == {"malformed": 3, "no-reference": 3}
    assert {row["tag"] for row in all_rows(tmp_path / "out", "captions")} == {"V"}


def test_what_cannot_be_used_is_named(clips, tmp_path):
    """A cut file, one that is no video, a clip without sound, one without subtitle, and signals that contradict."""
    cut(clips / "bell.mp4", clips / "cut.mp4", 0.5)
    (clips / "text.mp4").write_text("no video")
    write_video(clips / "silent.mp4", frames=6, fps=6)
    (clips / "silent.srt").write_text(SRT.format(f"silent {WORD}"))
    (clips / "river.srt").unlink()

    with CurationServer() as server:
        answer = server.answer
        hopeless = "door"

        def contradict(body):
            data = answer(body)
            if "consistent" in data and short_of_door in json.dumps(body):
                return {"conflicts": ["the bell is heard before it is there"], "consistent": False}
            return data

        server.answer = contradict
        path = write_config(tmp_path, server.url)
        config = read_config(path)
        curate(config, only=["collect", "split", "annotate"])
        rows = {row["clip"]: row for entry in GrowingLog(config.work, "annotate").entries() for row in entry["rows"]}
        short_of_door = rows[hopeless]["notes"]["S"]["summary"]
        summary = curate(config)
        assert server.violations == []
    stages = {account.stage: account for account in summary.accounts}
    assert sum(stages["collect"].dropped.values()) + sum(stages["split"].dropped.values()) == 2
    assert stages["split"].notes == {"without A": 1, "without S": 1}
    assert stages["align"].dropped == {"inconsistent": 1}
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    named = {(d["name"], d["reason"].split(":")[0]) for d in dropped if d["stage"] in ("collect", "split", "align")}
    assert named == {("cut", "media"), ("text", "media"), ("door", "inconsistent")}
    tags = {
        clip: {row["tag"] for row in all_rows(tmp_path / "out", "questions") if row["clip"] == clip} for clip in rows
    }
    assert tags["silent"] <= {"V", "S", "VS"} and tags["river"] <= {"V", "A", "VA"} and not tags["door"]
    silent = [row for row in all_rows(tmp_path / "out", "captions") if row["clip"] == "silent"]
    assert silent and all(row["audio"] is None for row in silent)


def test_a_server_that_refuses_stops_the_run(clips, tmp_path, capsys):
    with CurationServer() as server:
        choose, server.choose = server.choose, lambda number, body: status(401, "who are you?")
        path = write_config(tmp_path, server.url, run={"chunk": 1})
        assert run(path) == 1 and len(server.calls) == 1  # not all three clips
        told = capsys.readouterr().err
        assert "stage annotate: servers failed on 3 of 3 rows" in told and "who are you?" in told
        assert not (tmp_path / "out" / "questions").exists()
        server.choose = choose
        assert run(path) == 0
    assert len(all_rows(tmp_path / "out", "questions")) == 42


@pytest.mark.long
def test_what_servers_fail_on_may_be_left_out(clips, tmp_path):
    """One clip's pictures are too much for a server, whatever is tried."""
    with CurationServer() as server:
        choose, rejected = server.choose, []

        def reject(number, body):
            name = question_key(body)
            if not rejected and "still pictures" in body["messages"][0]["content"]:
                rejected.append(name)
            return status(400, "too large") if name in rejected else choose(number, body)

        server.choose = reject
        summary = curate(read_config(write_config(tmp_path, server.url, run={"max_unfinished": 0.4})))
        (account,) = [account for account in summary.accounts if account.stage == "annotate"]
        assert account.dropped == {"server": 1} and account.rows_out == 2
        rejected.clear()
        rejected.append("")  # the server has grown
        summary = curate(read_config(write_config(tmp_path, server.url, run={"max_unfinished": 0.4})))
    assert summary.accounts[2].rows_out == 3


# Before anything is sent


def test_a_dry_run_counts_what_a_run_then_does(clips, tmp_path, capsys):
    with CurationServer() as server:
        path = write_config(tmp_path, server.url, voters=2, filter={"quorum": 1})
        assert run(path, "--dry-run") == 0
        plan = json.loads(capsys.readouterr().out)
        assert not server.calls and not (tmp_path / "out").exists()
        assert run(path) == 0
        spent = json.loads(capsys.readouterr().out)["spent"]
        told = {(entry["stage"], entry["server"]): entry for entry in plan["spent"]}
        done = {(entry["stage"], entry["server"]): entry["calls"] for entry in spent}
        assert set(done) == set(told) and all(done[place] <= told[place]["calls"] for place in done)
        # All but what two voters need not be asked where the first decides.
        assert {place: told[place]["calls"] for place in done if place[0] != "filter"} == {
            place: calls for place, calls in done.items() if place[0] != "filter"
        }
        assert told["filter", "voter-1"]["calls"] == done["filter", "voter-1"]
        assert plan["cost"] > 0 and told["annotate", "vision"]["prompt_tokens"] > 3 * 2 * 800
        assert run(path, "--dry-run") == 0 and json.loads(capsys.readouterr().out)["spent"] == []  # nothing is to come
        assert cli.main(["data", "curate", "--config", str(path), "--dry-run"]) == 0
        told = capsys.readouterr()
        assert "To come, at most" in told.out and "filter: 42 of 42" in told.err


@pytest.mark.long
def test_some_stages_alone(clips, tmp_path, capsys):
    with CurationServer() as server:
        path = write_config(tmp_path, server.url)
        assert run(path, "--only", "annotate") == 2
        told = capsys.readouterr().err
        assert "the stage collect, which comes before, has 3 of 3 rows still to do" in told and not server.calls
        assert run(path, "--only", "collect", "split", "annotate") == 0 and sum(server.kinds.values()) == 9
        assert run(path, "--only", "align", "captions") == 0
        assert set(server.kinds) == {"annotate-video", "annotate-audio", "annotate-subtitle", "align", "caption"}
        assert (
            run(path, "--only", "none") == 2
            and "there is no stage 'none'; there are collect" in capsys.readouterr().err
        )
        assert run(path) == 0 and server.kinds["caption"] == 21 and server.violations == []


def test_only_what_changed_is_asked_again(clips, tmp_path):
    with CurationServer() as server:
        curate(read_config(write_config(tmp_path, server.url)))
        before = server.kinds.copy()
        curate(read_config(write_config(tmp_path, server.url, tags=["V", "VAS"], splits={"test_share": 0.5})))
        assert server.kinds == before  # all of it is known
        write_video(clips / "new.mp4", frames=9, fps=9)
        curate(read_config(write_config(tmp_path, server.url)))
        assert server.kinds - before == {"annotate-video": 1, "caption": 1, "questions": 1, "answer": 4}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"splitt": {}}, "there is no key 'splitt'; did you mean split?"),
        ({"source": None}, "the key 'source' is missing"),
        ({"source": {"path": "nowhere"}}, "source.path: there is no"),
        ({"source": {"path": "clips", "limit": 0}}, "source.limit: must be at least 1, got 0"),
        (
            {"source": {"path": "clips", "suffixes": ".mp4"}},
            "source.suffixes: must be a list of texts, got str '.mp4'",
        ),
        ({"source": {"path": "clips", "suffixes": [".flac"]}}, "holds no clip; looked for .flac"),
        ({"tags": ["V", "X"]}, "tags: 'X' is not a modality tag; the tags are V, A, S"),
        ({"split": {"frames": "many"}}, "split.frames: must be a whole number, got str 'many'"),
        ({"split": {"asr": {"device": "cpu"}}}, "split.asr: the key 'model' is missing"),
        (
            {"questions": {"types": ["Riddle"]}},
            "questions.types: there is no type 'Riddle'; there are AV Event Alignment",
        ),
        ({"questions": {"evidence": "all"}}, "questions.evidence: must be one of annotations, media, both, got 'all'"),
        ({"filter": {"quorum": 2}}, "filter.quorum: is 2, and there are 1 servers.voters"),
        ({"splits": {"test_share": 0.9}}, "splits.test_share: must be in [0.0, 0.5], got 0.9"),
        ({"splits": {"balance_test": 1}}, "splits.balance_test: must be true or false, got int 1"),
        (
            {"write": {"prompt_style": "loud"}},
            "write.prompt_style: must be one of think, answer, brackets, got 'loud'",
        ),
        ({"run": {"chunk": True}}, "run.chunk: must be a whole number, got bool True"),
        ({"seed": -1}, "seed: must be in [0, 2**32), got -1"),
        ({"servers": {"text": {"model": "m"}}}, "servers: the key 'vision' is missing"),
    ],
)
def test_what_is_described_wrongly(clips, tmp_path, capsys, change, told):
    with CurationServer() as server:
        path = write_config(tmp_path, server.url, **change)
        assert run(path) == 2 and not server.calls
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("maple-trl data curate: ") and told in last
    assert str(path) in last or "holds no clip" in last or "there is no" in last


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ({"model": "m", "api_key": "sk-1"}, "servers.vision: there is no key 'api_key'; did you mean api_key_env?"),
        ({"model": "m", "base_url": "ftp://x"}, "servers.vision: base_url must look like http://HOST:PORT/v1"),
        ({"model": "m", "api_key_file": "none.txt"}, "servers.vision: api_key_file"),
        ({"model": "m", "concurrency": 0}, "servers.vision: concurrency must be in [1, 1000], got 0"),
        ({"base_url": "http://x/v1"}, "servers.vision: the key 'model' is missing"),
        ({"model": "m", "cache_file": "x"}, "servers.vision: there is no key 'cache_file'"),
        ("m", "servers.vision: must be a mapping with model, base_url"),
        ({"model": "m"}, "servers.vision: no key: set the environment variable OPENAI_API_KEY"),
    ],
)
def test_servers_that_are_described_wrongly(clips, tmp_path, capsys, monkeypatch, server, told):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_config(tmp_path, "http://127.0.0.1:9/v1")
    content = yaml.safe_load(path.read_text())
    content["servers"]["vision"] = server
    path.write_text(yaml.safe_dump(content))
    assert run(path) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    """YAML takes the last of two sections: a day of calls would be spent by rules of which half were lost."""
    path = tmp_path / "curation.yaml"
    path.write_text("output: out\nfilter: {quorum: 2}\nsource: {path: clips}\nfilter: {voters: [text]}\n")
    with pytest.raises(CurationError, match="curation.yaml: line 4: 'filter' is given twice"):
        read_config(path)
    path.write_text("filter:\n  quorum: 2\n  quorum: 3\n")
    with pytest.raises(CurationError, match="curation.yaml: line 3: 'quorum' is given twice"):
        read_config(path)


def test_tables_of_clips(clips, tmp_path):
    """Names of one's own, a text for a subtitle, a file for the sound."""
    table = tmp_path / "clips.jsonl"
    rows = [
        {"clip": "../../one", "video": "bell.mp4", "subtitle": f"a text {WORD}"},
        {"video": "door.mp4", "clip": None},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "clips.jsonl", "media_root": "clips"}
    with CurationServer() as server:
        summary = curate(read_config(write_config(tmp_path, server.url, source=source)))
        assert server.violations == []
        assert summary.accounts[1].notes == {"without S": 1}
        row = next(row for row in all_rows(tmp_path / "out", "captions") if row["clip"] == "../../one")
        loader = MediaLoader(tmp_path / "out", workers=0)
        assert loader.subtitle(row["subtitle"]) == f"a text {WORD}"
        assert loader.probe(row["video"]).has_video and loader.audio(row["audio"]).duration == pytest.approx(
            1, abs=0.1
        )
        calls = len(server.calls)
        for bad, told in (
            ([{"video": "bell.mp4"}, {"video": "bell.mp4"}], "row 1: the clip 'bell' stands in row 0 too"),
            ([{"clip": "x", "video": None}], "row 0: the column 'video' must name a file"),
            ([{"video": ["bell.mp4"]}], "row 0: the column 'video' must be text"),
            (
                [{"video": "bell.mp4", "image": "a.png"}],
                "row 0: the column 'image' holds a picture, and clips are curated",
            ),
            ([{"video": None, "images": ["a.png"]}], "row 0: the column 'images' holds a picture"),
            ([{"path": "bell.mp4"}], "has no column 'video'; its columns: path"),
        ):
            table.write_text("".join(json.dumps(row) + "\n" for row in bad))
            with pytest.raises(CurationError, match=told):
                curate(read_config(write_config(tmp_path, server.url, source=source)))
        assert len(server.calls) == calls


def test_the_output_may_not_hold_the_source_and_has_one_writer(clips, tmp_path):
    import filelock

    with CurationServer() as server:
        config = read_config(write_config(tmp_path, server.url, output="."))
        with pytest.raises(CurationError, match="holds the source"):
            curate(config)
        config = read_config(write_config(tmp_path, server.url))
        config.work.mkdir(parents=True)
        with filelock.FileLock(config.work / "lock"), pytest.raises(CurationError, match="another run writes into"):
            curate(config)
        with pytest.raises(CurationError, match="--engine: must be one of local, ray, got 'spark'"):
            curate(config, engine="spark")
        assert not server.calls


def test_speech_to_text_without_a_model_is_refused(clips, tmp_path, capsys):
    pytest.importorskip("faster_whisper")
    (clips / "river.srt").unlink()
    (tmp_path / "model").mkdir()
    with CurationServer() as server:
        split = {"frames": 2, "workers": 0, "asr": {"model": str(tmp_path / "model"), "device": "cpu"}}
        assert run(write_config(tmp_path, server.url, split=split)) == 2 and not server.calls
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"split.asr.model: faster-whisper cannot load '{tmp_path / 'model'}'" in last


def test_a_config_without_a_file():
    config = make_config({"source": "x", "output": "y", "tags": ["sa"], "servers": servers("http://127.0.0.1:9/v1")})
    assert config.tags == (ModalityTag.AS,) and config.source.path == "x"
    content = {
        "source": "x",
        "output": "y",
        "tags": ["S"],
        "servers": {"text": {"model": "m"}, "voters": [{"model": "n"}]},
    }
    assert set(make_config(content).servers) == {"text", "judge"}  # nobody looks or listens


def test_the_example_says_every_key():
    """It parses; and what it leaves as a comment, every line of which is one, are the defaults."""
    path = Path(__file__).parents[3] / "examples" / "curation.yaml"
    config = read_config(path)
    assert len(config.voters) == 3 and config.filter.quorum == 2 and config.servers["text"].concurrency == 32
    lines = [re.sub(r"^( *)# (?=[a-z_]+:( |$))", r"\1", line) for line in path.read_text().splitlines()]
    content = yaml.safe_load("\n".join(lines))
    asr = content["split"].pop("asr")
    full = make_config(content, path.parent)
    assert full == config and set(asr) == {field.name for field in fields(Asr)}
    for name in ("source", "split", "captions", "questions", "filter", "splits", "write", "run"):
        assert set(content[name]) | {"asr"} == {field.name for field in fields(getattr(full, name))} | {"asr"}, name
    assert set(content) == {field.name for field in fields(full)} - {"voters"}
