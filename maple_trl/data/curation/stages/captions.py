"""Stage 5: a caption for each tag, from that tag's signals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maple_trl.data.curation.asking import Ask
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.evidence import isolate, possible_tags, show
from maple_trl.data.curation.prompts import CAPTION, CAPTION_FORM, CAPTION_PROMPT, signals
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.modalities import Modality, ModalityTag


REFERENCES = {Modality.VIDEO: "reference_v", Modality.AUDIO: "reference_a", Modality.SUBTITLE: "reference_s"}


def units(rows: Sequence[Row], config: CurationConfig) -> list[Row]:
    """Return a row for each clip and tag, with that tag's signals; also for the single signals of the clip's tags."""
    made = []
    for row in rows:
        own = possible_tags(row, config.tags)
        single = {ModalityTag.from_modalities([modality]) for tag in own for modality in tag.modalities}
        tags = [tag for tag in ModalityTag if tag in single.union(own)]
        made += [{**isolate(row, tag.modalities), "tag": tag.value} for tag in tags]
    return made


async def caption(row: Row, tools: Tools) -> Outcome:
    """Have a caption written."""
    outcome, tag = Outcome(), ModalityTag(row["tag"])
    ask = Ask(
        CAPTION,
        show(tools.root, row, tag.modalities, tools.config.captions.evidence),
        CAPTION_FORM,
        {"caption": "A sentence of usual length on what happens in this clip and in which situation."},
        {"signals": signals(tag)},
    )
    told = await tools.ask("captions", "text", ask, outcome)
    made = {
        "id": f"{row['clip']}-caption-{tag}",
        "clip": row["clip"],
        "tag": tag.value,
        "prompt": [{"role": "user", "content": CAPTION_PROMPT}],
        "reference": told.data["caption"],
        "provenance": [*about_media(row), *told.provenance("reference")],
        **row["media"],
    }
    outcome.rows.append(made)
    return outcome


def about_media(row: Row) -> list[Row]:
    """Return the provenance of a clip's files: of subtitles that a model wrote."""
    return [entry for entry in row["provenance"] if entry["field"] == "subtitle"]


def with_references(rows: list[Row], config: CurationConfig) -> Outcome:
    """Give each caption those of its single signals, without which it goes; keep those of the tags that are made."""
    single = {(row["clip"], row["tag"]): row for row in rows if len(row["tag"]) == 1}
    outcome = Outcome()
    for row in rows:
        tag = ModalityTag(row["tag"])
        if tag not in config.tags:
            continue
        alone = {
            modality: single.get((row["clip"], modality.value)) for modality in Modality if modality in tag.modalities
        }
        missing = [modality.value for modality, other in alone.items() if other is None]
        if missing:
            outcome.drop(row["id"], "no-reference", f"there is no caption of {missing[0]} alone")
        else:
            outcome.rows.append(_with(row, alone))
    return outcome


def _with(row: Row, alone: Mapping[Modality, Row]) -> Row:
    row = {**row, "provenance": list(row["provenance"])}
    for modality, other in alone.items():
        row[REFERENCES[modality]] = other["reference"]
        source = next(entry for entry in other["provenance"] if entry["field"] == "reference")
        row["provenance"].append({**source, "field": REFERENCES[modality]})
    return row


STAGE = Stage(
    "captions",
    "align",
    caption,
    name_of=lambda row: f"{row['clip']}, caption {row['tag']}",
    units=units,
    prompts=(CAPTION,),
    endpoints=lambda config: ["text"],
    decides=lambda config: [config.captions.evidence, CAPTION_PROMPT],
    join=with_references,
)
