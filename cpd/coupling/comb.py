"""Comb: find which channels must go together, and prove that each group can.

    trace -> the algebra over every operation (`cpd.rules`) -> proof on narrower copies (`cpd.proof`)
          -> exactness (`cpd.coupling.exactness`) -> groups

The model is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Dim, Fixed, Mask
from cpd.algebra.ties import Tie
from cpd.coupling.branches import Branch, Removable
from cpd.coupling.cost import Cost, FrozenShare
from cpd.coupling.exactness import Exactness
from cpd.coupling.groups import Group, freeze_tables, groups_of
from cpd.coupling.removal import NO_REMOVAL, Removal
from cpd.errors import InputError, PlanError
from cpd.model.architecture import architecture_of, check_architecture
from cpd.model.arguments import INPUTS, MODEL
from cpd.model.inputs import as_call, check_model
from cpd.model.outputs import Outputs, reader, whole
from cpd.model.skeleton import skeleton
from cpd.model.state import cold, preserved
from cpd.model.tensors import every_tensor
from cpd.options import FLAG, LIMIT, OUTPUTS, SECONDS, Check, checked, instance
from cpd.plan import PLAN, Architecture, Cache, Plan, Rescale, removes
from cpd.proof.auxiliary import auxiliary_graph
from cpd.proof.constants import Scale
from cpd.proof.copies import edits
from cpd.proof.proof import MAX_COPIES, Proof
from cpd.proof.provenance import Place
from cpd.rules import Context, infer
from cpd.trace.graph import OperationGraph
from cpd.trace.quiet import garbage_collection_paused
from cpd.trace.tracer import trace


def _are_channels(value: Any) -> bool:
    """Whether a value holds channels one beside the other; which they may be is for the group to say."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 1
    return isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))


def _are_widths(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and _are_channels(value[key]) for key in value)


NAMES = Check(
    "a list of names of branches, such as ['layer1.1']",
    lambda value: isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value),
)
KEEP = Check("a mapping from names of groups to the channels to keep, such as {'layer1.0.conv1': [0, 2]}", _are_widths)


