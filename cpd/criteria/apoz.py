"""Average percentage of zeros (Hu et al. 2016, arXiv 1607.03250): channels that are hardly ever active go first."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.criteria.activation_gates import CallSites
from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Site
from cpd.options import checked
from cpd.trace.layer_calls import LayerCall, LayerCalls, seen


@checked(setting=SETTING)
def apoz(setting: Setting) -> dict[str, Tensor]:
    """The share of a position's activations above zero, one less its APoZ (eq. 1), the mean over all layers.

    Counted where layers read the group (behind its ReLU), else where they give it. Activations that are never
    exactly zero (GELU, SiLU) count as active where they are positive. A group that no layer holds has 1 throughout.
    """
    sites = CallSites.of(setting)
    active = {group.name: torch.zeros(group.size, device=setting.device) for group in setting.comb.open}
    count = {name: torch.zeros_like(sums) for name, sums in active.items()}

    def add(layer: LayerCall, x: Tensor, site: Site) -> None:
        share = (x > 0).float().movedim(layer.channel, -1).flatten(0, -2).mean(0)
        labels = sites.labels(site, layer)
        active[site.group].index_add_(0, labels[labels >= 0], share[labels >= 0])
        count[site.group].index_add_(0, labels[labels >= 0], torch.ones_like(share)[labels >= 0])

    def after(layer: LayerCall) -> None:
        for site in sites.read.get(layer.weight, ()):
            add(layer, layer.input, site)
        for site in sites.given.get(layer.weight, ()):
            add(layer, layer.output, site)

    for batch in setting.batches():
        with torch.no_grad(), seen(LayerCalls(setting.model, after=after)):
            setting.output(batch)
    active, count = ({name: setting.total(sums) for name, sums in found.items()} for found in (active, count))
    return {name: torch.where(count[name] > 0, sums / count[name].clamp_min(1), 1.0) for name, sums in active.items()}
