"""The closed form: weights that stay are refitted, by least squares, to what the layers of the dense model gave.

Where most weights go, they go in stages, each of which is refitted before the next is chosen: what is left has taken
over by then what went, and its magnitude tells more than that of the dense weights. That is so within a layer: a refit
changes the scale of whole layers, which a norm behind them may undo, so their magnitudes are compared half-way between
the scale that they had and that of the refit. The last stage is refitted in several ways, of which held-out samples
choose (`cpd.surgery.recovery`). No gradient step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cpd.errors import InputError
from cpd.model.progress import part
from cpd.plan import Plan
from cpd.sparsity.masks import Masks
from cpd.surgery.calibration import Calibration
from cpd.surgery.compensation import Refit, refit
from cpd.surgery.recovery import Recovery, recover

#: The share of the weights that a stage leaves, of those that there were before it, at least.
LEAVING = 0.6
#: Samples that a stage before the last is refitted on.
SAMPLES = 256
#: What is kept of the shape of a model by masks: all.
WHOLE = Plan({}, {}, {})


def stages(before: float, after: float) -> list[float]:
    """The shares of zeros that lie on the way from one to another, the last included.

    Args:
        before: the share of zeros there is.
        after: the share there is to be.
    """
    dense, left = 1 - before, max(1 - after, 1e-6)
    count = max(1, math.ceil(math.log(left / dense) / math.log(LEAVING) - 1e-9)) if left < dense else 1
    return [1 - dense * (left / dense) ** (step / count) for step in range(1, count)] + [after]


@contextmanager
@torch.no_grad()
def _at_scale(model: nn.Module, dense: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this block the norm of each weight is half-way to that which the dense one has where it is not zero."""
    kept = {name: parameter for name, parameter in model.named_parameters() if name in dense}
    before = {name: parameter.clone() for name, parameter in kept.items()}
    try:
        for name, parameter in kept.items():
            norm = (dense[name] * (parameter != 0)).norm()
            parameter.mul_((norm / parameter.norm().clamp_min(1e-30)).sqrt())
        yield
    finally:
        for name, parameter in kept.items():
            parameter.copy_(before[name])


def sparsified(
    model: nn.Module,
    calibration: Calibration,
    choose: Callable[[nn.Module, float], Masks],
    shares: list[float],
    *,
    by_size: bool = True,
) -> tuple[Masks, Recovery]:
    """Make a model sparse, in place, in stages, and refit it after each.

    Args:
        model: the model.
        calibration: the samples, and what the dense model makes of them.
        choose: gives the masks of a model as it is by now, for a share of zeros.
        shares: of the stages.
        by_size: whether `choose` goes by the size of the weights alone, which it then sees at their former scale.

    Returns:
        The masks, and how the last stage was refitted.
    """
    chosen: dict[str, Refit] | None = None  # how much each layer is damped, by the first stage
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    with part("stages", len(shares)) as progress:
        for share in shares[:-1]:
            with _at_scale(model, dense if by_size else {}):
                masks = choose(model, share)
            masks.apply(model)
            if calibration.layers:
                try:
                    done = refit(
                        model, calibration, WHOLE, chosen, norms=True, samples=SAMPLES, support=masks.kept
                    )  # fmt: skip
                except InputError:
                    break  # the last stage says why
                chosen = chosen or done
            progress.advance()
        with _at_scale(model, dense if by_size else {}):
            masks = choose(model, shares[-1])
        masks.apply(model)
        found = recover(model, calibration, WHOLE, masks.kept)
        masks.apply(model)
        progress.advance()
    return masks, found
