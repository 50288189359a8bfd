"""Judge of open answers: whether one says the same as the right one (as MMVU's open questions, arXiv 2501.12380)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maple_trl.chat import fence
from maple_trl.rewards.answers import solution_text
from maple_trl.rewards.judge import OpenAIJudge, Question
from maple_trl.rewards.judge_prompts import RULES
from maple_trl.rewards.judge_texts import as_text, caption_text, harmless, prompt_text


AXIS = "correct"

ANSWER_SYSTEM = f"""\
You check a candidate answer to an open question about a clip. You don't see the clip; you are given the question and the right \
answer. Other words, another unit of the same quantity, another order of the same things, and more detail that contradicts \
nothing are all the same answer. One thing more or less than was asked for, a number that differs, a broader or narrower thing \
where the question asks for a certain one, and several answers of which one is right are another answer.

{AXIS}: whether the candidate answers the question as the right answer does.
  1.0 it does
  0.0 it does not, or it does not commit to an answer

{RULES.replace("Grades are 0.0, 0.2, 0.4, 0.6, 0.8 and 1.0", "Grades are 0.0 and 1.0")}"""


class AnswerJudge(OpenAIJudge):
    r"""
    Judges an open answer as right (1.0) or wrong (0.0).

    The judge sees the question, the row's `solution` and the answer: the completion's one `<answer>…</answer>` where it has
    one, else what stands after `</think>`. A row without a solution is not scored.

    Args:
        scorer (`ChatOptions`, `ChatClient` or `LocalScorer`):
            Where answers come from.
        question_column (`str`, *optional*, defaults to `"question"`):
            The question alone; the prompt's text where a row has none.
        **kwargs:
            As in [`OpenAIJudge`].
    """

    default_name = "answer_judge"
    default_characters = 4000
    columns = ("solution",)
    guideline = ANSWER_SYSTEM
    scale = (0.0, 1.0)

    def __init__(self, scorer: Any, *, question_column: str = "question", **kwargs: Any):
        super().__init__(scorer, **kwargs)
        self.question_column = question_column

    def judged_text(self, text: str) -> str | None:
        """Return the answer in the `text` of a completion."""
        return caption_text(text)

    def question(self, text: str, row: Mapping[str, Any]) -> Question | None:
        """Ask about an answer (`text`) to a `row`; `None` for a row without a solution."""
        solution = solution_text(row.get("solution"))
        if solution is None:
            return None
        asked = as_text(row.get(self.question_column)) or prompt_text(row.get("prompt") or "")
        parts = [self._fenced("question", asked), self._fenced("right_answer", solution)]
        parts += [fence("candidate_answer", harmless(text)), "Check the candidate answer."]
        messages = [{"role": "system", "content": ANSWER_SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]
        return Question(messages, (AXIS,))
