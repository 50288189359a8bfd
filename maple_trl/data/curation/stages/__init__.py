"""The stages that ask or decode, each in its own file: a function from a row to rows."""

from maple_trl.data.curation.stages import align, annotate, captions, collect, filter, questions, split


STAGES = (
    collect.STAGE,
    split.STAGE,
    annotate.STAGE,
    align.STAGE,
    captions.STAGE,
    questions.STAGE,
    filter.STAGE,
)
"""In their order; the splits and the files follow from all rows at once."""

NAMES = (*(stage.name for stage in STAGES), "splits", "write")
"""Names of all stages."""
