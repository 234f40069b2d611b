"""Group magnitude (Li et al. 2017, arXiv 1608.08710; over coupled layers as in DepGraph, arXiv 2301.12900)."""

from __future__ import annotations

from torch import Tensor

from cpd.criteria.setting import Setting
from cpd.gates import Gates, parameters_of


def magnitude(setting: Setting) -> dict[str, Tensor]:
    """The sum of squared weights over all slices of a position, relative to the group's mean.

    Relative, because layers of different fan-in and scale cannot be compared by size.
    """
    gates = Gates(setting.comb, everywhere=True)
    squares = {name: weight.float().square() for name, weight in parameters_of(setting.model).items()}
    return {name: score / score.mean().clamp_min(1e-30) for name, score in gates.sum(gates.reduce(squares)).items()}
