"""The seven-tag set: the files are what they claim to be, and every modality of a tag is necessary for its answer."""

import argparse
import collections
import hashlib
import importlib.util
import itertools
import json
import math
from pathlib import Path

import av
import numpy as np
import programs
import pysubs2
import pytest
import torch

from maple_trl import cli
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
from maple_trl.data.tiny_omni import build_model, build_processor, target_text
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint
from maple_trl.rewards import accuracy_reward, format_reward


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


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.matrix(cases=1)
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


@pytest.mark.slow
@pytest.mark.long
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


@pytest.mark.slow
def test_which_file_was_drawn_says_nothing_to_tags_without_its_modalities(written):
    _, tables = written
    for tag, column in [("S", "video"), ("V", "subtitle"), ("A", "subtitle"), ("VA", "subtitle")]:
        train, test = ([(row[column], row["answer"]) for row in t if row["tag"] == tag] for t in tables.values())
        assert tail_probability(majority_table_hits(train, test), len(test)) > 1e-4


@pytest.mark.long
@pytest.mark.slow
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


@pytest.mark.long
@pytest.mark.slow
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


def test_rows_and_what_is_made_of_them_are_valid(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_seven_tags(synthetic.default_folder(), **SMALL)
    monkeypatch.setattr(synthetic, "load_seven_tags", lambda: load_seven_tags(synthetic.default_folder(), **SMALL))
    folder = str(synthetic.default_folder())
    tables = [f"{folder}/train.parquet", f"{folder}/test.parquet"]
    assert cli.main(["data", "validate", *tables, "--media_root", folder]) == 0, capsys.readouterr().out
    words = ["--prompt_style", "answer"]
    assert cli.main(["data", "qa-plus", "builtin:seven-tags", str(tmp_path / "qa"), *words]) == 0
    assert cli.main(["data", "validate", str(tmp_path / "qa"), "--media_root", folder]) == 0, capsys.readouterr().out


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


@pytest.mark.slow
def test_concurrent_loads_share_one_set(tmp_path):
    code = f"from maple_trl.data import load_seven_tags; load_seven_tags({str(tmp_path / 'set')!r}, **{SMALL})"
    processes = [programs.Program(["-c", code], tmp_path.with_suffix(".log")) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]
    assert len(load_seven_tags(tmp_path / "set", **SMALL)["train"]) == 28


# The tiny omni model that goes with the set.


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny-omni"), load_processor("builtin:tiny-omni")


def test_committed_checkpoint_is_small_and_without_pickle(tiny):
    model, _ = tiny
    files = {path.name: path.stat().st_size for path in Path(resolve_checkpoint("builtin:tiny-omni")).iterdir()}
    assert sum(files.values()) <= 5 * 2**20
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja"}
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000
    assert model.dtype == torch.float32


def test_committed_checkpoint_is_what_the_code_builds(tiny, tmp_path):
    """A change of the code that the checkpoint has not been rebuilt for fails here."""
    model, committed = tiny
    processor = build_processor()
    processor.save_pretrained(tmp_path)
    build_model(processor.tokenizer).save_pretrained(tmp_path)
    built = load_processor(str(tmp_path))
    assert built.tokenizer.backend_tokenizer.to_str() == committed.tokenizer.backend_tokenizer.to_str()
    assert built.chat_template == committed.chat_template
    for part in ("video_processor", "image_processor", "feature_extractor"):
        assert getattr(built, part).to_dict() == getattr(committed, part).to_dict()
    configs = [load_model(str(tmp_path)).config.to_dict(), model.config.to_dict()]
    for config in configs:
        del config["transformers_version"], config["_name_or_path"]
    assert configs[0] == configs[1]


def test_processor_keeps_its_settings_when_saved(tiny):
    _, processor = tiny
    assert processor.video_processor.do_resize is False
    assert processor.feature_extractor.feature_size == 32
    assert processor.feature_extractor.sampling_rate == 16_000
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    batch = processor(text=["<|vision_bos|><|VIDEO|><|vision_eos|>"], videos=[frames], return_tensors="pt")
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4]]  # class defaults would have scaled the frames up
    assert (batch["input_ids"] == processor.tokenizer.video_token_id).sum() == 8


def test_every_word_of_the_set_is_one_token(tiny):
    _, processor = tiny
    words = {word for values in ATTRIBUTES.values() for word in values} | {*synthetic.NOUNS.values(), *LETTERS}
    for word in [
        *words,
        *(f" {word}" for word in words - set(LETTERS)),
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
    ]:
        assert len(processor.tokenizer(word)["input_ids"]) == 1, word
    text = "Any text, même ça: 日本語 <|im_end|>"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_target_text_is_perceived_values_and_letter(written):
    _, tables = written
    row = next(row for row in tables["test"] if row["tag"] == "VS")
    expected = f"<think> {row['truth_V']} {row['truth_S']}</think><answer>{row['solution']}</answer>"
    assert target_text(row) == expected
    assert accuracy_reward(completions=[expected], solution=[row["solution"]]) == [1.0]
    assert format_reward(completions=[expected]) == [1.0]
    with pytest.raises(ValueError, match="answer must be one of A, B, C, D, got 'E'"):
        target_text({**row, "answer": "E"})


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "make_tiny_omni.py"
    spec = importlib.util.spec_from_file_location("make_tiny_omni", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.slow
def test_training_the_tiny_model_is_repeatable(script, written):
    folder, tables = written
    table = tables["train"].select(range(32))
    args = argparse.Namespace(steps=3, batch_size=16, learning_rate=2e-3, seed=0)

    def trained(seed):
        processor = build_processor()
        model = build_model(processor.tokenizer, seed=seed)
        script.train(family_for(model, processor), model, table, folder, args)
        return model.state_dict()

    first, second, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    start = build_model(build_processor().tokenizer, seed=0).state_dict()
    # The Thinker holds this weight but reads the embeddings of its text tokens instead.
    unused = {"model.audio_tower.audio_bos_eos_token.weight"}
    assert {name for name in first if torch.equal(first[name], start[name])} == unused


@pytest.mark.slow
def test_committed_model_keeps_the_format_and_leaves_headroom(script, tiny, written, capsys):
    """It perceives every modality, is far from perfect, and answers in the format, so that rewards are not sparse."""
    folder, tables = written
    script.evaluate(family_for(*tiny), tiny[0], tables["test"], folder)
    numbers = {line[:16]: line.split()[2:] for line in capsys.readouterr().out.splitlines()}
    accuracy = dict(zip(numbers["sampled accuracy"][::2], map(float, numbers["sampled accuracy"][1::2]), strict=True))
    assert 0.5 < accuracy["all"] < 0.75
    assert all(accuracy[tag] > 0.6 for tag in "VAS")
    assert accuracy["VAS"] < 0.6
    assert float(numbers["valid format    "][0]) > 0.88
