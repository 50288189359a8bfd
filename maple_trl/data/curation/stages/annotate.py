"""Stage 3: each signal of a clip is described alone."""

from __future__ import annotations

from typing import Any

from maple_trl.data.curation.asking import Ask, DroppedError
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.evidence import show
from maple_trl.data.curation.prompts import ANNOTATION_FORMS, ANNOTATIONS
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.modalities import Modality


ROLE = {Modality.VIDEO: "vision", Modality.AUDIO: "audio", Modality.SUBTITLE: "text"}

_SENTENCES = "A sentence of usual length on what happens at this moment of the clip. " * 3
_TIMED = [{"second": float(second), "event": "A few words on an event."} for second in range(0, 30, 4)]
_EXAMPLES: dict[Modality, Any] = {
    Modality.VIDEO: {"events": _TIMED, "summary": _SENTENCES},
    Modality.AUDIO: {"cues": _TIMED, "summary": _SENTENCES},
    Modality.SUBTITLE: {"statements": [event["event"] for event in _TIMED], "summary": _SENTENCES},
}


def wanted(config: CurationConfig) -> list[Modality]:
    """Return the modalities that some tag needs."""
    fed = {modality for tag in config.tags for modality in tag.modalities}
    return [modality for modality in Modality if modality in fed]


async def annotate(row: Row, tools: Tools) -> Outcome:
    """Have each signal described by its server; what cannot be had is dropped, and the clip goes on without the signal."""
    outcome, notes, provenance = Outcome(), {}, list(row["provenance"])
    for modality in wanted(tools.config):
        if modality not in row["signals"]:
            continue
        ask = Ask(
            ANNOTATIONS[modality],
            show(tools.root, row, [modality], "media"),
            ANNOTATION_FORMS[modality],
            _EXAMPLES[modality],
        )
        try:
            told = await tools.ask("annotate", ROLE[modality], ask, outcome)
        except DroppedError as error:
            outcome.drop(f"{row['clip']}, signal {modality}", error.reason, error.detail)
            continue
        notes[modality.value] = told.data
        provenance += told.provenance(f"notes.{modality}")
    if notes:
        outcome.rows.append({**row, "notes": notes, "provenance": provenance})
    else:
        outcome.drop(row["clip"], "no-annotation", "none of its signals could be described")
    return outcome


STAGE = Stage(
    "annotate",
    "split",
    annotate,
    prompts=tuple(ANNOTATIONS.values()),
    endpoints=lambda config: [ROLE[modality] for modality in wanted(config)],
    decides=lambda config: [str(modality) for modality in wanted(config)],
)
