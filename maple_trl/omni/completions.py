"""Completions as texts, in which a model's thoughts stand between the marks that every reader of answers knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor


if TYPE_CHECKING:
    from maple_trl.omni.families.base import OmniFamily


_BEGIN, _END = "<think>", "</think>"
_TAIL = 16  # tokens at the end of a prompt among which its last words are


def completion_texts(
    family: OmniFamily, completions: Sequence[Sequence[int]], prompts: Sequence[Sequence[int] | Tensor]
) -> list[str]:
    """
    Return completions without special tokens, and with all thoughts between `<think>` and `</think>`.

    Two kinds of models leave no such pair in the text that a tokenizer gives: those that think between special tokens of
    their own (`thought_tokens` of the family), which are skipped as all special tokens are, so that thoughts and answer run
    together; and those whose chat template ends the prompt with `<think>`, so that a completion begins within its thoughts.

    Args:
        family: the model's.
        completions: N lists of token ids, up to and with the end token.
        prompts: token ids of the N prompts.
    """
    marks = _marks(family)
    parts = [list(_parts(completion, marks)) for completion in completions]
    pieces = [ids for found in parts for _, ids in found]
    # Of no completion at all a tokenizer would make one.
    texts = iter(family.tokenizer.batch_decode(pieces, skip_special_tokens=True) if pieces else ())
    found = []
    for part, prompt in zip(parts, prompts, strict=True):
        text = "".join(_marked(mark, next(texts), family) for mark, _ in part)
        if marks:  # a block with nothing in it, as models leave that are told not to think
            text = text.replace(_BEGIN + _END, "")
        found.append(_BEGIN + text if _ends_in_thoughts(family, prompt) else text)
    return found


def _marks(family: OmniFamily) -> dict[int, str]:
    """Return what the family's own marks of thoughts mean, by token id."""
    tokenizer = family.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in family.thought_tokens or ()]
    return dict(zip(ids, (_BEGIN, _END), strict=False)) if not {None, tokenizer.unk_token_id} & set(ids) else {}


def _parts(completion: Sequence[int], marks: dict[int, str]) -> Iterator[tuple[str, Sequence[int]]]:
    """Cut a completion at its marks; each part comes with what stands before it."""
    start, mark = 0, ""
    for place, token in enumerate(completion):
        if token in marks:
            yield mark, completion[start:place]
            start, mark = place + 1, marks[token]
    yield mark, completion[start:]


def _marked(mark: str, text: str, family: OmniFamily) -> str:
    heading, _, rest = text.partition("\n")
    return mark + (rest if mark == _BEGIN and heading == family.thought_heading else text)


def _ends_in_thoughts(family: OmniFamily, prompt: Sequence[int] | Tensor) -> bool:
    """Return whether the chat template has begun the model's thoughts itself."""
    return family.tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(_BEGIN)
