r"""
Conversations with media: ShareGPT's and LLaVA's turns, and messages with lists of files as ms-swift and LLaMA-Factory take them.

Relied on: the documented forms of LLaVA (`{"id", "conversations": [{"from": "human", "value": "<video>\n…"}, {"from": "gpt", …}],
"video": …}`) and of ms-swift (`{"messages": [{"role", "content"}], "videos": […], "audios": […], "images": […]}`, `solution`).

A last turn of the assistant is the column `completion`, and what comes before it is the prompt. The answer is what the record has as
`solution`, a text or a number, with which ms-swift's reward functions compare; such a conversation may end in a turn of the user. Without
one, it is the assistant's whole last turn. Marks of media keep their places: a clip of the first question stands there, before the answers
that were given to it; of a record without marks too, which is how ms-swift reads it. In LLaVA-NeXT's records `<image>` is the clip's mark. A
row has one clip and one sound. Pictures may be inside the table (`{"bytes", "path"}`): they are written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maple_trl.data.benchmarks.base import FieldError, LeaveOut, Record
from maple_trl.data.converters.base import Converter, Place, Sample, answer_text, first_of
from maple_trl.data.converters.turns import KINDS, block_files, read_turns, with_places, without_marks


def media_of(record: Record, turns: str) -> dict[str, Any]:
    """
    Read the media that a record names, in fields or else in blocks, as attributes of a sample: one clip, one sound, and pictures.

    Args:
        turns: the field with the conversation.

    Raises:
        LeaveOut: when it has several clips or sounds.
        FieldError: for what is no path.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        name = next((name for name in (kind, f"{kind}s") if record.get(name)), kind)
        source = record if record.get(name) else Record({name: block_files(record.get(turns), kind)})
        found[kind] = source.pictures(name) if kind == "image" else source.paths(name)
        if kind != "image" and len(found[kind]) > 1:
            raise LeaveOut(f"several media of the kind {kind}; a row has one of it")
    return {**found, "image": (), "images": found["image"]}


def first_path(media: Mapping[str, Any]) -> str | None:
    """Return the path of the first of the media that [`media_of`] found; `None` where it found none."""
    paths = (*media["video"], *media["audio"], *(picture.paths[0] for picture in media["images"]))
    return paths[0] if paths else None


def _share_gpt(record: Record, place: Place) -> Iterator[Sample]:
    name = first_of(record, "conversations", "messages", "conversation")
    turns = read_turns(record.get(name), name)
    solution = None if record.get("solution") in (None, "") else answer_text(record, "solution")
    last = turns[-1]["role"]
    if not any(turn["role"] == "user" for turn in turns) or last not in ("user", "assistant"):
        raise FieldError(name, f"must have a turn of the user and end in one of the assistant, but ends in {last}")
    if last == "user" and solution is None:
        raise FieldError(
            name, "must end in a turn of the assistant, or the record have a 'solution', but ends in user"
        )
    if turns[0]["role"] != "system" and isinstance(record.get("system"), str) and record.get("system").strip():
        turns.insert(0, {"role": "system", "content": record.text("system")})
    said = turns.pop()["content"] if last == "assistant" else None
    media = media_of(record, name)
    prompt = with_places(turns, media)
    question = without_marks(next(turn["content"] for turn in reversed(prompt) if turn["role"] == "user"))
    if not question.strip():
        raise FieldError(name, "must have words beside the marks of media in the last turn of the user, but has none")
    own = None if record.get("id") is None else record.name("id")
    yield Sample(
        clip=first_path(media) or f"{place.file.stem}-{place.number}",
        question=question,
        solution=said.strip() if solution is None else solution,
        kind="text",
        name=own,
        messages=tuple(prompt),
        text=record.text("subtitle") if record.get("subtitle") else None,
        further={"completion": said},
        **media,
    )


SHARE_GPT = Converter(
    name="sharegpt",
    title="Conversations as of ShareGPT",
    source="ShareGPT",
    read=_share_gpt,
    tables=(("*.jsonl", None), ("*.json", None), ("*.parquet", None)),
    media="put the files below the media root, as the records name them",
    hub="",
    further=("completion",),
)
