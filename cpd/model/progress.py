"""Progress: one line on stderr for all that runs, with what is on, how far it is, and the time left.

    with shown(), part("train", total=steps) as training:
        for batch in loader:
            ...
            training.advance()

What is called meanwhile adds its own parts to the same line, and logs are printed above it. Nothing is shown where
stderr is no terminal. `part` costs nothing where nothing is shown.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

#: Cells of the bar: fewer say nothing, more say no more.
LEAST, MOST = 10, 40
#: Times a second that the line is drawn.
RATE = 5


class Part:
    """Something that is under way.

    Args:
        name: what it is, as it is shown.
        total: how many steps it takes; None: not known.
        done: how many of them are behind.
        undisturbed: the line is drawn on `advance` alone, as what is timed meanwhile must not be disturbed.
    """

    def __init__(self, name: str, total: float | None = None, done: float = 0, undisturbed: bool = False) -> None:
        self.name, self.total, self.done, self.undisturbed = name, total, done, undisturbed
        self._first, self._start = done, time.monotonic()

    def advance(self, count: float = 1, name: str | None = None) -> None:
        """Note that so many steps more are behind, and what it is called from now on."""
        self.done += count
        self.name = self.name if name is None else name
        if self.undisturbed and _line is not None:
            _line.draw_at_times()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """The seconds that are left at the pace so far; None where nothing is known of it."""
        new = self.done - self._first
        return None if self.total is None or new <= 0 else self.seconds / new * max(self.total - self.done, 0)


class _Live(Live):
    """A line that its own thread leaves alone while something is timed."""

    undisturbed: Callable[[], bool]

    def refresh(self) -> None:
        """Draw the line."""
        if threading.get_ident() == _owner or not self.undisturbed():
            super().refresh()


class _Line:
    """The line: the names of all parts, the bar of the innermost that has a length, and its time left."""

    def __init__(self) -> None:
        self.console, self.parts, self._drawn = Console(stderr=True), list[Part](), 0.0
        self._spinner = Spinner("line" if self.console.options.ascii_only else "dots")
        self.live = _Live(
            get_renderable=self.drawn, console=self.console, transient=True, refresh_per_second=RATE,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self.live.undisturbed = lambda: any(part.undisturbed for part in self.parts)

    def draw_at_times(self) -> None:
        """Draw it, unless that was done a moment ago."""
        if time.monotonic() - self._drawn >= 2 / RATE:
            self._drawn = time.monotonic()
            self.live.refresh()

    def drawn(self) -> Table:
        """It as it is now, never wider than the terminal."""
        parts = list(self.parts)
        told = Text(", ".join(part.name for part in parts if part.name))
        measured = next((part for part in reversed(parts) if part.total), None)
        end = Text(_clock(parts[-1].seconds) if parts else "")
        if measured is not None and measured.total:
            left = "" if measured.left is None else f" {_clock(measured.left)} left"
            end = Text(f"{min(measured.done / measured.total, 1):4.0%}{left}")
        room = self.console.width - 4 - end.cell_len  # the spinner, the spaces between, and one cell at the end
        bar = 0 if measured is None or room < 3 * LEAST else max(LEAST, min(MOST, room - told.cell_len - 1))
        told.truncate(max(room - bar - bool(bar), 1), overflow="ellipsis")
        row = Table.grid(padding=(0, 1, 0, 0))
        cells = [self._spinner.render(time.monotonic()), told]
        if bar and measured is not None:
            cells.append(ProgressBar(measured.total, min(measured.done, measured.total or 0), width=bar))
        for _ in (*cells, end):
            row.add_column(no_wrap=True)
        row.add_row(*cells, end)
        return row


#: The line that is shown, and the thread that it belongs to.
_line: _Line | None = None
_owner: int | None = None


@contextmanager
def shown(wanted: bool | None = None) -> Iterator[None]:
    """Show a line for the length of a block, if stderr is a terminal and none is shown yet.

    Args:
        wanted: False shows none; True shows one in a notebook too.
    """
    global _line, _owner
    if _line is not None or wanted is False or not _can_be_shown(bool(wanted)):
        yield
        return
    line = _Line()
    with ExitStack() as stack:
        stack.callback(_forget)
        _line, _owner = line, threading.get_ident()
        stack.enter_context(line.live)
        _take_over_logs(line.console, stack)
        yield


@contextmanager
def part(name: str, total: float | None = None, done: float = 0, *, undisturbed: bool = False) -> Iterator[Part]:
    """A part of what is under way, for the length of a block; arguments are those of `Part`."""
    found, line = Part(name, total, done, undisturbed), _line if threading.get_ident() == _owner else None
    if line is None:
        yield found
        return
    line.parts.append(found)
    if len(line.parts) == 1 or undisturbed:  # what is over before the line would be drawn by itself is seen too
        line.live.refresh()
    try:
        yield found
    finally:
        line.parts.remove(found)


def console() -> Console:
    """Where something is printed on stderr so that it stands above the line, if one is shown."""
    return Console(stderr=True) if _line is None else _line.console


def _can_be_shown(insisted: bool) -> bool:
    """Whether stderr is a terminal whose cursor can be moved, or, if insisted on, a notebook."""
    found = Console(stderr=True)
    return (found.is_interactive and sys.stderr.isatty()) or (insisted and found.is_jupyter)


def _forget() -> None:
    global _line, _owner
    _line = _owner = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _take_over_logs(console: Console, stack: ExitStack) -> None:
    """Let the handlers of all logs that write to the terminal write above the line, until the stack is left."""
    loggers = [logging.root, *(item for item in logging.root.manager.loggerDict.values() if hasattr(item, "handlers"))]
    proxies = [file for file in (sys.stderr, sys.stdout) if isinstance(file, FileProxy)]
    streams: dict[int, Any] = {id(file.rich_proxied_file): file for file in proxies}
    for handler in {id(item): item for logger in loggers for item in logger.handlers}.values():
        if isinstance(handler, RichHandler) and id(handler.console.file) in streams:
            stack.callback(partial(setattr, handler, "console", handler.console))
            handler.console = console
        elif isinstance(handler, logging.StreamHandler) and id(handler.stream) in streams:
            stack.callback(partial(handler.setStream, handler.stream))
            handler.setStream(streams[id(handler.stream)])


def _leave_in_child() -> None:
    """A forked process (a worker that loads data) has no line: it writes as if none was shown."""
    if _line is not None:
        _forget()
        for name in ("stdout", "stderr"):
            file = getattr(sys, name)
            setattr(sys, name, file.rich_proxied_file if isinstance(file, FileProxy) else file)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_child)
