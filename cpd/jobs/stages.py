"""The stages of a run: how long each took, and which one is on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cpd.model.progress import part

log = logging.getLogger("cpd")


class Stages:
    """Times the stages of a run, and shows which one is on, of how many.

    Args:
        planned: those that follow one another; others are parts of these, or stand between them.
    """

    def __init__(self, planned: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.planned, self._within = planned, False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as a stage."""
        start, within = time.perf_counter(), self._within
        numbered = name in self.planned and not within
        log.log(logging.DEBUG if within else logging.INFO, "%s …", name.capitalize())
        self._within = True
        try:
            with part(f"stage {self.planned.index(name) + 1} of {len(self.planned)}: {name}" if numbered else name):
                yield
        finally:
            self._within = within
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
