"""Words that messages of errors share."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", prefix: str = "") -> str:
    """Return the end of an error about an unknown name: the closest known one, else other advice, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {prefix}{close[0]}?" if close else otherwise
    return f"; {advice}" if advice else ""
