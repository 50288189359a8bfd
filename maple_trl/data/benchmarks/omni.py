"""Benchmarks that ask for picture and sound together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from maple_trl.data.benchmarks.base import (
    Benchmark,
    FieldError,
    Medium,
    Question,
    Record,
    below,
    file_name,
    relative_path,
)
from maple_trl.data.benchmarks.options import (
    FormError,
    described,
    read_letter,
    read_letters,
    read_number,
    read_option_text,
    read_options,
    unwrapped,
)
from maple_trl.modalities import ModalityTag


CAPTION_FILES = ("audio_revised_captions.txt", "audio_detail_captions.txt")
"""Files that may stand in for a clip's subtitles in Daily-Omni; the first that exists and is not empty is taken."""


def _daily_omni(record: Record) -> Question:
    clip = record.read("video_id", file_name)
    options = record.read("Choice", read_options)
    folder = f"Videos/{clip}"
    return Question(
        question=record.text("Question"),
        options=tuple(options),
        solution=record.read("Answer", read_letter, options),
        category=record.text("Type"),
        videos=(Medium((f"{folder}/{clip}_video.mp4",)),),
        track=Medium((f"{folder}/{clip}_audio.wav",)),
        subtitle=Medium(tuple(f"{folder}/{name}" for name in CAPTION_FILES)),
        stand_in=True,
    )


# arXiv 2505.17862. VA: video and its sound. It has no subtitles; under a tag with S the caption of the sound that its
# authors' pipeline wrote stands in, which the questions were made from: no measure of subtitles.
DAILY_OMNI = Benchmark(
    name="daily-omni",
    title="Daily-Omni",
    read=_daily_omni,
    required=("Question", "Choice", "Answer", "video_id", "Type"),
    kept=("content_parent_category", "content_fine_category", "video_category", "video_duration"),
    tables=("qa.json",),
    splits=("test",),
    hub="liarliar/Daily-Omni",
    tag=ModalityTag.VA,
    media="unpack Videos.tar, so that Videos/{video_id}/{video_id}_video.mp4 is there",
)

_INTENT_KINDS = {
    "multiple choice": "option",
    "emer_ov_mc": "options",
    "judge": "yes_no",
    "numerical": "number",
    "regression": "number",
    "free-form": "text",
    "OCR": "text",
}
_INTENT_METRICS = {"emer_ov_mc": "letters_f1", "free-form": "rouge", "OCR": "word_error_rate"}


def _intent_bench(record: Record) -> Question:
    problem_type = record.text("problem_type")
    kind = _INTENT_KINDS.get(problem_type)
    if kind is None:
        raise FieldError("problem_type", f"must be one of {', '.join(_INTENT_KINDS)}, but is {problem_type!r}")
    data_type = record.text("data_type")
    if data_type not in ("video", "image", "audio"):
        raise FieldError("data_type", f"must be video, image or audio, but is {data_type!r}")
    if record.get("video") is None and record.get("path") is None:
        raise FieldError("video", "must be a path (or field 'path'), but both are missing")
    path = record.path("path" if record.get("video") is None else "video")
    options = record.read("options", read_options) if kind in ("option", "options") else []
    if kind == "option":
        solution = record.read("solution", read_letter, options)
    elif kind == "options":
        solution = record.read("solution", read_letters, options)
    else:
        solution = str(unwrapped(record.text("solution")))
        if kind == "yes_no":
            solution = solution.capitalize()
            if solution not in ("Yes", "No"):
                raise FieldError("solution", f"must be Yes or No, but is {solution!r}")
    medium = Medium(below(path, "videos"), still=data_type == "image")
    return Question(
        question=record.text("problem"),
        options=tuple(options),
        solution=solution,
        kind=kind,
        metric=_INTENT_METRICS.get(problem_type, "accuracy"),
        category=problem_type,
        videos=() if data_type == "audio" else (medium,),
        audios={"image": (), "audio": (medium,)}.get(data_type),
    )


