"""How far long work has come, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_LINE_SECONDS = 30.0  # between two lines where nothing can be drawn


class Progress(rich.progress.Progress):
    """rich's bars on standard error; where that is no terminal (nohup, CI, systemd), a plain line now and then."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None, **options: Any) -> None:
        console = console or Console(stderr=True)
        # rich looks back 30 s by default, over three episodes of a slow simulator: the time it foretells then jumps
        super().__init__(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=600, **options
        )
        self._last_line = self.get_time()

    def update(self, *args: Any, **options: Any) -> None:
        super().update(*args, **options)
        if self.disable and self.get_time() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = self.get_time()
            columns = [column for column in self.columns if isinstance(column, ProgressColumn)]
            cells = (column(task) for task in self.tasks for column in columns)
            self.console.print(*(cell for cell in cells if isinstance(cell, Text)), soft_wrap=True)


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that goes when it is full, and the function that moves it: done, in all, and what was done last."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total, last: shown.update(task, completed=done, total=total)
