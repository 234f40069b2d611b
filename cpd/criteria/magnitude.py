"""By the weights alone: magnitude, LAMP, geometric median, BatchNorm scales. No data is needed.

Layers of different fan-in and scale cannot be compared by size, so scores are relative to their group's mean (but
for LAMP, which has its own way).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Gates, Site, parameters_of, slices
from cpd.options import checked, number

NORM = number("of at least 1", lambda value: value >= 1)


@checked(setting=SETTING, p=NORM)
def magnitude(setting: Setting, p: float = 2) -> dict[str, Tensor]:
    """The sum of |w|^p over all slices of a position, relative to the group's mean.

    Li et al. 2017 (arXiv 1608.08710), over coupled layers as in DepGraph (arXiv 2301.12900).

    Args:
        setting: the model and its comb.
        p: the norm; `functools.partial(magnitude, p=1)` is a criterion too.
    """
    return {name: _relative(score) for name, score in _sums(setting, p).items()}


@checked(setting=SETTING)
def lamp(setting: Setting) -> dict[str, Tensor]:
    """|w_u|^2 over the sum of |w_v|^2 of all positions v of the group that are no smaller.

    Lee et al. 2021 (arXiv 2010.07611), eq. 5, of slices rather than weights. The largest of each group has 1.
    """
    result = {}
    for name, score in _sums(setting, 2).items():
        order = torch.argsort(score, descending=True, stable=True)
        result[name] = torch.empty_like(score)
        result[name][order] = score[order] / score[order].cumsum(0).clamp_min(1e-30)
    return result


@checked(setting=SETTING)
def fpgm(setting: Setting) -> dict[str, Tensor]:
    """The sum of distances to the other positions' slices: those near the geometric median can be replaced.

    He et al. 2019 (arXiv 1811.00250), eq. 5, over every slice that gives the position; relative to the group's mean.
    """
    weights = parameters_of(setting.model)

    def distances(site: Site) -> Tensor:
        rows = weights[site.tensor].float().movedim(site.dim, 0).flatten(1)
        order = torch.argsort(site.labels, stable=True)[int((site.labels < 0).sum()) :].to(rows.device)
        rows = rows[order].unflatten(0, (site.size, -1)).flatten(1)
        return torch.cdist(rows, rows).sum(1)

    return _scored(setting, _producers(setting), distances)


@checked(setting=SETTING)
def bn_scale(setting: Setting) -> dict[str, Tensor]:
    """|gamma| of the norm layers that a position goes through (Network Slimming, Liu et al. 2017, arXiv 1708.06519).

    A group that goes through none is scored by the L2 norms of the slices that give it. Relative to the group's mean.
    """
    weights = parameters_of(setting.model)
    norms = {name for name, module in setting.model.named_modules() if "norm" in type(module).__name__.lower()}
    chosen = {
        group: [site for site in sites if site.tensor.removesuffix("_orig").removesuffix(".weight") in norms]
        or producers
        for (group, sites), producers in zip(_sites(setting).items(), _producers(setting).values(), strict=True)
    }
    return _scored(setting, chosen, lambda site: slices(site, weights[site.tensor].float().square()).sqrt())


def _sums(setting: Setting, p: float) -> dict[str, Tensor]:
    """The sum of |w|^p over all slices of every position."""
    gates, weights = Gates(setting.comb, everywhere=True), parameters_of(setting.model)
    return gates.sum(gates.reduce(lambda name: weights[name].float().abs().pow(p)))


def _sites(setting: Setting) -> dict[str, list[Site]]:
    """Everywhere that each open group lies."""
    found: dict[str, list[Site]] = {group.name: [] for group in setting.comb.open}
    for site in Gates(setting.comb, everywhere=True).sites:
        found[site.group].append(site)
    return found


def _producers(setting: Setting) -> dict[str, list[Site]]:
    """The sites where layers give a group; all of its sites, if none does."""
    weights = parameters_of(setting.model)
    return {
        group: [site for site in sites if not site.consumer and weights[site.tensor].dim() > 1] or sites
        for group, sites in _sites(setting).items()
    }


def _scored(setting: Setting, sites: dict[str, list[Site]], score: Callable[[Site], Tensor]) -> dict[str, Tensor]:
    """A score of every site, summed over each group's, relative to the group's mean."""
    zeros = {group.name: torch.zeros(group.size, device=setting.device) for group in setting.comb.open}
    return {group: _relative(sum(map(score, found), zeros[group])) for group, found in sites.items()}


def _relative(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(1e-30)
