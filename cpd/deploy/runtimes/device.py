"""A device of one's own: a function that times ONNX files there, as over ssh on a board or by adb on a phone.

    def measure(paths):                    # [ms], one a file; original and candidate come together
        ...
    cpd.compress(model, target_speedup=2, data=loader, runtime=measure)

The function is given original and candidate at once, so that it can time them in turn: what slows the device then
slows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpd.deploy.runtimes.base import Artifact, Session
from cpd.errors import InputError, of_the_user
from cpd.options import shown

Measure = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Device:
    """A function that times models somewhere else.

    Attributes:
        measure: `measure(paths) -> [ms]`, one number a file; where `one_at_a_time`, `measure(path) -> ms`.
        name: what it is called in reports.
        precision: "f32", or "int8": the files hold 8-bit integers then.
        one_at_a_time: whether the function takes one path. It is called for the original and the candidate in turn.
        grain: widths in multiples of this are fast there.
        version: what else its times depend on, for the report.
        threads: that it uses, for the report.
    """

    measure: Callable[[Any], Any]
    name: str = "device"
    precision: str = "f32"
    one_at_a_time: bool = False
    grain: int = 8
    version: str = ""
    threads: int = 1

    def prepare(self, artifact: Artifact) -> Session:
        """A file of the model, which is there as long as the session is; what it computes there is not seen."""
        path = artifact.path(self.precision)
        return Session(lambda: (artifact, self._times([path])), None, self._together, path)

    def _together(self, sessions: Sequence[Session]) -> list[float]:
        return self._times([item.file for item in sessions if item.file is not None])

    def _times(self, paths: Sequence[Path]) -> list[float]:
        """The times of some files, in ms.

        Raises:
            InputError: if the function raises, or gives something else.
        """
        texts = [str(path) for path in paths]
        with of_the_user(f"The runtime {self.name}", "when it timed a model"):
            found = [self.measure(text) for text in texts] if self.one_at_a_time else self.measure(texts)
        try:
            times = [float(value) for value in found]
        except (TypeError, ValueError):
            times = []
        if len(times) != len(texts) or not all(math.isfinite(ms) and ms > 0 for ms in times):
            raise InputError(
                f"The runtime {self.name} must return one time in ms above 0 for each of {len(texts)} files; got "
                f"{shown(found)}. For a function that takes one path, use Device(measure, one_at_a_time=True)."
            )
        return times
