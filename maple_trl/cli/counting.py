"""A counter on the standard error output, for commands that read many rows."""

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
        from rich.progress import Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.completed:,.0f} {task.description}"),)
        self._bar = Progress(
            *columns, console=console, disable=quiet or not console.is_terminal, transient=True, refresh_per_second=4
        )
        self._task = self._bar.add_task(what, total=None)

    def update(self, done: int) -> None:
        """Show how many are done."""
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> Counting:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