# HumanOmniV2, arXiv 2506.21277. VA: video and its sound (a clip without sound as it is); V for a picture, A for a
# sound alone. Metric: accuracy; of questions with several right options the F1 of their letters, of transcripts the word
# error rate, of free answers ROUGE.
INTENT_BENCH = Benchmark(
    name="intentbench",
    title="IntentBench",
    read=_intent_bench,
    required=("problem", "options", "solution", "problem_type", "data_type"),
    kept=("video", "path"),
    tables=("qa.json",),
    splits=("test",),
    hub="PhilipC/IntentBench",
    tag=ModalityTag.VA,
    media="unpack videos.zip, so that videos/{video} is there",
)


def _omni_bench(record: Record) -> Question:
    options = record.read("options", read_options)
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=record.read("answer", read_option_text, options),
        category=record.text("task type"),
        name=None if record.get("index") is None else record.name("index"),
        videos=(_embedded(record, "image", still=True),),
        audios=(_embedded(record, "audio"),),
    )


def _embedded(record: Record, name: str, still: bool = False) -> Medium:
    """Return a file that the table holds as `{"bytes", "path"}`, or names (JSON has `{name}_path`)."""
    own = name if record.get(name) is not None or f"{name}_path" not in record.fields else f"{name}_path"
    value = record.get(own)
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            path = value.get("path")
            suffix = PurePosixPath(path).suffix if isinstance(path, str) else ""
            return Medium((f"{name}{suffix or ('.png' if still else '.wav')}",), content=value["bytes"], still=still)
        value = value.get("path")
    try:
        path = relative_path(value)
    except FormError as error:
        raise FieldError(own, f"must hold a file or its path, but is {described(record.get(own))}") from error
    return Medium(below(path, name, f"mm_data/{name}"), still=still)


# arXiv 2409.15272. VA: a picture and a sound.
OMNI_BENCH = Benchmark(
    name="omnibench",
    title="OmniBench",
    read=_omni_bench,
    required=("question", "options", "answer", "task type"),
    kept=("audio", "image", "audio content", "image content"),
    tables=("data/{split}-*.parquet", "{split}-*.parquet", "*.parquet", "dataset/*.jsonl", "*.jsonl"),
    splits=("train",),
    hub="m-a-p/OmniBench",
    tag=ModalityTag.VA,
    media="pictures and sounds are inside the Parquet files; write_media=True writes them out",
)


def _world_sense(record: Record) -> Question:
    options = record.read("candidates", read_options)
    subtitle = record.path("subtitle_path") if record.get("subtitle_path") else None
    clip = record.path("video_path")
    track = record.path("audio_path") if record.get("audio_path") else None
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=record.read("answer", read_letter, options),
        category=record.text("task_type"),
        name=record.name("index"),
        videos=(Medium(below(clip, "videos")),),
        track=Medium(below(track, "audios")) if track else None,
        subtitle=Medium(below(subtitle, "subtitles")) if subtitle else None,
    )


# arXiv 2502.04326. VA: video and its sound. tags=['VAS'] adds the subtitles that it publishes.
WORLD_SENSE = Benchmark(
    name="worldsense",
    title="WorldSense",
    read=_world_sense,
    required=("index", "video_path", "candidates", "task_type", "question", "answer"),
    kept=("video", "duration", "domain", "task_domain", "audio_class", "subtitle_path", "audio_path"),
    tables=("data/{split}-*.parquet", "{split}-*.parquet", "{split}.parquet", "{split}.jsonl", "{split}.json"),
    splits=("test",),
    hub="lmms-lab/worldsense",
    tag=ModalityTag.VA,
    media="unpack the archives of videos, audios and subtitles beside the table",
)


def _av_odyssey(record: Record) -> Question:
    options = record.read("options", read_options)
    data_type = record.text("data_type").lower()
    pictures = tuple(Medium(below(path, "data"), still=True) for path in record.paths("image_path"))
    videos = tuple(Medium(below(path, "data")) for path in record.paths("video_path"))
    # Both lists may be filled; what the question speaks of is said by data_type.
    shown = pictures if "image" in data_type else videos if "video" in data_type else ()
    if "image" not in data_type and "video" not in data_type:
        raise FieldError("data_type", f"must name image or video, but is {data_type!r}")
    audios = tuple(Medium(below(path, "data")) for path in record.paths("audio_path"))
    if not audios:
        raise FieldError("audio_path", "must name at least one sound, but is empty")
    question = record.text("question")
    _check_marks(question, options, len(shown), len(audios))
    return Question(
        question=question,
        options=tuple(options),
        solution=record.read("answer", read_letter, options),
        category=record.text("subfield"),
        name=record.name("question_id"),
        videos=shown,
        audios=audios,
    )


