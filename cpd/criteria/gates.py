"""Gates: a number m = 1 on every position of every place where a group lies; sums of per-weight tensors over them.

A gate multiplies what a consumer of a position reads: the slice of its weight that is summed over. Its gradient
is `sum over that slice of w * dL/dw`, by the chain rule from w' = m w. Each consumer has gates of its own, and the
scores of a group are summed over them (CPD: "summed over each coupled group"). A group that no parameter
consumes (the inner width of an attention's q and k) is gated on the slices that give it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpd.algebra import axes
from cpd.coupling.comb import Comb
from cpd.coupling.groups import Group, Member
from cpd.model.masks import masked_weights
from cpd.model.tensors import named_tensors


@dataclass(frozen=True, eq=False)
class Site:
    """Where a group lies in a tensor.

    Attributes:
        group: its name.
        tensor: name of the parameter.
        dim: which of its dimensions.
        labels: for each index along `dim` the position of the group (-1: none).
        size: of the group.
        consumer: whether an op sums over `dim`, rather than giving it.
    """

    group: str
    tensor: str
    dim: int
    labels: Tensor
    size: int
    consumer: bool


class Gates:
    """The gates of all open groups of a comb, one a position a site.

    Args:
        comb: the comb.
        everywhere: gate every slice of a group, its own weights, biases and norms too, rather than only those
            that consume it.
    """

    def __init__(self, comb: Comb, *, everywhere: bool = False) -> None:
        self.groups = {group.name: group.size for group in comb.open}
        self.sites = [
            Site(
                group.name, member.tensor, member.dim, self._labels(comb, group, member), group.size, member.contracted
            )
            for group in comb.open
            for member in _members(comb, group, everywhere)
        ]

    @staticmethod
    def _labels(comb: Comb, group: Group, member: Member) -> Tensor:
        return torch.from_numpy(axes.labels(comb.dims[member.tensor][member.dim], group.axis))

    @property
    def tensors(self) -> list[str]:
        """Names of the parameters that have a gate."""
        return list(dict.fromkeys(site.tensor for site in self.sites))

    def reduce(self, value_of: Callable[[str], Tensor | None]) -> list[Tensor]:
        """Sum per-weight values over the slice of each gate.

        Args:
            value_of: gives for a parameter's name a tensor of its shape, or None, which counts as zero; called once
                for each, so that no two need exist at a time.

        Returns:
            For each site a Tensor[size of its group].
        """
        found: dict[Site, Tensor] = {}
        for name, sites in self._by_tensor().items():
            value = value_of(name)
            found.update((site, torch.zeros(site.size) if value is None else slices(site, value)) for site in sites)
        return [found[site] for site in self.sites]

    def _by_tensor(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.tensor, []).append(site)
        return found

    def multiply(self, tensors: Mapping[str, Tensor], gates: Sequence[Tensor]) -> dict[str, Tensor]:
        """`tensors` with every slice multiplied by its gates; those without a gate are left out."""
        result: dict[str, Tensor] = {}
        for site, gate in zip(self.sites, gates, strict=True):
            value = result.get(site.tensor, tensors.get(site.tensor))
            if value is None:
                continue
            labels = site.labels.to(value.device)
            factor = torch.where(labels >= 0, gate.to(value)[labels], value.new_ones(()))
            shape = [-1 if dim == site.dim else 1 for dim in range(value.dim())]
            result[site.tensor] = value * factor.reshape(shape)
        return result

    def sum(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Sum one tensor a site over the sites of each group: {group name: Tensor[size]}."""
        result = {name: torch.zeros(size) for name, size in self.groups.items()}
        for site, value in zip(self.sites, values, strict=True):
            result[site.group] = result[site.group].to(value.device) + value
        return result


def slices(site: Site, value: Tensor) -> Tensor:
    """The sum of a tensor of the parameter's shape over the slice of each position, [size of the group]."""
    along = value.sum([dim for dim in range(value.dim()) if dim != site.dim]) if value.dim() > 1 else value
    labels = site.labels.to(value.device)
    return value.new_zeros(site.size).index_add_(0, labels[labels >= 0], along[labels >= 0])


def _members(comb: Comb, group: Group, everywhere: bool) -> list[Member]:
    """The members to gate: parameters, each once however many names it has."""
    parameters = dict(comb.model.named_parameters())
    own = [member for member in group.members if member.tensor in parameters]
    consumers = [member for member in own if member.contracted]
    return own if everywhere or not consumers else consumers


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, detached; one that a mask of `torch.nn.utils.prune` lies on is multiplied by it."""
    tensors = named_tensors(model)
    found = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    masks = {name: tensors[name.removesuffix("_orig") + "_mask"] for name in masked_weights(model)}
    return found | {name: found[name] * mask for name, mask in masks.items()}
