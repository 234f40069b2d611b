"""Every error that `cpd` raises on purpose: one base class, one subclass a stage.

A message says what was found, what was expected, and what to do about it. Errors are raised before
anything of the user's is changed.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CPDError(Exception):
    """Base class of all errors raised by `cpd`."""


class InputError(CPDError, ValueError):
    """An argument is unusable: a model that is no module, example inputs of the wrong shape, a bad target."""


class TraceError(CPDError):
    """`torch.export` could not trace the model; the message names the line."""


class PlanError(CPDError):
    """A plan names an unknown or frozen group, empties a group, or cannot satisfy a tie."""


class ShrinkError(CPDError):
    """A plan does not fit the model it is applied to; the model is left as it was."""


class NothingToPruneError(CPDError):
    """No group of the model can be pruned; the message gives the reason of each."""


class TargetError(CPDError):
    """The target cannot be reached; the message gives the best reachable figure and what stands in the way."""


class TrainingError(CPDError):
    """Training or scoring failed: an empty loader, a loss that is not finite."""


class CheckpointError(CPDError):
    """A checkpoint cannot be written, read, or used with this model; the message says what is safe."""


class ExportError(CPDError):
    """The ONNX export failed, or its outputs differ from PyTorch's."""


class ArtifactError(CPDError):
    """A saved result is missing, truncated, foreign, or cannot be written."""


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
            f'{what} needs {error.name or "a package"}, which is not installed: pip install "cpd[{extra}]".'
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
