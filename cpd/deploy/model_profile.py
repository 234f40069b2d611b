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
    """The time of all nodes of one operator, or of several that could not be told apart.

    Attributes:
        op: the runtime's operator.
        nodes: how many nodes.
        ms: their time in the unpruned model.
        half_ms: their predicted time where every group keeps half.
    """

    op: str
    nodes: int
    ms: float
    half_ms: float


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer's convolutions or matrix products, or of all nodes of an operator that is neither.

    Attributes:
        name: the module's; "" of an operator that is in no layer with a width of its own.
        op: the runtime's operator.
        ms: its time in the unpruned model; layers whose kernels are alike share theirs equally.
        half_ms: its predicted time where every group keeps half.
    """

    name: str
    op: str
    ms: float
    half_ms: float


@dataclass(frozen=True)
class Checked:
    """A narrower copy that was exported and timed, to see how good the prediction is.

    Attributes:
        macs_left: its share of the MACs.
        predicted: the speed-up predicted before.
        measured: the speed-up measured.
    """

    macs_left: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class ModelProfile:
    """Where a model's time goes on this machine.

    Attributes:
        total_ms: the time of all nodes.
        threads: the runtime's threads.
        operators: the most costly first.
        kernels: how many kernels are known on this machine, and in what file.
        file: that file.
        checks: narrower copies that were timed.
        runtime: what was profiled.
        layers: those with convolutions or matrix products, and the other operators, the most costly first; they add up
            to `total_ms`.
        groups: {name of an open group: ms of the convolutions and matrix products with its channels}; one with those of
            two groups counts for both.
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
        """All fields, ready for `json.dumps`."""
        return asdict(self)

    def summary(self) -> list[str]:
        """What a table does not say, sentence by sentence."""
        found = [f"{self.kernels} kernels are known on this machine: {self.file}"]
        found += [
            f"At {item.macs_left:.1%} of the MACs: predicted {item.predicted:.2f} times as fast, measured "
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
    """Measure what predictions for a model need, keep it for later, and say where its time goes.

    Args:
        model: left as it was.
        example_inputs: a tensor, a tuple, or (tuple, dict).
        runtime: what runs it, as for `cpd.compare_latency`; the profile of one that has none is ONNX Runtime's.
        threads: of a runtime given by name.
        check: narrower copies, every group of random width, that are exported, timed and compared with the prediction.
        seconds: how long each of them is timed.
        seed: of those widths.
        calibration: batches of the task, which give the ranges of 8-bit integers; without, the example inputs do.

    Raises:
        InputError: an unusable argument, or a package that is missing.
        TraceError: the model cannot be exported by torch.
        ExportError: the model cannot be exported to ONNX, or differs there.

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
