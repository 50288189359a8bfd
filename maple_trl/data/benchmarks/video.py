"""Benchmarks that ask for what a video shows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from maple_trl.data.benchmarks.base import (
    Benchmark,
    FieldError,
    LeaveOut,
    Medium,
    Question,
    Record,
    below,
    clips,
    file_name,
)
from maple_trl.data.benchmarks.options import (
    described,
    read_letter,
    read_option_index,
    read_option_text,
    read_options,
)
from maple_trl.modalities import ModalityTag


_TABLES = ("data/{split}-*.parquet", "{split}-*.parquet", "{split}.parquet", "{split}.jsonl", "{split}.json")

MVBENCH_FOLDERS: Mapping[str, str] = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""Where the clips of each of MVBench's tasks lie in its revision `video`, whose clips are cut to the question's span."""


def _mvbench(record: Record) -> Question:
    folder = MVBENCH_FOLDERS.get(record.table)
    if folder is None:
        raise FieldError(
            "task",
            f"is the name of the table, and must be one of {', '.join(MVBENCH_FOLDERS)}, but is {record.table!r}",
        )
    options = record.read("candidates", read_options)
    clip = record.path("video")
    if "." not in clip.rsplit("/", 1)[-1]:
        raise LeaveOut("the clip is a folder of single frames, which has no frame rate")
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=record.read("answer", read_option_text, options),
        category=record.table,
        videos=(Medium(below(f"{folder}/{clip}", "video", "videos", "data0613")),),
    )


# arXiv 2311.17005. V: the video alone; many clips have no sound.
MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench",
    read=_mvbench,
    required=("video", "question", "candidates", "answer"),
    kept=("start", "end", "accurate_start", "accurate_end", "fps"),
    tables=("json/*.json", "*.json"),
    splits=("test",),
    hub="OpenGVLab/MVBench",
    tag=ModalityTag.V,
    media="unpack the archives of the revision 'video' (clips cut to the question's span) into video/",
)


def _video_mme(record: Record) -> Question:
    options = record.read("options", read_options)
    clip = record.read("videoID", file_name)
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=record.read("answer", read_letter, options),
        category=record.text("task_type"),
        name=record.name("question_id"),
        videos=(Medium(clips(clip, "data", "videos", "video")),),
        subtitle=Medium((f"subtitle/{clip}.srt", f"subtitles/{clip}.srt")),
    )


# arXiv 2405.21075. V, its setting without subtitles. tags=['VS'] is the one with them, tags=['VA'] adds the sound.
VIDEO_MME = Benchmark(
    name="videomme",
    title="Video-MME",
    read=_video_mme,
    required=("videoID", "question_id", "question", "options", "answer", "task_type"),
    kept=("duration", "domain", "sub_category", "video_id", "url"),
    tables=("videomme/{split}-*.parquet", *_TABLES),
    splits=("test",),
    hub="lmms-eval/Video-MME",
    tag=ModalityTag.V,
    media="unpack the archives of videos into data/ and of subtitles into subtitle/",
)


def _lvbench(record: Record) -> Question:
    question, options = record.text("question"), record.get("options")
    if options:
        options = record.read("options", read_options)
    else:
        question, options = _options_in(question)
    return Question(
        question=question,
        options=tuple(options),
        solution=record.read("answer", read_letter, options),
        category=_category(record, "question_type"),
        videos=(Medium(below(record.path("video_path"), "videos", "data")),),
    )


def _options_in(question: str) -> tuple[str, list[str]]:
    """Split a question from the options in which it ends, one a line: `(A) red`."""
    lines = question.splitlines()
    first = next((i for i, line in enumerate(lines) if re.match(r"\s*\(?A[.):]", line)), None)
    rest = "\n".join(lines[first:]) if first else ""
    parts = re.split(r"\n(?=\s*\(?[B-Z][.):])", rest) if first else []
    if len(parts) < 2:
        raise FieldError("options", "is missing, and the question holds no lines '(A) …', '(B) …' at its end either")
    return "\n".join(lines[:first]).strip(), Record({"question": parts}).read("question", read_options)


