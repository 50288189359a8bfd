"""What hints are asked for, and what became of the rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from maple_trl.chat import ChatUsage


class HintError(ValueError):
    """Hints can't be built as asked; the message names the file, and row and field where there are any."""


@dataclass(frozen=True)
class HintOptions:
    """
    What the teacher is shown, and what becomes of its hints.

    Args:
        columns (`Sequence[str]`, *optional*):
            Further columns shown to the teacher, such as captions or cues; of a subtitle file below the media root its
            text.
        frames (`int`, *optional*, defaults to 0):
            Pictures of the row's video that are shown. Above 0, the row's own pictures are shown as well, all of them.
        media_root (`str` or `os.PathLike`, *optional*):
            Folder of pictures, videos and subtitle files; default is that of the input.
        max_tries (`int`, *optional*, defaults to 3):
            Hints asked for, a row, until one is not refused.
        max_words (`int`, *optional*, defaults to 60):
            Longest hint.
        limit (`int`, *optional*):
            Ask for the first rows only; the others keep the hint that they have, if any.
        only_missing (`bool`, *optional*, defaults to `False`):
            Ask only for rows to which the input gives no hint.
        chunk (`int`, *optional*, defaults to 64):
            Rows whose pictures are in memory at a time.

    Raises:
        ValueError: naming the field that is out of range.
    """

    columns: Sequence[str] = ()
    frames: int = 0
    media_root: str | os.PathLike | None = None
    max_tries: int = 3
    max_words: int = 60
    limit: int | None = None
    only_missing: bool = False
    chunk: int = 64

    def __post_init__(self):
        for name, least in (("frames", 0), ("max_tries", 1), ("max_words", 1), ("limit", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass
class HintSummary:
    """
    What became of the rows: `rows == kept + skipped + hinted + refused + failed + beyond the limit`.

    Attributes:
        rows (`int`): rows of the input.
        asked (`int`): rows that a hint was wanted for.
        kept (`int`): rows that had one.
        skipped (`int`): rows without a solution, whose hints could not be checked.
        hinted (`int`): rows with a new hint.
        refused (`Counter`): last reason ([`LEAKS`]) -> rows of which every hint was refused.
        failed (`Counter`): reason -> rows that got no answer; of a medium as `media:REASON`, `not-asked` after a stop.
        resumed (`int`): rows whose outcome an earlier run had left in the progress file.
        stopped (`str` or `None`): why the rest was not asked, after a chunk in which every row failed.
        usage (`ChatUsage`): what this run spent.
    """

    rows: int = 0
    asked: int = 0
    kept: int = 0
    skipped: int = 0
    hinted: int = 0
    refused: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    resumed: int = 0
    stopped: str | None = None
    usage: ChatUsage = field(default_factory=ChatUsage)

    @property
    def failed_share(self) -> float:
        """Share of the asked rows that failed; refused hints are no failures."""
        return self.failed.total() / self.asked if self.asked else 0.0
