"""Masked equals shrunk: the check that shrinking did what removing means.

The unpruned graph is run with every removed slice set to zero, statistics (norms, softmax, means) taken over the
kept positions. Its output must be that of the shrunk model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim, Mask
from cpd.coupling.comb import Comb
from cpd.coupling.exactness import (
    CONTRACTIONS,
    CONVOLUTIONS,
    DISTANCES,
    NORMS,
    REDUCTIONS,
    SOFTMAX,
    SUMS,
    WEIGHT_NORMS,
)
from cpd.model.inputs import check_model, evaluating, plain_attention
from cpd.model.tensors import every_tensor
from cpd.plan import Plan
from cpd.proof.constants import ATTENTION
from cpd.proof.copies import mismatch
from cpd.proof.replay import predicted
from cpd.rules import Shape, arguments
from cpd.rules.base import tensor_inputs
from cpd.trace.graph import OperationGraph, op_name
from cpd.trace.values import answering

#: Ops that mix over a dimension otherwise than by a sum of products: they see its kept positions alone.
MIXING = {*NORMS, *SOFTMAX, *REDUCTIONS, *SUMS, *DISTANCES, *WEIGHT_NORMS}


class MaskedForward(Interpreter):
    """Runs the unpruned graph of a comb as if the positions that a plan removes were not there.

    Args:
        comb: the comb of the unpruned model.
        plan: what is kept.
    """

    def __init__(self, comb: Comb, plan: Plan) -> None:
        super().__init__(comb.operations.module)
        self.context = comb.context
        self.masks: dict[Axis, Mask] = {}
        self.scales = {scale.node: scale for scale in comb.scales if not scale.rows}
        removal = comb.removal(plan.removed)
        self.instead, self.gone = removal.instead, removal.gone
        for group in comb.groups:
            self.masks[group.axis] = axes.mask(group.axis, {})
            if group.name not in removal.groups or group.axis in removal.empty:  # nothing is read of the others
                self.masks[group.axis][:] = False
                self.masks[group.axis][list(plan.groups[group.name])] = True
        self.counts = {axis: int(mask.sum()) for axis, mask in self.masks.items()}

    def run_node(self, n: Node) -> Any:
        """Run one node, on the kept positions alone where it mixes over a dimension."""
        name = op_name(n)
        if n in self.instead:
            return self.env[self.instead[n]].clone()
        if n.op == "call_function" and n not in self.gone:
            if name in MIXING and "other" not in arguments(n):
                return self._narrowed(n)
            if name == ATTENTION:
                return self._attention(n)
            if n in self.scales:
                return self._rescaled(n)
            if name in CONTRACTIONS or name in CONVOLUTIONS:
                self._zero_removed(n)
        return super().run_node(n)

    def _narrowed(self, n: Node) -> Any:
        """Run an op on the kept positions alone, and put what it gives back in its place, zeros between."""
        bound = arguments(n)
        for item in self.context.literals:
            if item.node is n:
                width = predicted(item, self.counts)
                value = bound[item.argument]
                bound[item.argument] = _replaced(value, item.index, width) if isinstance(value, list) else width
        result = _call(n, torch.fx.node.map_arg(bound, self._narrow))
        shapes = self.context.values[n]
        if isinstance(shapes, list):
            return [self._widen(value, dims) for value, dims in zip(result, shapes, strict=True)]
        return self._widen(result, shapes)

    def _narrow(self, source: Node) -> Any:
        """The kept positions of what a node gave."""
        value = self.env[source]
        for index, dim in enumerate(self.context.shape(source)) if isinstance(value, Tensor) else ():
            kept = self._kept(dim, value)
            value = value.index_select(index, kept) if len(kept) < dim.size else value
        return value

    def _widen(self, value: Tensor, dims: Shape) -> Tensor:
        """A tensor of kept positions, with zeros at the others."""
        for index, dim in enumerate(dims):
            kept = self._kept(dim, value)
            value = _scatter(value, index, kept, dim.size) if len(kept) < dim.size else value
        return value

    def _zero_removed(self, n: Node) -> None:
        """Let an op that sums over products see zeros at the removed positions."""
        for source in tensor_inputs(n):
            value = self.env[source]
            for index, dim in enumerate(self.context.shape(source)):
                gone = _positions(~axes.mask(dim, self.masks), value)
                value = value.index_fill(index, gone, 0) if len(gone) else value
            self.env[source] = value

    def _kept(self, dim: Dim, like: Tensor) -> Tensor:
        return _positions(axes.mask(dim, self.masks), like)

    def _bound(self, n: Node) -> dict[str, Any]:
        return {key: self.env[v] if isinstance(v, Node) else v for key, v in arguments(n).items()}

    def _attention(self, n: Node) -> Tensor:
        """Attention to the kept keys, by the scale that the narrower forward has."""
        bound = self._bound(n)
        kept = self._kept(self.context.shape(arguments(n)["key"])[-2], bound["key"])
        bound["key"], bound["value"] = (bound[name].index_select(-2, kept) for name in ("key", "value"))
        if bound["attn_mask"] is not None and bound["attn_mask"].shape[-1] > 1:
            bound["attn_mask"] = bound["attn_mask"].index_select(-1, kept)
        if n in self.scales:
            bound["scale"] = (bound["scale"] or bound["query"].shape[-1] ** -0.5) * self._change(n)
        result: Tensor = _call(n, bound)
        return result

    def _rescaled(self, n: Node) -> Any:
        """A constant that follows a width."""
        result = super().run_node(n)
        return result / self._change(n) if self.scales[n].inverse else result * self._change(n)

    def _change(self, n: Node) -> float:
        return self.scales[n].change(self.counts)


def _call(n: Node, bound: Mapping[str, Any]) -> Any:
    assert callable(n.target)
    schema = n.target._schema  # type: ignore[attr-defined]
    positional = [bound[arg.name] for arg in schema.arguments if not arg.kwarg_only]
    return n.target(*positional, **{arg.name: bound[arg.name] for arg in schema.arguments if arg.kwarg_only})


def _replaced(values: list[int], index: int, value: int) -> list[int]:
    """A list with another value in one place."""
    return [value if position == index else other for position, other in enumerate(values)]


def _positions(mask: Mask, like: Tensor) -> Tensor:
    """Where a mask is true, on the device of a tensor."""
    return torch.from_numpy(mask).nonzero().squeeze(1).to(like.device)


def _scatter(value: Tensor, dim: int, kept: Tensor, size: int) -> Tensor:
    """Put kept positions back in their places, zeros between them."""
    shape = list(value.shape)
    shape[dim] = size
    return value.new_zeros(shape).index_copy(dim, kept, value)


def masked_output(model: nn.Module, comb: Comb, plan: Plan) -> Any:
    """Output of the unpruned `model` on the comb's example inputs, removed slices zero (flattened to a list)."""
    aliases = {name: tensor.detach().clone() for name, tensor in every_tensor(check_model(model)).items()}
    for name, dims in plan.kept.items():
        for dim, indices in dims.items():
            gone = torch.ones(aliases[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            aliases[name].index_fill_(dim, gone.nonzero().squeeze(1).to(aliases[name].device), 0)
    call = iter(pytree.tree_leaves((comb.operations.call.args, comb.operations.call.kwargs)))
    inputs = [
        aliases[comb.operations.tensors[node.name]]
        if node.name in comb.operations.tensors
        else comb.operations.constants[node.name]
        if node.name in comb.operations.constants
        else next(call)
        for node in comb.operations.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        return pytree.tree_leaves(MaskedForward(comb, plan).run(*inputs))


def masked_error(model: nn.Module, shrunk: nn.Module, comb: Comb, plan: Plan) -> float:
    """Largest difference between the shrunk model and the masked unpruned one, relative to the largest output.

    Where only some of the outputs matter, those are compared.

    Args:
        model: the unpruned model.
        shrunk: the model that `plan` was applied to.
        comb: the comb of `model`.
        plan: what is kept.
    """
    expected = masked_output(model, comb, plan)
    shrunk = check_model(shrunk)
    with torch.no_grad(), evaluating(shrunk), plain_attention(), answering(comb.operations.answers):
        found = pytree.tree_leaves(comb.operations.call.on(comb.operations.runner(shrunk)))
    chosen = comb.operations.chosen
    pairs = [
        (a, b)
        for place, (a, b) in enumerate(zip(expected, found, strict=True))
        if isinstance(a, Tensor) and _continuous(a) and (chosen is None or place in chosen)
    ]
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)


def _continuous(value: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers."""
    return value.is_floating_point() or value.is_complex()


def shape_mismatch(comb: Comb, plan: Plan, again: OperationGraph) -> str | None:
    """The first node whose shape in the shrunk model is not what the comb of the unpruned one predicts.

    Args:
        comb: the comb of the unpruned model.
        plan: what is kept.
        again: the operations of the shrunk model.

    Returns:
        None where all agree, else a sentence that names the node.
    """
    widths = {group.axis: len(plan.groups[group.name]) for group in comb.groups}
    return mismatch(comb.context, again, widths, comb.removal(plan.removed).gone)
