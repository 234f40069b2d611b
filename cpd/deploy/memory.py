"""Peak memory: the elements of the tensors that are alive at once, at any widths, from the graph alone.

A runtime that reuses memory frees a tensor after its last reader. What works element by element is written in the
place of an input that nobody reads any more, as ONNX Runtime, OpenVINO and TFLite do; views take no memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch._ops import OpOverload
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.coupling.comb import Comb
from cpd.coupling.cost import VIEWS
from cpd.deploy.workload import workload
from cpd.trace.graph import op_name
from cpd.trace.pointwise import is_pointwise

#: Normalizations by fixed statistics, which runtimes fold into what comes before.
_FOLDED = {"batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}


@dataclass
class _Buffer:
    """Memory of one or several tensors, and the operations between which it is needed."""

    shapes: list[tuple[Dim, ...]]
    first: int
    last: int = field(default=0)


class PeakMemory:
    """The elements alive at once, of any widths of one model: of its inputs and of all that is computed.

    Args:
        comb: of the model, without the branches that have gone.
    """

    def __init__(self, comb: Comb) -> None:
        removal, ctx = comb.removal(comb.removed), comb.context
        self._empty = dict.fromkeys(removal.empty, 0)
        order = [node for node in ctx.graph.nodes if node not in removal.gone and node.name not in ctx.graph.tensors]
        place = {node: index for index, node in enumerate(order)}
        inside: dict[Node, list[tuple[Dim, ...]]] = {}
        for item in workload(ctx).tensors:
            inside.setdefault(item.node, []).append(item.dims)
        self._buffers = list[_Buffer]()
        held: dict[Node, _Buffer] = {}
        readers = _readers(order, removal.instead)
        for index, node in enumerate(order):
            shapes, within = _shapes(ctx.values.get(node)), inside.get(node, [])
            sources = [held[source] for source in _sources(node, removal.instead) if source in held]
            for source in sources:
                source.last = max(source.last, index)
            if not shapes:
                continue
            buffer = _in_place(node, shapes, sources, index) or self._new(shapes, index)
            held[node] = buffer
            buffer.last = max(buffer.last, *(place[reader] for reader in readers.get(node, [])), index)
            self._new([dims for dims in within if dims not in shapes], index)

    def _new(self, shapes: Sequence[tuple[Dim, ...]], index: int) -> _Buffer:
        buffer = _Buffer(list(shapes), index, index)
        self._buffers.append(buffer)
        return buffer

    def __call__(self, counts: Mapping[Axis, int]) -> int:
        """The elements alive at once where each axis keeps `counts[axis]` positions (all, if it is not named)."""
        widths = {**counts, **self._empty}
        change: dict[int, int] = {}
        for buffer in self._buffers:
            size = sum(math.prod(axes.count(dim, widths) for dim in shape) for shape in buffer.shapes)
            change[buffer.first] = change.get(buffer.first, 0) + size
            change[buffer.last + 1] = change.get(buffer.last + 1, 0) - size
        alive = peak = 0
        for index in sorted(change):
            alive += change[index]
            peak = max(peak, alive)
        return peak


def _shapes(value: object) -> list[tuple[Dim, ...]]:
    """The shapes of what an operation gives."""
    if isinstance(value, tuple):
        return [value]
    return [item for item in value if isinstance(item, tuple)] if isinstance(value, list) else []


def _sources(node: Node, instead: Mapping[Node, Node]) -> list[Node]:
    """What an operation reads, where sums have been passed over."""
    found = []
    for source in node.all_input_nodes:
        while source in instead:
            source = instead[source]
        found.append(source)
    return found


def _readers(order: Sequence[Node], instead: Mapping[Node, Node]) -> dict[Node, list[Node]]:
    """Who reads what each operation gives."""
    found: dict[Node, list[Node]] = {}
    for node in order:
        for source in _sources(node, instead):
            found.setdefault(source, []).append(node)
    return found


def _in_place(node: Node, shapes: Sequence[tuple[Dim, ...]], sources: Sequence[_Buffer], index: int) -> _Buffer | None:
    """The memory that an operation writes into rather than into new one; None where it takes new memory."""
    if not sources:
        return None
    name = op_name(node)
    if name in VIEWS or name.endswith("_"):
        return sources[0]
    if name in _FOLDED or (isinstance(node.target, OpOverload) and is_pointwise(node.target)):
        return next((item for item in sources if item.last <= index and item.shapes == list(shapes)), None)
    return None
