"""Latency of any widths of one model on this machine, without exporting them.

The profile of the unpruned model in the runtime says what each node takes there. A convolution or matrix product is
scaled by how its time changes with its widths (`cpd.deploy.kernels`), everything else by the size of its tensors,
which is what memory-bound operations follow. Candidates that were exported and timed correct what is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.algebra.polynomials import Numbers, ProductSums
from cpd.coupling.comb import Comb
from cpd.deploy.kernels import KernelTimes, MatrixProduct
from cpd.deploy.profiling import NodeTime
from cpd.deploy.workload import Computed, Contraction, Workload, workload

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
        return [sum(ms for _, ms in parts) for parts in self.by_layer(counts)]

    def by_layer(self, counts: Mapping[Axis, int]) -> list[list[tuple[str, float]]]:
        """The ms of each of `shares` at these widths, by the module that it is in: "" of what is no contraction."""
        values = self._sums.dims(self._sums.widths(counts)[None])[0]
        of = {id(item.contraction): self._ms(item, values) for item in self._items}
        found = []
        for share in self.shares:
            if share.contractions:
                each = share.ms / len(share.contractions)
                found.append([(item.name, of.get(id(item), each)) for item in share.contractions])
                continue
            whole = sum(_size(item.dims, {}) for item in share.tensors)
            left = sum(_size(item.dims, {**counts, **self._empty}) for item in share.tensors) / whole if whole else 1.0
            found.append([("", share.call_ms + (share.ms - share.call_ms) * left)])
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
