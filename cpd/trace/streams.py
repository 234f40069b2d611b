"""Streams: layers whose output is added to another value, most often one that the forward has computed before.

The last layer of a residual branch is one: what it gives passes a BatchNorm, a scale, a permutation, and is added to
what the branch has read. They are found from the calls of one forward, whatever modules make them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.model.inputs import Call
from cpd.model.tensors import named_tensors
from cpd.trace.layer_calls import LayerCalls, Step, norm_given, seen

_ADD = ("add", "add_", "__add__", "__iadd__", "__radd__")
_MULTIPLY = ("mul", "mul_", "multiply", "__mul__", "__imul__", "__rmul__")
_SAME = ("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone")
#: What a post-activation network does between two sums.
_ACTIVATIONS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "gelu", "silu", "hardswish", "leaky_relu")
_RESHAPE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")

Scale = tuple[str | None, str | None, float]


@dataclass(frozen=True)
class Stream:
    """How the output of a layer gets to a sum.

    Attributes:
        other: number of the call that gives the other operand; None where that comes after the layer.
        sum: number of the call that adds them.
        follows: the weight of the layer whose sum the other operand is, as it was or through an activation; None where
            it is something else.
        scales: what a channel is multiplied by on the way: names of a weight and of a running variance, each None
            where there is none, and an epsilon; or of neither, and a factor.
        undo: steps that bring a value of the sum's shape to that of the layer's output; they take that too.
    """

    other: int | None
    sum: int
    follows: str | None
    scales: tuple[Scale, ...]
    undo: tuple[Callable[[Tensor, torch.Size], Tensor], ...]

    def at_output(self, value: Tensor, shape: torch.Size) -> Tensor:
        """A value of the sum's shape laid out as the layer's output is."""
        for step in self.undo:
            value = step(value, shape)
        return value

    def laid_out(self, value: Any, shape: torch.Size) -> Tensor | None:
        """The same; None where it is no tensor, or one of another shape then."""
        if not isinstance(value, Tensor):
            return None
        value = self.at_output(value, shape)
        return value if value.shape == shape else None

    def scale(self, tensors: Mapping[str, Tensor], channels: int) -> Tensor:
        """What each channel of the layer's output is multiplied by on its way to the sum, [channels], float64."""
        result = torch.ones(channels, dtype=torch.double)
        for weight, variance, number in self.scales:
            if weight is not None:
                found = tensors[weight].detach().flatten().double().cpu()
                result *= found if variance is not None or len(found) in (1, channels) else torch.nan
            if variance is not None:
                result /= (tensors[variance].double().cpu() + number).sqrt()
            if weight is None and variance is None:
                result *= number
        return result


