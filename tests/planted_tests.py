"""Tests that are written by tests, and run by a pytest of their own under this suite's conftest."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Writes a file of tests into a folder, and runs it; whatever measures coverage of this process is left out."""
    (folder / "test_it.py").write_text(text)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    outer = ("SLIPCOVER", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", *words, str(folder)]
    return subprocess.run(
        command, cwd=folder, env=environment | {"PYTHONPATH": str(TESTS)}, capture_output=True, text=True
    )
