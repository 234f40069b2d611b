"""The best of a training: the weights that did best by the user's metric, before it or after one of its epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpd.model.tensors import restore, state_of
from cpd.tasks.metric import told

log = logging.getLogger("cpd")


class Best:
    """The weights that did best by now.

    Attributes:
        epoch: after which one; 0 is before the training, None that none was considered yet.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._metric, self._state = -math.inf, dict[str, Tensor]()

    def consider(self, epoch: int, metric: float, model: nn.Module) -> None:
        """Take the weights of a model for the best if none did better; of equally good ones the later."""
        if self.epoch is None or metric >= self._metric:
            self.epoch, self._metric, self._state = epoch, metric, state_of(model)

    def give(self, model: nn.Module, metric: str) -> None:
        """Give them to a model, and tell it by the metric's name."""
        assert self.epoch is not None
        restore(model, self._state)
        where = f"after epoch {self.epoch}" if self.epoch else "before the training"
        log.debug("The weights %s are kept: %s.", where, told(metric, self._metric))

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `cpd.files.checkpoint` writes it."""
        return {"epoch": self.epoch, "metric": self._metric, "state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self._metric, self._state = state["epoch"], state["metric"], dict(state["state"])
