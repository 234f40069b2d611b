"""Criteria: how much the loss would miss each channel of each group. One file a criterion, one table of names.

A criterion is a callable `(Setting) -> {group name: Tensor[size]}`; the higher the score, the more it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from cpd.criteria.apoz import apoz
from cpd.criteria.context import Setting
from cpd.criteria.first_order import snip, taylor
from cpd.criteria.fisher import fisher
from cpd.criteria.gates import Gates
from cpd.criteria.hessian import frobenius, trace
from cpd.criteria.magnitude import bn_scale, fpgm, lamp, magnitude
from cpd.criteria.obs import obs
from cpd.criteria.random_scores import uniform

Criterion: TypeAlias = Callable[[Setting], dict[str, Tensor]]

#: Name -> criterion. `hessian` is CPD's.
CRITERIA: dict[str, Criterion] = {
    "obs": obs,
    "hessian": frobenius,
    "hessian-trace": trace,
    "fisher": fisher,
    "taylor": taylor,
    "snip": snip,
    "apoz": apoz,
    "magnitude": magnitude,
    "magnitude-l1": partial(magnitude, p=1),
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "random": uniform,
}
#: Criteria that need no data.
DATA_FREE = frozenset({"magnitude", "magnitude-l1", "bn_scale", "fpgm", "lamp", "random"})
#: Criteria that need data, but no target.
TARGET_FREE = frozenset({"obs", "apoz"}) | DATA_FREE

__all__ = ["CRITERIA", "DATA_FREE", "TARGET_FREE", "Criterion", "Gates", "Setting"]
