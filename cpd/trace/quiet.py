"""Exporters without their output, and without searches for garbage."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_EXPORTER_LOGGERS = (
    "torch", "torch._subclasses.fake_tensor", "torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir",
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings, log lines and graph print-outs from the user, who can act on none of them."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No search for garbage in a block: while a large graph grows there is little, and looking takes a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def silent() -> Iterator[None]:
    """Without what compiled code prints, which Python's own streams do not see."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for place, own in zip((1, 2), kept, strict=True):
            os.dup2(own, place)
            os.close(own)
        os.close(nowhere)
