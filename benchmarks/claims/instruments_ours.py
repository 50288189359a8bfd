"""Whether a policy abstains where it should: asked when a run of the task `qa_plus` is over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from tasks import prepared, qa_plus

from maple_trl.rewards.answers import extract_answer, option_letter


class Abstention:
    """
    How often a policy chooses a none answer that is always among the options, by required tag and stratum.

    It is right where a signal is missing alone, and takes the place of a wrong option elsewhere: that it is shown says nothing. In the
    questions of MAPLE 5.4.1 a none answer is right wherever it is shown, and none can be chosen wrongly.
    """

    SAMPLES = 1

    def __init__(self, trainer: Any, measure: Callable[..., Any], cost: Any):
        self._trainer = trainer

    def result(self) -> dict[str, Any]:
        rows = [dict(row) for row in qa_plus.held_out(prepared("qa_plus"), "asked_always")] * self.SAMPLES
        with torch.random.fork_rng():
            torch.manual_seed(0)
            answers = self._trainer.generate_completions(rows)
        counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for row, text in zip(rows, answers, strict=True):
            letter = option_letter(extract_answer(text or "") or "")
            own = counts[row["required_tag"], row["stratum"]]
            own[0] += 1
            own[1] += letter == none_letter(row)
            own[2] += letter == row["solution"]
        return {"counts": [[*key, *own] for key, own in sorted(counts.items())]}


def none_letter(row: dict[str, Any]) -> str:
    """Return the letter of a row's none answer, which must have one."""
    [place] = [i for i, text in enumerate(row["options"]) if text != qa_plus.OPTIONS[i]]
    return "ABCD"[place]
