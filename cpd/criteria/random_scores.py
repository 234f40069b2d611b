"""Random scores: the yardstick for all others (Mittal et al. 2018, arXiv 1801.10447)."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.criteria.context import SETTING, Setting
from cpd.options import checked


@checked(setting=SETTING)
def uniform(setting: Setting) -> dict[str, Tensor]:
    """Independent uniform numbers in [0, 1), by the seed."""
    generator = torch.Generator().manual_seed(setting.seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in setting.comb.open}
