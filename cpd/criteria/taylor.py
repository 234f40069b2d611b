"""First-order Taylor expansion of the loss in the gates (Molchanov et al., arXiv 1906.10771): (dL/dm)^2."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.criteria.setting import Setting
from cpd.gates import Gates


def taylor(setting: Setting) -> dict[str, Tensor]:
    """The mean over batches of (dL/dm_u)^2, the squared change of the loss when gate u closes, to first order."""
    gates = Gates(setting.comb)
    total = {name: torch.zeros(size, device=setting.device) for name, size in gates.sizes.items()}
    count = 0
    for batch in setting.batches():
        for name, gradient in setting.gate_gradients(gates, batch).items():
            total[name] += gradient.square()
        count += 1
    return {name: sums / count for name, sums in total.items()}
