"""What a process does to files, stopped at any of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

#: What a process does to files, and where it can be killed.
OPERATIONS = ("open", "write", "fsync", "chmod", "replace", "unlink")


class Killed(BaseException):
    """Nothing is done any more, neither cleaning up."""


@contextmanager
def stopped(after: int, error: Callable[[], BaseException] = Killed, once: bool = False) -> Iterator[list[str]]:
    """From some operation on files on, each fails; or that one alone does. Gives what has been done until then."""
    done: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def operation(*arguments: Any, **named: Any) -> Any:
            if len(done) == after or (len(done) > after and not once):
                if once:
                    done.append(name)
                raise error()
            done.append(name)
            return real(*arguments, **named)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counting(name))
        yield done