def _category(record: Record, name: str) -> str | None:
    value = record.get(name)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return None if value is None else str(value)


# arXiv 2406.08035. V: the video alone. License: cc-by-nc-sa-4.0.
LVBENCH = Benchmark(
    name="lvbench",
    title="LVBench",
    read=_lvbench,
    required=("video_path", "question", "answer"),
    kept=("options", "question_type", "time_reference", "uid", "key", "type"),
    tables=_TABLES,
    splits=("train",),
    hub="lmms-eval/LVBench",
    tag=ModalityTag.V,
    media="unpack the archives of videos beside the table",
)


def _video_holmes(record: Record) -> Question:
    options = record.read("Options", read_options)
    return Question(
        question=record.text("Question"),
        options=tuple(options),
        solution=record.read("Answer", read_letter, options),
        category=record.text("Question Type"),
        name=record.name("Question ID"),
        videos=(Medium(clips(record.read("video ID", file_name), "videos_cropped", "videos")),),
    )


# arXiv 2505.21374. V, as lmms-eval asks it. The films have sound: tags=['VA'] adds it. License: apache-2.0, for
# academic use only; the films are their owners'.
VIDEO_HOLMES = Benchmark(
    name="video-holmes",
    title="Video-Holmes",
    read=_video_holmes,
    required=("video ID", "Question", "Options", "Answer", "Question ID", "Question Type"),
    kept=("Explanation",),
    tables=("{split}_Video-Holmes.json", *_TABLES),
    splits=("test", "train"),
    hub="TencentARC/Video-Holmes",
    tag=ModalityTag.V,
    media="unpack videos.zip, so that videos_cropped/{video ID}.mp4 is there",
)


def _mmvu(record: Record) -> Question:
    kind = record.text("question_type")
    if kind not in ("multiple-choice", "open-ended"):
        raise FieldError("question_type", f"must be multiple-choice or open-ended, but is {kind!r}")
    options = record.read("choices", read_options) if kind == "multiple-choice" else []
    solution = record.read("answer", read_letter, options) if options else record.text("answer")
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=solution,
        kind="option" if options else "text",
        metric="accuracy" if options else "judge",
        category=kind,
        name=record.name("id"),
        videos=(Medium(below(record.path("video_path"), "videos")),),
    )


# arXiv 2501.12380. V: the video alone. Metric: accuracy; open-ended questions (answer_kind 'text') are judged by a model.
MMVU = Benchmark(
    name="mmvu",
    title="MMVU",
    read=_mmvu,
    required=("id", "video_path", "question_type", "question", "choices", "answer"),
    kept=("metadata",),
    tables=_TABLES,
    splits=("validation",),
    hub="lmms-eval/MMVU",
    tag=ModalityTag.V,
    media="unpack the archives of videos beside the table",
)


def _tomato(record: Record) -> Question:
    options = record.read("options", read_options)
    answer = record.get("answer")
    if isinstance(answer, str):
        raise FieldError("answer", f"must be the number of an option from 0, but is {described(answer)}")
    return Question(
        question=record.text("question"),
        options=tuple(options),
        solution=record.read("answer", read_option_index, options),
        category=record.text("reason_type"),
        name=record.name("id"),
        videos=(Medium(below(record.path("video_path"), "videos")),),
    )


# arXiv 2410.23266; 16 frames. V: the video alone.
TOMATO = Benchmark(
    name="tomato",
    title="TOMATO",
    read=_tomato,
    required=("id", "video_path", "question", "options", "answer", "reason_type"),
    kept=("demonstration_type",),
    tables=_TABLES,
    splits=("test",),
    hub="lmms-eval/TOMATO",
    tag=ModalityTag.V,
    media="unpack the archives of videos beside the table",
)

VIDEO_BENCHMARKS = (MVBENCH, VIDEO_MME, LVBENCH, VIDEO_HOLMES, MMVU, TOMATO)
