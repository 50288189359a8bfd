"""
AVSBench (ECCV 2022, http://www.avlbench.opennlplab.cn): what sounds, and where in the picture.

Relied on: the authors' loaders. `s4_meta_data.csv` (single source) has the clip's name in its first column, the category in its third and a
column `split`; masks lie in `gt_masks/{split}/{category}/{name}/{name}_{second}.png`, the first second's alone in the training split. `metadata.csv`
(semantic) has `uid`, `label` (`v1s`, `v1m` or `v2`) and `split`, and frames, `audio.wav` and masks below `{label}/{uid}/`.

Guesses: clips of the first set lie in `raw_videos/{split}/{category}/{name}.mp4`; of the second, whose column `a_obj` names what sounds, in
`{label}/{uid}/video.mp4`. AVSBench has masks and no questions: the questions are this converter's. `avsbench` asks what sounds, and the answer is
words; `avsbench-boxes` asks where, and the answer is the box around the first second's mask, in pixels of the mask's picture, for
`box_iou_reward`. The masks must be there for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from maple_trl.data.benchmarks.base import FieldError, LeaveOut, Record, clips, file_name
from maple_trl.data.converters.base import Converter, Place, Sample
from maple_trl.modalities import ModalityTag


_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def _clip(record: Record) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Return what the samples of a record share, what sounds, and where its first mask may lie."""
    published = record.text("split")
    if published not in _SPLITS:
        raise FieldError("split", f"must be one of {', '.join(_SPLITS)}, but is {published!r}")
    if record.get("uid") is not None:
        name, folder = record.read("uid", file_name), record.read("label", file_name)
        category = record.text("a_obj")
        video, mask = clips("video", f"{folder}/{name}"), (f"{folder}/{name}/labels_rgb/0.png",)
        sound: tuple[str, ...] = (f"{folder}/{name}/audio.wav",)
    else:
        columns = list(record.fields)
        named = "category" if "category" in columns else columns[2] if len(columns) > 2 else "category"
        name, category = record.read(columns[0], file_name), record.read(named, file_name)
        place = f"{published}/{category}"
        video = clips(name, *(f"{folder}/{place}" for folder in ("raw_videos", "s4_data/raw_videos", "videos")))
        mask = tuple(f"{folder}/{place}/{name}/{name}_1.png" for folder in ("gt_masks", "s4_data/gt_masks"))
        sound = tuple(f"{folder}/{place}/{name}.wav" for folder in ("audio_wav", "s4_data/audio_wav"))
    known = {"clip": name, "name": name, "video": video, "track": sound, "split": _SPLITS[published]}
    return known, category.replace("_", " "), mask


def _object(record: Record, place: Place) -> Iterator[Sample]:
    known, category, _ = _clip(record)
    question = "What in this clip makes the sound that is heard? Name it, or say what it does, in a few words."
    yield Sample(question=question, solution=category, kind="text", question_type="sounding object", **known)


def _box(record: Record, place: Place) -> Iterator[Sample]:
    known, category, masks = _clip(record)
    path = next((place.root / mask for mask in masks if (place.root / mask).is_file()), None)
    if path is None:
        raise LeaveOut("no mask; put the masks below the media root")
    box, width, height = box_of(path)
    if box is None:
        raise LeaveOut("its first mask is empty")
    question = (
        "Where in the picture, in the clip's first second, is what makes the sound? Answer with the box around it, [x1, y1, x2, y2], in "
        f"pixels of a picture of {width} x {height}."
    )
    solution = f"[{', '.join(map(str, box))}]"
    yield Sample(question=question, solution=solution, kind="text", question_type=f"box of {category}", **known)


def box_of(path: Any) -> tuple[tuple[int, int, int, int] | None, int, int]:
    """
    Return the box around what a mask marks, and the mask's width and height; no box of an empty mask.

    Raises:
        FieldError: when the file is no picture.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).any(axis=-1)
    except (OSError, ValueError) as error:
        raise FieldError("mask", f"is no picture: {path}: {error}") from error
    height, width = pixels.shape
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not rows.size:
        return None, width, height
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), width, height


def _avsbench(name: str, title: str, read: Any) -> Converter:
    return Converter(
        name=name,
        title=title,
        source="AVSBench",
        read=read,
        tables=(("s4_meta_data.csv", None), ("metadata.csv", None), ("*.csv", None)),
        media="put clips and masks below the folder of the table, as their authors lay them out",
        hub="http://www.avlbench.opennlplab.cn",
        required=("split",),
        tag=ModalityTag.VA,
    )


AVSBENCH = _avsbench("avsbench", "AVSBench, what sounds", _object)
AVSBENCH_BOXES = _avsbench("avsbench-boxes", "AVSBench, where", _box)
