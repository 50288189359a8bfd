"""
Daily-Omni: multiple-choice questions on everyday clips of 30 or 60 seconds (`liarliar/Daily-Omni`, 1 197 questions).

Reads the published files where they lie; nothing is downloaded:

    qa.json
    Videos/{video_id}/{video_id}_video.mp4
    Videos/{video_id}/{video_id}_audio.wav               optional; without it the video's own audio track is used
    Videos/{video_id}/audio_revised_captions.txt         optional; see below

Daily-Omni has neither modality tags nor subtitles. A row gets the tag that the caller asks for, by default VA, which is
what the benchmark feeds. **Such a tag says what a row is fed, not what its question needs.**

A tag with S needs a text. The caption file that its authors' pipeline wrote for the audio track stands in: a
description of sounds that quotes some of the speech. It is written by a model, it is no transcript, and the questions
were made from such captions, so that accuracy under a tag with S is no measure of subtitles. It serves to send real
data through all seven tags.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from maple_trl.data.schema import LETTERS, QUESTION_COLUMNS
from maple_trl.modalities import Modality, ModalityTag


logger = logging.getLogger(__name__)

QUESTIONS_FILE = "qa.json"
CAPTION_FILES = ("audio_revised_captions.txt", "audio_detail_captions.txt")
"""Files that may stand in for a clip's subtitles; the first that exists and is not empty is taken."""

INSTRUCTION = (
    "Think about it first, then answer with the letter of the one right option, in this form: "
    "<think>your thoughts</think><answer>LETTER</answer>"
)

DETAILS = ("Type", "content_parent_category", "content_fine_category", "video_category", "video_duration")
"""Fields of Daily-Omni that are kept under their own names."""

FEATURES = Features(
    {
        **QUESTION_COLUMNS,
        "audio": Value("string"),
        "subtitle": Value("string"),
        "video_id": Value("string"),
        **{name: Value("string") for name in DETAILS},
    }
)


def load_daily_omni(root: str | os.PathLike, tags: Iterable[ModalityTag | str] | None = None) -> Dataset:
    """
    The questions whose clips exist below `root`, in the order of `qa.json`.

    How many questions and clips were left out is logged as a warning.

    Args:
        root: the folder that holds `qa.json` and `Videos`; also the media root of the paths in the table.
        tags (iterable of `ModalityTag` or `str`, *optional*):
            Give every question once in each of these tags, see [`with_tags`]. Default: VA.

    Returns:
        `Dataset` with the columns of `FEATURES`: `prompt` (one user message with question, options and the form of the
        answer), `options` (four texts without their letters), `answer` and `solution` (the letter), `video`, `audio`
        (`None` without a wav file), `subtitle` (the stand-in of the module's description, `None` without one), and
        what Daily-Omni tells about the question, `None` where it tells nothing.

    Raises:
        FileNotFoundError: when `qa.json` is missing, or every clip.
        ValueError: for the first record that is malformed, naming file, record and field.
    """
    root = Path(root)
    path = root / QUESTIONS_FILE
    rows, absent = [], []
    for number, record in enumerate(_read_records(path)):
        row = _row(record, number, f"{path}, record {number}")
        if (root / row["video"]).is_file():
            rows.append(row | _media_of(root, row["video_id"]))
        else:
            absent.append(row["video_id"])
    if not rows:
        raise FileNotFoundError(
            f"{root / 'Videos'}: none of the {len(set(absent))} clips of {QUESTIONS_FILE} is there. Unpack Daily-Omni's "
            f"Videos.tar so that the first one becomes {root / _video_path((absent or ['ID'])[0])}"
        )
    if absent:
        logger.warning(
            "Daily-Omni: %d of %d questions are left out, because %d of %d clips are not below %s",
            len(absent),
            len(absent) + len(rows),
            len(set(absent)),
            len({*absent, *(row["video_id"] for row in rows)}),
            root / "Videos",
        )
    dataset = Dataset.from_list(rows, features=FEATURES)
    return dataset if tags is None else with_tags(dataset, tags)


