"""
The seven-tag set: a procedurally made data set in which each modality is necessary for its tag.

A clip is a real mp4 file (H.264 video of four frames and an AAC audio track). A coloured shape moves in it and a tone
sounds; a word stands in an .srt file. Colour (video), pitch (audio) and word (subtitle) take four values each. The
question names the attributes of the row's tag, and the right letter is

    letter = "ABCD"[(sum of the indices of the tag's attributes) mod 4]

which is a Latin square: for every fixed choice of all attributes but one, the four values of that one give the four
letters. So no strict subset of a tag's modalities says anything about the answer, and neither do the modalities
outside the tag, although every row carries all three signals.

Folder layout:

    seven_tags.json            what the set was made with; written last
    train.parquet  test.parquet
    train/clip-000.mp4 …  train/subtitle-00.srt …
    test/clip-000.mp4 …   test/subtitle-00.srt …
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Value
from filelock import FileLock

from maple_trl.data.schema import LETTERS, QUESTION_COLUMNS, ROW_FEATURES
from maple_trl.files import user_cache
from maple_trl.modalities import Modality, ModalityTag


VERSION = 2
"""Version of what the generator writes; a set of another version is rebuilt by [`load_seven_tags`]."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 200, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
}
PITCHES: dict[str, float] = {"low": 220.0, "mid": 440.0, "high": 880.0, "top": 1760.0}  # Hz, an octave apart
WORDS: tuple[str, ...] = ("cat", "dog", "sun", "sea")

ATTRIBUTES: dict[Modality, tuple[str, ...]] = {
    Modality.VIDEO: tuple(COLORS),
    Modality.AUDIO: tuple(PITCHES),
    Modality.SUBTITLE: WORDS,
}
"""The four values of the attribute that each modality carries, in the order that gives their indices."""

NOUNS: dict[Modality, str] = {Modality.VIDEO: "color", Modality.AUDIO: "pitch", Modality.SUBTITLE: "word"}

FRAME_SIDE = 56  # pixels
NUM_FRAMES = 4
FRAME_RATE = 10  # frames per second: 0.4 s of video
SAMPLING_RATE = 16_000  # Hz
TONE_SAMPLES = 5 * 1024  # 0.32 s: a whole number of AAC frames, so that the decoded tone has exactly this length

STAMP_NAME = "seven_tags.json"

FEATURES = Features(
    {
        **QUESTION_COLUMNS,
        **{name: ROW_FEATURES[name] for name in ("clip", "source", "subtitle")},
        "truth_V": Value("string"),
        "truth_A": Value("string"),
        "truth_S": Value("string"),
    }
)


def right_letter(tag: ModalityTag | str, truth: Mapping[Modality, str]) -> str:
    """
    Return the right letter of a question.

    Args:
        tag (`ModalityTag` or `str`): the modalities that the question needs.
        truth (`Mapping[Modality, str]`): the attribute word of (at least) each modality of the tag.
    """
    modalities = ModalityTag.parse(tag).modalities
    return LETTERS[sum(ATTRIBUTES[modality].index(truth[modality]) for modality in modalities) % len(LETTERS)]


def question_of(tag: ModalityTag | str) -> str:
    """Return the question of a tag: the nouns of its modalities in canonical order, such as `"color pitch?"`."""
    return " ".join(NOUNS[modality] for modality in _ordered(tag)) + "?"


def options_of(tag: ModalityTag | str) -> list[str]:
    """
    Return what each letter means for a tag, as four texts.

    The text of a letter lists the attribute combinations that it stands for (`"red low or green top or …"`). The
    options depend on the tag alone, so they tell nothing about a row.
    """
    modalities = _ordered(tag)
    options: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for values in itertools.product(*(ATTRIBUTES[modality] for modality in modalities)):
        options[right_letter(tag, dict(zip(modalities, values, strict=True)))].append(" ".join(values))
    return [" or ".join(options[letter]) for letter in LETTERS]


def _ordered(tag: ModalityTag | str) -> list[Modality]:
    return [Modality(letter) for letter in ModalityTag.parse(tag).value]


