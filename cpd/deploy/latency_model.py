"""Latency of any widths of one model on this machine, without exporting them.

The profile of the unpruned model in the runtime says what each node takes there. A convolution or matrix product is
scaled by how its time changes with its widths (`cpd.deploy.kernels`), everything else by the size of its tensors,
which is what memory-bound operations follow. Candidates that were exported and timed correct what is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.algebra.polynomials import Numbers, ProductSums
from cpd.coupling.comb import Comb
from cpd.coupling.comb import comb as make_comb
from cpd.deploy.kernels import KernelTimes, MatrixProduct
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.profiling import NodeTime
from cpd.deploy.runtimes.catalogue import DEFAULT, RUNTIME
from cpd.deploy.workload import Computed, Contraction, Workload, workload
from cpd.model.arguments import DATA, INPUTS, MODEL
from cpd.model.progress import part
from cpd.model.tensors import copy_of
from cpd.options import SECONDS, SEED, THREADS, checked, integer
from cpd.surgery.shrink import shrink

#: What a node costs however small its tensors are, in ms.
CALL_MS = 0.002
#: A position's saving is the mean over so many that go with it, at most half of the width: over teeth of the saw.
SPAN = 32
#: Channels that ONNX Runtime's own layout fills up to at most: those of one vector of AVX-512.
VECTOR = 16
#: No kernel is predicted to take less than this share of its time alone.
LEAST = 0.3


@dataclass(frozen=True)
class Share:
    """Part of the unpruned model's time.

    Attributes:
        op: ONNX Runtime's operator, or several.
        nodes: how many nodes.
        ms: the time of all nodes of this kind and size in ms.
        contractions: the operations that these are, which share it equally.
        tensors: the tensors of that size, or all where there is none: those that the time of what is no contraction
            follows.
        call_ms: of that, what does not follow any width.
    """

    op: str
    nodes: int
    ms: float
    contractions: tuple[Contraction, ...] = ()
    tensors: tuple[Computed, ...] = ()
    call_ms: float = 0.0

    def without(self, nodes: Collection[Node]) -> Share:
        """What is left of it without some operations."""
        if self.contractions:
            left = tuple(item for item in self.contractions if item.node not in nodes)
            share = len(left) / len(self.contractions)
            return replace(self, nodes=round(self.nodes * share), ms=self.ms * share, contractions=left)
        tensors = tuple(item for item in self.tensors if item.node not in nodes)
        if len(tensors) == len(self.tensors):
            return self
        share = len(tensors) / len(self.tensors)
        call_ms, sizes = (
            self.call_ms * share,
            [sum(_size(t.dims, {}) for t in some) for some in (tensors, self.tensors)],
        )
        ms = call_ms + (self.ms - self.call_ms) * sizes[0] / max(sizes[1], 1)
        return replace(self, nodes=round(self.nodes * share), ms=ms, tensors=tensors, call_ms=call_ms)


class LatencyModel:
    """Predicts latencies of narrower copies of one model.

    Args:
        comb: the comb of the model.
        nodes: its profile, unpruned.
        times: times of kernels.

    Attributes:
        original_ms: the sum of the times of all nodes, unpruned; little is spent between them.
        shares: what it consists of.
    """

    def __init__(
        self,
        comb: Comb,
        nodes: Sequence[NodeTime],
        times: KernelTimes,
    ) -> None:
        work = workload(comb.context)
        self.shares = _assigned(nodes, work)
        self.original_ms = sum(share.ms for share in self.shares)
        self._times = times
        products, weights = _elementwise(self.shares)
        timed = [(item, share.ms / len(share.contractions)) for share in self.shares for item in share.contractions]
        moving = [(item, ms) for item, ms in timed if _open(item)]
        self._constant = _constant(self.shares)
        # the widths of contractions are evaluated along with the rest, as products that weigh nothing
        own = [
            Computed(item.node, (dim,)) for item, _ in moving for pair in item.widths.values() for part in pair
            for dim in part
        ]  # fmt: skip
        self._computed = [*products, *own]
        numbers = [[weight] for weight in (*weights, *(0.0 for _ in own))]
        self._sums = ProductSums([item.dims for item in self._computed], numbers, figures=1)
        self._items = [_Item(item, ms, self._sums.places) for item, ms in moving]
        self._users = {axis: [item for item in self._items if axis in item.axes] for axis in self._sums.axes}
        times.prepare([(item.anchor, _open(item)) for item, _ in moving])
        alone = {item: times.time(item.contraction.anchor, item.contraction.anchor) for item in self._items}
        self._pace = sum(item.ms for item in self._items) / max(sum(alone.values()), 1e-9)
        self._excess = {item: item.ms - self._pace * alone[item] for item in self._items}
        self._least = {item: min(LEAST, item.ms / max(self._pace * alone[item], 1e-9)) for item in self._items}
        self._observed: list[tuple[float, float]] = []
        self._empty: dict[Axis, int] = {}

    def unobserved(self) -> LatencyModel:
        """The same model, to be corrected by other measurements than this one."""
        other = copy(self)
        other._observed = []
        return other

    def without(self, nodes: Collection[Node], empty: Collection[Axis] = ()) -> LatencyModel:
        """The same model of a network without some operations, to be corrected by other measurements.

        Args:
            nodes: the operations that are not there.
            empty: axes of which no position is left.
        """
        other = self.unobserved()
        other._empty = dict.fromkeys(empty, 0)
        other.shares = [share.without(nodes) for share in self.shares]
        other._constant = _constant(other.shares)
        other._items = [item for item in self._items if item.contraction.node not in nodes]
        other._users = {
            axis: [item for item in users if item.contraction.node not in nodes] for axis, users in self._users.items()
        }
        stays = [item.node not in nodes for item in self._computed]
        other._sums = self._sums.weighted(np.array(stays)[:, None]).without(empty)
        return other

    def milliseconds(self, counts: Mapping[Axis, int]) -> float:
        """The sum of all nodes' times at these widths, in ms, not corrected by what was observed."""
        widths = self._sums.widths(counts)[None]
        values = self._sums.dims(widths)[0]
        return self._constant + float(self._sums(widths)[0, 0]) + sum(self._ms(item, values) for item in self._items)

    def speedup(self, counts: Mapping[Axis, int]) -> float:
        """How many times as fast as the unpruned model these widths are, corrected by what was observed."""
        raw = math.log(self.original_ms / self.milliseconds(counts))
        predicted, measured = np.array(sorted([(0.0, 0.0), *self._observed])).T
        if raw >= predicted[-1]:  # beyond all measurements: off by as much as the last
            return math.exp(raw + measured[-1] - predicted[-1])
        return math.exp(float(np.interp(raw, predicted, measured)) if raw > 0 else raw)

    def observe(self, counts: Mapping[Axis, int], speedup: float, runtime: str = "") -> None:
        """Learn from a measurement, in the runtime that this predicts."""
        self._observed.append((math.log(self.original_ms / self.milliseconds(counts)), math.log(max(speedup, 1e-3))))

    def slopes(self, counts: Mapping[Axis, int]) -> dict[Axis, float]:
        """The ms that one position less of each open axis saves at these widths."""
        widths = self._sums.widths(counts)
        spans = np.maximum(np.minimum(widths // 2, SPAN), 1)
        before = self._sums.dims(widths[None])[0]
        after = self._sums.dims(np.maximum(widths[None] - np.diag(spans), 1))
        rest = self._sums.slopes(widths)[:, 0]
        found = {}
        for index, axis in enumerate(self._sums.axes):
            saved = sum(self._ms(item, before) - self._ms(item, after[index]) for item in self._users[axis])
            found[axis] = max(saved / int(spans[index]) + float(rest[index]), 0.0)
        return found

    def local(self, counts: Mapping[Axis, int]) -> dict[Axis, float]:
        """The ms of all contractions that carry each open axis."""
        values = self._sums.dims(self._sums.widths(counts)[None])[0]
        return {axis: sum(self._ms(item, values) for item in users) for axis, users in self._users.items()}

    def by_share(self, counts: Mapping[Axis, int]) -> list[float]:
        """The ms of each of `shares` at these widths."""
        values = self._sums.dims(self._sums.widths(counts)[None])[0]
        of = {id(item.contraction): self._ms(item, values) for item in self._items}
        found = []
        for share in self.shares:
            if share.contractions:
                each = share.ms / len(share.contractions)
                found.append(sum(of.get(id(item), each) for item in share.contractions))
                continue
            whole = sum(_size(item.dims, {}) for item in share.tensors)
            left = sum(_size(item.dims, {**counts, **self._empty}) for item in share.tensors) / whole if whole else 1.0
            found.append(share.call_ms + (share.ms - share.call_ms) * left)
        return found

    def fixed(self) -> dict[str, float]:
        """The ms of the unpruned model that no width changes, each by the end of a sentence on its share."""
        overhead, frozen = 0.0, dict[str, float]()
        for share in self.shares:
            if share.contractions:
                parts = [(1.0, bool(_open(item))) for item in share.contractions]
                call = 0.0
            else:
                parts = [(float(_size(item.dims, {})), any(map(axes.is_open, item.dims))) for item in share.tensors]
                call = share.call_ms
            overhead += call
            held = sum(size for size, is_open in parts if not is_open) / max(sum(size for size, _ in parts), 1.0)
            frozen[share.op] = frozen.get(share.op, 0.0) + (share.ms - call) * held
        return {
            "goes into calling nodes, which only fewer layers would save": overhead,
            **{
                f"goes into {op} whose widths are frozen": frozen[op]
                for op in sorted(frozen, key=lambda op: -frozen[op])
            },
        }

    def _ms(self, item: _Item, values: Numbers) -> float:
        """The time of one contraction where its dimensions have these sizes."""
        anchor = item.contraction.anchor
        kernel = item.contraction.kernel(lambda dim: int(values[item.places[dim]]))
        alone = self._pace * self._times.time(kernel, anchor)
        # what it takes in the model and not alone is the memory's doing, so it follows the memory that is touched
        return max(alone + self._excess[item] * kernel.elements / anchor.elements, self._least[item] * alone)


def _size(shape: Sequence[Dim], counts: Mapping[Axis, int]) -> int:
    return math.prod(axes.count(dim, counts) for dim in shape)


class _Item:
    """A contraction whose widths may change, and its time in the unpruned model."""

    def __init__(self, contraction: Contraction, ms: float, places: Mapping[Dim, int]) -> None:
        self.contraction, self.ms = contraction, ms
        dims = {dim for pair in contraction.widths.values() for part in pair for dim in part}
        self.places = {dim: places[axes.resolve(dim)] for dim in dims}
        self.axes = {axis for dim in dims for axis in axes.leaves(dim)}


def _open(item: Contraction) -> list[str]:
    """The widths of a contraction that have an axis which may be pruned."""
    return [
        name
        for name, pair in item.widths.items()
        if any(axes.is_open(axes.resolve(dim)) for part in pair for dim in part)
    ]


Key = tuple[int | str, ...]


def _assigned(nodes: Sequence[NodeTime], work: Workload) -> list[Share]:
    """The nodes of a profile beside the operations that they are, alike ones together.

    ONNX Runtime fills channels up to whole vectors in its own layout, so what differs by less than that is alike.
    """
    contractions: dict[Key, list[Contraction]] = {}
    for item in work.contractions:
        for key in _keys(item):
            contractions.setdefault(key, []).append(item)
    tensors: dict[Key, list[Computed]] = {}
    for computed in work.tensors:
        sizes = tuple(dim.size for dim in computed.dims)
        for key in dict.fromkeys((("tensor", math.prod(sizes)), ("filled", math.prod(_filled(sizes))))):
            tensors.setdefault(key, []).append(computed)
    every = [computed for computed in work.tensors if computed.dims]
    tally: dict[Key, tuple[dict[str, None], list[float]]] = {}
    for node in nodes:
        largest = max((*node.inputs, *node.outputs), key=math.prod, default=())
        candidates = (_key(node), ("tensor", math.prod(largest)), ("filled", math.prod(_filled(largest))))
        found = next((key for key in candidates if key in contractions or key in tensors), candidates[-1])
        ops, times = tally.setdefault(found, ({}, []))
        ops[node.op] = None
        times.append(node.ms)
    found_shares = []
    for key, (ops, times) in tally.items():
        ms, own = sum(times), tuple(tensors.get(key, every))
        whole = sum(_size(item.dims, {}) for item in own)
        call = 0.0 if key in contractions else min(ms, CALL_MS) if whole else ms
        found_shares.append(Share(", ".join(ops), len(times), ms, tuple(contractions.get(key, ())), own, call))
    return found_shares


def _keys(item: Contraction) -> tuple[Key, ...]:
    """What a contraction may be called in a profile: a convolution also without its weight."""
    shape = tuple(dim.size for dim in item.result)
    if isinstance(item.anchor, MatrixProduct):
        return (_product(shape, item.anchor.input_shape),)
    weight, source = item.anchor.weight_shape, item.anchor.input_shape
    return _convolution("weight", shape, weight), _convolution("input", shape, source)


def _key(node: NodeTime) -> Key:
    """What a node that may be a contraction is called; nothing for others. Weights that were packed are missing."""
    if not node.inputs or not node.outputs:
        return ()
    if "Conv" in node.op:
        source, *others = node.inputs
        if others and len(others[0]) == len(source):
            return _convolution("weight", node.outputs[0], others[0])
        return _convolution("input", node.outputs[0], source)
    if "MatMul" in node.op or "Gemm" in node.op:
        return _product(node.outputs[0], node.inputs[0])
    return ()


def _product(result: Sequence[int], source: Sequence[int]) -> Key:
    return "product", math.prod(result), source[-1] if source else 1


def _convolution(by: str, result: Sequence[int], other: Sequence[int]) -> Key:
    """By its result and its weight, or by its result and its input."""
    return by, *_filled(result), other[1] if other[1] == 1 else _full(other[1]), *other[2:]


def _filled(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], _full(shape[1]), *shape[2:]) if len(shape) > 2 else tuple(shape)


def _full(channels: int) -> int:
    return VECTOR * math.ceil(channels / VECTOR)


def _constant(shares: Iterable[Share]) -> float:
    """The ms that no width changes."""
    return sum(
        share.call_ms + sum(share.ms / len(share.contractions) for item in share.contractions if not _open(item))
        for share in shares
    )


def _elementwise(shares: Sequence[Share]) -> tuple[list[Computed], list[float]]:
    """Of all that is no contraction: the tensors that its time follows, and the ms of an element of each."""
    products: list[Computed] = []
    weights: list[float] = []
    for share in shares:
        if not share.contractions:
            whole = sum(_size(item.dims, {}) for item in share.tensors)
            products += share.tensors
            weights += [(share.ms - share.call_ms) / max(whole, 1)] * len(share.tensors)
    return products, weights


# ---------------------------------------------------------------------------------- a profile to look at


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
    """

    total_ms: float
    threads: int
    operators: tuple[OperatorTime, ...]
    kernels: int
    file: str
    checks: tuple[Checked, ...]
    runtime: str = DEFAULT

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
    half = latency.by_share({group.axis: max(group.minimum, group.size // 2) for group in combed.open})
    operators: dict[str, list[float]] = {}
    for share, ms in zip(latency.shares, half, strict=True):
        entry = operators.setdefault(share.op, [0, 0.0, 0.0])
        entry[:] = entry[0] + share.nodes, entry[1] + share.ms, entry[2] + ms
    rows = sorted((OperatorTime(op, int(n), ms, h) for op, (n, ms, h) in operators.items()), key=lambda row: -row.ms)
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
        latency.original_ms, threads, tuple(rows), len(times), str(times.path), tuple(checks), probe.profiler.name
    )  # fmt: skip


def _near(width: float) -> int:
    """A width as selection chooses it: a multiple of 8 where it is wide enough."""
    return max(8 * round(width / 8), 8) if width >= SPAN else max(round(width), 1)
