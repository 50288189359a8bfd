"""Judge of captions (MAPLE, arXiv 2602.11596, appendix C.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maple_trl.chat import ChatOptions, fence
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.rewards.judge import OpenAIJudge, Question, Scorer
from maple_trl.rewards.judge_prompts import CAPTION_SYSTEM
from maple_trl.rewards.judge_texts import as_text, caption_text, harmless


AXES = ("missing", "errors", "fusion")
_SIGNALS = {Modality.VIDEO: "picture", Modality.AUDIO: "sound", Modality.SUBTITLE: "subtitles"}
UNIMODAL_COLUMNS = {"V": "reference_v", "A": "reference_a", "S": "reference_s"}


class CaptionJudge(OpenAIJudge):
    r"""
    Grades a caption on three axes, each 0.0, 0.2, … 1.0; the reward is their mean (MAPLE, arXiv 2602.11596, C.2).

    Axes are what is `missing`, `errors` and things made up, and the `fusion` of what comes from different signals; 1.0
    is good on all three.

    The judge sees the caption, the reference caption of the row's tag, and references for single signals: those of the
    tag's signals and no others. For a tag of one signal, whose two references are the same, it sees one.

    The caption is the completion's one `<answer>…</answer>` where it has one, else what stands after `</think>`. One of
    more than 8000 characters earns 0.0 (see [`OpenAIJudge`] for what else is decided by rule).

    Args:
        scorer (`ChatOptions`, `ChatClient` or `LocalScorer`):
            Where answers come from.
        reference_column (`str`, *optional*, defaults to `"reference"`):
            The reference caption. A row without one is not scored; of a tag of one signal, that signal's reference does.
        unimodal_columns (`Mapping[str, str]`, *optional*):
            Column by signal; default is `{"V": "reference_v", "A": "reference_a", "S": "reference_s"}`, which may be
            missing.
        tag_column (`str`, *optional*, defaults to `"tag"`):
            The row's tag. A row without one is graded by its reference caption alone.
        **kwargs:
            As in [`OpenAIJudge`].

    Raises:
        ValueError: for an unknown signal.

    Example:
    ```python
    from maple_trl.chat import ChatOptions
    from maple_trl.rewards import CaptionJudge

    options = ChatOptions(model="gpt-4o", cache_file="runs/judge.sqlite", sampling={"temperature": 0, "max_tokens": 200})
    judge = CaptionJudge(options)
    trainer = MAPOTrainer(model, reward_funcs=[judge], callbacks=[judge.callback()], ...)
    ```
    """

    default_name = "caption_judge"
    default_characters = 8000
    guideline = CAPTION_SYSTEM

    def __init__(
        self,
        scorer: ChatOptions | Scorer,
        *,
        reference_column: str = "reference",
        unimodal_columns: Mapping[str, str] | None = None,
        tag_column: str = "tag",
        **kwargs: Any,
    ):
        super().__init__(scorer, **kwargs)
        names = UNIMODAL_COLUMNS if unimodal_columns is None else unimodal_columns
        if not isinstance(names, Mapping):
            raise ValueError(f"unimodal_columns must map signals to columns, e.g. {UNIMODAL_COLUMNS}, got {names!r}")
        self.unimodal_columns = {Modality(signal): column for signal, column in names.items()}
        self.reference_column, self.tag_column = reference_column, tag_column
        self.columns = (reference_column,)
        self.named_columns = {
            f"unimodal_columns, {signal}": column for signal, column in (unimodal_columns or {}).items()
        }
        if tag_column != "tag":
            self.named_columns["tag_column"] = tag_column

    def judged_text(self, text: str) -> str | None:
        """Return the caption in the `text` of a completion."""
        return caption_text(text)

    def question(self, text: str, row: Mapping[str, Any]) -> Question | None:
        """Ask about a caption (`text`) of a `row`; `None` for a row without a reference."""
        tag = ModalityTag.parse(row[self.tag_column]) if row.get(self.tag_column) else None
        reference = as_text(row.get(self.reference_column))
        signals = [Modality(letter) for letter in tag.value] if tag else []
        single = {signal: as_text(row.get(self.unimodal_columns.get(signal, ""))) for signal in signals}
        if len(signals) == 1:
            reference, single = reference or single[signals[0]], {}
        if not reference:
            return None
        parts = [self._fenced("reference_caption", reference)]
        parts += [self._fenced(f"{_SIGNALS[signal]}_reference", told) for signal, told in single.items() if told]
        told = " and ".join(_SIGNALS[signal] for signal in signals) or "one or more"
        parts += [f"Signals of this clip that count: {told}.", fence("candidate_caption", harmless(text))]
        parts.append("Grade the candidate caption.")
        messages = [{"role": "system", "content": CAPTION_SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]
        return Question(messages, AXES)
