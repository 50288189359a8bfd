"""
AVQA (ACM MM 2022, https://mn.cs.tsinghua.edu.cn/avqa): questions on clips of VGGSound.

Relied on: code that reads `train_qa.json` and `val_qa.json`: `{"id", "video_name", "video_id", "question_text", "multi_choice": [four
texts], "answer": number of the right one from 0, "question_relation", "question_type"}`, and its repository's folder `data/video`, whose
files are `{video_name}.mp4`.

Guesses: `question_relation` says which signals a question needs, `View` or `Visual` V, `Sound` or `Audio` A, `Both` VA (its annotators' opinion,
kept in `required_tag`, empty for other words). All are fed VA, as AVATAR's second stage feeds them.
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import Record, clips, file_name
from maple_trl.data.benchmarks.options import read_option_index, read_options
from maple_trl.data.converters.base import Converter, Place, Sample, optional_text
from maple_trl.modalities import ModalityTag


RELATIONS = {
    "view": ModalityTag.V,
    "visual": ModalityTag.V,
    "sound": ModalityTag.A,
    "audio": ModalityTag.A,
    "both": ModalityTag.VA,
}


def _avqa(record: Record, place: Place) -> Iterator[Sample]:
    options = record.read("multi_choice", read_options)
    clip = record.read("video_name", file_name)
    relation = optional_text(record, "question_relation")
    yield Sample(
        clip=clip,
        question=record.text("question_text"),
        options=tuple(options),
        solution=record.read("answer", read_option_index, options),
        name=None if record.get("id") is None else record.name("id"),
        question_type=optional_text(record, "question_type"),
        video=clips(clip, "videos", "video", "data/video"),
        required_tag=RELATIONS.get((relation or "").lower()),
    )


AVQA = Converter(
    name="avqa",
    title="AVQA",
    source="AVQA",
    read=_avqa,
    tables=(("train_qa.json", "train"), ("val_qa.json", "validation"), ("test_qa.json", "test")),
    media="put VGGSound's clips into videos/, as {video_name}.mp4",
    hub="https://mn.cs.tsinghua.edu.cn/avqa",
    required=("video_name", "question_text", "multi_choice", "answer"),
    tag=ModalityTag.VA,
)
