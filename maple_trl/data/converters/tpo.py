"""
TPO, the preference data of Temporal Preference Optimization (`ruili0/LongVA-TPO-10k`, arXiv 2501.13919).

Relied on: the set is one `dataset.csv` of 10 000 rows beside an archive `videos` in parts (its repository's file list), each row a
question with a preferred and a rejected answer of LongVA-7B (the paper).

Guesses: the names of its columns. Taken are `video`, `video_path` or `video_id`; `prompt`, `question` or `query`; `chosen`,
`preferred` or `chosen_response`; `rejected`, `dispreferred` or `rejected_response`; rename others in the file. `completion`, what
supervised training learns, is the preferred answer as it is; `rejected` is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import CLIP_SUFFIXES, Record, below
from maple_trl.data.converters.base import Converter, Place, Sample, first_of, optional_text
from maple_trl.data.converters.turns import without_marks
from maple_trl.modalities import ModalityTag


_MODEL = "LongVA-7B"


def _tpo(record: Record, place: Place) -> Iterator[Sample]:
    path = record.path(first_of(record, "video", "video_path", "video_id"))
    question = without_marks(record.text(first_of(record, "prompt", "question", "query")))
    chosen = record.text(first_of(record, "chosen", "preferred", "chosen_response"))
    rejected = record.text(first_of(record, "rejected", "dispreferred", "rejected_response"))
    whole = (path,) if path.lower().endswith(CLIP_SUFFIXES) else tuple(path + suffix for suffix in CLIP_SUFFIXES)
    yield Sample(
        clip=path,
        question=question,
        solution=chosen,
        kind="text",
        video=tuple(place for one in whole for place in below(one, "videos")),
        question_type=optional_text(record, "type"),
        messages=({"role": "user", "content": question},),
        written=(("answer", _MODEL), ("completion", _MODEL), ("rejected", _MODEL)),
        further={"completion": chosen, "rejected": rejected},
    )


TPO = Converter(
    name="tpo",
    title="Temporal Preference Optimization",
    source="TPO",
    read=_tpo,
    tables=(("dataset.csv", "train"), ("*.csv", "train"), ("*.json", "train"), ("*.jsonl", "train")),
    media="join and unpack videos/videos.part.*, so that videos/{video} is there",
    hub="ruili0/LongVA-TPO-10k",
    tag=ModalityTag.V,
    further=("completion", "rejected"),
)
