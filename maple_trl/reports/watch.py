"""A report that follows runs that are going on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from maple_trl.reports.folders import NoRunError, has_ended, signature
from maple_trl.reports.report import end_live, write_report


_SHARE = 10
"""A page that took a second to write is left alone for as many: watching costs a tenth of a core at most."""


def watch_report(
    runs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    interval: float = 30.0,
    tell: Callable[[str], Any] = print,
    **options: Any,
) -> Path:
    """
    Write a report, and write it anew whenever its runs have written something, until all of them have ended.

    The open page loads itself anew meanwhile, and stays where its reader is. Ctrl-C ends the watch; the page is whole, and
    no longer loads itself.

    Args:
        runs: folders, as of [`~maple_trl.reports.write_report`]; one that holds no run yet is waited for.
        output: the HTML file.
        interval: seconds between two looks, at least.
        tell: is given a line for each page that is written.
        options: of [`~maple_trl.reports.write_report`].

    Returns:
        `Path`: the HTML file.

    Raises:
        ReportError: as of [`~maple_trl.reports.write_report`], but for a run that is not there yet.
        KeyboardInterrupt: when Ctrl-C is pressed before anything was written.
    """
    output, seen, waited = Path(output), None, None
    written = False
    try:
        while True:
            began, ended = time.monotonic(), all(map(has_ended, runs))  # what is written now is in the page below
            found = [signature(folder) for folder in runs]
            if found != seen:
                try:
                    write_report(runs, output, live=None if ended else interval, **options)
                except NoRunError as error:
                    if str(error) != waited:
                        tell(f"waiting for a run: {error}")
                    waited = str(error)
                else:
                    written, seen = True, found
                    tell(f"report: {output} ({datetime.now():%H:%M:%S}{', the end' if ended else ''})")
            if ended and seen == found:
                return output
            time.sleep(max(interval, _SHARE * (time.monotonic() - began)))
    except KeyboardInterrupt:
        if not written:
            raise
        end_live(output)
        tell(f"report: {output} (no longer watched)")
        return output
