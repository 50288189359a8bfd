"""What is wrong with a job, and what would be right."""

import difflib
from collections.abc import Iterable


class SetupError(ValueError):
    """The job is described wrongly: an unknown key, a data set or reward that is not there. The message says which."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", prefix: str = "") -> str:
    """Return the end of an error about an unknown name: the closest known one, else other advice, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {prefix}{close[0]}?" if close else otherwise
    return f"; {advice}" if advice else ""
