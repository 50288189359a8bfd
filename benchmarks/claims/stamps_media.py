"""
Clips and questions of real media, in the seven tags: what `tasks/stamps.py` trains on.

A clip shows a moving picture, a spoken name is heard with it, and a written name stands beside it; the three are of three different
objects. Asked are the kind of thing in the picture (V), the language of the voice (A) and that of the writing (S), and the right
letter is "ABCD"[sum of the indices of the tag's signals mod 4], as in the synthetic set: no part of a tag's signals says anything
about the answer. Each row carries all three signals, so those outside of its tag distract.

An object (a stamp with all its variants: its picture, its names said and written in every language) is of one split alone.
A language is told by its speaker too, since each has one or few: it is the voice that is asked.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from datasets import Dataset
from PIL import Image

from maple_trl.data.schema import LETTERS
from maple_trl.data.synthetic import SAMPLING_RATE, write_clip, write_subtitle
from maple_trl.modalities import ModalityTag


KINDS = {
    "animal": ("animals/birds", "animals/mammals", "animals/marsupials"),
    "vehicle": ("vehicles", "military/vehicles"),
    "hand": ("symbols/alphabets/asl",),  # signs of the manual alphabet
    "letter": ("symbols/alphabets/english", "symbols/alphabets/german"),
}
VOICES = {"spanish": "es", "romanian": "ro", "bulgarian": "bg", "greek": "el"}
TEXTS = {"english": "en", "french": "fr", "german": "de", "italian": "it"}
ATTRIBUTES = {"V": tuple(KINDS), "A": tuple(VOICES), "S": tuple(TEXTS)}
NOUNS = {"V": "picture", "A": "voice", "S": "text"}

SHARES = {"cold": 0.4, "train": 0.35, "test": 0.25}
"""Splits of the objects: cold start, reinforcement learning, held-out questions."""

SIDE, FRAMES, FRAME_RATE = 56, 4, 4
SAMPLES = 16 * 1024  # 1.02 s: a whole number of AAC frames
LONGEST_NAME = 40  # letters


@dataclass(frozen=True)
class Signal:
    """A picture, a spoken or a written name: of which object and file, and for a written name what it says."""

    thing: str
    file: str
    text: str = ""


Pools = Mapping[tuple[str, str, str], Sequence[Signal]]
"""Signals by modality, value and split."""


def thing_of(path: str) -> str:
    """Return the object that a file is of: folder and name, without what tells its variants and languages apart."""
    folder, _, name = path.rpartition("/")
    name = re.sub(r"(_desc(_\w+)?)?\.\w+$", "", name).lower()
    return f"{folder.split('/')[0]}/{re.sub(r'(_filled|_outlined?|_profile|_mirror|_flip|[-_ ]?[0-9]+)+$', '', name)}"


def kind_of(path: str) -> str:
    """Return the kind of thing that a file shows, or its first folder."""
    for kind, folders in KINDS.items():
        if any(path.startswith(f"{folder}/") for folder in folders):
            return kind
    return path.split("/")[0]


def split_things(paths: Sequence[str]) -> dict[str, str]:
    """Deal objects to the splits, each kind in the same shares, in an order that their names alone decide."""
    kinds: dict[str, str] = {}
    for path in paths:
        kinds.setdefault(thing_of(path), kind_of(path))
    splits: dict[str, str] = {}
    bounds = np.cumsum([*SHARES.values()])
    for kind in sorted(set(kinds.values())):
        things = sorted(
            (thing for thing in kinds if kinds[thing] == kind),
            key=lambda thing: hashlib.sha256(thing.encode()).hexdigest(),
        )
        for place, thing in enumerate(things):
            splits[thing] = [*SHARES][int(np.searchsorted(bounds, (place + 0.5) / len(things)))]
    return splits


def read_pools(root: Path) -> Pools:
    """
    Find the pictures, spoken and written names of each split.

    A file with the content of another is left out, and so is a name that is written alike in two of the languages.
    """
    paths = sorted(str(path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file())
    splits, seen = split_things(paths), set()
    pools: dict[tuple[str, str, str], list[Signal]] = defaultdict(list)

    def add(modality: str, value: str, path: str) -> None:
        digest = hashlib.sha256((root / path).read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            pools[modality, value, splits[thing_of(path)]].append(Signal(thing_of(path), path))

    named = []
    for path in paths:
        if path.endswith(".png") and kind_of(path) in KINDS and not re.search("_(mirror|flip)", path):
            add("V", kind_of(path), path)
        for voice, code in VOICES.items():
            if path.endswith(f"_desc_{code}.ogg") and "/alphabets/" not in path:
                add("A", voice, path)
        if path.endswith(".txt"):
            named += [(path, text, name) for text, name in written_names(root / path).items()]
    texts = {text: {name.lower() for _, own, name in named if own == text} for text in TEXTS}
    alike = Counter(name for names in texts.values() for name in names)
    for path, text, name in named:
        if alike[name.lower()] == 1 and (text, name.lower()) not in seen:
            seen.add((text, name.lower()))
            pools["S", text, splits[thing_of(path)]].append(Signal(thing_of(path), f"{path}:{TEXTS[text]}", name))
    return pools


def written_names(file: Path) -> dict[str, str]:
    """Return an object's written names by language: English is the first line, the others follow by their codes."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    told = {"en": lines[0]} | dict(re.findall(r"^(\w\w)\.utf8=(.*)$", "\n".join(lines), re.M))
    names = {text: told.get(code, "").strip() for text, code in TEXTS.items()}
    return {text: name for text, name in names.items() if 0 < len(name) <= LONGEST_NAME}


