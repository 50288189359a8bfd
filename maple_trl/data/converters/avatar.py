"""
AVATAR's published RL set (`yogkul2000/AVATAR-RL-dataset`, arXiv 2508.03100).

Relied on: the authors' release for ms-swift (its launch script and reward plugin), which reads the columns `solution`, `problem_type`
(`multiple_choice`, `numerical`, `ocr`, `free_form`, …), `question`, `audio_cues`, `prompt_id`, `videos` and `hint`; and ms-swift's form of a
row, `messages` with `videos`, `audios` and `images`.

Guesses: all else. The prompt is made of `question` and `options` where the record has `question`, else of its messages; a solution that is a
letter with options in the record is one of them; `source` or `dataset`, where it is there, says which of the paper's sets a row is of;
`audio_cues` stay out of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import FieldError, LeaveOut, Record
from maple_trl.data.benchmarks.options import read_letter, read_options
from maple_trl.data.converters.base import Converter, Place, Sample, answer_text, optional_text
from maple_trl.data.converters.sharegpt import first_path, media_of
from maple_trl.data.converters.turns import read_turns, with_places, without_marks


_NUMBERS = ("numerical", "regression", "counting")


def _avatar(record: Record, place: Place) -> Iterator[Sample]:
    problem_type = optional_text(record, "problem_type")
    has_options = bool(record.get("options"))
    options = record.read("options", read_options) if has_options else []
    media = media_of(record, "messages")
    clip = first_path(media)
    if clip is None:
        raise LeaveOut("no medium at all")
    question, messages = optional_text(record, "question"), ()
    if question is None:
        turns = read_turns(record.get("messages"), "messages")
        if turns[-1]["role"] == "assistant":  # the answer, which the solution says
            turns.pop()
        if not turns or turns[-1]["role"] != "user":
            raise FieldError("messages", "must have a turn of the user; or field 'question' must be filled")
        turns = with_places(turns, media)
        question, messages = without_marks(turns[-1]["content"]), tuple(turns)
    elif len(media["images"]) < 2:
        question = without_marks(question)
    kind = "option" if options else "number" if problem_type in _NUMBERS else "text"
    name = next((key for key in ("prompt_id", "id") if record.get(key) is not None), None)
    yield Sample(
        clip=clip,
        question=question,
        solution=record.read("solution", read_letter, options) if options else answer_text(record, "solution"),
        kind=kind,
        options=tuple(options),
        name=None if name is None else record.name(name),
        question_type=problem_type,
        messages=() if options else messages,
        hint=optional_text(record, "hint"),
        further={"audio_cues": optional_text(record, "audio_cues")},
        source=optional_text(record, "source") or optional_text(record, "dataset"),
        **media,
    )


AVATAR = Converter(
    name="avatar-rl",
    title="AVATAR's RL set",
    source="AVATAR-RL",
    read=_avatar,
    tables=(("*.jsonl", "train"), ("*.json", "train"), ("data/*.parquet", "train"), ("*.parquet", "train")),
    media="put the clips below the media root, as the records name them",
    hub="yogkul2000/AVATAR-RL-dataset",
    required=("solution",),
)
