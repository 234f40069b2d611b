"""Whole channels: a plan as masks, and masks as a plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cpd.coupling.comb import Comb
from cpd.criteria.gates import Gates, slices
from cpd.plan import Plan
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector


def plan_of(comb: Comb, scores: Mapping[str, Tensor], sparsity: float, scope: str, most: float) -> Plan:
    """The plan that removes channels of the lowest scores until about so large a share of the parameters is gone."""
    selector = Selector(comb, scores, Limits(round_to=1, max_ratio=most), "global" if scope == "global" else "group")
    full = comb.cost({}).parameters
    return selector.plan(selector.meet(lambda cost: cost.parameters, (1 - sparsity) * full))


def masks_of(plan: Plan, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter: which of its entries a plan keeps}, of those that it narrows: biases and norms among them."""
    found = dict[str, Tensor]()
    for name, dims in plan.kept.items():
        if name in parameters:
            kept = torch.ones(parameters[name].shape, dtype=torch.bool)
            for dim, index in dims.items():
                stays = torch.zeros(kept.shape[dim], dtype=torch.bool)
                stays[index] = True
                kept &= stays.view([-1 if at == dim else 1 for at in range(kept.dim())])
            found[name] = kept
    return found


def emptied(masks: Mapping[str, Tensor], comb: Comb) -> dict[str, list[int]]:
    """The channels of each group that stay: those that something gives, and something reads, under the masks."""
    open_groups = {group.name: group for group in comb.open}
    left: dict[str, dict[bool, Tensor]] = {name: {} for name in open_groups}
    for site in Gates(comb, everywhere=True).sites:
        mask = masks.get(site.tensor)
        weight = comb.model.get_parameter(site.tensor) if mask is None else mask
        if site.group in left and weight.dim() > 1:
            some = slices(site, torch.ones(weight.shape) if mask is None else mask.float()) > 0
            before = left[site.group].get(site.consumer)
            left[site.group][site.consumer] = some if before is None else before | some
    found = dict[str, list[int]]()
    for name, sides in left.items():
        stays = torch.ones(open_groups[name].size, dtype=torch.bool)
        for some in sides.values():
            stays &= some.cpu()
        channels = stays.nonzero()[:, 0].tolist()
        lacking = open_groups[name].minimum - len(channels)
        if lacking > 0:  # a group keeps its minimum, whatever is in it
            channels = sorted([*channels, *(~stays).nonzero()[:lacking, 0].tolist()])
        if len(channels) < open_groups[name].size:
            found[name] = channels
    return found
