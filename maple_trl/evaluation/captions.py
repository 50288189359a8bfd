"""What a caption is scored against: the reference of its clip for the signals that were fed (MAPLE, arXiv 2602.11596, C.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maple_trl.modalities import ModalityTag
from maple_trl.rewards.caption_judge import UNIMODAL_COLUMNS


Row = Mapping[str, Any]

REFERENCE = "reference"


class CaptionRows:
    """
    The captions among rows: those with a `reference` and no `solution`.

    A clip's rows have a tag each, and the reference that tells what these signals tell.

    Args:
        rows: of a data set.
        clips: the clip of each; `None` where it has none.
    """

    def __init__(self, rows: Sequence[Row], clips: Sequence[str | None]):
        self.rows, self.clips = rows, clips
        self._of_clip: dict[tuple[str | None, str], int] = {}
        for number, clip in enumerate(clips):
            if clip is not None and self.is_one(number) and self._tag(number):
                self._of_clip.setdefault((clip, self._tag(number)), number)

    def is_one(self, number: int) -> bool:
        """Return whether a row asks for a caption."""
        row = self.rows[number]
        names = (REFERENCE, *UNIMODAL_COLUMNS.values())
        return row.get("solution") in (None, "") and any(row.get(name) for name in names)

    def _tag(self, number: int) -> str:
        tag = self.rows[number].get("tag")
        return ModalityTag.parse(tag).value if tag else ""

    def of(self, number: int, fed: ModalityTag) -> Row | None:
        """
        Return the row by which a caption is scored that was written from `fed`.

        That is the row itself where its tag is `fed`, else its clip's row with this tag. Without one, and with a single
        signal, the row's own reference for that signal does. `None` where there is no reference for these signals.
        """
        row = self.rows[number]
        if not row.get("tag") or self._tag(number) == fed.value:
            return row
        other = self._of_clip.get((self.clips[number], fed.value))
        if other is not None:
            return self.rows[other]
        alone = row.get(UNIMODAL_COLUMNS.get(fed.value, ""))
        return {**row, "tag": fed.value, REFERENCE: alone} if alone else None
