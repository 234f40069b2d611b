"""Ratios: how many weights of each layer are zero, and which.

Shares of the whole are shares of all weights that can be sparse, those of layers that are decided on by name included.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cpd.errors import InputError, some
from cpd.sparsity.patterns import Layer, Pattern, Units, lowest, split

ERK, LAMP = "erk", "lamp"
#: Steps of a bisection.
STEPS = 60
#: Names in a message.
NAMED = 5


@runtime_checkable
class Curves(Protocol):
    """What a `cpd.Sensitivity` tells: of each group the error at several ratios."""

    @property
    def by_group(self) -> Mapping[str, Iterable[object]]:
        """The points of each group, the least that went first."""


Ratios = Mapping[str, float] | str | Curves


def lamp(scores: Tensor) -> Tensor:
    """Each score over the sum of those that are no smaller (Lee et al. 2021, arXiv 2010.07611, eq. 5)."""
    order = torch.argsort(scores, descending=True, stable=True)
    found = torch.empty_like(scores)
    found[order] = scores[order] / scores[order].cumsum(0).clamp_min(1e-30)
    return found


def erk(layers: Mapping[str, Layer], zeros: float, most: float) -> dict[str, float]:
    """The share of zeros of each layer by the Erdos-Renyi kernel rule (Evci et al. 2020, arXiv 1911.11134, sec. 3).

    A layer's density goes with the sum of its dimensions over their product; where that is above 1, it stays dense, and
    the others make up for it.

    Args:
        layers: the layers.
        zeros: of all their weights.
        most: the largest share of a layer.
    """
    numbers = {name: layer.weight.numel() for name, layer in layers.items()}
    raw = {name: sum(layer.weight.shape) / layer.weight.numel() for name, layer in layers.items()}

    def shares(factor: float) -> dict[str, float]:
        return {name: min(most, max(0.0, 1 - factor * raw[name])) for name in layers}

    low, high = 0.0, 1 / min(raw.values(), default=1.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        over = sum(share * numbers[name] for name, share in shares(middle).items()) > zeros
        low, high = (middle, high) if over else (low, middle)
    return shares(high)


def by_sensitivity(curves: Curves, layers: Mapping[str, Layer], zeros: float, most: float) -> dict[str, float]:
    """The shares at which every layer's error alone is the same, so that they come to so many zeros.

    Layers of no group have the share of the whole. (Han et al. 2015, arXiv 1506.02626, section 3.1, choose shares so.)
    """
    found = {name: points for name in layers if (points := _points(curves, name))}
    if not found:
        raise InputError(
            f"ratios: no group of this Sensitivity ({some(curves.by_group, NAMED)}) has the name of a layer of the "
            "model: pass the Sensitivity of the same model."
        )
    whole = zeros / max(1, sum(layer.weight.numel() for layer in layers.values()))

    def shares(error: float) -> dict[str, float]:
        return {
            name: min(most, _reached(found[name], error) if name in found else whole) for name in layers
        }  # fmt: skip

    low, high = 0.0, max(error for points in found.values() for _, error in points)
    for _ in range(STEPS):
        middle = (low + high) / 2
        less = sum(share * layers[name].weight.numel() for name, share in shares(middle).items()) < zeros
        low, high = (middle, high) if less else (low, middle)
    return shares(high)


def _points(curves: Curves, layer: str) -> list[tuple[float, float]]:
    """(ratio, error) of the group that a layer gives, from (0, 0) on, the error never falling."""
    module, found, highest = layer.rpartition(".")[0], [(0.0, 0.0)], 0.0
    for group, points in curves.by_group.items():
        if group.partition("#")[0].partition("[")[0] == module:
            for point in points:
                highest = max(highest, float(point.error))  # type: ignore[attr-defined]
                found.append((float(point.ratio), highest))  # type: ignore[attr-defined]
            return [*found, (1.0, max(highest * 2, 1e-12))]
    return []


def _reached(points: list[tuple[float, float]], error: float) -> float:
    """The largest ratio at which a curve is not above an error, between its points along a line."""
    for (ratio, before), (next_ratio, after) in pairwise(points):
        if after > error:
            return ratio + (next_ratio - ratio) * (error - before) / max(after - before, 1e-30)
    return points[-1][0]


def named_shares(ratios: Mapping[str, float], layers: Mapping[str, Layer]) -> dict[str, float]:
    """The share of each layer that is decided on, by shell patterns of the names of parameters or modules.

    Raises:
        InputError: a pattern that names no layer.
    """
    found = dict[str, float]()
    for pattern, share in ratios.items():
        names = [
            name
            for name in layers
            if any(fnmatch.fnmatchcase(form, pattern) for form in (name, name.rpartition(".")[0]))
        ]
        if not names:
            raise InputError(
                f"ratios: {pattern!r} matches no layer that can be sparse; these are {some(layers, NAMED)}."
            )
        found.update(dict.fromkeys(names, float(share)))
    return found


def select(
    layers: Mapping[str, Layer],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float | None,
    *,
    scope: str = "global",
    ratios: Ratios | None = None,
    most: float = 1.0,
) -> dict[str, Tensor]:
    """Which weights stay, bool of each weight's shape, those of the lowest scores going first.

    Args:
        layers: that can be sparse.
        scores: of each unit of each layer (`Units`), or of each weight for N:M.
        pattern: which weights go together.
        sparsity: the share of zeros; of N:M on the way there, None for that of the pattern.
        scope: "global": scores are compared over all layers; "layer": every layer has the same share.
        ratios: shares by name; "erk"; "lamp"; or a sensitivity. What is not decided on by name makes up for the rest.
        most: the largest share of a layer.

    Raises:
        InputError: if the sparsity cannot be reached.
    """
    if pattern.runs is not None:
        fixed = named_shares(ratios, layers) if isinstance(ratios, Mapping) else {}
        return {name: pattern.of_runs(layers[name], scores[name], sparsity) for name in layers if fixed.get(name) != 0}
    assert sparsity is not None
    units = {name: pattern.units(layer) for name, layer in layers.items()}
    fixed = named_shares(ratios, layers) if isinstance(ratios, Mapping) else {}
    free = {name: layer for name, layer in layers.items() if name not in fixed}
    total = sum(layer.weight.numel() for layer in layers.values())
    zeros = round(sparsity * total) - sum(round(share * layers[name].weight.numel()) for name, share in fixed.items())
    room = sum(int(most * layer.weight.numel()) for layer in free.values())
    if not 0 <= zeros <= room and abs(zeros) > len(fixed):
        raise InputError(
            f"sparsity={sparsity:g} cannot be reached with these ratios and max_ratio={most:g}: the other layers would "
            f"need {zeros:,} zeros among {sum(layer.weight.numel() for layer in free.values()):,} weights."
        )
    zeros = min(max(zeros, 0), room)
    shares = dict(fixed)
    if isinstance(ratios, Curves):
        shares |= by_sensitivity(ratios, free, zeros, most)
    elif ratios == ERK:
        shares |= erk(free, zeros, most)
    elif scope == "layer" and ratios != LAMP and free:
        whole = zeros / sum(layer.weight.numel() for layer in free.values())
        shares |= dict.fromkeys(free, whole)
    kept = {
        name: lowest(scores[name], units[name].sizes, round(share * layers[name].weight.numel()))
        for name, share in shares.items()
    }
    together = {name: units[name] for name in layers if name not in kept}
    if together:
        kept |= _together(together, scores, zeros, most, by_lamp=ratios == LAMP)
    return {name: units[name].spread(kept[name]) for name in layers}


def _together(
    units: Mapping[str, Units], scores: Mapping[str, Tensor], zeros: int, most: float, *, by_lamp: bool
) -> dict[str, Tensor]:
    """Scores compared over all layers; of each the best stay that it must keep."""
    compared = []
    for name, item in units.items():
        found = lamp(scores[name]) if by_lamp else scores[name].clone()
        order = torch.argsort(found, descending=True, stable=True)
        must = item.layer.weight.numel() - int(most * item.layer.weight.numel())
        before = torch.cumsum(item.sizes.to(order.device)[order], 0) - item.sizes.to(order.device)[order]
        found[order[before < must]] = torch.inf
        compared.append(found)
    sizes = torch.cat([item.sizes for item in units.values()])
    return split(lowest(torch.cat(compared), sizes, zeros), units)
