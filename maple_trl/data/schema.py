"""The columns of tables of questions and captions."""

from __future__ import annotations

from datasets import Features, List, Value


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

ROW_FEATURES = Features(
    {
        **QUESTION_COLUMNS,
        "clip": Value("string"),
        "source": Value("string"),
        "split": Value("string"),
        "question_type": Value("string"),
        "required_tag": Value("string"),
        "stratum": Value("string"),
        "reference": Value("string"),
        "reference_v": Value("string"),
        "reference_a": Value("string"),
        "reference_s": Value("string"),
        "hint": Value("string"),
        "audio_cues": Value("string"),
        "audio": Value("string"),
        "subtitle": Value("string"),
        "image": Value("string"),
        "images": List(Value("string")),
        "provenance": List(
            {
                "field": Value("string"),
                "model": Value("string"),
                "prompt_hash": Value("string"),
                "reviewer": Value("string"),
            }
        ),
    }
)
"""
Columns of a row of a tagged set, of a question or of a caption. `None` where a row has nothing to say; only `id`, `clip`,
`tag`, `source` and `prompt` must be filled.

- `id` names the row, `clip` what it is about: the rows of one clip never stand in two splits, and share their fate in intervals.
- `tag` says what is fed. `required_tag` is what the question needs, where that may differ (`stratum`: `exact`, `superset` or
  `deficit`).
- A question has `question`, `options` (texts without letters; `None` of an open one) and `answer`, equal to `solution`: a letter,
  several joined by commas, or the text of an open answer. A caption has `reference` instead, what all of its tag's signals tell,
  and `reference_v`, `reference_a`, `reference_s`, what each of its signals alone tells.
- `prompt` is what the model is asked, as one user message.
- `video`, `audio`, `subtitle` and `image` are paths below the media root; `subtitle` may be the text itself; without `audio` the sound
  is the video's track. A row with several pictures has them in `images`, in the order in which they are shown, and no `image`.
- `provenance` says of fields that a model wrote or a person changed who did it; `prompt_hash` is that of the request. Empty: nothing
  is known to come from a model.
"""
