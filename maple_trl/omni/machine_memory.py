"""What memory the system has, and how much processes take of it; read from Linux's files, unknown elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


_UNLIMITED = 1 << 60
"""A limit above it is none: control groups of version 1 write a large number."""


def machine_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """
    Return the bytes that this process and its like may take: of the machine, or less where a control group says so.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        `int`, or `None` where the system does not tell.
    """
    found = [*_total(Path(root)), *_group_limits(Path(root))]
    return min((size for size in found if 0 < size < _UNLIMITED), default=None)


def _total(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            yield int(line.split()[1]) << 10


def _group_limits(root: Path) -> Iterator[int]:
    """Yield limits of the control groups that this process is in, and of those around them."""
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (
            (groups / "memory", ("memory.limit_in_bytes",)) if controllers else (groups, ("memory.max", "memory.high"))
        )
        inner = Path(path.lstrip("/"))
        # In a container the path may be that outside, of which nothing is mounted but the innermost group.
        for folder in (base, *(base / inner.parents[i] for i in range(len(inner.parts))), base / inner):
            for name in names:
                value = _text(folder / name).strip()
                if value.isdigit():  # "max": none
                    yield int(value)


def local_processes(all_processes: int = 1) -> int:
    """Return how many processes of a run share this machine, as the launcher says; where it does not, all of them."""
    names = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    said = [value for name in names if (value := os.environ.get(name, "")).isdigit()]
    return max(int(said[0]) if said else all_processes, 1)


def resident_bytes(process: int) -> int | None:
    """Return the memory that a process has in use, shared files among it; `None` where the system does not tell."""
    fields = _text(Path(f"/proc/{process}/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else None


def children_of(process: int) -> list[int]:
    """Return the processes that a process, and those in turn, have started."""
    found, waiting = [], [process]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*"):
            started = [int(child) for child in _text(task / "children").split()]
            found += started
            waiting += started
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # there is none, or the process has ended
        return ""