def draw_frames(color: str, rng: np.random.Generator) -> np.ndarray:
    """
    Draw frames of a moving shape, `uint8` of shape `(NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3)`.

    Only the colour is given; shape, size, path, background and a slight shade of the colour are random. The shape
    moves in every frame, so no two neighbouring frames are equal.

    Args:
        color: a key of `COLORS`.
        rng: what the rest is drawn from.
    """
    radius = int(rng.integers(8, 14))
    kind = int(rng.integers(3))
    low, high = radius, FRAME_SIDE - 1 - radius
    x, y = rng.integers(low, high + 1, 2)
    speed_x, speed_y = rng.integers(2, 7, 2) * rng.choice([-1, 1], 2)
    shade = np.clip(np.array(COLORS[color]) * rng.uniform(0.75, 1.0) + rng.integers(-10, 11, 3), 0, 255)
    frames = np.full((NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), rng.integers(0, 60), np.uint8)
    rows, columns = np.mgrid[:FRAME_SIDE, :FRAME_SIDE]
    for frame in frames:
        across, down = np.abs(columns - x), np.abs(rows - y)
        distance = (np.maximum(across, down), np.hypot(across, down), across + down)[kind]  # square, disc, diamond
        frame[distance <= radius] = shade
        if not low <= x + speed_x <= high:
            speed_x = -speed_x
        if not low <= y + speed_y <= high:
            speed_y = -speed_y
        x, y = np.clip([x + speed_x, y + speed_y], low, high)
    return frames


def make_tone(pitch: str, rng: np.random.Generator) -> np.ndarray:
    """
    Make a noisy tone, `float32` of shape `(TONE_SAMPLES,)`, at `SAMPLING_RATE`; loudness, phase and detuning are random.

    Args:
        pitch: a key of `PITCHES`.
        rng: what the rest is drawn from.
    """
    frequency = PITCHES[pitch] * rng.uniform(0.96, 1.04)
    time = np.arange(TONE_SAMPLES) / SAMPLING_RATE
    tone = rng.uniform(0.2, 0.6) * np.sin(2 * np.pi * (frequency * time + rng.uniform()))
    return (tone + rng.normal(0.0, 0.01, TONE_SAMPLES)).astype(np.float32)


