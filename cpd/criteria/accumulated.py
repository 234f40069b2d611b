"""Scores read off the gradients of a training, at no cost: no pass of their own over any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpd.coupling.comb import Comb
from cpd.criteria.gates import Gates
from cpd.model.tensors import named_tensors


class AccumulatedScores:
    """(dL/dm_u)^2 averaged over the steps of a training, as `cpd.criteria.first_order.taylor` averages over batches.

    Args:
        comb: the comb of the model that is trained, at its present widths.
    """

    def __init__(self, comb: Comb) -> None:
        self._gates = Gates(comb)
        self._sums = [torch.zeros(site.size) for site in self._gates.sites]
        self._count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Add what the gradients say that the last step has left in `parameter.grad`."""
        weights = named_tensors(model)
        found = self._gates.reduce(lambda name: None if (g := weights[name].grad) is None else g * weights[name])
        self._sums = [sums.to(value.device) + value.square() for sums, value in zip(self._sums, found, strict=True)]
        self._count += 1

    def scores(self) -> dict[str, Tensor] | None:
        """{group: Tensor[size]}; None where no step has been seen yet."""
        return self._gates.sum([sums / self._count for sums in self._sums]) if self._count else None

    def state_dict(self) -> dict[str, Any]:
        """The sums, as a checkpoint holds them."""
        return {"sums": list(self._sums), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums, self._count = list(state["sums"]), int(state["count"])
