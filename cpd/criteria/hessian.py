"""CPD's criterion: the curvature of the loss in the gates (Schmitt et al., arXiv 2408.03046).

H is the Hessian of the loss in the gates. It is never formed: for v ~ N(0, I) the product
`H v ~ (grad L(m + eps v) - grad L(m)) / eps` takes one more backward pass. Two readings of the paper:

- *frobenius*: E[(H v)_u^2] is the u-th row's share of ||H||_F^2, the sum of the squared eigenvalues;
- *trace*: E[v_u (H v)_u] = H_uu, the curvature along one gate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpd.criteria.setting import Setting
from cpd.gates import Gates, parameters_of
from cpd.inputs import Batch

#: Relative size of the finite difference: small against the gates (1), large against float32's rounding.
EPSILON = 1e-2


def frobenius(setting: Setting) -> dict[str, Tensor]:
    """E[(H v)_u^2] for every gate u."""
    return _expectation(setting, lambda v, product: product.square())


def trace(setting: Setting) -> dict[str, Tensor]:
    """|E[v_u (H v)_u]| = |H_uu| for every gate u."""
    return {name: score.abs() for name, score in _expectation(setting, lambda v, product: v * product).items()}


def _expectation(setting: Setting, reading: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean of `reading(v, H v)` over batches and random vectors, summed over each group's gates."""
    gates = Gates(setting.comb)
    generator = torch.Generator().manual_seed(setting.seed)
    total = [torch.zeros(site.size, device=setting.device) for site in gates.sites]
    count = 0
    for batch in setting.batches():
        base = setting.gate_gradients(gates, batch)
        for _ in range(setting.probes):
            v = [torch.randn(site.size, generator=generator).to(setting.device) for site in gates.sites]
            moved = _gradients_at(setting, gates, batch, [1 + EPSILON * value for value in v])
            for index, sums in enumerate(total):
                sums += reading(v[index], (moved[index] - base[index]) / EPSILON)
            count += 1
    return gates.sum([sums / count for sums in total])


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
