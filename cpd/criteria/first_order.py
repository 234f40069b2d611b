"""First order in the gates: Taylor expansion (arXiv 1906.10771) and connection sensitivity (SNIP, arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Gates
from cpd.criteria.reliability import Means
from cpd.options import checked


@checked(setting=SETTING)
def taylor(setting: Setting) -> dict[str, Tensor]:
    """The mean over batches of (dL/dm_u)^2: the squared change of the loss when gate u closes, to first order.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8.
    """
    return _mean(setting, Tensor.square, lambda mean: mean)


@checked(setting=SETTING)
def snip(setting: Setting) -> dict[str, Tensor]:
    """|mean over batches of dL/dm_u|: Lee et al. 2019, eq. 5, of a gate on a channel rather than on a weight."""
    return _mean(setting, lambda gradient: gradient, Tensor.abs)


def _mean(setting: Setting, each: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A function of the gates' gradients averaged over batches, another of the average, summed over each group."""
    gates = Gates(setting.comb)
    means = Means("batches")
    for batch in setting.batches():
        means.add([each(gradient) for gradient in setting.gate_gradients(gates, batch)])
    return means.scores(setting, lambda found: gates.sum([last(mean) for mean in found]))
