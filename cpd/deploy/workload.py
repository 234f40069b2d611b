"""Workload: what a model computes, each operation with the dimensions that its time depends on.

Contractions (convolutions, matrix products) become kernels of any widths; of all else the size of its tensors counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.fx import Node

from cpd.algebra.axes import Dim
from cpd.coupling.cost import CONVOLUTIONS, MATRIX_PRODUCTS, TRANSPOSED
from cpd.deploy.kernels import Convolution, Kernel, MatrixProduct
from cpd.rules import Context, arguments
from cpd.trace.graph import op_name, owner

Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Contraction:
    """A convolution or matrix product.

    Attributes:
        node: the operation.
        name: the module that it is in.
        result: the dimensions of what it gives.
        anchor: the kernel at the widths of the unpruned model.
        widths: for each of the kernel's widths by name, the dimensions whose product, divided by that of others, it is.
    """

    node: Node
    name: str
    result: Dims
    anchor: Kernel
    widths: dict[str, tuple[Dims, Dims]]

    def kernel(self, size: Callable[[Dim], int]) -> Kernel:
        """The kernel at other widths.

        Args:
            size: dimension -> how many positions it has.
        """
        return self.anchor.at(**{name: _width(*dims, size) for name, dims in self.widths.items()})


class Computed(NamedTuple):
    """A tensor that an operation gives, or has inside."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class Workload:
    """All operations of a model: contractions, and the shape of every tensor that is computed."""

    contractions: tuple[Contraction, ...]
    tensors: tuple[Computed, ...]


def workload(ctx: Context) -> Workload:
    """The operations of a comb's graph, in their order."""
    contractions: list[Contraction] = []
    tensors: list[Computed] = []
    for node in ctx.graph.operations:
        value = ctx.values[node]
        tensors.extend(Computed(node, tuple(shape)) for shape in (value if isinstance(value, list) else [value]))
        found = _contractions(ctx, node)
        contractions.extend(found)
        if op_name(node) == "scaled_dot_product_attention":  # its weights are a tensor that the graph does not name
            tensors.append(Computed(node, found[0].result))
    return Workload(tuple(contractions), tuple(tensors))


def _contractions(ctx: Context, node: Node) -> list[Contraction]:
    name = op_name(node)
    if name not in {"linear", "scaled_dot_product_attention", *CONVOLUTIONS, *TRANSPOSED, *MATRIX_PRODUCTS}:
        return []
    bound, value = arguments(node), ctx.values[node]
    assert isinstance(value, tuple)
    if name == "linear":
        inner = ctx.shape(bound["weight"])[-1]
        return [_product(node, value, (), value[:-1], inner, value[-1], constant=True)]
    if name in MATRIX_PRODUCTS:
        left, right = (source for source in node.args[-2:] if isinstance(source, Node))
        inner = ctx.shape(left)[-1]
        if right.name in ctx.graph.tensors:
            return [_product(node, value, (), value[:-1], inner, value[-1], constant=True)]
        return [_product(node, value, value[:-2], value[-2:-1], inner, value[-1])]
    if name == "scaled_dot_product_attention":
        query, key = ctx.shape(bound["query"]), ctx.shape(bound["key"])
        scores = (*query[:-1], key[-2])
        return [
            _product(node, scores, query[:-2], query[-2:-1], query[-1], key[-2]),
            _product(node, value, query[:-2], query[-2:-1], key[-2], value[-1]),
        ]
    return [_convolution(ctx, node, bound, value)]


def _product(
    node: Node, result: Dims, batch: Dims, rows: Dims, inner: Dim, columns: Dim, *, constant: bool = False
) -> Contraction:
    sizes = (math.prod(dim.size for dim in batch), math.prod(dim.size for dim in rows), inner.size, columns.size)
    widths: dict[str, tuple[Dims, Dims]] = {
        "batch": (batch, ()), "rows": (rows, ()), "inner": ((inner,), ()), "columns": ((columns,), ()),
    }  # fmt: skip
    return Contraction(node, _where(node), result, MatrixProduct(*sizes, constant), widths)


def _convolution(ctx: Context, node: Node, bound: dict[str, object], value: Dims) -> Contraction:
    source, weight = ctx.shape(bound["input"]), ctx.shape(bound["weight"])  # type: ignore[arg-type]
    rank = len(weight) - 2
    batch = source[: -rank - 1]
    channels, outputs = source[-rank - 1], value[-rank - 1]
    transposed = op_name(node) in TRANSPOSED
    inner, others = weight[1], outputs if transposed else channels  # those of one group, and of all
    widths: dict[str, tuple[Dims, Dims]] = {
        "batch": (batch, ()),
        "groups": ((others,), (inner,)),
        "inputs": ((inner,), ()) if not transposed else ((channels, inner), (outputs,)),
        "outputs": ((outputs, inner), (channels,)) if not transposed else ((inner,), ()),
    }
    kernel = tuple(dim.size for dim in weight[2:])
    padding = bound["padding"]
    if isinstance(padding, str):
        padding = [size // 2 if padding == "same" else 0 for size in kernel]
    sizes = {name: _width(*dims, lambda dim: dim.size) for name, dims in widths.items()}
    stride, padding, dilation = (_each(numbers, rank) for numbers in (bound["stride"], padding, bound["dilation"]))
    space = tuple(dim.size for dim in source[-rank:])
    anchor = Convolution(
        **sizes, space=space, kernel=kernel, stride=stride, padding=padding, dilation=dilation, transposed=transposed
    )
    return Contraction(node, _where(node), value, anchor, widths)


def _where(node: Node) -> str:
    return owner(node) or op_name(node)


def _each(numbers: object, rank: int) -> tuple[int, ...]:
    """One number a spatial dimension."""
    found = tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)
    return found if len(found) == rank else found * rank


def _width(numerator: Dims, denominator: Dims, size: Callable[[Dim], int]) -> int:
    return max(math.prod(map(size, numerator)) // max(math.prod(map(size, denominator)), 1), 1)
