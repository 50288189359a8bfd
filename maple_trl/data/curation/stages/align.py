"""Stage 4: clips whose signals contradict each other are dropped."""

from __future__ import annotations

from typing import Any

from maple_trl.data.curation.asking import Ask
from maple_trl.data.curation.evidence import show
from maple_trl.data.curation.prompts import ALIGN, ALIGN_FORM
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.modalities import Modality


def check(data: Any) -> str | None:
    """Return what is wrong with an answer that has the form."""
    if data["consistent"] == bool(data["conflicts"]):
        return "consistent must be true if conflicts is empty, and false if it is not"
    return None


async def align(row: Row, tools: Tools) -> Outcome:
    """Let a judge compare what was written about each signal; a clip with one signal has nothing to compare."""
    outcome, told = Outcome(), [modality for modality in Modality if modality in row["notes"]]
    if len(told) == 1:
        outcome.notes["one signal"] += 1
        outcome.rows.append(row)
        return outcome
    example = {"conflicts": [], "consistent": True}
    ask = Ask(ALIGN, show(tools.root, row, told, "annotations"), ALIGN_FORM, example, check=check)
    verdict = (await tools.ask("align", "judge", ask, outcome)).data
    if verdict["consistent"]:
        outcome.rows.append(row)
    else:
        outcome.drop(row["clip"], "inconsistent", "; ".join(verdict["conflicts"]))
    return outcome


STAGE = Stage("align", "annotate", align, prompts=(ALIGN,), endpoints=lambda config: ["judge"])
