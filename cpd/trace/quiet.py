"""Exporters without their output, and without searches for garbage."""

from __future__ import annotations

import gc
import io
import logging
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
