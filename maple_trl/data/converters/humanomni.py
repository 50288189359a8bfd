"""
HumanOmniV2's records (`PhilipC/IntentTrain` and `PhilipC/IntentBench`, arXiv 2506.21277).

Relied on: the authors' `grpo_qwenomni.py`, and IntentBench's `qa.json`. A record is `{"problem", "options", "solution",
"problem_type", "data_type": "video"|"image"|"audio", "path"}`, where `path` may be `{"image": …, "audio": …}` for a picture with its
sound; `emer_ov` is an open question on emotions.

Guess: `process`, where a record has it, holds the thoughts of its cold start, as in Video-R1-CoT: then the row has a completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maple_trl.data.benchmarks.base import FieldError, Record, below, relative_path
from maple_trl.data.benchmarks.omni import INTENT_BENCH
from maple_trl.data.benchmarks.options import FormError
from maple_trl.data.converters.base import Converter, Place, Sample, of_question, optional_text
from maple_trl.data.converters.video_r1 import with_thoughts


def _human_omni(record: Record, place: Place) -> Iterator[Sample]:
    paths = record.get("path")
    fields = dict(record.fields)
    if fields.get("problem_type") == "emer_ov":
        fields["problem_type"] = "free-form"
    if isinstance(paths, Mapping):
        fields["path"], fields["data_type"] = paths.get("image"), "image"
    question = INTENT_BENCH.read(Record(fields, record.table))
    clip = (question.videos or question.audios or ())[0].paths[0]
    sample = of_question(question, clip=clip, question_type=record.text("problem_type"))
    if isinstance(paths, Mapping):
        sample = Sample(**{**vars(sample), "audio": below(_path(paths, "audio"), "videos")})
    if optional_text(record, "process"):
        sample = with_thoughts(sample, record, "HumanOmniV2's annotation pipeline")
    yield sample


def _path(paths: Mapping[str, object], name: str) -> str:
    try:
        return relative_path(paths.get(name))
    except FormError as error:
        raise FieldError(f"path.{name}", str(error)) from error


HUMAN_OMNI = Converter(
    name="humanomni",
    title="HumanOmniV2",
    source="HumanOmniV2",
    read=_human_omni,
    tables=(("qa.json", "test"), ("*_rewrite.json", "train"), ("*.json", "train"), ("*.jsonl", "train")),
    media="unpack the archives of videos into videos/",
    hub="PhilipC/IntentTrain",
    required=("problem", "solution", "problem_type", "data_type"),
    further=("completion",),
)
