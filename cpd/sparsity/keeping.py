"""Keeping: what becomes of the weights under a mask from step to step.

Without regrowth, and for RigL, they are zero and have no gradient. For network surgery (Guo et al. 2016, arXiv
1608.04493) the dense weights are kept beside the model: it runs masked, and each step is taken on the dense ones with
the gradient of the masked run. For soft pruning (He et al. 2018, arXiv 1808.06866) weights are set to zero at each
change and go on being trained, until the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cpd.sparsity.masks import Masks


class Keeper:
    """Hooks on an optimizer that keep masks on a model.

    Args:
        model: the model.
        regrow: how weights come back; None: they do not.

    Attributes:
        watching: whether the gradients of the next step are wanted before they are masked.
        gradients: those, by the name of the parameter.
    """

    def __init__(self, model: nn.Module, regrow: str | None) -> None:
        self.model, self.regrow = model, regrow
        self.optimizer: torch.optim.Optimizer | None = None
        self.watching = False
        self.gradients: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._gone: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._shadow: dict[str, Tensor] | None = None
        self._inside = False

    def attach(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Take another optimizer."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer = optimizer
        self._hooks = [] if optimizer is None else [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]  # fmt: skip

    def take(self, masks: Masks, *, last: bool) -> None:
        """Keep these masks from now on; the weights are masked, and what comes back starts anew.

        Args:
            masks: the masks.
            last: whether they change no more.
        """
        before, self._gone = self._gone, {}
        pairs = zip(masks.kept, masks.pairs(self.model), strict=True)
        every = {name: (parameter, ~mask) for name, (parameter, mask) in pairs}
        for name, (parameter, gone) in every.items():
            if name in before and self.optimizer is not None and self.regrow == "rigl":
                _forget(self.optimizer, parameter, before[name][1] & ~gone)
        if self.regrow == "splice" and not last:
            self._shadow = {name: parameter.detach().clone() for name, (parameter, _) in every.items()}
        else:
            self._shadow = None
        if self.regrow != "soft" or last:
            self._gone = every
        with torch.no_grad():
            for parameter, gone in every.values():
                parameter.masked_fill_(gone, 0)
        self.gradients, self.watching = {}, False

    def restore(self, masks: Masks | None, dense: Mapping[str, Tensor], *, last: bool) -> None:
        """Go on from what was written down; the weights of the model are left to others."""
        self._gone, self._shadow = {}, None
        if masks is not None and (self.regrow != "soft" or last):
            pairs = zip(masks.kept, masks.pairs(self.model), strict=True)
            self._gone = {name: (parameter, ~mask) for name, (parameter, mask) in pairs}
        if dense:
            self._shadow = {name: tensor.to(self._gone[name][0].device) for name, tensor in dense.items()}

    def dense(self) -> dict[str, Tensor]:
        """The dense weights beside the model, where there are any."""
        return {name: tensor.clone() for name, tensor in (self._shadow or {}).items()}

    # ------------------------------------------------------------------------------ each step

    def before_step(self) -> None:
        """Note the gradients where they are wanted, and mask them."""
        if self._shadow is not None:
            return
        for name, (parameter, gone) in self._gone.items():
            if parameter.grad is not None:
                if self.watching and self.regrow == "rigl" and name not in self.gradients:
                    self.gradients[name] = parameter.grad.detach().abs().float()
                parameter.grad.masked_fill_(gone, 0)

    def _before(self) -> None:
        self.before_step()
        self.show_dense()

    @torch.no_grad()
    def _after(self) -> None:
        for name, (parameter, gone) in self._gone.items():
            if self._shadow is not None:
                self._shadow[name].copy_(parameter)
            parameter.masked_fill_(gone, 0)

    @torch.no_grad()
    def show_dense(self) -> None:
        """Put the dense weights into the model."""
        for name, value in (self._shadow or {}).items():
            self._gone[name][0].copy_(value)

    @contextmanager
    def weighed(self, masks: Masks | None, scale: float) -> Iterator[None]:
        """Within this block what has gone is smaller by a factor: it comes back only if it is clearly larger."""
        if masks is None or scale == 1.0 or self._shadow is None:
            yield
            return
        kept = [(parameter, parameter.detach().clone(), gone) for parameter, gone in self._gone.values()]
        with torch.no_grad():
            for parameter, _, gone in kept:
                parameter[gone] /= scale
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, _ in kept:
                    parameter.copy_(value)


def _forget(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, which: Tensor) -> None:
    """Set what an optimizer keeps of some entries of a parameter to zero: momentum, moments."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(which, 0)
