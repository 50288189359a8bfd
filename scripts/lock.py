"""
Writes constraints.txt: exact versions of all packages that the ranges of setup.cfg allow today, and nothing of where they
come from, for every Python and system that the package is for.

    python scripts/lock.py dev,plots
"""

import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
HEAD = "# Versions that the tests pass with, written by `make lock`; `make install LOCKED=1` installs these and no others.\n"


def resolve(extras: str) -> str:
    """Return the versions, a line each."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "setup.py", "--universal", "--python-version", "3.11"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet", "--upgrade"]
    command += [word for extra in extras.split(",") for word in ("--extra", extra)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def check(lines: list[str]) -> None:
    """Raise ValueError for a line that is no exact version, as a URL or an option is."""
    for line in lines:
        if not re.fullmatch(r"[\w.-]+(\[[\w,.-]+\])?==[\w.!+]+( ; [^@]+)?", line):
            raise ValueError(f"constraints.txt holds exact versions alone, not {line!r}")


def main() -> None:
    """Write the file."""
    lines = [line for line in resolve(sys.argv[1]).splitlines() if line and not line.startswith("#")]
    check(lines)
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