def read_picture(file: Path) -> Image.Image | None:
    """Return a picture cut to what is not transparent, in the middle of a square; `None` where all is."""
    image = Image.open(file).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    image.thumbnail((64, 64), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (64, 64))
    square.paste(image, ((64 - image.width) // 2, (64 - image.height) // 2))
    return square


def read_voice(file: Path) -> np.ndarray | None:
    """Return a voice at `SAMPLING_RATE` without the silence around it; `None` where less than 0.2 s is left."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLING_RATE)
    with av.open(str(file)) as container:
        decoded = [piece for frame in container.decode(audio=0) for piece in resampler.resample(frame)]
    wave = np.concatenate([piece.to_ndarray()[0] for piece in [*decoded, *resampler.resample(None)]])
    level = np.abs(wave)
    loud = np.flatnonzero(level > 0.05 * level.max())
    if level.max() < 1e-3 or loud[-1] - loud[0] < 0.2 * SAMPLING_RATE:
        return None
    wave = wave[max(0, loud[0] - 320) : loud[-1] + 320][: int(1.5 * SAMPLING_RATE)]
    return wave * (0.7 / np.abs(wave).max())


def draw_frames(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture that moves, and grows or shrinks a little, over a smooth coloured ground."""
    size, growth, gain = rng.uniform(0.6, 0.9) * SIDE, rng.uniform(-0.04, 0.04), rng.uniform(0.8, 1.15, 3)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    ramp, corners = np.linspace(0, 1, SIDE)[:, None], rng.uniform(90, 255, (4, 3))
    down, across = (corners[i] * (1 - ramp) + corners[i + 1] * ramp for i in (0, 2))
    ground = ((down[:, None] + across[None]) / 2).astype(np.uint8)
    place, step = rng.uniform(0, SIDE - size, 2), rng.uniform(-2.5, 2.5, 2)
    frames = []
    for time in range(FRAMES):
        side = int(size * (1 + growth * time))
        at = np.clip(place + step * time, 0, max(0, SIDE - side)).astype(int)
        frame, small = Image.fromarray(ground), picture.resize((side, side), Image.Resampling.BILINEAR)
        frame.paste(small, (int(at[0]), int(at[1])), small)
        frames.append(np.clip(np.asarray(frame, np.float32) * gain, 0, 255).astype(np.uint8))
    return np.stack(frames)


def vary_voice(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a voice with a little of another speed (and pitch with it), loudness, start and noise, `SAMPLES` long."""
    speed, start = rng.uniform(0.9, 1.1), int(rng.uniform(0, 0.06) * SAMPLING_RATE)
    wave = np.interp(np.arange(0, len(wave) - 1, speed), np.arange(len(wave)), wave)[: SAMPLES - start]
    heard = rng.normal(0, 0.002, SAMPLES)
    heard[start : start + len(wave)] += wave * rng.uniform(0.5, 1.2)
    return np.clip(heard, -1, 1).astype(np.float32)


class Dealer:
    """Deals the signals of a split so that each is used about equally often; one that can't be read is dealt no more."""

    def __init__(self, pools: Pools, split: str, rng: np.random.Generator):
        self._pools, self._split, self._rng = pools, split, rng
        self._left: dict[tuple[str, str], list[Signal]] = {}
        self._read: dict[str, Any] = {}

    def deal(self, modality: str, value: str, read: Callable[[str], Any]) -> tuple[Signal, Any]:
        while True:
            if not self._left.get((modality, value)):
                usable = [one for one in self._pools.get((modality, value, self._split), ()) if self._usable(one)]
                if not usable:
                    raise ValueError(f"the package has no {value} {NOUNS[modality]} for the split {self._split}")
                self._left[modality, value] = [usable[i] for i in self._rng.permutation(len(usable))]
            signal = self._left[modality, value].pop()
            if signal.file not in self._read:
                self._read[signal.file] = read(signal.file)
            if self._usable(signal):
                return signal, self._read[signal.file]

    def _usable(self, signal: Signal) -> bool:
        return self._read.get(signal.file, ...) is not None


def right_letter(tag: str, truth: Mapping[str, str]) -> str:
    """Return the right letter of a question."""
    return LETTERS[sum(ATTRIBUTES[signal].index(truth[signal]) for signal in tag) % len(LETTERS)]


def write_split(root: Path, pools: Pools, folder: Path, split: str, rows: int, clips: int, seed: int = 0) -> Dataset:
    """
    Write the media and the questions of a split.

    Args:
        root: the unpacked stamps.
        pools: what [`read_pools`] found there.
        folder: where to write; media lie in a folder named by the split, questions in a table beside it.
        split: `cold`, `train` or `test`.
        rows: questions of each tag; the 64 combinations of signals come about equally often.
        clips: clips of each pair of kind and voice.
        seed: the same seed and library versions give the same files.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    (folder / split).mkdir(parents=True, exist_ok=True)
    dealer = Dealer(pools, split, rng)
    pairs = [*itertools.product(KINDS, VOICES)] * clips
    shown: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for number, index in enumerate(rng.permutation(len(pairs))):  # a file's number says nothing about its content
        kind, voice = pairs[index]
        seen, picture = dealer.deal("V", kind, lambda file: read_picture(root / file))
        heard, wave = dealer.deal("A", voice, lambda file: read_voice(root / file))
        path = f"{split}/clip-{number:04}.mp4"
        write_clip(folder / path, draw_frames(picture, rng), vary_voice(wave, rng), FRAME_RATE)
        shown[kind, voice].append(
            {"video": path, "clip": path}
            | {"thing_V": seen.thing, "thing_A": heard.thing, "file_V": seen.file, "file_A": heard.file}
        )
    written: dict[str, list[dict[str, str]]] = defaultdict(list)
    for number, text in enumerate([text for text in TEXTS for _ in range(clips * len(KINDS))]):
        read, _ = dealer.deal("S", text, str)
        path = f"{split}/subtitle-{number:04}.srt"
        write_subtitle(folder / path, read.text, 0, 900)
        written[text].append({"subtitle": path, "thing_S": read.thing, "file_S": read.file})
    table = Dataset.from_list(make_rows(split, rows, shown, written, rng))
    table.to_parquet(folder / f"{split}.parquet")
    return table


def make_rows(
    split: str,
    count: int,
    shown: Mapping[tuple[str, str], list],
    written: Mapping[str, list],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Make `count` questions of each tag, in random order."""
    combinations = [dict(zip("VAS", values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]
    rows = []
    for tag in ModalityTag:
        question = " " + " ".join(NOUNS[signal] for signal in tag.value) + "?"
        blocks = -(-count // len(combinations))
        order = np.concatenate([rng.permutation(len(combinations)) for _ in range(blocks)])[:count]
        for truth in (combinations[index] for index in order):
            clips, texts = shown[truth["V"], truth["A"]], written[truth["S"]]
            answer = right_letter(tag.value, truth)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "question": question,
                    "options": list(LETTERS),
                    "answer": answer,
                    "solution": answer,
                    "tag": tag.value,
                    "source": "tuxpaint-stamps",
                    **clips[rng.integers(len(clips))],
                    **texts[rng.integers(len(texts))],
                    **{f"truth_{signal}": value for signal, value in truth.items()},
                }
            )
    return [{"id": f"{split}-{number:04}", **rows[index]} for number, index in enumerate(rng.permutation(len(rows)))]
