"""A profile to look at: where a model's time goes on this machine, by operator, by layer and by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from cpd.algebra.axes import Axis
from cpd.coupling.comb import comb as make_comb
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import SPAN, LatencyModel
from cpd.deploy.runtimes.catalogue import DEFAULT, RUNTIME
from cpd.model.arguments import DATA, INPUTS, MODEL
from cpd.model.progress import part
from cpd.model.tensors import copy_of
from cpd.options import SECONDS, SEED, THREADS, checked, integer
from cpd.surgery.shrink import shrink


@dataclass(frozen=True)
class OperatorTime:
    """The time of all nodes of one operator, or of several operators that cannot be distinguished.

    Attributes:
        op: Name of the operator in the runtime.
        nodes: Number of nodes.
        ms: Their time in the unpruned model, in milliseconds.
        half_ms: Their predicted time if every group keeps half of its channels.
    """

    op: str
    nodes: int
    ms: float
    half_ms: float


@dataclass(frozen=True)
class LayerTime:
    """The time of the convolutions or matrix products of one layer, or of all nodes of another operator.

    Attributes:
        name: Name of the module; "" for an operator outside of such layers.
        op: Name of the operator in the runtime.
        ms: Its time in the unpruned model, in milliseconds. Layers with equal kernels share their time equally.
        half_ms: Its predicted time if every group keeps half of its channels.
    """

    name: str
    op: str
    ms: float
    half_ms: float


@dataclass(frozen=True)
class Checked:
    """A narrower copy that was exported and timed, to check the prediction.

    Attributes:
        macs_left: Share of the MACs that is left in the copy.
        predicted: The predicted speed-up.
        measured: The measured speed-up.
    """

    macs_left: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class ModelProfile:
    """The result of `cpd.profile_model`: where a model's time goes on this machine.

    Attributes:
        total_ms: The time of all nodes, in milliseconds.
        threads: Threads that the runtime used.
        operators: One `OperatorTime` for each operator, the most costly first.
        kernels: Number of kernels whose times are known on this machine.
        file: The file in which these times are kept.
        checks: The narrower copies that were timed.
        runtime: Name of the runtime that was profiled.
        layers: One `LayerTime` for each layer with convolutions or matrix products, and for each other operator, the
            most costly first. They add up to `total_ms`.
        groups: {name of an open group: milliseconds of the convolutions and matrix products with its channels}. A layer
            with channels of two groups counts for both.
    """

    total_ms: float
    threads: int
    operators: tuple[OperatorTime, ...]
    kernels: int
    file: str
    checks: tuple[Checked, ...]
    runtime: str = DEFAULT
    layers: tuple[LayerTime, ...] = ()
    groups: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types for `json.dumps`."""
        return asdict(self)

    def summary(self) -> list[str]:
        """Sentences on the checks, and on the file of kernel times."""
        found = [f"The times of {self.kernels} kernels on this machine are kept in {self.file}"]
        found += [
            f"At {item.macs_left:.1%} of the MACs, the predicted speed-up is {item.predicted:.2f} and the measured one "
            f"{item.measured:.2f} ({item.predicted / item.measured - 1:+.1%})."
            for item in self.checks
        ]
        return found


