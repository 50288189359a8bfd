"""Chromium, for the tests that open pages in it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
_FLAGS += " --disable-component-update"

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: the page cannot be opened (Debian: apt-get install chromium)"
)


@contextmanager
def chromium(home: Path, *flags: str) -> Iterator:
    """A browser with a home of its own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive Chromium with")
    with sync_api.sync_playwright() as driver:
        made = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*_FLAGS.split(), *flags], env={**os.environ, "HOME": str(home)}
        )
        yield made
        made.close()
