"""
Daily-Omni: multiple-choice questions on everyday clips of 30 or 60 seconds (`liarliar/Daily-Omni`, 1 197 questions).

The rows of the benchmark `daily-omni` ([`~maple_trl.data.benchmarks.load_benchmark`]) for training, from the published
files where they lie:

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

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, Features, Value

from maple_trl.data.benchmarks import load_benchmark
from maple_trl.data.benchmarks.omni import CAPTION_FILES, DAILY_OMNI
from maple_trl.data.schema import QUESTION_COLUMNS
from maple_trl.modalities import Modality, ModalityTag


logger = logging.getLogger(__name__)

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

# Every row has its caption, whatever its tag, so that `with_tags` can give it another one.
_WITH_CAPTIONS = dataclasses.replace(
    DAILY_OMNI, read=lambda record: dataclasses.replace(DAILY_OMNI.read(record), stand_in=False)
)


def load_daily_omni(root: str | os.PathLike, tags: Iterable[ModalityTag | str] | None = None) -> Dataset:
    """
    Load the questions whose clips exist below `root`, in the order of `qa.json`.

    How many questions were left out is logged as a warning.

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
        FileNotFoundError: when `qa.json` is missing.
        BenchmarkError: for the first record that is malformed, naming file, record and field; and when every clip is
            missing.
    """
    dataset = Dataset.from_list(list(map(_row, load_benchmark(_WITH_CAPTIONS, root))), features=FEATURES)
    return dataset if tags is None else with_tags(dataset, tags)


def _row(found: dict[str, Any]) -> dict[str, Any]:
    record = json.loads(found["record"])
    return {
        **{name: found[name] for name in FEATURES if name in found},
        "id": f"daily-omni-{int(found['id'].rpartition('-')[2]):04}",
        "video": found["video"][0],
        "audio": found["audio"][0] if found["audio"] else None,
        "video_id": record["video_id"],
        **{name: _detail(record.get(name)) for name in DETAILS},
    }


def _detail(value: Any) -> str | None:
    """Read a text; Daily-Omni writes `null`, "None" and "No … provided" where it has nothing to tell."""
    text = "" if value is None else str(value).strip()
    return None if text in ("", "None") or re.fullmatch(r"No \w+ provided", text) else text


def with_tags(dataset: Dataset, tags: Iterable[ModalityTag | str] = tuple(ModalityTag)) -> Dataset:
    """
    Repeat every row once for each of the given tags; a question's rows follow each other, and `id` ends in the tag.

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
