"""Weigh: among what scores are compared, and what they are divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from cpd.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

    from cpd.algebra.axes import Axis
    from cpd.coupling.comb import Comb

Normalization = Literal["memory", "macs", "parameters", "latency", "none"]
Scope = Literal["global", "isomorphic", "group"]

#: Every scope: scores compared over all groups, by rank among groups alike in structure, by rank within each group.
SCOPES: tuple[Scope, ...] = ("global", "isomorphic", "group")
#: Every normalization: what a removed channel saves, by which its score is divided.
NORMALIZATIONS: tuple[Normalization, ...] = ("memory", "macs", "parameters", "latency", "none")
#: Of the MACs and the parameters of a channel, the exponents in its capacity (docs/decisions.md).
CAPACITY = (0.75, 0.25)


class Latency(Protocol):
    """Predicted latency, as `cpd.deploy.latency_model.LatencyModel` gives it; ms."""

    def milliseconds(self, counts: Mapping[Axis, int]) -> float:
        """The latency at these widths."""

    def slopes(self, counts: Mapping[Axis, int]) -> Mapping[Axis, float]:
        """What one channel less of each axis saves."""

    def local(self, counts: Mapping[Axis, int]) -> Mapping[Axis, float]:
        """The latency of the operations that carry each axis."""


@dataclass(frozen=True)
class Weighing:
    """How scores are weighed against what is saved.

    Attributes:
        normalization: the figure that scores are divided by what is saved of.
        exponent: score / saved^exponent. 1 is the best trade where scores are changes of a loss; CPD's lambda.
        latency: for "latency": predicts it.
    """

    normalization: Normalization = "macs"
    exponent: float = 1.0
    latency: Latency | None = None

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise InputError(
                f"There is no normalization {self.normalization!r}: use one of {', '.join(NORMALIZATIONS)}."
            )
        if self.normalization == "latency" and self.latency is None:
            raise InputError("normalization='latency' needs a latency=LatencyModel(…).")

    @property
    def _figure(self) -> str:
        return {"memory": "activations", "none": "macs"}.get(self.normalization, self.normalization)

    def total(self, comb: Comb, counts: Mapping[Axis, int]) -> float:
        """The figure at these widths."""
        if self.latency is not None:
            return self.latency.milliseconds(counts)
        return float(getattr(comb.cost(counts), self._figure))

    def saved(self, comb: Comb, counts: Mapping[Axis, int]) -> Mapping[Axis, float]:
        """What one channel less of each axis saves of it, to first order."""
        if self.latency is not None:
            return self.latency.slopes(counts)
        return {axis: float(getattr(slope, self._figure)) for axis, slope in comb.cost.slopes(counts).items()}

    def __call__(self, score: float, saved: float) -> float:
        """What a channel's removal costs for what it saves."""
        return score if self.normalization == "none" else score / max(saved, 1e-30) ** self.exponent


def by_capacity(comb: Comb, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that come from weights alone, made comparable among groups: score / mean of its group * capacity.

    How large weights are tells channels of one group apart, not groups, whose scale follows from initialisation and
    fan-in. Capacity is MACs^(3/4) * parameters^(1/4) of one channel in the unpruned model.

    Args:
        comb: the comb.
        scores: {group name: Tensor[size]}, at least 0; -inf where a channel has gone.
    """
    slopes, result = comb.cost.slopes({}), {}
    for group in comb.open:
        found, saved = scores[group.name].double(), slopes[group.axis]
        capacity = max(saved.macs, 1.0) ** CAPACITY[0] * max(saved.parameters, 1.0) ** CAPACITY[1]
        mean = float(found[found.isfinite()].mean()) or 1.0
        result[group.name] = found / mean * capacity
    return result
