"""A terminal: a program run on a pseudo-terminal of a width, and what is seen of it then."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from helpers.forks import started

_SEQUENCE = re.compile(r"\x1b\[(?P<given>[?0-9;]*)(?P<kind>[A-Za-z])")


@dataclass
class Screen:
    """What a terminal shows once it has been sent some text: the few control sequences that are used are known.

    Attributes:
        width: in cells.
        lines: all of them, those that have scrolled away too.
        seen: every state of every line, in the order in which it was left or wiped.
        wrapped: whether anything was longer than a line.
        cursor: whether it is visible.
    """

    width: int
    lines: list[str] = field(default_factory=lambda: [""])
    seen: list[str] = field(default_factory=list)
    wrapped: bool = False
    cursor: bool = True
    row: int = 0
    column: int = 0

    def send(self, text: str) -> Screen:
        """Take up text."""
        place = 0
        while place < len(text):
            if found := _SEQUENCE.match(text, place):
                self._control(found["given"], found["kind"])
                place = found.end()
                continue
            self._write(text[place])
            place += 1
        self.seen.append(self.lines[self.row])
        return self

    def _write(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.seen.append(self.lines[self.row])
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif char >= " ":
            if self.column == self.width:
                self.wrapped = True
                self._write("\r")
                self._write("\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
            self.column += 1
        else:
            raise AssertionError(f"an unknown control character: {char!r}")

    def _control(self, given: str, kind: str) -> None:
        if kind == "m":
            return
        if (given, kind) in (("?25", "l"), ("?25", "h")):
            self.cursor = kind == "h"
        elif (given, kind) == ("2", "K"):
            self.seen.append(self.lines[self.row])
            self.lines[self.row] = ""
        elif kind == "A":
            self.row -= int(given or 1)
            assert self.row >= 0, "above the first line"
        else:
            raise AssertionError(f"an unknown control sequence: {given}{kind}")


def run_in_terminal(
    function: str, *arguments: Any, width: int, folder: Path, interrupt_at: str | None = None, seconds: float = 120
) -> tuple[int, str]:
    """The exit code of a process that calls a function, and all that it wrote to its terminal.

    Args:
        function: "module:function".
        arguments: of it.
        width: of the terminal, in cells.
        folder: where it runs.
        interrupt_at: Ctrl-C is pressed once it has written this.
        seconds: after which it is ended.
    """
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    unset = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"TERM": "xterm-256color"}
    process = started(
        function, *arguments, output=os.ttyname(inside), environment=environment, folder=folder, terminal=True
    )
    written, deadline = b"", time.monotonic() + seconds
    while ready := wait([terminal, process.sentinel], max(0, deadline - time.monotonic())):
        if terminal not in ready:  # it has ended, and all is read
            break
        written += os.read(terminal, 1 << 16)
        if interrupt_at is not None and interrupt_at in written.decode(errors="ignore"):
            os.write(terminal, b"\x03")
            interrupt_at = None
    process.kill()  # where it is silent, or talks, for too long
    process.join()
    os.close(inside)
    os.close(terminal)
    return process.exitcode, written.decode()


def run_program(program: str, *options: str, **given: Any) -> tuple[int, str]:
    """The same of Python code in an interpreter of its own, with options for it."""
    return run_in_terminal("os:execv", sys.executable, [sys.executable, *options, "-c", program], **given)
