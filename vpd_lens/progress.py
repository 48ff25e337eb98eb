"""How far a long computation is and how long it will still take.

On terminals and in notebooks a bar, in log files lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

from rich import progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from vpd_lens.rendering import as_html, as_text

T = TypeVar("T")

_FIRST, _BETWEEN = 5.0, 30.0  # seconds before the first line, and between lines, of a log file


_watcher: ContextVar[Callable[[Progress], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Callable[[Progress], None]) -> Iterator[None]:
    """Hand every `Progress` of this thread to `watcher`, when it begins and after each unit.

    What the watcher raises ends the work in between.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Bar(progress.Progress):
    """A bar that rich redraws on a terminal, and `draw` in a notebook, which needs no ipywidgets.

    `show` says whether there is one at all; elsewhere there is none.
    """

    note = ""  # how it stands, on a line of its own, so that 80 columns hold it and the bar

    def __init__(self, *columns: progress.ProgressColumn, console: Console, show: bool) -> None:
        super().__init__(*columns, console=console, disable=not (show and console.is_terminal))
        self._in_notebook = show and console.is_jupyter
        self._output: Any = None
        self._drawn = 0.0

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the note below it."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)

    def draw(self, pause: float = 0.25) -> None:
        """Show its state in a notebook in place of the last one, `pause` seconds after it."""
        if not self._in_notebook or time.monotonic() - self._drawn < pause:
            return
        self._drawn, state = time.monotonic(), self.get_renderable()
        shown = {"text/html": as_html(state), "text/plain": as_text(state)}
        if self._output is None:
            from IPython.display import display

            self._output = display(shown, raw=True, display_id=True)
        else:
            self._output.update(shown, raw=True)


class Progress:
    """A bar, or lines where there is none, for `total` units of work of which `start` are done.

    What the work will `cost` is said before it begins.
    """

    def __init__(
        self, title: str, total: int, start: int = 0, show: bool = True, cost: str = ""
    ) -> None:
        self.title, self.total, self.start, self.done = title, total, start, start
        self.cost = cost
        self.console = Console(quiet=not show)
        self._in_lines = not (self.console.is_terminal or self.console.is_jupyter)
        whole = Column(no_wrap=True)  # on a narrow terminal only the bar shrinks
        self._bar = Bar(
            progress.TextColumn("[bold]{task.description}", table_column=whole),
            progress.BarColumn(),
            progress.MofNCompleteColumn(table_column=whole),
            progress.TimeElapsedColumn(table_column=whole),
            progress.TextColumn("left", table_column=whole),
            progress.TimeRemainingColumn(table_column=whole),
            console=self.console,
            show=show,
        )
        self._task = self._bar.add_task(title, total=total, completed=start)
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> Progress:
        if self.cost:
            self.console.print(f"{self.title}: {self.cost}", highlight=False, markup=False)
        self._bar.start()
        self._bar.draw()
        self._tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._bar.draw(pause=0.0)

    def advance(self, units: int = 1) -> None:
        """Count finished units of work."""
        self.done += units
        self._bar.advance(self._task, units)
        self._bar.draw()
        self._tell()
        now = time.monotonic()
        wait = _FIRST if self._spoke == self._began else _BETWEEN
        if self._in_lines and now - self._spoke >= wait:
            self._spoke, passed = now, now - self._began
            left = passed / (self.done - self.start) * (self.total - self.done)
            passed, left = (timedelta(seconds=round(seconds)) for seconds in (passed, left))
            line = f"{self.title}: {self.done} of {self.total}, {passed} passed, about {left} left"
            self.console.print(line, highlight=False)

    def _tell(self) -> None:
        if watcher := _watcher.get():
            watcher(self)

    def say(self, text: str) -> None:
        """Say how it stands: below the bar, or in a line."""
        self._bar.note = text
        if self._in_lines:
            self.console.print(f"{self.title}  {text}", highlight=False)

    def counting(self, units: Iterable[T]) -> Iterator[T]:
        """Yield units of work, and count each when the next is asked for."""
        for unit in units:
            yield unit
            self.advance()
