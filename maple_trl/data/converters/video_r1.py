"""
Video-R1 and Video-R1-CoT (`Video-R1/Video-R1-data`, arXiv 2503.21776): questions on clips and on pictures.

Relied on: the data card's example, and the authors' `grpo.py` and `sft_video.py`. A record of `Video-R1-260k.json` or
`Video-R1-COT-165k.json` is `{"problem_id", "problem", "data_type": "video"|"image", "problem_type": "multiple choice"|
"numerical"|"OCR"|"free-form"|"regression", "options": ["A. …"], "process": "<think>…</think>", "solution": "<answer>B</answer>",
"path": "./…"}`; `process` is filled in the CoT file, whose thoughts Qwen2.5-VL-72B-Instruct wrote (their paper), and the two
together are what a model is trained to say.

Guesses: rows of one file (`path`) are of one clip. The tag is V, as its authors feed pictures alone; many of the clips have no sound.
A picture's row has `image`, and no `video`.
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import FieldError, Record
from maple_trl.data.benchmarks.options import read_letter, read_options
from maple_trl.data.converters.base import Converter, Place, Sample, answer_text
from maple_trl.data.converters.turns import without_marks
from maple_trl.modalities import ModalityTag


KINDS = {
    "multiple choice": "option",
    "numerical": "number",
    "regression": "number",
    "OCR": "text",
    "free-form": "text",
}
_THINKER = "Qwen2.5-VL-72B-Instruct"
_REQUIRED = ("problem", "data_type", "problem_type", "solution", "path")


def _question(record: Record) -> Sample:
    problem_type, data_type = record.text("problem_type"), record.text("data_type")
    kind = KINDS.get(problem_type)
    if kind is None:
        raise FieldError("problem_type", f"must be one of {', '.join(KINDS)}, but is {problem_type!r}")
    if data_type not in ("video", "image"):
        raise FieldError("data_type", f"must be video or image, but is {data_type!r}")
    options = record.read("options", read_options) if kind == "option" else []
    path = record.path("path")
    name = None if record.get("problem_id") is None else record.name("problem_id")
    media = {data_type: (path,)}
    return Sample(
        clip=path,
        question=without_marks(record.text("problem")),
        solution=record.read("solution", read_letter, options) if options else answer_text(record, "solution"),
        kind=kind,
        options=tuple(options),
        name=name,
        question_type=problem_type,
        video=media.get("video", ()),
        image=media.get("image", ()),
    )


def _video_r1(record: Record, place: Place) -> Iterator[Sample]:
    yield _question(record)


def _video_r1_cot(record: Record, place: Place) -> Iterator[Sample]:
    sample = _question(record)
    yield with_thoughts(sample, record, _THINKER)


def with_thoughts(sample: Sample, record: Record, model: str) -> Sample:
    """
    Add the completion of a record with thoughts (`process`) and answer (`solution`).

    Raises:
        FieldError: when it has no thoughts, or they do not end where they must.
    """
    process = record.text("process")
    begins, ends = process.count("<think>"), process.count("</think>")
    if (begins, ends) not in ((0, 0), (1, 1)):
        raise FieldError("process", f"must be <think>…</think>, but has {begins} beginnings and {ends} ends")
    thoughts = process if begins else f"<think>{process}</think>"
    solution = record.text("solution")
    answer = solution if "<answer>" in solution else f"<answer>{solution}</answer>"
    further = {**sample.further, "completion": f"{thoughts}{answer}"}
    return Sample(**{**vars(sample), "further": further, "written": (*sample.written, ("completion", model))})


VIDEO_R1 = Converter(
    name="video-r1",
    title="Video-R1",
    source="Video-R1",
    read=_video_r1,
    tables=(("Video-R1-260k.json", "train"), ("Video-R1-260k.jsonl", "train")),
    media="unpack the archives of videos and pictures beside the file, so that its paths lead to them",
    hub="Video-R1/Video-R1-data",
    required=_REQUIRED,
    tag=ModalityTag.V,
)
VIDEO_R1_COT = Converter(
    name="video-r1-cot",
    title="Video-R1-CoT",
    source="Video-R1-CoT",
    read=_video_r1_cot,
    tables=(("Video-R1-COT-165k.json", "train"), ("Video-R1-COT-165k.jsonl", "train")),
    media=VIDEO_R1.media,
    hub="Video-R1/Video-R1-data",
    required=(*_REQUIRED, "process"),
    tag=ModalityTag.V,
    further=("completion",),
)
