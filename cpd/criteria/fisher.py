"""Group Fisher (Liu et al. 2021, arXiv 2108.00708): the gradients of coupled gates, squared sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.criteria.activation_gates import CallSites, sample_gradients
from cpd.criteria.context import LOSS_SCALE, SETTING, Setting
from cpd.criteria.reliability import Means
from cpd.options import checked


@checked(setting=SETTING)
def fisher(setting: Setting) -> dict[str, Tensor]:
    """The mean over samples n of (the sum over coupled gates of dL_n/dm)^2, eq. 6.

    The gates of a group move as one, so their gradients are summed before they are squared.
    """
    sites, names = CallSites.of(setting), [group.name for group in setting.comb.open]
    means = Means("samples")
    for batch in setting.batches():
        samples = batch.call.samples
        scale = samples * (LOSS_SCALE if setting.dtype is torch.float16 else 1.0)  # the loss is a mean over samples

        def loss(batch: object = batch, scale: float = scale) -> Tensor:
            return setting.loss_of(batch) * scale  # type: ignore[arg-type]

        found = sample_gradients(setting, sites, batch, loss)
        means.add([(value * (samples / scale)).square() for value in found.values()], samples)
    means.pool(setting)
    return means.scores(setting, lambda every: dict(zip(names, every, strict=True)))