def write_clip(
    path: str | os.PathLike, frames: np.ndarray, waveform: np.ndarray, frame_rate: int = FRAME_RATE
) -> None:
    """
    Write an mp4 file with one H.264 and one AAC stream; the same input gives the same bytes.

    Args:
        path: file to write.
        frames (`np.ndarray`, uint8, `(T, H, W, 3)`): RGB frames. H and W must be even.
        waveform (`np.ndarray`, float32, `(n,)`): mono audio at `SAMPLING_RATE`.
        frame_rate (`int`): frames per second.
    """
    with av.open(os.fspath(path), "w", format="mp4") as container:
        # One thread: several would only cost start-up time on 56 x 56 pixels.
        video = container.add_stream("libx264", rate=frame_rate, options={"crf": "10", "bf": "0", "threads": "1"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono")
        audio.bit_rate = 48_000
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, frame_rate)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        sound.sample_rate = SAMPLING_RATE
        sound.pts, sound.time_base = 0, Fraction(1, SAMPLING_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


def write_subtitle(path: str | os.PathLike, word: str, start_ms: int, end_ms: int) -> None:
    """
    Write an .srt file with one cue.

    Args:
        path: file to write.
        word: the text of the cue.
        start_ms: when it begins, in milliseconds.
        end_ms: when it ends, in milliseconds.
    """

    def clock(milliseconds: int) -> str:
        seconds, rest = divmod(milliseconds, 1000)
        return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{rest:03}"

    Path(path).write_text(f"1\n{clock(start_ms)} --> {clock(end_ms)}\n{word}\n", encoding="utf-8", newline="\n")


def write_seven_tags(
    folder: str | os.PathLike,
    prompts_per_tag: int | Mapping[str, int] = 64,
    seed: int = 0,
    splits: Sequence[str] = ("train", "test"),
    clips_per_pair: int = 8,
) -> DatasetDict:
    """
    Write the set into `folder` and return its table.

    The attribute combinations of a tag come in blocks of all 64, in random order: with a multiple of 64 prompts per
    tag the set is exactly balanced. Clips are shared between rows; splits share none.

    Args:
        folder: where to write; made if absent.
        prompts_per_tag (`int` or `Mapping[str, int]`): rows of each of the seven tags in every split, or per split.
        seed (`int`): the same seed and library versions give the same bytes.
        splits (`Sequence[str]`): names of the splits. A split's content does not depend on which others are written.
        clips_per_pair (`int`): clips for each of the 16 pairs of colour and pitch, in every split.

    Returns:
        `DatasetDict` with one `Dataset` per split and the columns of `FEATURES`. `video` and `subtitle` are paths
        relative to `folder`; the audio of a row is the audio track of its video.

    Raises:
        ValueError: when a count is not positive, a split is missing from `prompts_per_tag`, or a name is unusable.
    """
    stamp = _stamp(prompts_per_tag, seed, splits, clips_per_pair)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = DatasetDict()
    for split, count in stamp["prompts_per_tag"].items():
        # The generator depends on the split's name, so that leaving out a split does not change the others.
        rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
        clips, subtitles = _write_media(folder, split, clips_per_pair, rng)
        tables[split] = Dataset.from_list(_make_rows(split, count, clips, subtitles, rng), features=FEATURES)
        pq.write_table(tables[split].data.table, folder / f"{split}.parquet")
    (folder / STAMP_NAME).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    return tables


def _stamp(
    prompts_per_tag: int | Mapping[str, int], seed: int, splits: Sequence[str], clips_per_pair: int
) -> dict[str, Any]:
    """Check what determines the content of a set, and return it in the form in which it is stored beside the set."""
    counts = prompts_per_tag if isinstance(prompts_per_tag, Mapping) else dict.fromkeys(splits, prompts_per_tag)
    for split in splits:
        if not split.isidentifier():
            raise ValueError(f"split {split!r} cannot be a folder name; use letters, digits and underscores")
        if split not in counts:
            raise ValueError(f"prompts_per_tag has no count for split {split!r}; it has {sorted(counts)}")
        if counts[split] < 1:
            raise ValueError(f"prompts_per_tag of split {split!r} must be at least 1, got {counts[split]}")
    if clips_per_pair < 1:
        raise ValueError(f"clips_per_pair must be at least 1, got {clips_per_pair}")
    return {
        "format": "maple_trl/seven-tags",
        "version": VERSION,
        "seed": seed,
        "prompts_per_tag": {split: counts[split] for split in splits},
        "clips_per_pair": clips_per_pair,
    }


def _write_media(
    folder: Path, split: str, clips_per_pair: int, rng: np.random.Generator
) -> tuple[dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """Write the media of a split; return the relative paths by (colour, pitch) and by word."""
    (folder / split).mkdir(exist_ok=True)
    pairs = list(itertools.product(COLORS, PITCHES)) * clips_per_pair
    clips: dict[tuple[str, str], list[str]] = {pair: [] for pair in pairs}
    # Random order, so that a file's number says nothing about its content.
    for number, index in enumerate(rng.permutation(len(pairs))):
        color, pitch = pairs[index]
        path = f"{split}/clip-{number:03}.mp4"
        write_clip(folder / path, draw_frames(color, rng), make_tone(pitch, rng))
        clips[color, pitch].append(path)
    words = WORDS * clips_per_pair
    subtitles: dict[str, list[str]] = {word: [] for word in words}
    for number, index in enumerate(rng.permutation(len(words))):
        path = f"{split}/subtitle-{number:02}.srt"
        start = int(rng.integers(0, 100))
        write_subtitle(folder / path, words[index], start, start + int(rng.integers(150, 300)))
        subtitles[words[index]].append(path)
    return clips, subtitles


def _make_rows(
    split: str,
    count: int,
    clips: Mapping[tuple[str, str], list[str]],
    subtitles: Mapping[str, list[str]],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Make `count` rows of each tag, in random order."""
    combinations = list(itertools.product(*ATTRIBUTES.values()))
    rows = []
    for tag in ModalityTag:
        blocks = -(-count // len(combinations))
        order = np.concatenate([rng.permutation(len(combinations)) for _ in range(blocks)])[:count]
        question, options = question_of(tag), options_of(tag)
        for index in order:
            color, pitch, word = combinations[index]
            answer = right_letter(tag, dict(zip(ATTRIBUTES, combinations[index], strict=True)))
            video = str(rng.choice(clips[color, pitch]))
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "question": question,
                    "options": options,
                    "answer": answer,
                    "solution": answer,
                    "tag": tag.value,
                    "video": video,
                    "clip": video,
                    "source": "seven-tags",
                    "subtitle": str(rng.choice(subtitles[word])),
                    "truth_V": color,
                    "truth_A": pitch,
                    "truth_S": word,
                }
            )
    return [{"id": f"{split}-{number:04}", **rows[index]} for number, index in enumerate(rng.permutation(len(rows)))]


def add_hints(rows: Dataset) -> Dataset:
    """
    Add a column `hint`: what the first signal of the tag shows, such as `"color: red"`.

    By the Latin square it says nothing about the answer. Where the tag has no other signal it would be all that is asked,
    and the hint is empty.
    """
    signals = [_ordered(tag) for tag in rows["tag"]]
    hints = [
        f"{NOUNS[first]}: {row[f'truth_{first.value}']}" if others else None
        for row, (first, *others) in zip(rows, signals, strict=True)
    ]
    return rows.add_column("hint", hints)


def default_folder(prompts_per_tag: int | Mapping[str, int] = 64, seed: int = 0) -> Path:
    """
    Return the folder in the user's cache where [`load_seven_tags`] keeps the set of these sizes and seed.

    The cache is `$XDG_CACHE_HOME/maple_trl`, by default `~/.cache/maple_trl`.

    Args:
        prompts_per_tag (`int` or `Mapping[str, int]`): as in [`write_seven_tags`].
        seed (`int`): likewise.
    """
    if isinstance(prompts_per_tag, Mapping):
        size = "-".join(f"{split}{count}" for split, count in prompts_per_tag.items())
    else:
        size = str(prompts_per_tag)
    return user_cache() / f"seven-tags-{size}-seed{seed}"


def load_seven_tags(
    folder: str | os.PathLike | None = None,
    prompts_per_tag: int | Mapping[str, int] = 64,
    seed: int = 0,
    splits: Sequence[str] = ("train", "test"),
    clips_per_pair: int = 8,
) -> DatasetDict:
    """
    Load the set, writing it first where it is absent, incomplete, or made with other settings or another version.

    The set is written beside its place and then renamed into it, so an interrupted or concurrent call never leaves a
    half-written set. With the default sizes that is 448 rows a split (7 tags x 64) on 128 clips, a few seconds.

    Args:
        folder: where the set is or shall be; also the media root of its paths. Default: [`default_folder`].
        prompts_per_tag, seed, splits, clips_per_pair: as in [`write_seven_tags`].

    Returns:
        `DatasetDict` as of [`write_seven_tags`].

    Raises:
        FileExistsError: when `folder` holds something else than such a set; nothing of it is touched.
        FileNotFoundError: when files vanish while the set is being written.
        ValueError: as of [`write_seven_tags`].
    """
    folder = Path(default_folder(prompts_per_tag, seed) if folder is None else folder).absolute()
    stamp = _stamp(prompts_per_tag, seed, splits, clips_per_pair)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        tables = _read(folder, stamp)
        if tables is not None:
            return tables
        if folder.exists() and any(folder.iterdir()) and not (folder / STAMP_NAME).is_file():
            raise FileExistsError(
                f"{folder} is not empty and holds no {STAMP_NAME}; name a new or an empty folder for the seven-tag set"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            write_seven_tags(Path(scratch, "new"), prompts_per_tag, seed, splits, clips_per_pair)
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            Path(scratch, "new").rename(folder)
        tables = _read(folder, stamp)
        if tables is None:
            raise FileNotFoundError(f"files of the seven-tag set vanished from {folder} while it was being written")
        return tables


def _read(folder: Path, stamp: Mapping[str, Any]) -> DatasetDict | None:
    """Read the set in `folder`; `None` where there is none with this stamp and all its files."""
    try:
        if json.loads((folder / STAMP_NAME).read_text(encoding="utf-8")) != stamp:
            return None
        tables = DatasetDict()
        for split in stamp["prompts_per_tag"]:
            rows = pq.read_table(folder / f"{split}.parquet").cast(FEATURES.arrow_schema)
            tables[split] = Dataset(rows)
            # A cleaner of old cache files may have taken some of the media.
            paths = {path for column in ("video", "subtitle") for path in rows[column].unique().to_pylist()}
            if not all((folder / path).is_file() for path in paths):
                return None
        return tables
    except (OSError, ValueError):  # absent or damaged; pyarrow's errors are kinds of ValueError and OSError
        return None
