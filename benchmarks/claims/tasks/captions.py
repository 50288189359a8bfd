"""
Clips that are told in a caption, and the embedded model, cold-started on all seven inputs.

A clip is a row for each tag, with a reference of its own: what these signals tell. A signal has two facts (colour and size
of a shape, pitch and loudness of a tone, the two cues of a subtitle); two signals or three have a joint fact besides, the
letter of the seven-tag set, of which no part of them says anything. All rows ask the same, and what is fed decides what is right.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from supervised import train_supervised

from maple_trl.data.synthetic import (
    COLORS,
    FRAME_SIDE,
    NUM_FRAMES,
    PITCHES,
    WORDS,
    make_tone,
    right_letter,
    write_clip,
    write_subtitle,
)
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.rewards.answers import completion_text


VERSION = 1
ACCESSES = ("required",)  # a caption is judged by what was fed
TEST_CLIPS = 256
QUESTIONS, SAMPLES = TEST_CLIPS, 3  # all seven rows of every clip
COLD_STEPS = 130
WRONG = 0.25
"""Share of the sizes, loudnesses and speakers that are told wrongly in the cold start."""
QUESTION = "What is in this clip?"

FACTS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "size": ("thin", "big"),
    "pitch": tuple(PITCHES),
    "loudness": ("soft", "loud"),
    "word": WORDS,
    "speaker": ("user", "person", "assistant", "system"),
    "joint": ("A", "B", "C", "D"),
}
"""The facts of a clip in the order in which a reference tells them, with their values; no value belongs to two."""
OF_SIGNAL = {
    Modality.VIDEO: ("color", "size"),
    Modality.AUDIO: ("pitch", "loudness"),
    Modality.SUBTITLE: ("word", "speaker"),
}
_FACT_OF = {value: fact for fact, values in FACTS.items() for value in values}

NOISE = 0.1
"""Standard deviation of an axis of the judge that trains, before it is rounded to steps of 0.2."""


# The judge


def told_facts(text: str) -> dict[str, set[str]]:
    """Return the values that a caption tells of each fact; words that belong to none are told of `""`."""
    told: dict[str, set[str]] = {}
    for word in re.findall(r"\w+", text):
        told.setdefault(_FACT_OF.get(word, ""), set()).add(word)
    return told


def axes(caption: str, reference: str) -> tuple[float, float, float]:
    """
    Score a caption on the three axes of MAPLE's rubric (C.2), each in `[0, 1]`.

    - Missing: the share of the single signals' facts that are told, and nothing else of the same fact.
    - Errors: 1, less a half for each wrong value, fact of a signal that was not fed, and word that tells nothing.
    - Fusion: whether the joint fact is told. One signal leaves nothing to fuse, and has a half.

    A caption that tells nothing has 0 on all three.
    """
    told, right = told_facts(caption), told_facts(reference)
    if not told:
        return 0.0, 0.0, 0.0
    alone = [fact for fact in right if fact != "joint"]
    invented = sum(len(values - right.get(fact, set())) for fact, values in told.items())
    return (
        sum(told.get(fact) == right[fact] for fact in alone) / len(alone),
        max(0.0, 1 - invented / 2),
        float(told.get("joint") == right["joint"]) if "joint" in right else 0.5,
    )


def judge(caption: str, reference: str) -> float:
    """Score a caption, in `[0, 1]`: the mean of its axes."""
    return sum(axes(caption, reference)) / 3


def noisy_score(caption: str, reference: str, name: str) -> float:
    """
    Score a caption as a model that judges would: each axis with noise, in steps of 0.2.

    The same caption of the same row has the same score each time, as the answer of a judge at temperature 0 has.
    """
    noise = random.Random(zlib.crc32(f"{name}\n{caption}".encode()))
    values = (min(1.0, max(0.0, round((axis + noise.gauss(0, NOISE)) * 5) / 5)) for axis in axes(caption, reference))
    return sum(values) / 3


def score(completions: Sequence[Any], reference: Sequence[str], **columns: Any) -> list[float | None]:
    return [judge(completion_text(text), right) for text, right in zip(completions, reference, strict=True)]


def caption_score(
    completions: Sequence[Any], reference: Sequence[str], id: Sequence[str], **columns: Any
) -> list[float | None]:
    """Reward captions in training, by the judge with noise."""
    return [
        noisy_score(completion_text(text), right, name)
        for text, right, name in zip(completions, reference, id, strict=True)
    ]


# The clips


def reference_of(truth: Mapping[str, str], tag: ModalityTag) -> str:
    """Return what the signals of a tag tell of a clip."""
    signals = [signal for signal in Modality if signal in tag.modalities]
    words = [truth[fact] for signal in signals for fact in OF_SIGNAL[signal]]
    if len(signals) > 1:
        words.append(right_letter(tag, {signal: truth[OF_SIGNAL[signal][0]] for signal in signals}))
    return " ".join(words)


def draw_shape(color: str, size: str, rng: np.random.Generator) -> np.ndarray:
    """Draw frames of a shape that moves, `uint8` of shape `(NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3)`."""
    radius = int(rng.integers(6, 10) if size == "thin" else rng.integers(11, 15))
    kind = int(rng.integers(3))
    place, speed = rng.integers(14, FRAME_SIDE - 14, 2), rng.integers(-4, 5, 2)
    shade = np.clip(np.array(COLORS[color]) * rng.uniform(0.75, 1.0), 0, 255)
    frames = np.full((NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), rng.integers(0, 60), np.uint8)
    rows, columns = np.mgrid[:FRAME_SIDE, :FRAME_SIDE]
    for number, frame in enumerate(frames):
        x, y = place + speed * (number - 1.5)
        across, down = np.abs(columns - x), np.abs(rows - y)
        distance = (np.maximum(across, down), np.hypot(across, down), across + down)[kind]  # square, disc, diamond
        frame[distance <= radius] = shade
    return frames


def draw_tone(pitch: str, loudness: str, rng: np.random.Generator) -> np.ndarray:
    """Make a noisy tone, `float32`."""
    tone = make_tone(pitch, rng)
    return (tone / np.abs(tone).max() * rng.uniform(*((0.05, 0.2) if loudness == "soft" else (0.35, 0.8)))).astype(
        "f4"
    )


def write_clips(folder: Path, split: str, clips: int, seed: int) -> Dataset:
    """Write clips and their table, seven rows each; colours, pitches and words come in blocks of all 64 combinations."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    (folder / split).mkdir(parents=True)
    combinations = list(itertools.product(COLORS, PITCHES, WORDS))
    order = np.concatenate([rng.permutation(len(combinations)) for _ in range(-(-clips // len(combinations)))])
    rows: list[dict[str, Any]] = []
    for number, index in enumerate(order[:clips]):
        truth = dict(zip(("color", "pitch", "word"), combinations[index], strict=True))
        truth |= {fact: str(rng.choice(FACTS[fact])) for fact in ("size", "loudness", "speaker")}
        video, subtitle = f"{split}/clip-{number:03}.mp4", f"{split}/clip-{number:03}.srt"
        write_clip(
            folder / video,
            draw_shape(truth["color"], truth["size"], rng),
            draw_tone(truth["pitch"], truth["loudness"], rng),
        )
        write_subtitle(folder / subtitle, f"{truth['word']} {truth['speaker']}", 50, 300)
        rows += rows_of_clip(f"{split}-{number:03}", truth, video, subtitle)
    table = Dataset.from_list([rows[i] for i in rng.permutation(len(rows))])
    table.to_parquet(str(folder / f"{split}.parquet"))
    return table


def rows_of_clip(clip: str, truth: Mapping[str, str], video: str, subtitle: str) -> list[dict[str, Any]]:
    """Return a clip's rows, one for each tag."""
    return [
        {
            "id": f"{clip}-{tag.value}",
            "prompt": [{"role": "user", "content": QUESTION}],
            "question": QUESTION,
            "reference": reference_of(truth, tag),
            "tag": tag.value,
            "clip": clip,
            "video": video,
            "subtitle": subtitle,
        }
        for tag in ModalityTag
    ]


def with_targets(rows: Iterable[Mapping[str, Any]], seed: int) -> Dataset:
    """
    Return rows with what supervised training tells: the reference, in which size, loudness and speaker are often wrong.

    A caption of one signal so has something left to learn from rewards, too.
    """
    draw = random.Random(seed)
    return Dataset.from_list(
        [
            {**row, "completion": [{"role": "assistant", "content": _with_errors(row["reference"], draw)}]}
            for row in rows
        ]
    )


def _with_errors(reference: str, draw: random.Random) -> str:
    words = [
        draw.choice([value for value in FACTS[_FACT_OF[word]] if value != word])
        if _FACT_OF[word] in ("size", "loudness", "speaker") and draw.random() < WRONG
        else word
        for word in reference.split()
    ]
    return "".join(f" {word}" for word in words)


# The task


def prepare(folder: Path) -> None:

    for split, clips in (("train", 64), ("test", TEST_CLIPS)):
        write_clips(folder / "data", split, clips, seed=0)
    told = with_targets(write_clips(folder / "cold", "train", 128, seed=1000), seed=0)
    train_supervised(folder, told, COLD_STEPS)


def options(trainer: str) -> Mapping[str, Any]:
    return {
        "model_name_or_path": "{folder}/model",
        "dataset_name": "{folder}/data",
        "media_root": "{folder}/data",
        "max_completion_length": 24,
        "reward_funcs": ["tasks.captions:caption_score"],
        "reward_weights": None,
    }


def held_out(folder: Path) -> Dataset:
    return Dataset.from_parquet(str(folder / "data" / "test.parquet"), keep_in_memory=True)
