"""The seven-tag set: the files are what they claim to be, and every modality of a tag is necessary for its answer."""

import collections
import hashlib
import itertools
import json
import math
import multiprocessing
from pathlib import Path

import av
import numpy as np
import pysubs2
import pytest

from maple_trl.data import synthetic
from maple_trl.data.synthetic import (
    ATTRIBUTES,
    COLORS,
    LETTERS,
    PITCHES,
    load_seven_tags,
    right_letter,
    write_seven_tags,
)
from maple_trl.modalities import Modality, ModalityTag


SUBSETS = [frozenset(s) for n in range(4) for s in itertools.combinations(Modality, n)]
COMBINATIONS = [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set with 256 questions a tag and split: large enough for the statistics below."""
    folder = tmp_path_factory.mktemp("seven-tags")
    return folder, write_seven_tags(folder, prompts_per_tag=256, seed=11)


# Independent readers: plain PyAV, numpy and pysubs2, nothing of the package.


def read_video(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def read_audio(path):
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def seen_color(frames):
    background = frames[0, 0, 0].astype(int)
    shape = frames[np.abs(frames.astype(int) - background).max(-1) > 100]
    hue = shape.mean(0) / shape.mean(0).max()
    return min(COLORS, key=lambda name: np.abs(hue - np.array(COLORS[name]) / max(COLORS[name])).sum())


def heard_pitch(waveform):
    peak = np.abs(np.fft.rfft(waveform)).argmax() * synthetic.SAMPLING_RATE / len(waveform)
    return min(PITCHES, key=lambda name: abs(math.log(peak / PITCHES[name])))


def read_word(path):
    return pysubs2.load(str(path))[0].plaintext


# The statistic: what a table of majority answers, fitted on one split, gets right on the other.


def tail_probability(right, count, chance=0.25):
    """P(X >= right) of a binomial variable."""
    return sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(right, count + 1))


def majority_table_hits(train, test):
    """`train`, `test`: lists of (features, answer). Unknown features get the overall majority answer."""
    cells = collections.defaultdict(collections.Counter)
    for features, answer in train:
        cells[features][answer] += 1
    fallback = collections.Counter(answer for _, answer in train).most_common(1)[0][0]
    table = {features: answers.most_common(1)[0][0] for features, answers in cells.items()}
    return sum(table.get(features, fallback) == answer for features, answer in test)


def leaks(train, test, signals, level=1e-4):
    """
    The (tag, modalities) that lack a modality of the tag and yet predict its answer above chance.

    `signals[modality](row)` is what can be read from that modality of a row.
    """
    train, test = list(train), list(test)
    found = set()
    for tag, subset in itertools.product(ModalityTag, SUBSETS):
        if subset >= tag.modalities:
            continue
        train_pairs, test_pairs = (
            [(tuple(signals[m](row) for m in sorted(subset)), row["answer"]) for row in rows if row["tag"] == tag]
            for rows in (train, test)
        )
        if tail_probability(majority_table_hits(train_pairs, test_pairs), len(test_pairs)) < level:
            found.add((str(tag), "".join(sorted(subset))))
    return found


@pytest.fixture(scope="module")
def signals(written):
    """Everything that is read back from the files: the attribute and a side feature of each modality."""
    folder, tables = written
    side = {}
    for row in itertools.chain(*tables.values()):
        if row["video"] not in side:
            frames, _ = read_video(folder / row["video"])
            waveform = read_audio(folder / row["video"])
            side[row["video"]] = (
                (seen_color(frames), bool(frames[0, 0, 0].mean() > 30)),
                (heard_pitch(waveform), bool(np.abs(waveform).max() > 0.4)),
            )
        if row["subtitle"] not in side:
            cue = pysubs2.load(str(folder / row["subtitle"]))[0]
            side[row["subtitle"]] = (cue.plaintext, cue.start > 50)
    return {
        Modality.VIDEO: lambda row: side[row["video"]][0],
        Modality.AUDIO: lambda row: side[row["video"]][1],
        Modality.SUBTITLE: lambda row: side[row["subtitle"]],
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_are_real_and_carry_the_attributes_of_their_row(written, split):
    folder, tables = written
    for row in {row["video"]: row for row in tables[split]}.values():
        path = folder / row["video"]
        with av.open(str(path)) as container:
            kinds = [(stream.type, stream.codec_context.name) for stream in container.streams]
            assert "mp4" in container.format.name
        assert sorted(kinds) == [("audio", "aac"), ("video", "h264")]
        frames, times = read_video(path)
        assert frames.shape == (4, 56, 56, 3)
        assert times == pytest.approx([0.0, 0.1, 0.2, 0.3])
        assert all(np.abs(a.astype(int) - b).max() > 100 for a, b in itertools.pairwise(frames)), (
            "the shape stood still"
        )
        assert seen_color(frames) == row["truth_V"]
        waveform = read_audio(path)
        assert len(waveform) == 0.32 * 16_000
        assert heard_pitch(waveform) == row["truth_A"]
    for row in {row["subtitle"]: row for row in tables[split]}.values():
        assert read_word(folder / row["subtitle"]) == row["truth_S"]


def test_table_has_the_documented_rows(written):
    folder, tables = written
    for split, table in tables.items():
        assert collections.Counter(table["tag"]) == dict.fromkeys(map(str, ModalityTag), 256)
        assert len(set(table["id"])) == len(table)
        for row in table:
            truth = {m: row[f"truth_{m}"] for m in Modality}
            assert row["answer"] == row["solution"] == right_letter(row["tag"], truth)
            assert row["prompt"] == [{"role": "user", "content": row["question"]}]
            chosen = row["options"][LETTERS.index(row["answer"])].split(" or ")
            assert " ".join(truth[Modality(letter)] for letter in row["tag"]) in chosen
            assert sum(len(option.split(" or ")) for option in row["options"]) == 4 ** len(row["tag"])
            assert row["video"].startswith(f"{split}/") and (folder / row["video"]).is_file()
            assert not Path(row["subtitle"]).is_absolute()
    digests = {
        s: {hashlib.sha256((folder / p).read_bytes()).digest() for p in set(tables[s]["video"])} for s in tables
    }
    assert not digests["train"] & digests["test"], "a clip of the test split was seen in training"


@pytest.mark.parametrize("tag", ModalityTag)
def test_right_letter_needs_every_modality_of_its_tag(tag):
    for subset in SUBSETS:
        cells = collections.defaultdict(collections.Counter)
        for truth in COMBINATIONS:
            cells[tuple(truth[m] for m in sorted(subset))][right_letter(tag, truth)] += 1
        if subset >= tag.modalities:
            assert all(len(answers) == 1 for answers in cells.values())
        else:
            assert all(set(answers.values()) == {len(COMBINATIONS) // len(cells) // 4} for answers in cells.values())
            assert all(len(answers) == 4 for answers in cells.values())


def test_no_other_signal_predicts_the_answers_of_the_written_set(written, signals):
    _, tables = written
    assert leaks(tables["train"], tables["test"], signals) == set()
    for tag in ModalityTag:
        pairs = [
            [
                (tuple(signals[m](row)[0] for m in sorted(tag.modalities)), row["answer"])
                for row in rows
                if row["tag"] == tag
            ]
            for rows in (tables["train"], tables["test"])
        ]
        assert majority_table_hits(*pairs) == 256, "the full tag must determine the answer"


def test_which_file_was_drawn_says_nothing_to_tags_without_its_modalities(written):
    _, tables = written
    for tag, column in [("S", "video"), ("V", "subtitle"), ("A", "subtitle"), ("VA", "subtitle")]:
        train, test = ([(row[column], row["answer"]) for row in t if row["tag"] == tag] for t in tables.values())
        assert tail_probability(majority_table_hits(train, test), len(test)) > 1e-4


def test_a_leaky_rule_is_caught(written, signals):
    """Negative control of the statistic: two rules that look right but make a modality superfluous."""
    _, tables = written

    def without_subtitle(row):  # VAS answered by colour and pitch alone
        truth = {m: row[f"truth_{m}"] for m in Modality}
        return right_letter("VA", truth) if row["tag"] == "VAS" else row["answer"]

    def mostly_by_color(row):  # two thirds of the VA rows answered by colour alone
        truth = {m: row[f"truth_{m}"] for m in Modality}
        return right_letter("V", truth) if row["tag"] == "VA" and int(row["id"][-4:]) % 3 else row["answer"]

    for rule, expected in [
        (without_subtitle, {("VAS", "AV")}),
        (mostly_by_color, {("VA", "V"), ("VA", "SV")}),
    ]:
        train, test = ([{**row, "answer": rule(row)} for row in table] for table in tables.values())
        assert leaks(train, test, signals) == expected


def test_a_subtitle_that_follows_the_color_is_caught(written, signals):
    """Negative control on the signals: a word that depends on the colour lets the subtitle answer V questions."""
    _, tables = written
    word_of = dict(zip(COLORS, synthetic.WORDS, strict=True))
    leaky = {**signals, Modality.SUBTITLE: lambda row: word_of[row["truth_V"]]}
    assert ("V", "S") in leaks(tables["train"], tables["test"], leaky)


def content(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SMALL = {"prompts_per_tag": 4, "clips_per_pair": 1}


def test_same_seed_same_bytes(tmp_path):
    write_seven_tags(tmp_path / "a", **SMALL)
    write_seven_tags(tmp_path / "b", **SMALL)
    write_seven_tags(tmp_path / "c", **SMALL, seed=1)
    write_seven_tags(tmp_path / "d", **SMALL, splits=["test"])
    a, b, c, d = (content(tmp_path / name) for name in "abcd")
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a if name.endswith((".mp4", ".parquet")))
    assert all(a[name] == digest for name, digest in d.items() if name.startswith("test"))


def test_sizes_per_split(tmp_path):
    tables = write_seven_tags(tmp_path, prompts_per_tag={"train": 5, "test": 2}, clips_per_pair=1)
    assert {split: len(table) for split, table in tables.items()} == {"train": 35, "test": 14}
    with pytest.raises(ValueError, match="no count for split 'dev'"):
        write_seven_tags(tmp_path, prompts_per_tag={"train": 5}, splits=["train", "dev"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        write_seven_tags(tmp_path, prompts_per_tag=0)
    with pytest.raises(ValueError, match="clips_per_pair must be at least 1"):
        write_seven_tags(tmp_path, clips_per_pair=0)
    with pytest.raises(ValueError, match="cannot be a folder name"):
        write_seven_tags(tmp_path, splits=["../out"])


def test_load_writes_once_and_repairs(tmp_path):
    folder = tmp_path / "set"
    first = load_seven_tags(folder, **SMALL)
    written_at = (folder / synthetic.STAMP_NAME).stat().st_mtime_ns
    again = load_seven_tags(folder, **SMALL)
    assert (folder / synthetic.STAMP_NAME).stat().st_mtime_ns == written_at
    assert all(first[split].to_list() == again[split].to_list() for split in first)
    assert again["train"].features == synthetic.FEATURES
    before = content(folder)

    (folder / first["train"][0]["video"]).unlink()
    load_seven_tags(folder, **SMALL)
    assert content(folder) == before

    (folder / "test.parquet").write_bytes(b"PAR1 cut off")
    load_seven_tags(folder, **SMALL)
    assert content(folder) == before

    stamp = json.loads((folder / synthetic.STAMP_NAME).read_text())
    (folder / synthetic.STAMP_NAME).write_text(json.dumps({**stamp, "version": 0}))
    load_seven_tags(folder, **SMALL)
    assert content(folder) == before

    assert len(load_seven_tags(folder, prompts_per_tag=2, clips_per_pair=1)["test"]) == 14
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"], "scratch folders were left behind"


def test_load_goes_to_the_user_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_seven_tags(prompts_per_tag={"train": 1, "test": 2}, clips_per_pair=1)
    assert (tmp_path / "maple_trl" / "seven-tags-train1-test2-seed0" / synthetic.STAMP_NAME).is_file()
    assert synthetic.default_folder() == tmp_path / "maple_trl" / "seven-tags-64-seed0"


def test_load_never_touches_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no seven_tags.json"):
        load_seven_tags(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    calls = itertools.count()
    write_clip = synthetic.write_clip

    def fails_at_the_tenth(*args):
        if next(calls) == 10:
            raise KeyboardInterrupt
        write_clip(*args)

    monkeypatch.setattr(synthetic, "write_clip", fails_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        load_seven_tags(tmp_path / "set", **SMALL)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    assert len(load_seven_tags(tmp_path / "set", **SMALL)["train"]) == 28


def _load_in_process(folder):
    return load_seven_tags(folder, **SMALL)["train"]["id"][:]


def test_concurrent_loads_share_one_set(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_load_in_process, [tmp_path / "set"] * 2)
    assert first == second
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]