class _Flow:
    """What the calls of one forward take from one another."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self.steps: list[Step] = []
        self.takes: list[list[int | None]] = []
        self.read = Counter[int]()
        self.latest: dict[int, int] = {}  # the call that last gave or changed a tensor; all are alive in `steps`

    def add(self, step: Step) -> None:
        found = [self.latest.get(id(leaf)) for leaf in tree_leaves((step.args, step.kwargs)) if _is_tensor(leaf)]
        self.read.update(number for number in found if number is not None)
        self.steps.append(step)
        self.takes.append(found)
        changed = step.args[:1] if step.function is Tensor.__setitem__ else (step.output,)
        for leaf in tree_leaves(changed):
            if _is_tensor(leaf):
                self.latest[id(leaf)] = step.number

    def back(self, number: int) -> tuple[Step, Stream] | None:
        """The layer whose output came to be this value, and how; None where it is another kind of value."""
        scales, undo = list[Scale](), list[Callable[[Tensor, torch.Size], Tensor]]()
        while self.read[number] == 1:
            step, taken = self.steps[number], self.takes[number]
            if step.weight is not None:
                return step, Stream(None, -1, None, tuple(scales), tuple(undo))
            name, before = step.function.__name__, taken[0] if taken else None
            if name == "batch_norm":
                given = norm_given(step.args, step.kwargs)
                if given.get("running_var") is None or given.get("training"):
                    return None
                weight = None if given.get("weight") is None else self.names.get(id(given["weight"]))
                scales.append((weight, self.names[id(given["running_var"])], float(given.get("eps", 1e-5))))
            elif name in _MULTIPLY:
                found = self._constant(step)
                if found is None:
                    return None
                before, scale = found
                scales.append(scale)
            elif name in ("permute", "transpose"):
                undo.append(_inverse(step))
            elif name in _RESHAPE and before is not None and self.steps[before].weight is not None:
                undo.append(lambda value, shape: value.reshape(shape))
            elif name not in _SAME:
                return None
            if before is None:
                return None
            number = before
        return None

    def sums(self) -> Iterator[Step]:
        """The calls that add two values of one shape."""
        for step in self.steps:
            operands = [value for value in step.args if _is_tensor(value)]
            if step.function.__name__ not in _ADD or len(operands) != 2 or step.kwargs.get("alpha", 1) != 1:
                continue
            if operands[0].shape == operands[1].shape == step.output.shape:
                yield step

    def through_views(self, number: int) -> int:
        """The same through what only lays a value out in another way."""
        number = self.through_activations(number)
        while self.steps[number].function.__name__ in (*_RESHAPE, "permute", "transpose"):
            before = self.takes[number][0]
            if before is None:
                break
            number = self.through_activations(before)
        return number

    def through_activations(self, number: int) -> int:
        """The call whose result a value is, or is the activation of."""
        while self.steps[number].function.__name__ in (*_ACTIVATIONS, *_SAME) and self.takes[number][0] is not None:
            number = self.takes[number][0] or 0
        return number

    def _constant(self, step: Step) -> tuple[int | None, Scale] | None:
        """The value that a product multiplies by a constant, and the constant; None where there is none."""
        operands = [*step.args, *step.kwargs.values()]
        if len(operands) != 2:
            return None
        for value, constant in (operands, reversed(operands)):
            number = self.latest.get(id(value))
            if number is None:
                continue
            if isinstance(constant, Real):
                return number, (None, None, float(constant))
            name = self._named(constant)
            if name is not None:
                return number, (name, None, 0.0)
        return None

    def _named(self, value: Any) -> str | None:
        """The parameter or buffer that a tensor is, or is another shape of."""
        while id(value) not in self.names:
            number = self.latest.get(id(value))
            if number is None or self.steps[number].function.__name__ not in (*_RESHAPE, "__getitem__"):
                return None
            value = self.steps[number].args[0]
        return self.names[id(value)]


@torch.no_grad()
def streams(model: nn.Module, call: Call) -> dict[str, Stream]:
    """The layers whose output is added to another value, by the name of their weight.

    Args:
        model: in eval mode.
        call: one it runs on; one sample is enough.
    """
    flow, found, sums = _Flow(model), dict[str, Stream](), dict[int, str]()
    with seen(LayerCalls(model, step=flow.add)):
        call.on(model)
    for step in flow.sums():
        numbers = flow.takes[step.number]
        for value, other in (numbers, reversed(numbers)):
            if value is None or other is None:
                continue
            branch = flow.back(value)
            if branch is not None:
                weight, known = str(branch[0].weight), other < branch[0].number
                follows = sums.get(flow.through_activations(other)) if known else None
                found[weight] = replace(branch[1], other=other if known else None, sum=step.number, follows=follows)
                if known or step.number not in sums:
                    sums[step.number] = weight
    return found


@torch.no_grad()
def stages(model: nn.Module, call: Call) -> dict[str, tuple[int, ...]]:
    """The modules that give a stream as it is at the end of each stage: the last of each shape.

    Args:
        model: in eval mode.
        call: one it runs on; one sample is enough.

    Returns:
        {path of the module: shape of what it gives, without the samples}, in the order of the forward.
    """
    flow, given = _Flow(model), dict[int, str]()

    def note(path: str, output: Any) -> None:
        if _is_tensor(output) and path:
            given[id(output)] = path  # the outermost that gives it comes last

    handles = [
        module.register_forward_hook(lambda _, args, output, path=path: note(path, output))
        for path, module in model.named_modules()
    ]
    try:
        with seen(LayerCalls(model, step=flow.add)):
            call.on(model)
    finally:
        for handle in handles:
            handle.remove()
    sums = {step.number for step in flow.sums()}
    last: list[tuple[tuple[int, ...], str]] = []
    for step in flow.steps:
        path = given.get(id(step.output)) if _is_tensor(step.output) and step.output.dim() > 2 else None
        if path is not None and flow.through_views(step.number) in sums:
            shape = tuple(step.output.shape[1:])
            goes_on = bool(last) and sorted(last[-1][0]) == sorted(shape)  # channels may lie first or last
            last = [*(last[:-1] if goes_on else last), (shape, path)]
    return {path: shape for shape, path in last}


def _inverse(step: Step) -> Callable[[Tensor, torch.Size], Tensor]:
    """What undoes a permutation of dimensions."""
    numbers = [value for value in tree_leaves((step.args[1:], step.kwargs)) if isinstance(value, int)]
    if step.function.__name__ == "transpose":
        return lambda value, shape: value.transpose(*numbers)
    order = [number % len(numbers) for number in numbers]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return lambda value, shape: value.permute(inverse)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
