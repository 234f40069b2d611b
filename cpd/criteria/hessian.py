"""CPD's criterion: the curvature of the loss in the gates (Schmitt et al., arXiv 2408.03046).

H is the Hessian of the loss in the gates. It is never formed: for v ~ N(0, I) the product
`H v ~ (grad L(m + eps v) - grad L(m)) / eps` takes one more backward pass. Two readings of the paper:

- *frobenius*: E[(H v)_u^2] is the u-th row's share of ||H||_F^2, the sum of the squared eigenvalues;
- *trace*: E[v_u (H v)_u] = H_uu, the curvature along one gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Gates, parameters_of
from cpd.criteria.reliability import Means
from cpd.model.inputs import Batch
from cpd.options import checked

#: How far the gates, which are 1, move at least. Networks of ReLUs have a gradient that jumps: over a short step the
#: difference is a few jumps divided by next to nothing (its square grows as 1 / step). A step that crosses many
#: averages them, and closing a gate is a step of 1.
STEP = 0.03
#: Rounding errors of a gradient that went through many layers, in units of the dtype's, and the longest step.
NOISE, LONGEST = 100.0, 0.1


def epsilon(dtype: torch.dtype) -> float:
    """The step of the difference, relative to the gates and to the deviation of v, which are 1.

    In low precision the square root of the gradient's relative rounding error, where that and truncation are alike
    (Nocedal and Wright, Numerical Optimization, section 8.1).
    """
    return min(LONGEST, max(STEP, math.sqrt(NOISE * torch.finfo(dtype).eps)))


@checked(setting=SETTING)
def frobenius(setting: Setting) -> dict[str, Tensor]:
    """E[(H v)_u^2] for every gate u."""
    return _expectation(setting, lambda v, product: product.square(), lambda score: score)


@checked(setting=SETTING)
def trace(setting: Setting) -> dict[str, Tensor]:
    """|E[v_u (H v)_u]| = |H_uu| for every gate u."""
    return _expectation(setting, lambda v, product: v * product, Tensor.abs)


def _expectation(
    setting: Setting, reading: Callable[[Tensor, Tensor], Tensor], last: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean of `reading(v, H v)` over batches and random vectors, summed over each group's gates, `last` of it."""
    gates, step = Gates(setting.comb), epsilon(setting.dtype)
    wide = torch.promote_types(torch.float32, setting.dtype)
    generator = torch.Generator().manual_seed(setting.seed)
    means = Means("batches")
    for batch in setting.batches():
        base = setting.gate_gradients(gates, batch)
        sums = [torch.zeros_like(gradient) for gradient in base]
        for _ in range(setting.probes):
            v = [torch.randn(site.size, generator=generator).to(setting.device, wide) for site in gates.sites]
            moved = _gradients_at(setting, gates, batch, [1 + step * value for value in v])
            for index, value in enumerate(sums):
                value += reading(v[index], (moved[index] - base[index]) / step)
        means.add([value / setting.probes for value in sums])
    return means.scores(setting, lambda found: {name: last(score) for name, score in gates.sum(found).items()})


def _gradients_at(setting: Setting, gates: Gates, batch: Batch, at: list[Tensor]) -> list[Tensor]:
    """The gradient in the gates at another point; the weights are put back whatever happens."""
    named = dict(setting.model.named_parameters())
    before = parameters_of(setting.model)
    try:
        for name, value in gates.multiply(before, at).items():
            named[name].data = value
        found = setting.gate_gradients(gates, batch)
    finally:
        for name, parameter in named.items():
            parameter.data = before[name]
    return [gradient / gate for gradient, gate in zip(found, at, strict=True)]
