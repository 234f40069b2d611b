"""Small modules written as a function, and the check that shrinking what their combs call prunable is sound."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpd.coupling.comb import Comb
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.zoo import comb, conv, dense, random_plan, relative_error, zeroed


def random(*shape: int) -> Tensor:
    """The same random numbers for the same shape, in float64."""
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))


MAP, TOKENS = random(2, 3, 8, 8), random(2, 5, 12)


class Sketch(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Tensor], **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def checked(model: nn.Module, *inputs: Tensor, batched: bool = True, train: bool = False) -> Comb:
    """The comb of a model whose open groups have been shrunk at two depths, and found equal to their oracles.

    Args:
        model: the model; made dense in place.
        inputs: what it is combed on.
        batched: the inputs' first dimension is the batch, and the model treats its entries alike.
        train: the shrunk model also takes a training step.
    """
    model = dense(model)
    combed = comb(model, *inputs)
    for share in (0.3, 0.6):
        plan = random_plan(combed, share, at_least=1)
        assert bool(plan.kept) == bool(combed.open)
        shrunk = shrink(copy.deepcopy(model), plan)
        assert masked_error(model, shrunk, combed, plan) <= 1e-9
        exact = random_plan(combed, share, at_least=1, exact=True)
        narrow = shrink(copy.deepcopy(model), exact)
        with torch.no_grad():
            assert relative_error(narrow(*inputs), zeroed(model, exact)(*inputs)) <= 1e-9
        if batched:
            longer = [torch.cat([x, x.flip(0)[:1]]) for x in inputs]
            with torch.no_grad():
                assert relative_error(shrunk(*longer)[: len(inputs[0])], shrunk(*inputs)) <= 1e-9
    if train:
        train_step(shrunk, *inputs)
    return combed


def train_step(model: nn.Module, *inputs: Tensor) -> None:
    """One step of SGD: every parameter gets a finite gradient, and every weight moves."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(*inputs).square().mean().backward()
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert torch.isfinite(parameter).all()
        assert parameter.dim() < 2 or not torch.equal(old, parameter)  # the bias of a key has no gradient


def sketch(function: Callable[..., Tensor], x: Tensor = MAP, **attributes: object) -> Comb:
    """The checked comb of a sketch."""
    return checked(Sketch(function, **attributes), x)


def between(mix: Callable[[Tensor], Tensor], outputs: int = 8, x: Tensor = MAP, **attributes: object) -> Comb:
    """The checked comb of an op between two convolutions, the first of 8 channels, the second reading `outputs`."""
    return sketch(lambda self, x: self.out(mix(self.a(x))), x, a=conv(3, 8), out=conv(outputs, 5), **attributes)
