"""The columns that every set of questions here has."""

from __future__ import annotations

from datasets import List, Value


LETTERS = "ABCD"

QUESTION_COLUMNS = {
    "id": Value("string"),
    "prompt": List({"role": Value("string"), "content": Value("string")}),
    "question": Value("string"),
    "options": List(Value("string")),
    "answer": Value("string"),
    "solution": Value("string"),
    "tag": Value("string"),
    "video": Value("string"),
}
"""Columns of a question with four options, for `datasets.Features`; a set adds its own."""
