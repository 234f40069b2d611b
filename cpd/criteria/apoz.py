"""Average percentage of zeros (Hu et al. 2016, arXiv 1607.03250): channels that are hardly ever active go first."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from cpd.criteria.activation_gates import CallSites, per_sample
from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Site
from cpd.criteria.reliability import Means
from cpd.options import checked
from cpd.trace.layer_calls import LayerCall, LayerCalls, seen


@checked(setting=SETTING)
def apoz(setting: Setting) -> dict[str, Tensor]:
    """The share of a position's activations above zero, one less its APoZ (eq. 1), the mean over all layers.

    Counted where layers read the group (behind its ReLU), else where they give it. Activations that are never
    exactly zero (GELU, SiLU) count as active where they are positive. A group that no layer holds has 1 throughout.
    """
    sites, means = CallSites.of(setting), Means("samples")
    names = [group.name for group in setting.comb.open]

    def after(layer: LayerCall) -> None:
        dims = sites.samples_along.get((layer.weight, times[layer.weight]), (0, 0))
        times[layer.weight] += 1
        for site in sites.read.get(layer.weight, ()):
            add(layer, layer.input, dims[0], site)
        for site in sites.given.get(layer.weight, ()):
            add(layer, layer.output, dims[1], site)

    def add(layer: LayerCall, x: Tensor, along: int, site: Site) -> None:
        places = x.numel() / x.shape[layer.channel] / samples
        share = per_sample((x > 0).float(), along, layer.channel, samples) / places
        labels = sites.labels(site, layer)
        active[site.group].index_add_(1, labels[labels >= 0], share[:, labels >= 0])
        count[site.group].index_add_(1, labels[labels >= 0], torch.ones_like(share)[:, labels >= 0])

    for batch in setting.batches():
        samples, times = batch.call.samples, Counter[str]()
        active = {g.name: torch.zeros(samples, g.size, device=setting.device) for g in setting.comb.open}
        count = {name: torch.zeros_like(shares) for name, shares in active.items()}
        with torch.no_grad(), seen(LayerCalls(setting.model, after=after)):
            setting.output(batch)
        means.add(
            [torch.where(count[name] > 0, active[name] / count[name].clamp_min(1), 1.0) for name in names], samples
        )
    means.pool(setting)
    return means.scores(setting, lambda every: dict(zip(names, every, strict=True)))
