"""Target: what pruning has to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpd.errors import TargetError

if TYPE_CHECKING:  # torch takes seconds to import
    from cpd.coupling.cost import CostFigures
    from cpd.deploy.latency import LatencyComparison

#: Targets that are measured, and those that are computed with the figure that they speak of.
MEASURED = ("target_speedup", "target_latency_ms")
COMPUTED = {"target_macs": "macs", "target_params": "parameters", "target_memory": "activations"}
TARGETS = (*MEASURED, *COMPUTED)


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
                f"The unpruned model takes {original_ms:.3g} ms, which already meets target_latency_ms={self.value:g}: "
                "there is nothing to do. Ask for less."
            )
        return original_ms / self.value

    def attained(self, found: LatencyComparison) -> float:
        """How fast a candidate is for what a measured target asks: 1 is the target, above is faster."""
        if self.name == "target_speedup":
            return found.speedup / self.value
        return self.value / found.candidate_ms

    def of(self, figures: CostFigures) -> float:
        """The figure of a cost that the target speaks of."""
        return float(getattr(figures, COMPUTED[self.name]))

    def absolute(self, full: CostFigures) -> float:
        """The target as a number: a share up to 1 is one of the original's figure."""
        return self.value * self.of(full) if self.value <= 1 else self.value
