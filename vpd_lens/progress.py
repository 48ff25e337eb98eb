"""How far a long computation is and how long it will still take, on terminals and in log files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich import progress
from rich.console import Console
from rich.table import Column

T = TypeVar("T")

# Seconds before the first line and between lines in a log file.
_FIRST, _BETWEEN = 5.0, 30.0


class Progress:
    """A bar on a terminal, and a line now and then where the output is a file, pipe or notebook.

    Args:
        title: What is done.
        total: Number of units of work in all.
        start: Units that were done before.
        show: Show anything at all.

    Examples:
        >>> with Progress("Attributing", 3, show=False) as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """

    def __init__(self, title: str, total: int, start: int = 0, show: bool = True) -> None:
        self.title, self.total, self.start, self.done = title, total, start, start
        self.console = Console(quiet=not show)
        self._in_lines = not self.console.is_terminal or self.console.is_jupyter
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}", table_column=_column()),
            progress.BarColumn(),
            progress.MofNCompleteColumn(table_column=_column()),
            progress.TimeElapsedColumn(table_column=_column()),
            progress.TextColumn("left", table_column=_column()),
            progress.TimeRemainingColumn(table_column=_column()),
            console=self.console,
            disable=not show or self._in_lines,
        )
        self._task = self._bar.add_task(title, total=total, completed=start)
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, units: int = 1) -> None:
        """Count finished units of work."""
        self.done += units
        self._bar.advance(self._task, units)
        now = time.monotonic()
        wait = _FIRST if self._spoke == self._began else _BETWEEN
        if self._in_lines and now - self._spoke >= wait:
            self._spoke = now
            passed = now - self._began
            left = passed / (self.done - self.start) * (self.total - self.done)
            self.console.print(
                f"{self.title}: {self.done} of {self.total}, {_time(passed)} passed, about "
                f"{_time(left)} left",
                highlight=False,
            )

    def counting(self, units: Iterable[T]) -> Iterator[T]:
        """Yield units of work, and count each when the next is asked for."""
        for unit in units:
            yield unit
            self.advance()


def _column() -> Column:
    return Column(no_wrap=True)  # on a narrow terminal only the bar shrinks


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
