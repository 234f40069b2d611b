"""Memory that was freed, used again at once.

The C library gives tensors of 32 MiB or more back to the system when they are freed, and the system clears each page of
the next one anew. Where the activations of many images are computed that takes a third of the processor's time.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# The parameters of mallopt(3), and the values at which its own adjustment of the thresholds ends.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_THRESHOLD, _MAPPINGS = 2**25, 65536
#: Who has set one of these has chosen for himself.
_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_depth = 0


@contextmanager
def memory_reused() -> Iterator[None]:
    """For the length of a block freed memory is kept for what comes next; all goes back to the system at its end.

    Does nothing without the GNU C library, or where the user has set its variables. Afterwards the library gives back
    what is 32 MiB or more, as it does of itself once a tensor of that size has been freed.
    """
    global _depth
    library = _library()
    if library is None:
        yield
        return
    _depth += 1
    try:
        if _depth == 1:
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, -1)
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            library.mallopt(_MMAP_MAX, _MAPPINGS)
            library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            library.malloc_trim(0)


@cache
def _library() -> Any:
    """The GNU C library, if its settings are ours to change."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN):
        return None
    return ctypes.CDLL(None)
