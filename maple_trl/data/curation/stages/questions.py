"""Stage 6: questions of six types for each tag, from that tag's signals alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.data.benchmarks.prompts import prompt_style
from maple_trl.data.curation.asking import Ask
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.evidence import isolate, possible_tags, show
from maple_trl.data.curation.prompts import ASK, QUESTION_TYPES, need, questions_form, signals
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.data.curation.stages.captions import about_media
from maple_trl.data.schema import LETTERS
from maple_trl.files import digest
from maple_trl.modalities import ModalityTag


_LETTERED = re.compile(r"\(?[A-D][.):]\s+\S")


def units(rows: Sequence[Row], config: CurationConfig) -> list[Row]:
    """Return a row for each clip and tag, with that tag's signals."""
    return [{**isolate(row, t.modalities), "tag": t.value} for row in rows for t in possible_tags(row, config.tags)]


async def write_questions(row: Row, tools: Tools) -> Outcome:
    """Have the questions of a clip and a tag written; those that stay malformed are dropped one by one."""
    outcome, tag, wanted = Outcome(), ModalityTag(row["tag"]), tools.config.questions
    lines = "\n".join(f"- {name}: {QUESTION_TYPES[name]}" for name in wanted.types)
    ask = Ask(
        ASK,
        show(tools.root, row, tag.modalities, wanted.evidence),
        questions_form(wanted.types, wanted.per_type),
        _example(wanted.types, wanted.per_type),
        {"signals": signals(tag), "need": need(tag), "count": str(wanted.per_type), "types": lines},
        check=lambda data: problem_of(data["questions"], wanted.types, wanted.per_type),
    )
    told = await tools.ask("questions", "text", ask, outcome)
    letters = shuffled_letters(len(told.data["questions"]), tools.config.seed, row["clip"], tag)
    seen: Counter = Counter()
    for item, letter in zip(told.data["questions"], letters, strict=True):
        seen[item["type"]] += 1
        name = f"{row['clip']}-{tag}-{item['type'].lower().replace(' ', '-')}-{seen[item['type']]}"
        problem = item_problem(item)
        if problem is not None or seen[item["type"]] > wanted.per_type:
            outcome.drop(name, "malformed", problem or "one more of its type than was asked for")
            continue
        provenance = [*about_media(row), *told.provenance("question", "options", "answer", "solution")]
        outcome.rows.append(_question_row(row, item, name, letter, provenance, tools.config))
    return outcome


def _question_row(row: Row, item: Row, name: str, letter: str, provenance: list, config: CurationConfig) -> Row:
    options = list(item["wrong"])
    options.insert(LETTERS.index(letter), item["right"])
    text = prompt_style(config.write.prompt_style).render(item["question"], options, "option")
    return {
        "id": name,
        "clip": row["clip"],
        "tag": row["tag"],
        "question_type": item["type"],
        "prompt": [{"role": "user", "content": text}],
        "question": item["question"],
        "options": options,
        "answer": letter,
        "solution": letter,
        "provenance": provenance,
        **row["media"],
        "signals": row["signals"],  # for the filter
        "notes": row["notes"],
    }


def shuffled_letters(count: int, seed: int, clip: str, tag: ModalityTag) -> list[str]:
    """Return the letters of right options: each as often as any other, give or take one, in a seeded order."""
    rng = random.Random(digest([seed, clip, tag]))
    letters: list[str] = []
    while len(letters) < count:
        letters += rng.sample(LETTERS, len(LETTERS))
    return letters[:count]


def problem_of(items: Sequence[Mapping[str, Any]], types: Sequence[str], per_type: int) -> str | None:
    """Return what is wrong with an answer that has the form."""
    often = Counter(item["type"] for item in items)
    for name in types:
        if often[name] != per_type:
            return f"there are {often[name]} questions of the type {name!r}, and {per_type} were asked for"
    texts = Counter(item["question"].casefold() for item in items)
    if max(texts.values()) > 1:
        return f"the question {texts.most_common(1)[0][0]!r} stands there twice"
    problems = [(number, item_problem(item)) for number, item in enumerate(items, start=1)]
    return next((f"question {number}: {problem}" for number, problem in problems if problem), None)


def item_problem(item: Mapping[str, Any]) -> str | None:
    """Return what is wrong with one question, if anything."""
    options = [item["right"], *item["wrong"]]
    if not all([item["question"], *options]):
        return "a text is empty"
    if len({option.casefold().rstrip(".") for option in options}) < len(options):
        return "two options are the same"
    if all(_LETTERED.match(option) for option in options):
        return "options must carry no letters"
    return None


def _example(types: Sequence[str], per_type: int) -> dict[str, Any]:
    texts = [f"An option of usual length, as number {number} of four is" for number in range(4)]
    item = {"question": "A question of usual length on what the clip shows at some moment?", "right": texts[0]}
    return {"questions": [{**item, "type": name, "wrong": texts[1:]} for name in types for _ in range(per_type)]}


STAGE = Stage(
    "questions",
    "align",
    write_questions,
    name_of=lambda row: f"{row['clip']}, questions {row['tag']}",
    units=units,
    prompts=(ASK,),
    endpoints=lambda config: ["text"],
    decides=lambda config: [
        config.questions.evidence,
        list(config.questions.types),
        config.questions.per_type,
        config.seed,
        prompt_style(config.write.prompt_style).canonical,
    ],
)
