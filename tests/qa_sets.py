"""Questions for the QA+ builder, and a checker of what it makes that shares no code with it."""

import random
from collections import Counter

from datasets import Dataset

from maple_trl.data.benchmarks.prompts import PROMPT_STYLES
from maple_trl.data.none_answers import NONE_ANSWERS
from maple_trl.data.schema import ROW_FEATURES


TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"]
SIZES = {"V": 552, "A": 75, "S": 76, "VA": 1145, "VS": 1784, "AS": 171, "VAS": 1198}
"""Questions of each tag behind MAPLE's table 1."""


def question(name, tag="VA", options=("red", "green", "blue", "grey"), right=1, **more):
    """A row of the schema."""
    letter = "ABCDEFGH"[right]
    asked = f"What is seen in {name}?"
    row = dict.fromkeys(ROW_FEATURES)
    row |= {"id": name, "clip": f"clip of {name}", "tag": tag, "source": "made", "split": "train"}
    row |= {"question": asked, "options": list(options), "answer": letter, "solution": letter}
    row |= {"video": f"{name}.mp4", "subtitle": f"{name}.srt", "hint": "Look at the left side.", "provenance": []}
    row["prompt"] = [{"role": "user", "content": PROMPT_STYLES["think"].render(asked, row["options"], "option")}]
    return row | more


def questions(count, seed=0, **more):
    """`count` rows, tags in the shares of MAPLE's benchmark."""
    draw = random.Random(seed)
    tags = draw.choices(TAGS, [SIZES[tag] for tag in TAGS], k=count)
    return [
        question(f"q{i}", tag, [f"{word} {i}" for word in ("red", "green", "blue", "grey")], i % 4, **more)
        for i, tag in enumerate(tags)
    ]


def table(rows):
    return Dataset.from_list(rows, features=ROW_FEATURES)


def same(one, other):
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()


def faults(made, source, share=0.25, replace="right"):
    """What is wrong with QA+ rows, as a list of words; `source` are the rows that they were made of."""
    found = []
    by_name = {row["id"]: row for row in source}
    counts, swaps = Counter(), Counter()
    if len({row["id"] for row in made}) < len(made):
        found.append("ids")
    for row in made:
        before = by_name[row["question_id"]]
        fed, needed = set(row["tag"]), set(row["required_tag"])
        truth = before["options"]["ABCDEFGH".index(before["answer"])]
        chosen = row["options"]["ABCDEFGH".index(row["answer"])]
        counts[row["stratum"]] += 1
        fits = {"exact": fed == needed, "superset": fed > needed, "deficit": not fed >= needed}
        if row["required_tag"] != before["tag"] or not fits[row["stratum"]]:
            found.append("stratum")
        changed = [
            i for i, pair in enumerate(zip(before["options"], row["options"], strict=True)) if pair[0] != pair[1]
        ]
        swaps[row["stratum"]] += bool(changed)
        if len(changed) > 1 or any(row["options"][i] not in NONE_ANSWERS for i in changed):
            found.append("options")
        wanted = "right" if row["stratum"] == "deficit" else replace
        if row["replaced"] != (wanted if changed else None):
            found.append("replaced")
        if row["stratum"] == "deficit" and (
            chosen not in NONE_ANSWERS or any(same(text, truth) for text in row["options"])
        ):
            found.append("true answer")
        if changed and wanted == "right" and any(same(text, truth) for text in row["options"]):
            found.append("true answer")
        if changed and wanted == "wrong" and chosen != truth:
            found.append("right answer")
        if row["answer"] != before["answer"] or row["solution"] != before["solution"]:
            found.append("answer")
        lines = [f"{letter}. {text}" for letter, text in zip("ABCDEFGH", row["options"], strict=False)]
        if "\n".join(lines) not in row["prompt"][-1]["content"] or row["question"] not in row["prompt"][-1]["content"]:
            found.append("prompt")
        if changed and wanted == "right" and row["hint"] is not None:
            found.append("hint")
        if any(
            row[name] != before[name] for name in ("clip", "source", "video", "subtitle", "provenance", "question")
        ):
            found.append("columns")
    for stratum, count in counts.items():
        exactly = count if stratum == "deficit" else int(share * count + 0.5)
        if swaps[stratum] != exactly:
            found.append("share")
    return sorted(set(found))
