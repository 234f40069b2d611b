"""Layer calls: what each weight of a running model is applied to, whatever module or function applies it.

A forward may call `self.conv(x)`, `F.linear(x, self.qkv.weight)` or `torch.nn.MultiheadAttention`; in the end a
weight meets its input in one of a few functions of torch. `LayerCalls` sees each such call, as it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cpd.model.inputs import plain_attention
from cpd.model.masks import masked_weights

#: Function -> names of its arguments.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.matmul: ("input", "weight"),
    Tensor.matmul: ("input", "weight"),
    Tensor.__matmul__: ("input", "weight"),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
}


@dataclass(frozen=True)
class LayerCall:
    """One application of a weight to an input.

    A layer is a matrix product once its input is laid out: `responses = features @ matrix(weight)^T + bias`, in each
    of its groups. (Of a transposed convolution the features are the input's channels and each response is what one
    input position adds to the output, so that `outputs` are not its responses.)

    Attributes:
        weight: name of the parameter.
        kind: "linear", "matmul", "conv" or "transposed".
        function: that of torch.
        given: the function's arguments by name.
        output: what it returned, a tensor; None before the call.
    """

    weight: str
    kind: str
    function: Callable[..., Tensor]
    given: dict[str, Any]
    output: Any = None

    @property
    def input(self) -> Tensor:
        """What the weight is applied to."""
        found: Tensor = self.given["input"]
        return found

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for all else."""
        return int(self.given.get("groups", 1))

    @property
    def channel(self) -> int:
        """The dimension of the input, and of the output, that the weight works along."""
        return -1 if self.kind in ("linear", "matmul") else 1 - int(self.given["weight"].dim())

    @property
    def positions(self) -> int:
        """In how many places of one sample, or row, the matrix product is taken."""
        if self.kind in ("linear", "matmul"):
            return math.prod(self.input.shape[:-1])
        return math.prod((self.output if self.kind == "conv" else self.input).shape[2:])

    @property
    def rows(self) -> int:
        """In how many places of the whole input the matrix product is taken."""
        return self.positions * (1 if self.kind in ("linear", "matmul") else self.input.shape[0])

    def features(self, index: Tensor | None = None) -> Tensor:
        """The inputs of the matrix product, [groups, rows, features].

        Args:
            index: which rows (linear layers) or positions of every sample (convolutions); all if None.
        """
        if self.kind in ("linear", "matmul"):
            rows = self.input.reshape(-1, self.input.shape[-1])
            return (rows if index is None else rows[index]).unsqueeze(0)
        x = self.input if self.input.dim() == self.given["weight"].dim() else self.input.unsqueeze(0)
        patches = self._patches(x, index) if self.kind == "conv" else _places(x, index).unsqueeze(2)
        samples, places, kernel, channels = patches.shape
        split = patches.reshape(samples, places, kernel, self.groups, -1).permute(3, 0, 1, 4, 2)
        return split.reshape(self.groups, samples * places, channels // self.groups * kernel)

    def spread(self, rows: int, samples: int, along: int, generator: torch.Generator) -> Tensor | None:
        """An index for `features` of about so many rows: the same places of every sample, samples outermost.

        Args:
            rows: how many; at least one a sample are taken. None is returned where there are no more than that.
            samples: in the batch.
            along: the dimension of a linear layer's input that they lie along.
            generator: draws the places.
        """
        linear = self.kind in ("linear", "matmul")
        length = self.input.shape[along if linear else 0]
        samples = samples if length % samples == 0 else 1
        places = self.positions // samples if linear else self.positions
        each = max(1, rows // samples if linear else rows // length)
        if each >= places and (not linear or along == 0):
            return None
        chosen = torch.randperm(places, generator=generator)[:each].sort().values
        if linear:
            shape = self.input.shape[:-1]
            chosen = torch.arange(math.prod(shape)).reshape(shape).movedim(along, 0).reshape(samples, -1)[:, chosen]
        return chosen.flatten().to(self.input.device)

    def outputs(self, index: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """The rows of the output, or of a tensor like it, that belong to `features`: [groups, rows, outputs]."""
        y = self.output if value is None else value
        if self.kind in ("linear", "matmul"):
            rows = y.reshape(-1, y.shape[-1])
            return (rows if index is None else rows[index]).unsqueeze(0)
        y = _places(y if y.dim() == self.given["weight"].dim() else y.unsqueeze(0), index)
        samples, places, channels = y.shape
        split = y.reshape(samples, places, self.groups, -1).permute(2, 0, 1, 3)
        return split.reshape(self.groups, samples * places, channels // self.groups)

    def responses(self, index: Tensor | None = None) -> Tensor:
        """`features @ matrix(weight)^T`, and the bias where the output holds it by row: [groups, rows, responses]."""
        if self.kind != "transposed":
            return self.outputs(index)
        return self.features(index) @ matrix(self.kind, self.given["weight"], self.groups).transpose(1, 2)

    def without_data(self) -> LayerCall:
        """The call less input and output: what a hook may hold, lest it keep the graph that holds it alive for ever."""
        return replace(self, given={name: value for name, value in self.given.items() if name != "input"}, output=None)

    def again(self) -> Tensor:
        """What the function returns now."""
        settings = {name: value for name, value in self.given.items() if name not in ("input", "weight")}
        return self.function(self.given["input"], self.given["weight"], **settings)

    def shape_of_output(self) -> Tensor:
        """What the function would return, without values."""
        on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in self.given.items()}
        return replace(self, given=on_meta).again()

    def _patches(self, x: Tensor, index: Tensor | None) -> Tensor:
        """What the kernel sees at some positions of the output, [samples, positions, kernel, channels]."""
        kernel, rank = self.given["weight"].shape[2:], x.dim() - 2
        stride, dilation = (_each(self.given.get(name, 1), rank) for name in ("stride", "dilation"))
        padding = _padding(self.given.get("padding", 0), kernel, dilation)
        place = torch.zeros((1, 1), dtype=torch.long, device=x.device)
        outside = torch.zeros((1, 1), dtype=torch.bool, device=x.device)
        for d in range(rank):
            along = (
                torch.arange(self.output.shape[-rank:][d], device=x.device)[:, None] * stride[d]
                + torch.arange(kernel[d], device=x.device) * dilation[d]
                - padding[d][0]
            )[None, :, None, :]
            size = x.shape[2 + d]
            shape = (place.shape[0] * along.shape[1], -1)
            place = (place[:, None, :, None] * size + along.clamp(0, size - 1)).reshape(shape)
            outside = (outside[:, None, :, None] | (along < 0) | (along >= size)).reshape(shape)
        if index is not None:
            place, outside = place[index], outside[index]
        found = _places(x, place.reshape(-1)).reshape(len(x), *place.shape, x.shape[1])
        return found.masked_fill_(outside.unsqueeze(-1), 0) if bool(outside.any()) else found


def matrix(kind: str, weight: Tensor, groups: int = 1) -> Tensor:
    """A layer's weight as matrices, [groups, outputs, features] (`LayerCall.features`)."""
    grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
    return grouped.transpose(1, 2) if kind in ("matmul", "transposed") else grouped


def from_matrix(kind: str, value: Tensor, like: Tensor) -> Tensor:
    """The inverse of `matrix`: a weight of the shape of `like`."""
    return (value.transpose(1, 2) if kind in ("matmul", "transposed") else value).reshape(like.shape)


class LayerCalls(TorchFunctionMode):
    """Within this block every call of a layer whose weight is a parameter of `model` is seen.

    Args:
        model: whose parameters are looked for.
        before: given the call that is to be made, returns the input to use instead.
        after: given the call with its output, returns the output to use instead, or None for its own.
        instead: given the call with an output that has a shape and no values, returns the output; or None, and the call
            is made.
        norm: told of the arguments of each `batch_norm` that uses running statistics.
        step: told of each call of any function that gives a tensor, in their order, which is that of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[LayerCall], Tensor] | None = None,
        after: Callable[[LayerCall], Tensor | None] | None = None,
        norm: Callable[[dict[str, Any]], None] | None = None,
        instead: Callable[[LayerCall], Tensor | None] | None = None,
        step: Callable[[Step], None] | None = None,
    ) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.masked = masked_weights(model)
        self.before, self.after, self.norm, self.instead, self.step = before, after, norm, instead, step
        self.steps = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = None
        if func in SIGNATURES:
            given = {**dict(zip(SIGNATURES[func], args, strict=False)), **kwargs}
            name = self._name(given.get("weight", given.get("other")))
        elif func is F.batch_norm and self.norm is not None:
            given = norm_given(args, kwargs)
            if given.get("running_mean") is not None and not given.get("training"):
                self.norm(given)
        elif isinstance(func, FunctionType) and func.__globals__ is vars(F) and func is not F.batch_norm:
            with self:
                return without_function_modes(func)(*args, **kwargs)
        output = func(*args, **kwargs) if name is None else self._layer(func, name, given)
        if self.step is not None and (_holds_tensors(output) or func is Tensor.__setitem__):
            self.step(Step(self.steps, func, args, kwargs, output, name))
            self.steps += 1
        return output

    def _name(self, weight: Any) -> str | None:
        """The parameter that a weight is, or that it is computed of by a mask."""
        under = (name for name, (module, own) in self.masked.items() if getattr(module, own) is weight)
        return self.names.get(id(weight)) or next(under, None)

    def _layer(self, func: Any, name: str, given: dict[str, Any]) -> Tensor:
        signature = SIGNATURES[func]
        kind = {_CONV: "conv", _TRANSPOSED: "transposed"}.get(signature, "linear" if "bias" in signature else "matmul")
        weight = given.setdefault("weight", given.pop("other", None))
        if weight.dim() < 2 or (kind == "matmul" and weight.dim() > 2):
            return func(*given.values())  # type: ignore[no-any-return]
        layer = LayerCall(name, kind, func, given)
        if self.before is not None:
            given["input"] = self.before(layer)
        made = None if self.instead is None else self.instead(replace(layer, output=layer.shape_of_output()))
        output = layer.again() if made is None else made
        replaced = self.after(replace(layer, output=output)) if self.after is not None else None
        return output if replaced is None else replaced


_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def norm_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `torch.nn.functional.batch_norm` by name."""
    return {**dict(zip(_NORM, args, strict=False)), **kwargs}


class Step(NamedTuple):
    """One call of a function that gives a tensor.

    Attributes:
        number: how many came before it in this forward.
        function: that of torch.
        args: its arguments by position.
        kwargs: those by name.
        output: what it gave.
        weight: name of the parameter, where it is the call of a layer.
    """

    number: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    weight: str | None


@contextmanager
def seen(calls: LayerCalls) -> Iterator[None]:
    """Layer calls seen within a block, those inside `torch.nn.MultiheadAttention` too."""
    with plain_attention(), calls:
        yield


@cache
def without_function_modes(function: FunctionType) -> Callable[..., Any]:
    """A function of torch.nn.functional that does not hand itself over to a mode, so that its calls are seen."""
    never = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)
    names = {**function.__globals__, **never}
    opened = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _holds_tensors(output: Any) -> bool:
    return isinstance(output, (Tensor, tuple, list)) and not isinstance(output, torch.Size)


def _never(*_: Any) -> bool:
    return False


def _places(x: Tensor, index: Tensor | None) -> Tensor:
    """[samples, channels, ...] at some of its places, all if None: [samples, places, channels]."""
    rows = x.movedim(1, -1).flatten(1, -2)  # a view, whichever dimension is innermost in memory
    return rows if index is None else rows.index_select(1, index)


def _each(setting: Any, rank: int) -> tuple[int, ...]:
    given = tuple(setting) if isinstance(setting, (tuple, list)) else (setting,)
    return given * rank if len(given) == 1 else given


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """What a convolution's padding puts before and after each dimension."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":  # the odd one is added at the end
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in _each(padding, len(kernel))]