@dataclass(frozen=True, repr=False)
class Comb:
    """The coupling groups of a model, from which plans are made.

    Attributes:
        groups: All groups, prunable or frozen, in the order of the model's operations.
        graph: The operations as a `networkx.DiGraph`. Each node has `op`, `module`, `shape`, `line` and `groups`.
        unknown: ATen operations for which cpd has no rule. Every width that they touch is frozen.
        unread: Integer attributes that equal a width but do not change with it, each with the widths that it equals.
        model: The model that was combed.
        architecture: What must be the same in another model for this comb and its plans to be valid for it.
        frame: A copy of the combed model without its weights. Plans change the integer attributes that it holds.
        read: A function that takes the model's output and returns the parts that matter; `outputs` names them.
        applied: The plan that was applied to `model`, if this is the comb of a narrower model.
        removed: Names of branches that every plan of this comb removes. `cost` is the cost of what is left.
    """

    groups: tuple[Group, ...]
    operations: OperationGraph
    context: Context
    dims: Mapping[str, tuple[Dim, ...]]
    attributes: Mapping[Place, Dim]
    scales: tuple[Scale, ...]
    model: nn.Module
    architecture: Architecture
    frame: nn.Module
    caches: tuple[Cache, ...] = ()
    unread: Mapping[Place, tuple[Dim, ...]] = field(default_factory=dict)
    read: Callable[[Any], Any] = whole
    applied: Plan | None = None
    removed: frozenset[str] = frozenset()
    _found: list[Removable] = field(default_factory=list, repr=False)  # once it is asked for

    def __repr__(self) -> str:
        """The number of groups, and how many of them can be pruned."""
        return f"Comb({type(self.model).__name__}: {len(self.groups)} groups, {len(self.open)} of them open)"

    @property
    def open(self) -> tuple[Group, ...]:
        """The groups that can be pruned."""
        gone = self._removal(self.removed).groups
        return tuple(group for group in self.groups if group.frozen is None and group.name not in gone)

    @property
    def ties(self) -> tuple[Tie, ...]:
        """Pairs of dimensions that must keep the same number of channels."""
        removal = self._removal(self.removed).groups
        gone = {group.axis for group in self.groups if group.name in removal}
        return tuple(tie for tie in self.context.ties if gone.isdisjoint(tie.axes))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the returned tensors that matter and so keep their width; "" if the model returns one tensor."""
        chosen = self.operations.chosen
        return tuple(name for place, name in self.operations.output_names.items() if chosen is None or place in chosen)

    @property
    def unknown(self) -> tuple[str, ...]:
        """ATen operations for which cpd has no rule. Every width that they touch is frozen."""
        return tuple(self.context.unknown)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The operations as a graph, each with the names of the groups along which its result has channels."""
        graph = self.operations.digraph()
        names = {group.axis: group.name for group in self.groups}
        for node in self.operations.nodes:
            found = [axis for dim in self.context.dims_of(node) for axis in axes.leaves(dim)]
            label = self.operations.tensors.get(node.name, node.name)
            graph.nodes[label]["groups"] = list(dict.fromkeys(names[axis] for axis in found if axis in names))
        return graph

    @cached_property
    def cost(self) -> Cost:
        """A function from widths to MACs, parameters and activations, computed from the shapes of the graph."""
        left = self._removal(self.removed).cost
        return Cost(self.context, self.dims, every_tensor(self.model)) if left is None else left

    @property
    def _removable(self) -> Removable:
        if not self._found:
            check_architecture(
                self.model, self.architecture, PlanError, "The comb was made for",
                "Read comb.branches before the model is shrunk, or call cpd.comb on it again.",
            )  # fmt: skip
            self._found.append(Removable(self.context, self.model, self.dims, self.attributes, self.groups, self.cost))
        return self._found[0]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, removable or not (with the reason). They are found, and tried on copies, when first read.

        Raises:
            PlanError: If the model has been shrunk since it was combed.

        Examples:
            >>> from torchvision.models import resnet18
            >>> comb = cpd.comb(resnet18(), torch.randn(1, 3, 64, 64))
            >>> [branch.name for branch in comb.branches][:3]
            ['layer1.0', 'layer1.1', 'layer2.0']
            >>> comb.plan({}, remove=["layer1.1"])
            Plan(1 branch removed, 0 tensors narrower, 21 groups, 0 attributes)
        """
        return self._removable.branches

    def _removal(self, names: frozenset[str]) -> Removal:
        return self._removable.removal(names) if names else NO_REMOVAL

    @checked(names=NAMES)
    def removal(self, names: Collection[str]) -> Removal:
        """The operations, modules and groups that are removed with some branches, and the cost of what is left.

        Raises:
            PlanError: If a branch is unknown or frozen, or if both operands of a sum would be removed.
        """
        return self._removal(frozenset(names))

    @checked(names=NAMES)
    def without(self, names: Collection[str]) -> Comb:
        """A comb of the same model whose plans all remove these branches, given by name.

        Raises:
            PlanError: If a branch is unknown or frozen, or if both operands of a sum would be removed.
        """
        found = replace(self, removed=self._removal(self.removed | frozenset(names)).names)
        return found if found.removed != self.removed else self

    @cached_property
    def open_share(self) -> dict[str, float]:
        """The shares of MACs, and of the parameters that the forward uses, that lie in at least one open group."""
        return self.cost.open_share()

    @property
    def unused(self) -> Mapping[str, int]:
        """Elements of each parameter that the forward never uses. They are not changed and count in no share."""
        return self.cost.unused

    @cached_property
    def frozen_share(self) -> tuple[FrozenShare, ...]:
        """The shares that lie in no open group, by the reason why they are frozen, the largest first."""
        return self.cost.frozen_share()

    @checked(plan=PLAN)
    def left_alone(self, plan: Plan) -> tuple[str, ...]:
        """Integer attributes that a plan does not change although they equal a width that it changes: `block.dim = 64`.

        The forward does not read them. If another method of the model does, it may need the new width.
        """
        counts = {group.axis: len(plan.groups[group.name]) for group in self.groups}
        return tuple(
            f"{place.module}.{place.name} = {dims[0].size}".lstrip(".")
            for place, dims in self.unread.items()
            if not removes(plan.replacements, f"{place.module}.{place.name}")
            and any(axes.count(dim, counts) < dim.size for dim in dims)
        )

    @checked(model=MODEL, plan=PLAN)
    def narrowed(self, model: nn.Module, plan: Plan) -> Comb:
        """The comb of a model that was shrunk by `plan`, for scoring it without another trace or verification.

        Its groups and `dims` are those of the narrower model. Its operations and its cost are still those of the
        unpruned model, so plan with the comb of that, and shrink the narrower model by `plan.since(earlier)`.

        Args:
            model: This comb's model after `cpd.shrink(model, plan)`.
            plan: The plan that was applied to it.

        Raises:
            PlanError: If `plan` belongs to another model, or if `model` is not the result of applying it.
        """
        found = plan.architecture and self.architecture.difference(plan.architecture)
        if found:
            raise PlanError(f"The plan belongs to another model than the comb: {found}. Make the plan with this comb.")
        narrower = self.architecture.narrowed(plan)
        check_architecture(
            model, narrower, PlanError, "The comb and the plan were made for",
            "Pass the model to which only this plan was applied.",
        )  # fmt: skip
        sizes = {group.axis: len(plan.groups[group.name]) for group in self.groups}
        others = {axis: Axis(size) for axis, size in sizes.items() if size < axis.size}
        removal = self._removal(frozenset(plan.removed))
        groups = tuple(
            replace(
                group,
                size=sizes[group.axis],
                axis=others.get(group.axis, group.axis),
                members=tuple(item for item in group.members if not removal.removes(item.tensor)),
            )
            for group in self.groups
            if group.name not in removal.groups
        )
        dims = {
            name: tuple(axes.substitute(dim, others) for dim in found)
            for name, found in self.dims.items()
            if not removal.removes(name)
        }
        return replace(
            self, groups=groups, dims=dims, model=model, architecture=narrower, applied=plan, removed=removal.names,
        )  # fmt: skip

    @checked(keep=KEEP, remove=NAMES, strict=FLAG)
    def plan(self, keep: Mapping[str, Any], *, remove: Collection[str] = (), strict: bool = False) -> Plan:
        """Make a plan that keeps the given channels and removes the given branches.

        Args:
            keep: {group name: indices of the channels to keep}. Groups that are not named keep all channels.
            remove: Names of branches to remove as a whole.
            strict: Whether to raise an error if a tie or a minimum width requires more channels than `keep` gives. By
                default more are kept, and `plan.adjusted` says which.

        Raises:
            PlanError: If a group or a branch is unknown or frozen, a group would lose all its channels, a channel is
                out of range, or both operands of a sum would be removed; if `strict`, when a tie or a minimum width
                requires more channels; or if this is the comb of a narrower model (`narrowed`).

        Examples:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
            >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
            >>> plan = comb.plan({"0": range(8)})  # of the 16 channels of layer 0
            >>> plan
            Plan(3 tensors narrower, 3 groups, 0 attributes)
            >>> len(plan.kept["0.weight"][0]), len(plan.kept["3.weight"][1])  # 36 features a channel, after the flatten
            (8, 288)
        """
        if self.applied is not None and self.applied.changes:
            raise PlanError(
                "This comb belongs to a model that was already shrunk and can only be used for scores. Make the plan "
                "with the comb of the unpruned model, and shrink the model by plan.since(earlier)."
            )
        if remove:
            return self.without(remove).plan(keep, strict=strict)
        named, removal = {group.name: group for group in self.groups}, self._removal(self.removed)
        masks = {
            named[name].axis: _mask(named, name, positions)
            for name, positions in keep.items()
            if name in named and name not in removal.groups
        }
        unknown = sorted(set(keep) - set(named))
        if unknown:
            raise PlanError(f"There are no groups named {unknown}; comb.groups lists the names.")
        masks, adjusted = self._honour_ties(masks, strict)
        masks.update((axis, np.zeros(axis.size, dtype=np.bool_)) for axis in removal.empty)
        return self._build(masks, adjusted, removal)

    def _honour_ties(self, masks: dict[Axis, Mask], strict: bool) -> tuple[dict[Axis, Mask], list[str]]:
        """Keep more where a tie or a minimum demands it: the first of the removed channels come back."""
        counts = {group.axis: int(masks[group.axis].sum()) for group in self.open if group.axis in masks}
        counts.update({group.axis: group.size for group in self.open if group.axis not in masks})
        needed = ties.repair(counts, self.ties)
        adjusted = []
        names = {group.axis: group for group in self.groups}
        for axis, count in needed.items():
            if count == counts.get(axis, axis.size):
                continue
            group = names[axis]
            why = axis.why_minimum if counts[axis] < axis.minimum else group.ties[0]
            sentence = f"{group.name} keeps {count} of {group.size} channels instead of {counts[axis]}: {why}"
            if strict:
                raise PlanError(f"{sentence}. Pass strict=False to keep more channels than asked for.")
            mask = masks[axis].copy()
            mask[np.flatnonzero(~mask)[: count - counts[axis]]] = True
            masks[axis] = mask
            adjusted.append(sentence)
        return masks, adjusted

    def _build(self, masks: Mapping[Axis, Mask], adjusted: Sequence[str], removal: Removal) -> Plan:
        kept: dict[str, dict[int, Tensor]] = {}
        for name, dims in self.dims.items():
            if removal.removes(name):
                continue
            for index, dim in enumerate(dims):
                stays = axes.mask(dim, masks)
                if not stays.all():
                    kept.setdefault(name, {})[index] = torch.from_numpy(np.flatnonzero(stays))
        counts = {axis: int(mask.sum()) for axis, mask in masks.items()}
        return Plan(
            kept=kept,
            groups={
                group.name: ()
                if group.name in removal.groups
                else tuple(np.flatnonzero(masks[group.axis]).tolist())
                if group.axis in masks
                else tuple(range(group.size))
                for group in self.groups
            },
            shapes={name: tuple(dim.size for dim in self.dims[name]) for name in kept},
            attributes=tuple(
                item
                for item in edits(self.frame, self.attributes, counts)
                if not removal.removes(f"{item.module}.{item.name}")
            ),
            rescales=tuple(
                Rescale(tensor, 0, positions, scale.factor(counts))
                for scale in self.scales
                if scale.change(counts) != 1
                for tensor, positions in scale.rows
                if not removal.removes(tensor)
            ),
            adjusted=tuple(adjusted),
            caches=tuple(item for item in self.caches if not removal.removes(f"{item.module}.{item.name}")),
            architecture=self.architecture,
            removed=tuple(branch.name for branch in self.branches if branch.name in removal.names)
            if removal.names
            else (),
            replacements=removal.replacements,
        )


COMB = instance(Comb, "a comb: the result of cpd.comb(model, example_inputs)")


def _mask(named: Mapping[str, Group], name: str, positions: Any) -> Mask:
    """The kept channels of a group as a mask, checked."""
    group = named[name]
    index = np.array(positions.tolist() if isinstance(positions, Tensor) else list(positions), ndmin=1)
    if index.size == 0:
        raise PlanError(f"The plan removes all channels of {name}: keep at least one of its {group.size} channels.")
    if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= group.size:
        raise PlanError(f"Channels of {name} must be integers from 0 to {group.size - 1}; got {index.tolist()[:8]}.")
    mask = np.zeros(group.size, dtype=np.bool_)
    mask[index] = True
    if group.frozen is not None and not mask.all():
        raise PlanError(f"{name} cannot be pruned: {group.frozen}.")
    return mask


@checked(model=MODEL, example_inputs=INPUTS, outputs=OUTPUTS, proof_copies=LIMIT, proof_seconds=SECONDS)
def comb(
    model: nn.Module, example_inputs: Any, *, outputs: Outputs | None = None, proof_copies: int = MAX_COPIES,
    proof_seconds: float | None = None,
) -> Comb:  # fmt: skip
    """Find which channels of a model must be removed together, and which cannot be removed.

    The model is traced by `torch.export`, and every group is verified on narrower copies. The model is not changed.

    Args:
        model: Any module that `torch.export` can trace in eval mode. A model that `torch.compile` returned is
            unwrapped.
        example_inputs: A tensor, a tuple, or `(tuple, dict)` on which the model runs.
        outputs: The parts of the model's output that you use, if it returns more than those: a key, an attribute or an
            index (`a.b` or `1.0` for nested outputs), several of them, or a function of the output. These parts keep
            their width; others may become narrower. Default: all parts.
        proof_copies: Largest number of narrower copies to try, at least 1. Groups not verified by then are frozen.
        proof_seconds: Time limit of the verification in seconds. Groups not verified by then are frozen. Default: no
            limit, so that the same model always gives the same groups.

    Returns:
        A `Comb` with `groups`, `graph` and `plan(...)`.

    Raises:
        InputError: If `model` is not a module or fails on `example_inputs`, if its output has no such parts, or if a
            limit is not above 0.
        TraceError: If the model cannot be exported.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
        >>> comb
        Comb(Sequential: 3 groups, 1 of them open)
        >>> for member in comb.open[0].members:
        ...     print(member)
        0.weight dim 0
        0.bias dim 0
        1.weight dim 0
        1.bias dim 0
        4.weight dim 1
        1.running_mean dim 0
        1.running_var dim 0
        >>> comb.groups[-1].frozen
        "the model's output [linear in 4, ...]"
    """
    model = check_model(model)
    call = as_call(example_inputs)
    with preserved(model):
        with garbage_collection_paused():
            new, emptied = cold(model, call)
            graph = trace(new, call).choosing(outputs)
            ctx = Context(graph)
            tensors = _propagate(ctx, new, {})
        auxiliary = auxiliary_graph(new, graph)
        if auxiliary is not None:
            with suppress(InputError):  # which may give something else in train mode: all of it matters then
                auxiliary = auxiliary.choosing(outputs)
            _follow(Context(auxiliary, ties=ctx.ties, contracted=ctx.contracted, unknown=ctx.unknown), new, tensors)
        named = every_tensor(new)
        dims = {name: tensors[name] for name in named if name in tensors}
        freeze_tables(ctx, dims, named)
        proof = Proof(new, ctx, dims, in_train_mode=auxiliary, max_copies=proof_copies, max_seconds=proof_seconds)
        proof.run()
    with garbage_collection_paused():
        inexact = Exactness(ctx).inexact
    for scale in proof.scales:
        for axis in axes.leaves(scale.dim) if not scale.rows else ():
            inexact.setdefault(axis, ctx.reason(scale.node, "a constant of the forward depends on this width"))
    groups = groups_of(ctx, dims, inexact)
    caches = tuple(dict.fromkeys([*emptied, *graph.caches]))
    return Comb(
        groups, graph, ctx, dims, proof.attributes, tuple(proof.scales), model, architecture_of(model),
        skeleton(model, {}, meta=True), caches, proof.left_alone, reader(outputs),
    )  # fmt: skip


def _follow(ctx: Context, model: nn.Module, tensors: dict[str, tuple[Dim, ...]]) -> None:
    """Run the algebra over the graph in train mode too; widths that only it knows stay as they are."""
    known = set(tensors)
    _propagate(ctx, model, tensors)
    shared = {axis for name in known for dim in tensors[name] for axis in axes.leaves(dim)}
    for name in tensors.keys() - known:
        for axis in {axis for dim in tensors[name] for axis in axes.leaves(dim)} - shared:
            axes.freeze(axis, "used in train mode alone")


def _propagate(ctx: Context, model: nn.Module, tensors: dict[str, tuple[Dim, ...]]) -> dict[str, tuple[Dim, ...]]:
    """Run the algebra over the graph; the dimensions of every parameter and buffer, under all its names.

    Args:
        ctx: holds the graph.
        model: the model.
        tensors: the dimensions known so far; those of the others are added.
    """
    first_name: dict[int, str] = {}
    state = every_tensor(model)
    aliases = {name: first_name.setdefault(id(tensor), name) for name, tensor in state.items()}
    for node in ctx.graph.nodes:
        if node.op == "placeholder":
            name = aliases.get(ctx.graph.tensors.get(node.name, ""))
            shape = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else ()
            if name is not None and node.users:
                ctx.values[node] = tensors.setdefault(name, tuple(Axis(s) if s > 1 else Fixed(s) for s in shape))
            else:
                ctx.values[node] = tuple(Fixed(int(size)) for size in shape)
        elif node.op == "call_function":
            ctx.values[node] = infer(ctx, node)
    for source, part in ctx.graph.returned().items():
        for dim in ctx.dims_of(source):
            ctx.freeze(dim, source, f"the model's output {part}".strip())
    own = {axis for dims in tensors.values() for dim in dims for axis in axes.leaves(dim)}
    for node in ctx.values:
        for dim in ctx.dims_of(node):
            for axis in axes.leaves(dim):
                if axis not in own:
                    axes.freeze(axis, "no parameter lies along it")
    for axis in own:
        if axis.size == 1:
            axes.freeze(axis, "a single channel")
    for name, shared in aliases.items():
        if shared in tensors:
            tensors[name] = tensors[shared]
    return tensors
