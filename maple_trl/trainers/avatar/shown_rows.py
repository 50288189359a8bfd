"""Rows as AVATAR shows them: with their hints, and again where a stored completion was written for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import gather_object

from maple_trl.algorithms import Experience
from maple_trl.omni.encoded import EncodedPrompt
from maple_trl.omni.errors import MediaError
from maple_trl.omni.host_memory import hold_prompt
from maple_trl.trainers.avatar.replay_memory import Group
from maple_trl.trainers.common.checkpoint import LostPromptsError
from maple_trl.trainers.common.hinted_rows import HINTED, has_hint, prompt_key, row_digest, row_key, with_hint
from maple_trl.trainers.common.tag_metrics import tag_number


logger = logging.getLogger(__name__)

Shown = tuple[dict[str, Any], EncodedPrompt | None]
"""A row and its prompt, `None` for a text-only model."""


class ShownRowsMixin:
    """Finds and encodes the rows that [`~maple_trl.AvatarTrainer`] shows, by the keys under which completions are stored."""

    def _forget_rows(self) -> None:
        self._hinted_prompts: dict[str, EncodedPrompt | None] = {}
        self._numbers: dict[str, int] | None = None
        self._tags: dict[str, int] = {}

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[EncodedPrompt]]:
        """Encode rows as the parent does, and discard what is stored of prompts that have gone into quarantine."""
        known = len(self.row_encoder.quarantined)
        encoded = super().encode_rows(rows)
        if len(self.row_encoder.quarantined) > known:
            self._discard_quarantined()
        return encoded

    def _discard_quarantined(self) -> None:
        """Discard stored completions of prompts in quarantine, which cannot be shown any more."""
        reasons = {} if self.family is None else {prompt.key: prompt.detail for prompt in self.row_encoder.quarantined}
        for key in self.memory.buffer.prompts() if reasons else ():
            reason = reasons.get(prompt_key(key))
            if reason is not None:
                count = self.memory.buffer.discard(key)
                logger.warning("%d completions of prompt %s are not replayed: %s", count, key, reason)

    def _group_of(self, row: dict[str, Any], prompt: EncodedPrompt | None) -> Group:
        key, number = row_key(row, prompt), -1
        if prompt is not None:
            registry = self.row_encoder.registries.get("train_dataset")
            number = registry.row_number(prompt.key) if registry is not None and prompt.key in registry else -1
        hintable = has_hint(row)
        if hintable and prompt is not None and self.memory.may_hint(key):
            hintable = self._hinted_prompt(row, prompt) is not None
        return Group(key, number, tag_number(row.get("tag")), hintable)

    def _hinted_prompt(self, row: dict[str, Any], prompt: EncodedPrompt) -> EncodedPrompt | None:
        """Return the encoded prompt of a row with its hint; `None` where it cannot be encoded."""
        key = row_key(row, prompt)
        if key not in self._hinted_prompts:
            try:
                self._hinted_prompts[key] = self._encode_hinted(row, key)
            except MediaError as error:
                logger.warning("Prompt %s is shown without its hint: %s", key, error)
                self._hinted_prompts[key] = None
        return self._hinted_prompts[key]

    def _encode_hinted(self, row: dict[str, Any], key: str) -> EncodedPrompt:
        encoded = self.prompt_builder.encode(with_hint(row, self.args.hint_template))
        return hold_prompt(replace(encoded, key=key + HINTED))

    def _prompts_by_key(self, keys: list[str]) -> list[EncodedPrompt]:
        plain = iter(super()._prompts_by_key([key for key in keys if not key.endswith(HINTED)]))
        encoded: dict[str, EncodedPrompt] = {}
        for key in dict.fromkeys(key for key in keys if key.endswith(HINTED)):
            plain_key = key.removesuffix(HINTED)
            try:
                encoded[key] = self._encode_hinted(self._row_of(plain_key), plain_key)
            except MediaError as error:
                raise LostPromptsError([(prompt_key(plain_key), error)]) from error
        return [encoded[key] if key.endswith(HINTED) else next(plain) for key in keys]

    def _row_of(self, key: str) -> dict[str, Any]:
        """Return the row of the data set that a key of the memory stands for."""
        if self.family is None:
            return self.train_dataset[self._text_row(key)]
        rows = self.row_encoder.registries["train_dataset"].rows_of(prompt_key(key))
        return next(row for row in rows if row_digest(row) == key.removeprefix(f"{prompt_key(key)}-"))

    def _text_row(self, key: str) -> int:
        if self._numbers is None:
            self._numbers = {row_digest(row): i for i, row in enumerate(self.train_dataset)}
        return self._numbers[key]

    def _tag_of(self, experience: Experience) -> int:
        """Return the tag of the row that a stored completion was written for, as a number."""
        key = experience.prompt
        if key not in self._tags:
            self._tags[key] = tag_number(self._row_of(key).get("tag"))
        return self._tags[key]

    def _with_own_prompts(
        self, replayed: dict[int, tuple[dict[str, Any], EncodedPrompt | None, Experience]]
    ) -> tuple[dict[int, tuple[dict[str, Any], EncodedPrompt | None, Experience | None]], set[int]]:
        """
        Put each replayed completion under the row and prompt that it was written for; a collective call.

        Where media have gone, the completion stays in the place of its group, without a token that counts.

        Args:
            replayed: of this rank, by place: the row and prompt of the place, and the completion.

        Returns:
            the same with each completion's own row and prompt, and the places of all ranks whose media have gone.
        """
        shown: dict[tuple[str, bool], Shown] = {}
        failed: dict[tuple[str, bool], MediaError] = {}
        found, lost = {}, []
        for place, (row, prompt, experience) in replayed.items():
            form = experience.prompt, experience.hinted
            if form not in shown and form not in failed:
                try:
                    shown[form] = self._row_and_prompt(row, prompt, *form)
                except MediaError as error:
                    failed[form] = error
            if form in failed:
                lost.append((place, prompt_key(experience.prompt), failed[form]))
            found[place] = (*shown.get(form, (row, prompt)), None if form in failed else experience)
        lost = gather_object(lost)
        for _, key, error in lost:
            self.row_encoder.registries["train_dataset"].add(key, error)
        if lost:
            self._write_quarantine()
            self._discard_quarantined()
        return found, {place for place, *_ in lost}

    def _row_and_prompt(self, row: dict[str, Any], prompt: EncodedPrompt | None, key: str, hinted: bool) -> Shown:
        if row_key(row, prompt) != key:
            row = self._row_of(key)
            prompt = None if self.family is None else self.prompt_builder.encode(row)
        if prompt is None:
            return row, None
        if hinted and self._hinted_prompt(row, prompt) is None:
            file = next(iter(self.row_encoder.spec(row).files), None)
            raise MediaError("prompt-too-long", file, "the prompt cannot be shown with its hint")
        return row, prompt

    def _shown(self, row: dict[str, Any], prompt: EncodedPrompt | None, hinted: bool) -> Shown:
        """Return a row and its prompt as they are shown to the model, with the hint where `hinted`."""
        if not hinted:
            return row, prompt
        hinted_prompt = None if prompt is None else self._hinted_prompt(row, prompt)
        return with_hint(row, self.args.hint_template), hinted_prompt
