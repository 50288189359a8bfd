"""The one error of a curation that is described wrongly or cannot go on."""


class CurationError(ValueError):
    """A curation that cannot be done as it is described; the message names file and key, and what would be right."""


class UnfinishedError(RuntimeError):
    """A stage that is not finished, because servers failed; the same command goes on from there."""
