"""Patterns: which weights of a layer are zero together.

A pattern takes a weight apart into units, each of which stays or goes as a whole:

unstructured   every weight is a unit
RxC            blocks of R outputs by C inputs of the layer as a matrix [outputs, inputs x kernel]; 1x3 is a row of a
               3x3 kernel, 4x1 the same weight of four channels
kernel         the kernel of one output and one input channel
N:M            every weight is a unit, and of each M that follow one another along the input channels N stay
channel        the channels of the comb's groups, in every layer that they run through

Of the layers alone that are convolutions, linear, or the projections of attention; embeddings, norms and biases stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cpd.errors import InputError
from cpd.model.masks import masked_weights

UNSTRUCTURED, KERNEL, CHANNEL = "unstructured", "kernel", "channel"
#: What a pattern may be, in words.
FORMS = "unstructured, N:M (as 2:4), RxC (as 1x3 or 4x1), kernel, or channel"
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """The weight of a layer that can be sparse.

    Attributes:
        name: of the parameter.
        weight: the parameter, [outputs, inputs, *kernel]; of a transposed convolution [inputs, outputs, *kernel].
        transposed: whether it is of one.
    """

    name: str
    weight: Tensor
    transposed: bool = False

    def forward(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs, kernel]."""
        found = tensor.transpose(0, 1) if self.transposed else tensor
        return found.reshape(*found.shape[:2], -1)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of `forward`."""
        shape = self.weight.shape
        if self.transposed:
            return tensor.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()
        return tensor.reshape(shape)


def prunable(model: nn.Module) -> dict[str, Layer]:
    """The layers whose weights can be sparse, by the name of the parameter, in the order of the modules; each once."""
    masked = {(id(module), name): full for full, (module, name) in masked_weights(model).items()}
    found, seen = dict[str, Layer](), set[int]()
    for path, module in model.named_modules():
        for name in _names(module):
            own = masked.get((id(module), name), f"{path}.{name}".removeprefix("."))
            weight = module._parameters.get(own.rpartition(".")[2])
            if weight is not None and id(weight) not in seen and weight.is_floating_point():
                seen.add(id(weight))
                found[own] = Layer(own, weight, bool(getattr(module, "transposed", False)))
    return found


def _names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's weights that are matrices or kernels."""
    if isinstance(module, (nn.Linear, _ConvNd)):
        return ("weight",)
    return _PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ()


@dataclass(frozen=True)
class Pattern:
    """Which weights are zero together; `Pattern.of` reads its name.

    Attributes:
        name: as users give it.
        block: outputs and inputs of a unit; None: those of a kernel.
        runs: of N:M, how many stay of how many.
    """

    name: str
    block: tuple[int, int] | None = (1, 1)
    runs: tuple[int, int] | None = None

    @staticmethod
    def of(name: str) -> Pattern:
        """The pattern of a name.

        Raises:
            InputError: if it is none.
        """
        text = str(name).strip().lower()
        if text in (UNSTRUCTURED, CHANNEL):
            return Pattern(text)
        if text == KERNEL:
            return Pattern(text, None)
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if found is not None and len(text) <= 16:
            first, second = int(found[1]), int(found[3])
            if found[2] == "x" and first and second:
                return Pattern(text, (first, second))
            if found[2] == ":" and 0 < first < second:
                return Pattern(text, (1, 1), (first, second))
        raise InputError(f"pattern must be {FORMS}; got {name!r}.")

    @property
    def share(self) -> float | None:
        """The share of zeros that the pattern itself says; None where it is free."""
        return None if self.runs is None else 1 - self.runs[0] / self.runs[1]

    def fits(self, layer: Layer) -> bool:
        """Whether the pattern can be laid on a layer: of N:M, whether M divides its input channels."""
        return self.runs is None or layer.forward(layer.weight).shape[1] % self.runs[1] == 0

    def units(self, layer: Layer) -> Units:
        """The units of a layer."""
        return Units(layer, self.block)

    def of_runs(self, layer: Layer, scores: Tensor, share: float | None = None) -> Tensor:
        """What stays of a layer where N of each M stay, those of the highest scores; bool of the weight's shape.

        Args:
            layer: the layer.
            scores: of its weights.
            share: of zeros, on the way to N of M; None: that of the pattern.
        """
        assert self.runs is not None
        stay, length = self.runs
        stay = stay if share is None else max(stay, round((1 - share) * length))
        rows = layer.forward(scores).transpose(1, 2)  # the input channels innermost
        runs = rows.reshape(*rows.shape[:2], -1, length)
        order = torch.argsort(runs, dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., :stay], True)
        return layer.back(kept.reshape(rows.shape).transpose(1, 2))


@dataclass(frozen=True)
class Units:
    """A weight taken apart into blocks; those at an edge may be smaller.

    Attributes:
        layer: whose weight it is.
        block: outputs by inputs of one; None: the kernel of one output and one input channel.
    """

    layer: Layer
    block: tuple[int, int] | None

    @cached_property
    def sizes(self) -> Tensor:
        """How many weights each unit has, [units]."""
        return self._fold(torch.ones(self.layer.weight.shape)).sum(1).long()

    def sums(self, values: Tensor) -> Tensor:
        """The sum of values of the weight's shape over each unit, [units], float64."""
        return self._fold(values.double()).sum(1)

    def spread(self, kept: Tensor) -> Tensor:
        """One value a unit as a tensor of the weight's shape."""
        outputs, inputs, kernel = self.layer.forward(self.layer.weight).shape
        if self.block == (1, 1):
            return self.layer.back(kept)
        if self.block is None:
            return self.layer.back(kept.reshape(outputs, inputs, 1).expand(outputs, inputs, kernel))
        rows, columns = self.block
        down, across = -(-outputs // rows), -(-inputs * kernel // columns)
        whole = kept.reshape(down, 1, across, 1).expand(down, rows, across, columns)
        return self.layer.back(whole.reshape(down * rows, -1)[:outputs, : inputs * kernel])

    def _fold(self, values: Tensor) -> Tensor:
        """[units, weights of one], zeros where a unit at the edge has none."""
        found = self.layer.forward(values)
        if self.block == (1, 1):
            return found.reshape(-1, 1)
        if self.block is None:
            return found.flatten(0, 1)
        rows, columns = self.block
        matrix = found.flatten(1)
        outputs, inputs = matrix.shape
        matrix = F.pad(matrix, (0, -inputs % columns, 0, -outputs % rows))
        blocks = matrix.reshape(len(matrix) // rows, rows, -1, columns).transpose(1, 2)
        return blocks.reshape(-1, rows * columns)


def lowest(scores: Tensor, sizes: Tensor, zeros: int) -> Tensor:
    """Which units stay where those of the lowest scores go until about so many weights are zero; bool [units].

    As many go as bring the number nearest to what is asked: exactly there where units are single weights. Of equal
    scores the first in order go.
    """
    order = torch.argsort(scores, stable=True)
    gone = torch.cumsum(sizes.to(order.device)[order], 0)
    count = int(torch.searchsorted(gone, zeros, right=True))
    before = int(gone[count - 1]) if count else 0
    if count < len(gone) and int(gone[count]) - zeros < zeros - before:
        count += 1
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = False
    return kept


def split(values: Tensor, units: Mapping[str, Units]) -> dict[str, Tensor]:
    """Values of the units of several layers, one after the other, as each layer's."""
    return dict(zip(units, values.split([len(item.sizes) for item in units.values()]), strict=True))
