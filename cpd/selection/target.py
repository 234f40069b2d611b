"""Request: what `compress` was asked for, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpd.coupling.cost import CostFigures
from cpd.deploy.latency import LatencyComparison
from cpd.errors import InputError, TargetError

#: Targets that a stop watch decides.
MEASURED = ("target_speedup", "target_latency_ms")


@dataclass(frozen=True)
class Target:
    """One target: a measured speed-up or latency, or a cost figure to get down to."""

    name: str
    value: float

    @property
    def is_measured(self) -> bool:
        """Whether the target is measured rather than computed."""
        return self.name in MEASURED

    def speedup(self, original_ms: float) -> float:
        """A measured target as original over compressed latency.

        Raises:
            TargetError: the original is as fast as that already.
        """
        if self.name == "target_speedup":
            return self.value
        if original_ms <= self.value:
            raise TargetError(
                f"The model takes {original_ms:.3g} ms as it is, and target_latency_ms={self.value:g}: there is "
                "nothing to do. Ask for less."
            )
        return original_ms / self.value

    def attained(self, found: LatencyComparison) -> float:
        """How fast a candidate is for what a measured target asks: 1 is the target, above is faster."""
        if self.name == "target_speedup":
            return found.speedup / self.value
        return self.value / found.candidate_ms

    def of(self, figures: CostFigures) -> float:
        """The figure of a cost that the target speaks of."""
        names = {"target_macs": "macs", "target_params": "parameters", "target_memory": "activations"}
        return float(getattr(figures, names[self.name]))

    def absolute(self, full: CostFigures) -> float:
        """The target as a number: a share up to 1 is one of the original's figure."""
        return self.value * self.of(full) if self.value <= 1 else self.value


def check_target(*values: float | None) -> Target:
    """The one target that was given.

    Raises:
        InputError: if it is not exactly one, not a number, or out of range.
    """
    names = (*MEASURED, "target_macs", "target_params", "target_memory")
    given = [Target(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"Give exactly one target of {', '.join(names)}; got {[item.name for item in given] or 'none'}."
        )
    (target,) = given
    if isinstance(target.value, bool) or not isinstance(target.value, (int, float)) or not math.isfinite(target.value):
        raise InputError(f"{target.name} must be a number; got {target.value!r}.")
    if target.name == "target_speedup" and target.value < 1:
        raise InputError(
            f"target_speedup is original over compressed latency, so at least 1; got {target.value:g}. "
            "For half the latency ask for 2."
        )
    if target.name == "target_latency_ms" and target.value <= 0:
        raise InputError(f"target_latency_ms must be above 0; got {target.value:g}.")
    if target.value <= 0:
        raise InputError(f"{target.name} must be above 0: a share up to 1, or a number; got {target.value:g}.")
    return target