@checked(
    model=MODEL, example_inputs=INPUTS, runtime=RUNTIME, threads=THREADS, check=integer(0, 1000), seconds=SECONDS,
    seed=SEED, calibration=DATA,
)  # fmt: skip
def profile_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    runtime: Any = DEFAULT,
    threads: int = 1,
    check: int = 0,
    seconds: float = 5.0,
    seed: int = 0,
    calibration: Iterable[Any] | None = None,
) -> ModelProfile:
    """Show where a model's time goes on this machine, and measure the kernel times from which latency is predicted.

    The kernel times are kept in a file and reused later.

    Args:
        model: The model. It is not changed.
        example_inputs: A tensor, a tuple, or (tuple, dict).
        runtime: Where the model runs, as for `cpd.compare_latency`. For a runtime that cannot be profiled, ONNX Runtime
            is profiled instead.
        threads: Threads that a runtime given by name uses.
        check: Number of narrower copies, with random widths, that are exported, timed and compared with the prediction.
        seconds: Time for which each copy is timed.
        seed: Seed of those widths.
        calibration: Batches of the task, from which the ranges for 8-bit integers are taken. Default: the example
            inputs.

    Returns:
        A `ModelProfile` with the times by operator, by layer and by group.

    Raises:
        InputError: An argument cannot be used, or a package is missing.
        TraceError: The model cannot be exported by torch.
        ExportError: The model cannot be exported to ONNX, or its outputs differ there.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> profile = cpd.profile_model(model, torch.randn(1, 3, 32, 32))
        >>> costly = profile.operators[0]
        >>> costly.op
        'Conv'
        >>> costly.half_ms < costly.ms  # predicted, at half of every width that can change
        True
    """
    with part("comb"):
        combed = make_comb(model, example_inputs)
    with part("export"):
        probe = LatencyProbe(model, example_inputs, threads=threads, runtime=runtime, calibration=calibration)
    nodes, times = probe.profile(), KernelTimes(runtime=probe.profiler)
    latency = LatencyModel(combed, nodes, times)
    widths = {group.axis: max(group.minimum, group.size // 2) for group in combed.open}
    layers = _layers(latency, widths)
    operators: dict[str, list[float]] = {}
    for share, ms in zip(latency.shares, latency.by_share(widths), strict=True):
        entry = operators.setdefault(share.op, [0, 0.0, 0.0])
        entry[:] = entry[0] + share.nodes, entry[1] + share.ms, entry[2] + ms
    rows = sorted((OperatorTime(op, int(n), ms, h) for op, (n, ms, h) in operators.items()), key=lambda row: -row.ms)
    carried = latency.local({})
    groups = {group.name: carried.get(group.axis, 0.0) for group in combed.open}
    rng, checks = np.random.default_rng(seed), list[Checked]()
    for _ in range(check):
        least = rng.uniform(0.25, 0.9)
        keep = {
            group.name: range(max(group.minimum, min(group.size, _near(group.size * rng.uniform(least, 1)))))
            for group in combed.open
        }
        plan = combed.plan(keep)
        counts = {group.axis: len(plan.groups[group.name]) for group in combed.groups}
        expected = latency.speedup(counts)
        with part(f"narrower copy {len(checks) + 1} of {check}"):
            measured = probe.compare(shrink(copy_of(model), plan), seconds=seconds, precision=0.01).speedup
        left = combed.cost(counts).macs / max(combed.cost({}).macs, 1)
        checks.append(Checked(left, expected, measured))
    return ModelProfile(
        latency.original_ms, threads, tuple(rows), len(times), str(times.path), tuple(checks), probe.profiler.name,
        layers, groups,
    )  # fmt: skip


def _layers(latency: LatencyModel, widths: Mapping[Axis, int]) -> tuple[LayerTime, ...]:
    """The time by layer, whole and at these widths, the most costly first."""
    found: dict[tuple[str, str], list[float]] = {}
    for share, whole, narrow in zip(latency.shares, latency.by_layer({}), latency.by_layer(widths), strict=True):
        for (name, ms), (_, half) in zip(whole, narrow, strict=True):
            entry = found.setdefault((name, share.op), [0.0, 0.0])
            entry[:] = entry[0] + ms, entry[1] + half
    rows = (LayerTime(name, op, ms, half) for (name, op), (ms, half) in found.items())
    return tuple(sorted(rows, key=lambda row: -row.ms))


def _near(width: float) -> int:
    """A width as selection chooses it: a multiple of 8 where it is wide enough."""
    return max(8 * round(width / 8), 8) if width >= SPAN else max(round(width), 1)
