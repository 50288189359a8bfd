"""A server for curations that answers by what a request holds, and takes down what a request must not hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web
from chat_server import ChatServer, completion

from maple_trl.data.curation import prompts
from maple_trl.modalities import ModalityTag


WORD = "zanzibar"  # in every subtitle of the tests, and nowhere else
# What descriptions of each signal hold, and nothing else does.
MARKS = {"V": "SEEN", "A": "HEARD", "S": "SAID"}
TAGS = tuple(ModalityTag)


def blocks_of(body: dict) -> list[dict]:
    contents = [message["content"] for message in body["messages"]]
    return [
        block
        for content in contents
        for block in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]


def signals_in(body: dict) -> tuple[set[str], set[str]]:
    """The signals that a request holds: themselves, and as descriptions."""
    blocks = blocks_of(body)
    text = "\n".join(block.get("text", "") for block in blocks)
    kinds = {block["type"] for block in blocks}
    media = {letter for letter, kind in (("V", "image_url"), ("A", "input_audio")) if kind in kinds}
    media |= {"S"} if WORD in text else set()
    return media, {letter for letter, mark in MARKS.items() if mark in text}


def kind_of(body: dict) -> tuple[str, str]:
    """What a request is for, and of which tag, by its system message."""
    system = body["messages"][0]["content"]
    for prompt in prompts.PROMPTS:
        if system.startswith(prompt.text.split("{")[0]):
            break
    else:
        raise AssertionError(f"a prompt that there is not: {system[:100]}")
    told = [tag for tag in TAGS if f"You are shown {prompts.signals(tag)} of the clip" in system]
    single = {"annotate-video": "V", "annotate-audio": "A", "annotate-subtitle": "S"}
    return prompt.name, told[0].value if told else single.get(prompt.name, "")


def violation(body: dict) -> str | None:
    """Whether a request holds something of a signal that is none of its tag's."""
    name, tag = kind_of(body)
    media, described = signals_in(body)
    if name == "align":
        return None
    if name == "answer":  # a vote is of any subset of the tag of its question
        tag = re.search(r" of (\w+) about ", question_of(body))[1]
    if strange := (media | described) - set(tag):
        return f"a request of {name} for {tag} holds {sorted(strange)}"
    if name.startswith("annotate") and media != set(tag):
        return f"a request of {name} for {tag} does not hold it"
    if name in ("caption", "questions") and media | described != set(tag):
        return f"a request of {name} for {tag} lacks {sorted(set(tag) - media - described)}"
    return None


def short(text: Any) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:8]


def question_key(body: dict) -> str:
    """The same for a request and the one that asks for its repair."""
    content = body["messages"][1]["content"]
    form = "Answer with one JSON object"
    if isinstance(content, str):
        content = content.split(form)[0].rstrip()
    else:
        content = [block for block in content if form not in block.get("text", "")]
    return short([body["model"], body["messages"][0], content])


def describe(tag: str, body: dict) -> dict:
    summary = f"{MARKS[tag]} {short(blocks_of(body)[1:])}"
    timed = [{"second": 0.5, "event": f"{MARKS[tag]} something"}]
    return {"V": {"events": timed}, "A": {"cues": timed}, "S": {"statements": [f"{MARKS[tag]} words"]}}[tag] | {
        "summary": summary
    }


def write(tag: str, body: dict, needs: Callable[[str, str], str]) -> dict:
    """A question of each type; which signals it really needs stands in it, for the voters."""
    items = []
    about = short(blocks_of(body)[1:])
    for name in [name for name in prompts.QUESTION_TYPES if f"- {name}: " in body["messages"][0]["content"]]:
        need = needs(tag, name)
        question = f"{name} of {tag} about {about}, needs [{need}]?"
        wrong = [f"wrong {number} {about}" for number in range(3)]
        items.append({"type": name, "question": question, "right": f"right {about}", "wrong": wrong})
    return {"questions": items}


def right_letter(text: str) -> str:
    return re.search(r"^([A-D])\. right", text, re.MULTILINE)[1]


def asked(body: dict) -> str:
    content = body["messages"][1]["content"]
    return content if isinstance(content, str) else "\n".join(block.get("text", "") for block in content)


def question_of(body: dict) -> str:
    return next(line for line in asked(body).splitlines() if "needs [" in line)


def vote(body: dict, knows: Callable[[str, str, str], bool]) -> dict:
    """The right letter, or unknown: as the voter knows the question with the signals that it is shown."""
    media, described = signals_in(body)
    shown = "".join(letter for letter in "VAS" if letter in media | described)
    knowing = knows(question_of(body), body["model"], shown)
    return {"answer": right_letter(asked(body)) if knowing else "unknown"}


def by_need(question: str, voter: str, shown: str) -> bool:
    """A question is answered where all that it needs is shown; one that needs `?` never."""
    need = re.search(r"needs \[(.*)\]", question)[1]
    return need != "?" and set(need) <= set(shown)


def own_need(tag: str, name: str) -> str:
    return tag


class CurationServer(ChatServer):
    """
    Args:
        needs: tag and type of a question -> the signals that it really needs.
        knows: question, voter and shown signals -> whether the voter answers it.
        spoil: number of a call and its body -> a text in place of the right answer, or `None`.
        before: called with the number of a call and its body before it is answered.

    Attributes:
        violations (`list[str]`): what requests held that they must not.
        answered (`Counter`): digest of a request -> how often it was answered.
        kinds (`Counter`): what requests were for.
    """

    def __init__(
        self, needs=own_need, knows=by_need, spoil=lambda number, body: None, before=lambda number, body: None
    ):
        super().__init__(self._choose)
        self.needs, self.knows, self.spoil, self.before = needs, knows, spoil, before
        self.violations: list[str] = []
        self.answered: Counter = Counter()
        self.kinds: Counter = Counter()

    def _choose(self, number: int, body: dict):
        async def act(request, body):
            self.before(number, body)
            if (problem := violation(body)) is not None:
                self.violations.append(problem)
            name, _ = kind_of(body)
            text = self.spoil(number, body)
            if text is None:
                text = json.dumps(self.answer(body))
            self.kinds[name] += 1
            self.answered[short(body)] += 1
            return web.json_response(completion(text, prompt_tokens=100, completion_tokens=10))

        return act

    def answer(self, body: dict) -> dict:
        name, tag = kind_of(body)
        if name.startswith("annotate"):
            return describe(tag, body)
        if name == "align":
            return {"conflicts": [], "consistent": True}
        if name == "caption":
            return {"caption": f"A caption of {tag} about {short(blocks_of(body)[1:])}."}
        if name == "questions":
            return write(tag, body, self.needs)
        return vote(body, self.knows)


def servers(url: str, voters: int = 1, **settings) -> dict:
    """The section `servers` of a file."""
    roles = {
        role: {"model": f"{role}-model", "base_url": url, **settings} for role in ("vision", "audio", "text", "judge")
    }
    return roles | {"voters": [{"model": f"voter-{i}", "base_url": url, **settings} for i in range(1, voters + 1)]}


def subsets(tag: str):
    """All strict subsets of a tag's letters."""
    return [subset for size in range(len(tag)) for subset in itertools.combinations(tag, size)]
