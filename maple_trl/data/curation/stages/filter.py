"""Stage 7: a question stays if it is answered with its tag's signals, and with none of their strict subsets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import combinations

from maple_trl.chat import text_block
from maple_trl.data.benchmarks.prompts import PROMPT_STYLES
from maple_trl.data.curation.asking import Ask, DroppedError
from maple_trl.data.curation.evidence import show
from maple_trl.data.curation.prompts import ANSWER, ANSWER_FORM
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.modalities import Modality, ModalityTag


Subset = tuple[Modality, ...]


def strict_subsets(tag: ModalityTag) -> list[Subset]:
    """Return the strict subsets of a tag's signals, the empty one among them, the small ones first."""
    own = [modality for modality in Modality if modality in tag.modalities]
    return [subset for size in range(len(own)) for subset in combinations(own, size)]


async def reason_to_drop(tag: ModalityTag, solved: Callable[[Subset], Awaitable[bool]]) -> tuple[str, str] | None:
    """
    Return why a question goes, and a detail; `None` for one that stays.

    Asked first is what decides most for least: without any signal, then with all of the tag's, then the subsets between.

    Args:
        solved: whether a question is answered with some signals.
    """
    nothing, *between = strict_subsets(tag)
    if await solved(nothing):
        return "trivial", "it is answered without any signal"
    if not await solved(tuple(modality for modality in Modality if modality in tag.modalities)):
        return "unsolved", f"it is not answered with {tag}"
    for subset in between:
        if await solved(subset):
            return "smaller-tag", f"it is answered with {''.join(subset)} alone"
    return None


async def keep_exact(row: Row, tools: Tools) -> Outcome:
    """Let the voters answer a question with its tag's signals and without some of them."""
    outcome, tag, quorum = Outcome(), ModalityTag(row["tag"]), tools.config.filter.quorum
    voters = [f"voter-{number}" for number in range(1, len(tools.config.voters) + 1)]
    provenance: list[Row] = []

    async def solved(subset: Subset) -> bool:
        right = 0
        for place, voter in enumerate(voters):
            # Asked one after another: the rest is not asked once it can change nothing.
            if right >= quorum or right + len(voters) - place < quorum:
                break
            try:
                told = await tools.ask("filter", voter, _question(row, tag, subset, tools), outcome)
            except DroppedError as error:
                outcome.notes[f"no vote: {error.reason}"] += 1
                continue
            if told.data["answer"] == row["answer"]:
                right += 1
                if len(subset) == len(tag):
                    provenance.extend(told.provenance("tag"))
        return right >= quorum

    reason = await reason_to_drop(tag, solved)
    if reason is not None:
        outcome.drop(row["id"], *reason)
        return outcome
    kept = {name: value for name, value in row.items() if name not in ("signals", "notes")}
    outcome.rows.append({**kept, "provenance": [*row["provenance"], *provenance]})
    return outcome


def _question(row: Row, tag: ModalityTag, subset: Subset, tools: Tools) -> Ask:
    shown = show(tools.root, row, subset, tools.config.filter.evidence)
    if not shown:
        shown = [text_block("No signal of the clip is shown.")]
    style = PROMPT_STYLES["answer"]
    lines = [
        style.option_line.format(letter=letter, text=text) for letter, text in zip("ABCD", row["options"], strict=True)
    ]
    # In a dry run each question stays, which takes the most calls.
    example = {"answer": row["answer"] if len(subset) == len(tag) else "unknown"}
    return Ask(ANSWER, shown, ANSWER_FORM, example, task="\n".join([row["question"], *lines]))


STAGE = Stage(
    "filter",
    "questions",
    keep_exact,
    name_of=lambda row: row["id"],
    prompts=(ANSWER,),
    endpoints=lambda config: [f"voter-{number}" for number in range(1, len(config.voters) + 1)],
    decides=lambda config: [config.filter.evidence, config.filter.quorum],
)
