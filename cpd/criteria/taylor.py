"""First-order Taylor expansion of the loss in the gates (Molchanov et al., arXiv 1906.10771): (dL/dm)^2."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.criteria.setting import Setting
from cpd.gates import Gates


def taylor(setting: Setting) -> dict[str, Tensor]:
    """The mean over batches of (dL/dm_u)^2, the squared change of the loss when gate u closes, to first order."""
    gates = Gates(setting.comb)
    total = [torch.zeros(site.size, device=setting.device) for site in gates.sites]
    count = 0
    for batch in setting.batches():
        for sums, gradient in zip(total, setting.gate_gradients(gates, batch), strict=True):
            sums += gradient.square()
        count += 1
    return gates.sum([sums / count for sums in total])
