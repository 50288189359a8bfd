"""A counter on the standard error output, for commands that go through many rows."""

from __future__ import annotations

from typing import Any


class Counting:
    """
    Shows how many rows are done, where the standard error output is a screen.

    Args:
        what: is counted.
        quiet: show nothing.
    """

    def __init__(self, what: str, quiet: bool = False):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns, console=console, disable=quiet or not console.is_terminal, transient=True, refresh_per_second=4
        )
        self._task = self._bar.add_task(what, total=None)

    def update(self, done: int, total: int | None = None) -> None:
        """Show how many are done, of how many where that is known."""
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Counting:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
