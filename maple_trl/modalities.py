"""Modalities and required modality tags (MAPLE, arXiv 2602.11596, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


IMAGE_COLUMNS = ("image", "images")
"""Columns of a row that name its pictures: one, or several."""

MEDIA_COLUMNS = ("video", "audio", "subtitle", *IMAGE_COLUMNS)
"""Columns of a row that name its media."""

INPUT_COLUMNS = (*MEDIA_COLUMNS, "tag", "audio_in_video")
"""Columns of a row that decide what it is fed, and how: of one question, they tell two inputs apart."""

SUBTITLE_SUFFIXES = (".srt", ".vtt", ".json", ".ass", ".ssa", ".ttml", ".dfxp", ".sbv", ".sub")
"""Endings of the files that are read as subtitles; any other text is the subtitle itself."""

SCOPES = ("vision", "audio", "projectors", "llm")
"""The parts of an omni model that can be trained or frozen apart."""


STRATA = ("exact", "superset", "deficit")
"""How an input stands to what a question requires (MAPLE, arXiv 2602.11596, 5.4.1): see [`ModalityTag.stratum_of`]."""


class Modality(StrEnum):
    """One signal of a clip."""

    VIDEO = "V"
    AUDIO = "A"
    SUBTITLE = "S"


class ModalityTag(StrEnum):
    """
    The minimal set of signals that a sample needs (MAPLE, arXiv 2602.11596, section 4.1).

    Members stand in the canonical order `V A S VA VS AS VAS`; their value is the canonical spelling.
    """

    V = "V"
    A = "A"
    S = "S"
    VA = "VA"
    VS = "VS"
    AS = "AS"
    VAS = "VAS"

    @classmethod
    def parse(cls, text: str | ModalityTag) -> ModalityTag:
        """
        Read a tag from a `text` in any order and case (`"sv"` is `VS`).

        Raises:
            ValueError: when `text` is not one of the seven tags; the message names it and lists them.
        """
        if isinstance(text, cls):
            return text
        canonical = "".join(m for m in "VAS" if isinstance(text, str) and m in text.upper())
        if not isinstance(text, str) or sorted(text.strip().upper()) != sorted(canonical) or not canonical:
            raise ValueError(f"{text!r} is not a modality tag; the tags are {', '.join(cls)} (any order and case)")
        return cls(canonical)

    @classmethod
    def from_modalities(cls, modalities: Iterable[Modality]) -> ModalityTag:
        """Return the tag of a non-empty set of modalities."""
        return cls.parse("".join(sorted(modalities)))

    @property
    def modalities(self) -> frozenset[Modality]:
        """The signals that the tag names."""
        return frozenset(Modality(letter) for letter in self.value)

    @property
    def arity(self) -> str:
        """`"uni"`, `"bi"` or `"tri"`."""
        return ("uni", "bi", "tri")[len(self.value) - 1]

    def supersets(self) -> tuple[ModalityTag, ...]:
        """Return the tags that hold strictly more than this one, in canonical order."""
        return tuple(tag for tag in ModalityTag if tag.modalities > self.modalities)

    def stratum_of(self, given: ModalityTag) -> str:
        """Return how an input, the tag `given`, stands to what this tag requires: `"exact"`, `"superset"` or `"deficit"`."""
        if given.modalities >= self.modalities:
            return "exact" if given is self else "superset"
        return "deficit"

    def deficits(self) -> tuple[ModalityTag, ...]:
        """Return the tags that lack at least one modality of this one, in canonical order."""
        return tuple(tag for tag in ModalityTag if not tag.modalities >= self.modalities)
