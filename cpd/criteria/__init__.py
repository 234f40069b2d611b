"""Criteria: how much the loss would miss each position of each group. One file a criterion, one table of names.

A criterion is a callable `(Setting) -> {group name: Tensor[size]}`; the higher the score, the more it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from cpd.criteria.hessian import frobenius, trace
from cpd.criteria.magnitude import magnitude
from cpd.criteria.setting import Setting
from cpd.criteria.taylor import taylor

Criterion: TypeAlias = Callable[[Setting], dict[str, Tensor]]

#: Name -> criterion. `hessian` is CPD's.
CRITERIA: dict[str, Criterion] = {
    "hessian": frobenius,
    "hessian-trace": trace,
    "taylor": taylor,
    "magnitude": magnitude,
}
#: Criteria that need no data.
DATA_FREE = frozenset({"magnitude"})

__all__ = ["CRITERIA", "DATA_FREE", "Criterion", "Setting"]
