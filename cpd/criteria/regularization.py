"""Sparse learning: a training that drives whole channels towards zero before they are removed.

group-lasso   the norm of a channel, over all that belongs to it in every coupled layer (Yuan and Lin 2006; Wen et al.
              2016, arXiv 1608.03665, eq. 2, of single layers)
growing       its square, weighed by how many channels of its group are larger, ever more as the last shrink comes
              near (Wang et al. 2021, arXiv 2012.09243, section 3); the weight grows with that share as in Fang et al.
              2023, arXiv 2301.12900, eq. 5, who take the norms themselves: beside one large channel, all are small
batchnorm     the scale of a channel in a BatchNorm (Liu et al. 2017, arXiv 1708.06519, eq. 1)

Each is a proximal step behind the step of the optimizer (Parikh and Boyd 2014, "Proximal algorithms", section 6.5):
weights are multiplied by a factor a channel, whatever the optimizer is, its momentum, and what it clips.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpd.coupling.comb import Comb
from cpd.criteria.gates import Gates
from cpd.errors import InputError
from cpd.model.tensors import named_tensors

GROUP_LASSO, GROWING, BATCHNORM = "group-lasso", "growing", "batchnorm"
#: Kind -> the strength that is usual: in a unit of learning rate, the share of the mean norm of its group that a
#: channel loses; of `growing` the weight decay that the least channel has in the end.
STRENGTHS = {GROUP_LASSO: 0.05, GROWING: 1.0, BATCHNORM: 0.05}
#: How steeply the weight decay of `growing` rises with the share of larger channels: alpha of Fang et al. 2023.
STEEP = 4.0


@dataclass(frozen=True)
class Penalty:
    """What is penalised, and how much.

    Attributes:
        kind: one of `STRENGTHS`.
        strength: in units that are the same for all sizes of weights; None: what is usual.
    """

    kind: str
    strength: float | None = None

    @property
    def value(self) -> float:
        """The strength."""
        return STRENGTHS[self.kind] if self.strength is None else self.strength


class Regularizer:
    """The penalty on the channels of the open groups of a comb.

    Args:
        comb: the comb of the model that is trained, at its present widths.
        penalty: what is penalised.
        leave_out: groups that are not, since none of their channels will go.

    Raises:
        InputError: if there is nothing of the kind in those groups.
    """

    def __init__(self, comb: Comb, penalty: Penalty, leave_out: Collection[str] = ()) -> None:
        self.penalty = penalty
        gates = Gates(comb, everywhere=True)
        gates.sites = [site for site in gates.sites if site.group not in leave_out]
        if penalty.kind == BATCHNORM:
            names = {
                f"{path}.weight".removeprefix(".")
                for path, module in comb.model.named_modules()
                if isinstance(module, _BatchNorm) and module.affine
            }
            gates.sites = [site for site in gates.sites if site.tensor in names]
        if not gates.sites:
            what = "BatchNorm of a group" if penalty.kind == BATCHNORM else "group"
            raise InputError(
                f"regularization={penalty.kind!r} has nothing to work on: there is no {what} that may become narrower."
            )
        self._gates = gates

    @torch.no_grad()
    def step(self, model: nn.Module, lr: float, time: float) -> None:
        """Let the channels become smaller, in place.

        Args:
            model: that is trained.
            lr: the learning rate of the step that the optimizer has just taken.
            time: how much of the way to the last shrink is behind, from 0 to 1.
        """
        weights = named_tensors(model)
        squares = self._gates.reduce(lambda name: weights[name].detach().square())
        if self.penalty.kind == BATCHNORM:
            factors = [self._factor(value.sqrt(), lr, time) for value in squares]
        else:
            whole = {name: self._factor(value.sqrt(), lr, time) for name, value in self._gates.sum(squares).items()}
            factors = [whole[site.group] for site in self._gates.sites]
        for name, value in self._gates.multiply(weights, factors).items():
            weights[name].copy_(value)

    def _factor(self, norms: Tensor, lr: float, time: float) -> Tensor:
        """What the channels of norms [size of a group] are multiplied by."""
        if self.penalty.kind == GROWING:
            place = norms.argsort(descending=True).argsort().to(norms)  # how many channels are larger
            larger = place / max(len(norms) - 1, 1)
            small = (2 ** (STEEP * larger) - 1) / (2**STEEP - 1)
            return 1 / (1 + lr * self.penalty.value * time * small)
        return (1 - lr * self.penalty.value * norms.mean() / norms.clamp_min(1e-30)).clamp_min(0)