def with_tags(dataset: Dataset, tags: Iterable[ModalityTag | str] = tuple(ModalityTag)) -> Dataset:
    """
    Every row once in each of the given tags; a question's rows follow each other, and `id` gets the tag behind it.

    A row without subtitle text is left out of the tags with S, which is logged as a warning.

    Args:
        dataset (`Dataset`): rows of [`load_daily_omni`].
        tags (iterable of `ModalityTag` or `str`, *optional*): default: all seven.

    Raises:
        ValueError: for an unknown tag, for no tag at all, and when no row is left.
    """
    tags = [ModalityTag.parse(tag) for tag in tags]
    if not tags:
        raise ValueError(f"tags is empty; give at least one of {', '.join(ModalityTag)}")
    rows, left_out = [], 0
    for row in dataset:
        for tag in tags:
            if Modality.SUBTITLE in tag.modalities and not row["subtitle"]:
                left_out += 1
            else:
                rows.append({**row, "tag": tag.value, "id": f"{row['id']}-{tag.value}"})
    if not rows:
        raise ValueError(
            f"No row is left in the tags {', '.join(tag.value for tag in tags)}: the data set has {len(dataset)} rows, "
            f"and none has the subtitle text that S needs (a caption file beside its clip, {' or '.join(CAPTION_FILES)})"
        )
    if left_out:
        logger.warning(
            "Daily-Omni: %d rows of tags with S are left out, because their clips have no caption", left_out
        )
    return Dataset.from_list(rows, features=dataset.features)


def _read_records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist; give the folder of Daily-Omni that holds {QUESTIONS_FILE} and Videos"
        ) from error
    except ValueError as error:  # not UTF-8, or not JSON; the message holds the place
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list of questions, but holds {_described(records)}")
    return records


def _row(record: Any, number: int, place: str) -> dict[str, Any]:
    """A row of the table without what depends on files."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} must be an object with the fields of a question, but is {_described(record)}")

    def text(name: str) -> str:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: field '{name}' must be a text, but is {_described(value, name in record)}")
        return value.strip()

    video_id, question, answer = text("video_id"), text("Question"), text("Answer")
    if not re.fullmatch(r"[\w-]+", video_id):  # it becomes part of a path
        raise ValueError(f"{place}: field 'video_id' must be letters, digits, '_' and '-', but is {video_id!r}")
    options = _options(record.get("Choice"), f"{place}: field 'Choice'")
    if answer not in tuple(LETTERS):
        raise ValueError(f"{place}: field 'Answer' must be one of {', '.join(LETTERS)}, but is {answer!r}")
    lines = [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)), INSTRUCTION]
    return {
        "id": f"daily-omni-{number:04}",
        "prompt": [{"role": "user", "content": "\n".join(lines)}],
        "question": question,
        "options": options,
        "answer": answer,
        "solution": answer,
        "tag": ModalityTag.VA.value,
        "video": _video_path(video_id),
        "video_id": video_id,
        **{name: _detail(record.get(name)) for name in DETAILS},
    }


def _options(choices: Any, place: str) -> list[str]:
    """The texts of `["A. …", "B. …", "C. …", "D. …"]`."""
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise ValueError(f"{place} must be a list of {len(LETTERS)} options, but is {_described(choices)}")
    options = []
    for letter, choice in zip(LETTERS, choices, strict=True):
        match = re.fullmatch(rf"{letter}\.\s*(\S.*)", choice.strip(), re.DOTALL) if isinstance(choice, str) else None
        if match is None:
            raise ValueError(f"{place} must have '{letter}. …' as option {letter}, but has {choice!r}")
        options.append(match[1])
    return options


def _detail(value: Any) -> str | None:
    """Daily-Omni writes `null`, "None" and "No … provided" where it has nothing to tell."""
    text = "" if value is None else str(value).strip()
    return None if text in ("", "None") or re.fullmatch(r"No \w+ provided", text) else text


def _video_path(video_id: str) -> str:
    return f"Videos/{video_id}/{video_id}_video.mp4"


def _media_of(root: Path, video_id: str) -> dict[str, str | None]:
    """The other media of a clip: its wav file and its caption."""
    audio = f"Videos/{video_id}/{video_id}_audio.wav"
    subtitle = None
    for name in CAPTION_FILES:
        path = root / "Videos" / video_id / name
        if subtitle is None and path.is_file():
            try:
                subtitle = path.read_text(encoding="utf-8").strip() or None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return {"audio": audio if (root / audio).is_file() else None, "subtitle": subtitle}


def _described(value: Any, present: bool = True) -> str:
    if not present:
        return "missing"
    if isinstance(value, (str, int, float, bool)) or value is None:
        return repr(value)
    return f"{type(value).__name__} of {len(value)} items" if isinstance(value, (list, dict)) else type(value).__name__
