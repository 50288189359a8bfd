"""Logs that only grow: a line is there whole or does not count, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class GrowingLog:
    """
    A log of JSON objects in files `NAME.jsonl` and `NAME-PART.jsonl` of a folder, each written by one process.

    Args:
        folder (`Path`): where the files lie.
        name (`str`): of the log.
        part (`str`): tells this process's file apart from those of others.
    """

    def __init__(self, folder: Path, name: str, part: str = ""):
        self.folder, self.name = folder, name
        self.path = folder / f"{name}{part and f'-{part}'}.jsonl"

    def add(self, entry: Mapping[str, Any], flush: bool = True) -> None:
        """
        Add an object at once.

        Args:
            flush: wait until it is on the disk, and outlives a power cut too.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # A line that a killed run left unfinished must not swallow the next one, hence the line break in front.
        line = f"\n{json.dumps(entry)}\n".encode()
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)
            if flush:
                os.fsync(file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of all files, less those that were never written to their end."""
        for path in sorted([*self.folder.glob(f"{self.name}.jsonl"), *self.folder.glob(f"{self.name}-*.jsonl")]):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(entry, dict):
                        yield entry
