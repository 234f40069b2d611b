"""Latency in several runtimes at once: each predicted from what it can do itself, the slowest counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from torch.fx import Node

from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel

K = TypeVar("K")


class SlowestModel:
    """Predicts how fast narrower copies are in the runtime in which they gain least.

    Milliseconds are the mean over the runtimes, each at the scale of the first one's original: what a channel saves is
    what it saves on average.

    Args:
        models: {runtime: the prediction for it}; all of one model.
    """

    def __init__(self, models: Mapping[str, LatencyModel]) -> None:
        self.models = dict(models)
        first = next(iter(self.models.values())).original_ms
        self._scales = {
            name: first / max(item.original_ms, 1e-9) / len(self.models) for name, item in self.models.items()
        }
        self.original_ms = first

    def unobserved(self) -> SlowestModel:
        """The same, to be corrected by other measurements."""
        return SlowestModel({name: item.unobserved() for name, item in self.models.items()})

    def without(self, nodes: Collection[Node], empty: Collection[Axis] = ()) -> SlowestModel:
        """The same of a network without some operations; arguments as for `LatencyModel.without`."""
        return SlowestModel({name: item.without(nodes, empty) for name, item in self.models.items()})

    def speedup(self, counts: Mapping[Axis, int]) -> float:
        """How many times as fast these widths are where they gain least, corrected by what was observed."""
        return min(item.speedup(counts) for item in self.models.values())

    def observe(self, counts: Mapping[Axis, int], speedup: float, runtime: str = "") -> None:
        """Learn from a measurement in one of the runtimes; in one that is not among them, for all."""
        for name, item in self.models.items():
            if runtime == name or runtime not in self.models:
                item.observe(counts, speedup)

    def milliseconds(self, counts: Mapping[Axis, int]) -> float:
        """The mean time at these widths, in ms of the first."""
        return sum(scale * self.models[name].milliseconds(counts) for name, scale in self._scales.items())

    def slopes(self, counts: Mapping[Axis, int]) -> dict[Axis, float]:
        """The ms that one position less of each open axis saves at these widths, on average."""
        return _mean([(scale, self.models[name].slopes(counts)) for name, scale in self._scales.items()])

    def local(self, counts: Mapping[Axis, int]) -> dict[Axis, float]:
        """The ms of all contractions that carry each open axis, on average."""
        return _mean([(scale, self.models[name].local(counts)) for name, scale in self._scales.items()])

    def fixed(self) -> dict[str, float]:
        """The ms of the unpruned model that no width changes, on average."""
        return _mean([(scale, self.models[name].fixed()) for name, scale in self._scales.items()])


def _mean(parts: Sequence[tuple[float, Mapping[K, float]]]) -> dict[K, float]:
    """The sum of values times their scales, for each key."""
    found: dict[K, float] = {}
    for scale, values in parts:
        for key, value in values.items():
            found[key] = found.get(key, 0.0) + scale * value
    return found


def latency_model(comb: Comb, probe: LatencyProbe) -> LatencyModel | SlowestModel:
    """What predicts latencies of narrower copies, in the runtime of a probe or in all of them.

    Args:
        comb: of the unpruned model.
        probe: times it; each of its runtimes is predicted from its own profile and kernels, or those of ONNX Runtime.
    """
    found = {
        runtime.name: LatencyModel(comb, profiler.profile(probe.original), KernelTimes(runtime=profiler))
        for runtime, profiler in zip(probe.runtimes, probe.profilers, strict=True)
    }
    return next(iter(found.values())) if len(found) == 1 else SlowestModel(found)
