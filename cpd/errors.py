"""The errors that `cpd` raises: one base class, and one subclass for each stage.

A message says what was found, what was expected, and what to do about it. Errors are raised before any model or file
of yours is changed.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CPDError(Exception):
    """Base class of all errors raised by `cpd`."""


class InputError(CPDError, ValueError):
    """An argument cannot be used: for example, example inputs have the wrong shape, or an option is out of range."""


class TraceError(CPDError):
    """`torch.export` could not trace the model. The message names the line."""


class PlanError(CPDError):
    """A plan names an unknown or frozen group, removes all channels of a group, or cannot satisfy a tie."""


class ShrinkError(CPDError):
    """A plan does not fit the model to which it is applied. The model is unchanged."""


class NothingToPruneError(CPDError):
    """No group of the model can be pruned. The message gives the reason for each group."""


class TargetError(CPDError):
    """The target cannot be reached. The message gives the best figure that can, and what prevents a better one."""


class TrainingError(CPDError):
    """Training or scoring failed: for example, the loader is empty, or a loss is not finite."""


class CheckpointError(CPDError):
    """A checkpoint cannot be written, read, or used with this model. The message says which files are intact."""


class ExportError(CPDError):
    """The ONNX export failed, or its outputs differ from those of PyTorch."""


class ArtifactError(CPDError):
    """A saved result is missing, truncated or not written by cpd, or a result cannot be written."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Name the extra of `cpd` to install, where a block imports a package that is not.

    Raises:
        InputError: in the place of `ImportError`.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f'{what} needs {error.name or "a package"}, which is not installed. Run: pip install "cpd[{extra}]".'
        ) from error


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters, without a full stop; its type if it has none.

    Exporters put whole graphs and pages of symbols into their messages.
    """
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], limit, placeholder=" …").rstrip(". ") if lines else type(error).__name__


def some(names: Iterable[object], most: int, separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    told = [str(name) for name in names]
    more = f" and {len(told) - most} more" if len(told) > most else ""
    return f"{separator.join(told[:most])}{more}"


def let_through(error: BaseException) -> None:
    """Raise again what is no fault of a user's forward, where anything that it raises is caught.

    That is what a signal handler raised while the forward ran, to stop us, and that the memory is full. Whatever the
    exporter made of it, the exception itself is raised.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers if callable(handler)} - {None}
    found: BaseException | None = error
    while found is not None:
        frame = found.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code in codes:
                raise found
            frame = frame.tb_next
        if isinstance(found, MemoryError):
            raise found
        found = found.__cause__ or found.__context__


@contextmanager
def of_the_user(what: str, where: str = "") -> Iterator[None]:
    """Tell what a function of the user's raises within a block as that function's, the exception itself as the cause.

    Args:
        what: what is called, as the user knows it: "evaluate", "loss", "data".
        where: when, or on what, in words that end the sentence: "on the model before pruning".

    Raises:
        InputError: in the place of what it raises, unless that is an error of `cpd` already.
    """
    try:
        yield
    except CPDError:
        raise
    except Exception as error:
        let_through(error)
        raise InputError(f"{what} raised {type(error).__name__}{where and ' '}{where}: {first_line(error)}.") from error
