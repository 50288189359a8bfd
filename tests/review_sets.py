"""Rows in all columns of the schema, and desks on them, for the tests of the review."""

import pyarrow as pa
import pyarrow.parquet as pq

from maple_trl.data.review.desk import ReviewDesk, Shown
from maple_trl.data.review.log import ReviewLog
from maple_trl.data.review.rows import ReviewSet
from maple_trl.data.schema import ROW_FEATURES


LETTERS = "ABCD"


def question_row(number: int, tag: str = "V", **values) -> dict:
    """A row in all columns of the schema."""
    options = ["red", "green", "blue", "yellow"]
    prompt = f"Which colour has shape {number}?\n" + "".join(
        f"{letter}. {text}\n" for letter, text in zip(LETTERS, options, strict=True)
    )
    row = dict.fromkeys(ROW_FEATURES) | {
        "id": f"row-{number}",
        "clip": f"clip-{number // 2}",
        "tag": tag,
        "source": "test",
        "split": "train",
        "prompt": [{"role": "user", "content": prompt + "Answer with the letter."}],
        "question": f"Which colour has shape {number}?",
        "options": options,
        "answer": LETTERS[number % 4],
        "solution": LETTERS[number % 4],
        "required_tag": tag,
        "provenance": [{"field": "question", "model": "writer", "prompt_hash": "abc", "reviewer": None}],
    }
    return row | values


def caption_row(number: int, tag: str = "VAS", **values) -> dict:
    row = question_row(number, tag)
    row |= dict.fromkeys(("question", "options", "answer", "solution"))
    row |= {"prompt": [{"role": "user", "content": "Describe the clip."}], "reference": f"Caption {number}."}
    return row | values


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema), path)
    return path


def desk_of(path, log=None) -> ReviewDesk:
    return ReviewDesk(ReviewSet(path), ReviewLog(log or path.with_name("review.log")))


def seen(desk: ReviewDesk, index: int, **values) -> Shown:
    return Shown(desk.data.digest(index), **values)
