"""Processes of their own that begin at once: forks of one that has imported what takes seconds.

What they do is a function of a module, and what they write goes to a file or a terminal. Timings are short, as in the
tests' own process.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
IMPORTED = "helpers.imported"
#: In the environment of an interpreter of its own: it finds the library and the tests, and is not the only one.
ALONE = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}


@functools.cache
def _context() -> ForkServerContext:
    """Has a process that is forked: it starts with the first, and ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    return context


def started(
    function: str, *arguments: Any, output: str | Path, environment: Mapping[str, str] = os.environ,
    folder: Path | None = None, terminal: bool = False,
) -> ForkServerProcess:  # fmt: skip
    """A process that calls a function.

    Args:
        function: "module:function".
        arguments: of it.
        output: a file, made anew, or a terminal: where all goes that it writes.
        environment: of the process.
        folder: where it runs; the folder of this process if None.
        terminal: whether `output` is one; it is read from too then, and its Ctrl-C interrupts the process.
    """
    with pytest.MonkeyPatch.context() as patch:  # of the process that is forked
        for name, value in ALONE.items():
            patch.setenv(name, value)
        alone = {**environment, **ALONE}  # accelerate would take threads of its own where the number is not given
        given = (function, arguments, alone, str(folder or os.getcwd()), str(output), terminal)
        process = _context().Process(target=_begin, args=given)
        process.start()
    return process


def _begin(
    function: str, arguments: tuple[Any, ...], environment: dict[str, str], folder: str, output: str, terminal: bool
) -> None:
    """The whole of such a process."""
    assert IMPORTED in sys.modules, "it could not be imported"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if terminal:
        os.setsid()  # the terminal that is opened next is its own
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    place = os.open(output, os.O_RDWR if terminal else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for handle in (0, 1, 2) if terminal else (1, 2):
        os.dup2(place, handle)
    os.close(place)
    sys.stdout, sys.stderr = (open(handle, "w", buffering=1, closefd=False) for handle in (1, 2))  # noqa: SIM115
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
