"""Groups: channels that must go together, each with every dimension of a tensor that it lies along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.rules import Context
from cpd.rules.contraction import KERNEL


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer along which a group has its channels.

    Attributes:
        tensor: Name of the parameter or buffer.
        dim: Index of the dimension.
        contracted: Whether an operation sums over this dimension (it reads the channels) rather than producing it.
    """

    tensor: str
    dim: int
    contracted: bool = False

    def __str__(self) -> str:
        return f"{self.tensor} dim {self.dim}"


@dataclass(frozen=True)
class Group:
    """Channels that are removed together from several tensors.

    Attributes:
        name: Name of the layer that produces the channels, followed by a number if it produces several groups.
        size: Number of channels.
        minimum: Smallest number of channels that can be kept.
        frozen: None if the group can be pruned, else the reason why it cannot.
        exact: Whether removing a channel gives the same outputs as setting it to zero in the unpruned model.
        inexact: The operation that mixes values over the group, if it is not exact.
        members: Every dimension of a tensor along which the group has its channels.
        ties: The reasons of all conditions that tie the group's width to other widths.
    """

    name: str
    size: int
    minimum: int
    frozen: str | None
    exact: bool
    inexact: str | None
    members: tuple[Member, ...]
    ties: tuple[str, ...]
    axis: Axis = field(repr=False, compare=False)


def freeze_tables(ctx: Context, dims: Mapping[str, tuple[Dim, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Freeze what buffers alone give: like an input, it is no layer's to narrow (and a forward may compute it anew)."""
    given: set[Axis] = set()
    tables: dict[Axis, str] = {}
    for name, shape in dims.items():
        for index, dim in enumerate(shape):
            for axis in axes.leaves(dim):
                if not isinstance(tensors[name], nn.Parameter):
                    tables.setdefault(axis, name)
                elif (name, index) not in ctx.contracted:
                    given.add(axis)
    for axis, name in tables.items():
        if axis not in given:
            axes.freeze(axis, f"given by the buffer {name} alone")


def groups_of(ctx: Context, dims: Mapping[str, tuple[Dim, ...]], inexact: Mapping[Axis, str]) -> tuple[Group, ...]:
    """One group an axis, named by the first tensor that gives it; space and kernels are left out."""
    members: dict[Axis, list[Member]] = {}
    for name, shape in dims.items():
        for index, dim in enumerate(shape):
            for axis in dict.fromkeys(axes.leaves(dim)):
                members.setdefault(axis, []).append(Member(name, index, (name, index) in ctx.contracted))
    reasons: dict[Axis, list[str]] = {}
    for tie in ctx.ties:
        for axis in tie.axes:
            reasons.setdefault(axis, []).append(tie.reason)
    taken: dict[str, int] = {}
    found = []
    for axis, places in members.items():
        if axis.frozen is not None and axis.frozen.startswith(KERNEL):
            continue
        first = next((place for place in places if not place.contracted and place.dim == 0), places[0])
        layer = first.tensor.removesuffix(".weight")
        taken[layer] = taken.get(layer, 0) + 1
        name = layer if taken[layer] == 1 else f"{layer}#{taken[layer]}"
        why = inexact.get(axis)
        found.append(
            Group(
                name=name,
                size=axis.size,
                minimum=axis.minimum,
                frozen=axis.frozen,
                exact=why is None,
                inexact=why,
                members=tuple(places),
                ties=tuple(reasons.get(axis, ())),
                axis=axis,
            )
        )
    return tuple(found)
