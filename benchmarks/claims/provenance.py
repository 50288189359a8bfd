"""What git knows: when a claim was registered as it stands, and when results were added."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from register import Claim, Register


def _git(folder: Path, *words: str) -> str | None:
    """Return what git says in a folder; `None` where there is no git, no repository, or nothing of that name."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def register_commit(register: Register) -> str | None:
    """Return the commit that last changed the register, with its date; `None` outside of a repository."""
    told = _git(register.folder, "log", "-1", "--format=%h of %cs", "--", "register.yaml", "register")
    return (told or "").strip() or None


def uncommitted(register: Register) -> list[str]:
    """Return the register's files that are not as they are committed; none outside of a repository."""
    told = _git(register.folder, "status", "--porcelain", "--", "register.yaml", "register")
    return [line[3:] for line in (told or "").splitlines()]


def registered_at(register: Register, claims: Sequence[Claim]) -> dict[str, int]:
    """Return when the text of claims was last changed, in seconds; those that are not committed are absent."""
    by_file: dict[Path, list[int | None]] = {}
    found = {}
    for claim in claims:
        if claim.file not in by_file:
            by_file[claim.file] = _line_times(register.folder, claim.file)
        times = by_file[claim.file][claim.lines[0] - 1 : claim.lines[1]]
        if times and None not in times:
            found[claim.name] = max(time for time in times if time is not None)
    return found


def rules_at(register: Register) -> int | None:
    """Return when the rules were last changed, in seconds; `None` where they are not committed as they stand."""
    file = register.folder / "register.yaml"
    times, own, inside = _line_times(register.folder, file), [], False
    for line, time in zip(file.read_text(encoding="utf-8").splitlines(), times, strict=False):
        if line[:1].strip() not in ("", "#"):  # a key of the file
            inside = line.startswith("rules:")
        if inside:
            own.append(time)
    return None if not own or None in own else max(time for time in own if time is not None)


def _line_times(folder: Path, file: Path) -> list[int | None]:
    """Return when each line of a file was committed; `None` where it is not."""
    times: list[int | None] = []
    own, time = False, 0
    told = _git(folder, "blame", "--line-porcelain", "--", str(file.resolve()))
    for line in (told or "").splitlines():
        if line.startswith("\t"):
            times.append(time if own else None)
        elif line.startswith("committer-time "):
            time = int(line.split()[1])
        elif len(line.split()) in (3, 4) and len(line.split()[0]) == 40:
            own = line.strip("0 ") != "" and not line.startswith("0" * 40)
    return times


def added_at(results: Path) -> dict[Path, int]:
    """Return when result files were first committed, in seconds; those that are not are absent."""
    top = (_git(results, "rev-parse", "--show-toplevel") or "").strip() if results.is_dir() else ""
    told = _git(results, "log", "--diff-filter=A", "--format=@%ct", "--name-only", "--", ".") if top else None
    found: dict[Path, int] = {}
    time = 0
    for line in (told or "").splitlines():
        if line.startswith("@"):
            time = int(line[1:])
        elif line:
            found[Path(top, line)] = time  # older ones come later
    return found
