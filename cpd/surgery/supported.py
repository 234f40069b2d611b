"""Least squares with a support: every output is a combination of its own inputs alone, the others of its weights zero.

Each row of the solution is that of its own, smaller system: the rows and columns of the normal equations A that its
support names. They are solved directly, many rows at a time. Where fewer entries are zero than not, what is solved is
the system of those that are zero: with x the solution without a support, x - y inverse(A), y so that it is zero there.
Where either would take long (wide layers), all rows are solved together by conjugate gradients, one product with A an
iteration (Hestenes and Stiefel 1952), preconditioned by the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Iterations of conjugate gradients at most, and the residual at which they end, relative to the right side.
ITERATIONS, RESIDUAL = 100, 1e-5
#: Numbers in the systems that are solved at a time.
NUMBERS = 2**23


def solve_on(support: Tensor, xx: Tensor, cross: Tensor) -> Tensor:
    """The matrices C, zero off their support, for which (C xx - cross) is zero on it: each row by itself.

    Args:
        support: which entries may differ from zero, bool [groups, outputs, features].
        xx: positive definite, [groups, features, features].
        cross: [groups, outputs, features].
    """
    features, counts = support.shape[-1], support.sum(-1).double()
    by_zeros = bool(counts.mean() > features / 2)
    directly = float((features - counts if by_zeros else counts).pow(3).sum()) / 3
    if directly > 2.0 * ITERATIONS * features**2 * counts.numel():
        return _by_gradients(support, xx, cross)
    return _by_zeros(support, xx, cross) if by_zeros else _directly(support, xx, cross)


def solve_positive(systems: Tensor, right: Tensor) -> Tensor:
    """The solutions of positive definite systems [count, n, n] with right sides [count, n, m], [count, n, m]."""
    factor, failed = torch.linalg.cholesky_ex(systems)
    if bool(failed.any()):  # rounding has left one a little short of positive
        solved: Tensor = torch.linalg.solve(systems, right)
        return solved
    return torch.cholesky_solve(right, factor)


def _by_zeros(support: Tensor, xx: Tensor, cross: Tensor) -> Tensor:
    """Row by row, by the systems of the entries that are to be zero."""
    inverse: Tensor = torch.linalg.inv(xx)
    whole = cross @ inverse
    found: Tensor = (whole - _directly(~support, inverse, whole) @ inverse) * support
    return found


def _directly(support: Tensor, xx: Tensor, cross: Tensor) -> Tensor:
    """Row by row, those with about as many inputs together."""
    groups, outputs, features = support.shape
    rows, found = support.reshape(-1, features), torch.zeros_like(cross).reshape(-1, features)
    wanted, counts = cross.reshape(-1, features), rows.sum(1)
    order, start = torch.argsort(counts, descending=True, stable=True), 0
    while start < len(order) and (most := int(counts[order[start]])):
        at = order[start : start + max(1, NUMBERS // most**2)]
        at = at[counts[at] * 4 >= most * 3]
        start += len(at)
        inputs = torch.argsort(rows[at], dim=1, descending=True, stable=True)[:, :most]
        inside = torch.arange(most, device=rows.device) < counts[at, None]
        system = xx[(at // outputs)[:, None, None], inputs[:, :, None], inputs[:, None, :]]
        if int(counts[at[-1]]) < most:
            system = torch.where(inside[:, :, None] & inside[:, None, :], system, 0)
            system.diagonal(dim1=1, dim2=2).add_(~inside)
        right = torch.where(inside, wanted[at].gather(1, inputs), 0)
        found[at] = found[at].scatter_add(1, inputs, solve_positive(system, right.unsqueeze(-1)).squeeze(-1))
    return found.reshape(groups, outputs, features)


def _by_gradients(support: Tensor, xx: Tensor, cross: Tensor) -> Tensor:
    """All rows together, by preconditioned conjugate gradients."""
    scale = 1 / xx.diagonal(dim1=1, dim2=2).clamp_min(1e-30).unsqueeze(1)
    found, left = torch.zeros_like(cross), cross * support
    least = RESIDUAL * left.norm(dim=-1, keepdim=True)
    direction = scaled = left * scale
    size = (left * scaled).sum(-1, keepdim=True)
    for _ in range(ITERATIONS):
        if bool((left.norm(dim=-1, keepdim=True) <= least).all()):
            break
        along = (direction @ xx) * support
        step = size / (direction * along).sum(-1, keepdim=True).clamp_min(1e-300)
        found, left = found + step * direction, left - step * along
        scaled = left * scale
        size, before = (left * scaled).sum(-1, keepdim=True), size
        direction = scaled + size / before.clamp_min(1e-300) * direction
    return found
