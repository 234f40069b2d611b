"""`Plan`: which positions of which tensors stay, and what else must change with them. Immutable.

A plan needs nothing but itself to be applied to a model of the original architecture: `cpd.shrink(model, plan)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cpd.errors import ArtifactError

FORMAT = 1


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that a forward reads, before and after.

    Attributes:
        module: path of the module.
        name: name of the attribute, e.g. "groups" or "num_heads".
        old: its value in the unpruned model; lists stand for tuples and lists alike.
        new: its value once the plan is applied.
    """

    module: str
    name: str
    old: int | list[int]
    new: int | list[int]


@dataclass(frozen=True)
class Rescale:
    """Rows of a parameter to be multiplied so that a width-dependent constant keeps its old effect.

    Attributes:
        tensor: name of the parameter.
        dim: the dimension that `positions` lie along.
        positions: positions in the unpruned tensor.
        factor: what the kept ones among them are multiplied by.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: float


@dataclass(frozen=True, repr=False)
class Plan:
    """What is kept of a model.

    Attributes:
        kept: {parameter or buffer name: {dim: LongTensor of kept indices, ascending}}; only what changes.
        groups: {group name: kept positions}, for every group.
        shapes: shape in the unpruned model of every tensor in `kept`.
        attributes: module attributes that change with the widths.
        rescales: rows whose scale changes so that the function does not.
        adjusted: one sentence for each group that keeps more than was asked, because a tie demands it.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    groups: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: tuple[Attribute, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    adjusted: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(dims)) for name, dims in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(frozen))
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))

    def __repr__(self) -> str:
        """How much it changes; the positions themselves are in `groups` and `kept`."""
        return f"Plan({len(self.kept)} tensors narrower, {len(self.groups)} groups, {len(self.attributes)} attributes)"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Each list of kept indices is stored once, however many tensors share it."""
        table: dict[tuple[int, ...], int] = {}

        def number(indices: Tensor) -> int:
            return table.setdefault(tuple(indices.tolist()), len(table))

        kept = {name: {str(dim): number(index) for dim, index in dims.items()} for name, dims in self.kept.items()}
        return {
            "format": FORMAT,
            "groups": {name: list(positions) for name, positions in self.groups.items()},
            "indices": [list(indices) for indices in table],
            "kept": kept,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": [vars(attribute) for attribute in self.attributes],
            "rescales": [{**vars(item), "positions": list(item.positions)} for item in self.rescales],
            "adjusted": list(self.adjusted),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            ArtifactError: if `data` is no plan, or of another format.
        """
        try:
            if data["format"] != FORMAT:
                raise ArtifactError(f"The plan is of format {data['format']}; this version of cpd reads {FORMAT}.")
            indices = [torch.tensor(item, dtype=torch.long) for item in data["indices"]]
            return Plan(
                kept={
                    name: {int(dim): indices[number] for dim, number in dims.items()}
                    for name, dims in data["kept"].items()
                },
                groups={name: tuple(positions) for name, positions in data["groups"].items()},
                shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
                attributes=tuple(Attribute(**item) for item in data["attributes"]),
                rescales=tuple(Rescale(**{**item, "positions": tuple(item["positions"])}) for item in data["rescales"]),
                adjusted=tuple(data["adjusted"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"This is not a plan that cpd wrote: {type(error).__name__}: {error}.") from error