def _check_marks(question: str, options: list[str], shown: int, heard: int) -> None:
    """Check that `[img2]`, `[audio1]` and `[video1]` in a text have their medium: the order of media tells it."""
    marks = re.findall(r"\[(img|video|audio)([0-9]+)\]", "\n".join([question, *options]))
    for kind, number in marks:
        there = heard if kind == "audio" else shown
        if not 1 <= int(number) <= there:
            name = {"img": "image_path", "video": "video_path", "audio": "audio_path"}[kind]
            raise FieldError(name, f"has {there} paths, but the question speaks of [{kind}{number}]")


# arXiv 2412.02611. VA: pictures or a clip, then the sounds. They stand before
# the question in the order of its marks [img1], [audio1], …, and not at the marks; a clip's own track is not used.
# License: apache-2.0.
AV_ODYSSEY = Benchmark(
    name="av-odyssey",
    title="AV-Odyssey Bench",
    read=_av_odyssey,
    required=("question_id", "question", "options", "answer", "data_type", "subfield", "audio_path"),
    kept=("image_path", "video_path"),
    tables=("av_odyssey.parquet", "{split}-*.parquet", "{split}.parquet", "{split}.jsonl", "{split}.json"),
    splits=("test",),
    hub="AV-Odyssey/AV_Odyssey_Bench_LMMs_Eval",
    tag=ModalityTag.VA,
    media="unpack the archives beside the table",
)


def _av_counting(record: Record) -> Question:
    path = record.path("video")
    return _count(record, Medium(below(path, "cg_videos_720p", "videos")))


def _av_counting_clip(record: Record) -> Question:
    interval = record.get("query_interval")
    numbers = [n for n in interval if isinstance(n, int | float)] if isinstance(interval, list) else []
    if len(numbers) != 2 or len(interval) != 2:
        raise FieldError("query_interval", f"must be [start, end] in seconds, but is {described(interval)}")
    stem = PurePosixPath(record.path("video")).stem
    name = f"{stem}_{numbers[0]:.2f}_{numbers[1]:.2f}.mp4"
    return _count(record, Medium((f"ref_videos/{name}",)))


def _count(record: Record, clip: Medium) -> Question:
    return Question(
        question=record.text("question"),
        solution=record.read("answer", read_number),
        kind="number",
        metric="counting",
        category=record.text("category"),
        name=record.name("index"),
        videos=(clip,),
    )


def _av_counting_benchmark(name: str, title: str, read, media: str) -> Benchmark:
    # arXiv 2506.05328; access is granted on request. VA: video and its sound for every question; field 'type' says
    # where query and clue are. Metric: share of exact counts (ACC), of counts off by at most one (OBOA), MAE and RMSE.
    return Benchmark(
        name=name,
        title=title,
        read=read,
        required=("index", "video", "question", "answer", "type", "category"),
        kept=("query_interval", "clue"),
        tables=("{split}-*.parquet", "{split}.parquet", "data/{split}-*.parquet", "{split}.jsonl", "{split}.json"),
        splits=("test",),
        hub="CG-Bench/CG-AV-Counting",
        tag=ModalityTag.VA,
        media=media,
    )


AV_COUNTING = _av_counting_benchmark(
    "av-counting",
    "CG-AV-Counting, whole videos",
    _av_counting,
    "join and unpack videos.zip.part*, so that cg_videos_720p/{video} is there",
)
AV_COUNTING_CLIPS = _av_counting_benchmark(
    "av-counting-clips",
    "CG-AV-Counting, reference clips",
    _av_counting_clip,
    "join and unpack ref_videos.zip.part*, so that ref_videos/{video}_{start}_{end}.mp4 is there",
)

OMNI_BENCHMARKS = (
    DAILY_OMNI,
    INTENT_BENCH,
    OMNI_BENCH,
    WORLD_SENSE,
    AV_ODYSSEY,
    AV_COUNTING,
    AV_COUNTING_CLIPS,
)
