"""Replay: run a narrower copy of a model on tensors without values, and see what its forward asks for.

A forward that was written for one width may name it again: `x.reshape(B, N, self.num_heads, 64)`. The replay
intercepts every such call, compares the integers with the widths that the comb predicts, notes each that
differs, and goes on with the predicted shape, so that one pass finds them all.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from cpd.algebra import axes
from cpd.algebra.axes import Axis
from cpd.errors import let_through
from cpd.model.inputs import as_exported, device_of, evaluating
from cpd.model.state import code_memory_preserved
from cpd.proof.provenance import Place, places_of
from cpd.rules import Context, Literal, arguments
from cpd.trace.graph import op_name, owner
from cpd.trace.layer_calls import without_function_modes
from cpd.trace.quiet import garbage_collection_paused, quiet
from cpd.trace.standins import NAMES as RECURRENT
from cpd.trace.values import answering


@dataclass
class Observation:
    """What a narrower copy asked for.

    Attributes:
        counts: the width of each axis in the copy.
        asked: the integer passed for each literal that was reached.
        error: what ended the run early, if anything did.
        culprit: path of the module whose forward it ended in.
        steps: how many calls of torch it reached.
        places: for each literal whose integer a module keeps or computes from what it keeps, where it is kept.
        compared: whether the copy was compared with the prediction op by op, beyond the widths that it asks for.
    """

    counts: Mapping[Axis, int]
    asked: dict[Literal, int] = field(default_factory=dict)
    error: Exception | None = None
    culprit: str = ""
    steps: int = 0
    places: dict[Literal, frozenset[Place]] = field(default_factory=dict)
    compared: bool = False

    def as_predicted(self) -> bool:
        """Whether nothing ended the run early, and every integer is the predicted width."""
        return self.error is None and not self.wrong()

    def wrong(self) -> list[Literal]:
        """The literals whose integer is not the predicted width."""
        return [item for item in self.asked if not self.agrees(item)]

    def agrees(self, item: Literal) -> bool:
        """Whether a literal was reached and is as predicted."""
        return item in self.asked and self.asked[item] == predicted(item, self.counts)

    def is_constant(self, item: Literal) -> bool:
        """Whether a literal that was reached is what it is in the unpruned model."""
        return self.asked[item] == item.sign * item.dim.size

    def failing(self) -> str:
        """Path of the module in which the run ended early, or which asked for another width than predicted."""
        return self.culprit if self.error is not None else owner(self.wrong()[0].node)


def predicted(item: Literal, counts: Mapping[Axis, int]) -> int:
    """The integer that the forward must pass when the axes have these widths."""
    return item.sign * axes.count(item.dim, counts)


def _sizes(start: int, name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Sequence[int]]:
    """Read a list of sizes given as `f(x, a, b)`, `f(x, (a, b))` or `f(x, name=(a, b))`."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int]:
        values = args[start:] or (kwargs.get(name, ()),)
        first = values[0]
        return tuple(first) if isinstance(first, (tuple, list)) else values

    return read


def _one(position: int, name: str, default: int = 0) -> Callable[[tuple[Any, ...], dict[str, Any]], Sequence[int]]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int]:
        value = args[position] if len(args) > position else kwargs.get(name, default)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    return read


def _named(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Sequence[int]]:
    """Read an integer that is given by name alone, if it is."""
    return lambda _, kwargs: (kwargs[name],) if kwargs.get(name) is not None else ()


def _bounds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int]:
    """Start and length of `narrow(x, dim, start, length)`."""
    return (*args[2:4], *(kwargs[name] for name in ("start", "length") if name in kwargs))


#: Functions whose result is taken from the prediction: their kernels for tensors without values are slow, or, as that
#: of `istft`, ask for values.
_PREDICTED = (
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "istft", *RECURRENT,
)  # fmt: skip
#: Python name of a function that is given widths -> (name shared with the ATen op, how to read the widths).
READERS: dict[str, tuple[str, Callable[[tuple[Any, ...], dict[str, Any]], Sequence[int]]]] = {
    "view": ("view", _sizes(1, "size")),
    "reshape": ("reshape", _sizes(1, "shape")),
    "expand": ("expand", _sizes(1, "size")),
    "broadcast_to": ("broadcast_to", _sizes(1, "size")),
    "repeat_interleave": ("repeat_interleave", _named("output_size")),
    "unflatten": ("unflatten", _one(2, "sizes")),
    "split": ("split", _one(1, "split_size_or_sections")),
    "tensor_split": ("tensor_split", _one(1, "indices")),
    "split_with_sizes": ("split", _one(1, "split_sizes")),
    "pad": ("pad", _one(1, "pad")),
    "narrow": ("narrow", _bounds),
    "layer_norm": ("layer_norm", _one(1, "normalized_shape")),
    "rms_norm": ("rms_norm", _one(1, "normalized_shape")),
    "group_norm": ("group_norm", _one(1, "num_groups")),
    "zeros": ("zeros", _sizes(0, "size")),
    "ones": ("ones", _sizes(0, "size")),
    "empty": ("empty", _sizes(0, "size")),
    "full": ("full", _one(0, "size")),
    "rand": ("rand", _sizes(0, "size")),
    "randn": ("randn", _sizes(0, "size")),
    "new_zeros": ("new_zeros", _sizes(1, "size")),
    "new_ones": ("new_ones", _sizes(1, "size")),
    "new_empty": ("new_empty", _sizes(1, "size")),
    "new_full": ("new_full", _one(1, "size")),
    **{name: (name, lambda *_: ()) for name in _PREDICTED},
    **{f"conv{rank}d": (f"conv{rank}d", _one(6, "groups", 1)) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": (f"conv_transpose{rank}d", _one(6, "groups", 1)) for rank in (1, 2, 3)},
}
#: Functions that give a tensor like their first, whose kernels for tensors without values are slow.
_ALIKE = {
    "batch_norm", "layer_norm", "relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "softmax", "dropout", "hardswish",
}  # fmt: skip
#: The same, of a number or of another tensor of the same shape.
_ELEMENTWISE = {
    f"{before}{name}{after}" for name in ("add", "sub", "mul", "div", "truediv")
    for before, after in (("", ""), ("", "_"), ("__r", "__"), ("__i", "__"))
}  # fmt: skip
#: Modules whose functions are written in Python, and call others that name widths.
_PYTHON = (F.__name__, torch.functional.__name__)
_IN_PLACE = re.compile(r"[a-z]\w*[^_]_$|__i\w+__$")
_SHARED_NAMES = {"split_with_sizes": "split", "constant_pad_nd": "pad"}


class _Recorder(TorchFunctionMode):
    """Compares every call that names widths with the node that the trace found in the same place."""

    def __init__(
        self,
        ctx: Context,
        observation: Observation,
        path: list[str],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.device = device
        self.entered: list[Any] = []
        self.ctx, self.counts, self.observation, self.path = ctx, observation.counts, observation, path
        self.literals: dict[Node, list[Literal]] = defaultdict(list)
        for item in ctx.literals:
            self.literals[item.node].append(item)
        self.expected: dict[tuple[str, str], deque[Node]] = defaultdict(deque)
        for node in ctx.graph.operations:
            name = op_name(node)
            if name == "slice" and _is_whole(*node.args[2:4]):
                continue
            self.expected[owner(node), _SHARED_NAMES.get(name, name)].append(node)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.observation.steps += 1
        if func is Tensor.__getitem__:
            return func(args[0], self._sliced(*args))
        if func is Tensor.__setitem__:
            return func(args[0], self._sliced(*args[:2]), args[2])
        name, read = READERS.get(getattr(func, "__name__", ""), ("", None))
        queue = self.expected.get((self.path[-1], name)) if read is not None else None
        in_python = isinstance(func, FunctionType) and func.__globals__["__name__"] in _PYTHON
        if read is None and in_python and func not in self.entered:  # some hand themselves over again inside
            self.entered.append(func)
            with self:
                try:
                    return without_function_modes(func)(*args, **kwargs)
                finally:
                    self.entered.pop()
        if read is None or not queue:
            return _run(func, args, kwargs)
        node = queue.popleft()
        asked = read(args, kwargs)
        given = {item: asked[item.index] for item in self.literals[node] if item.index < len(asked)}
        wrong = [item for item in given if not self._note(item, given[item])]
        if wrong or name in _PREDICTED:
            return self._predict(node, [*args, *kwargs.values()])
        return _run(func, args, kwargs)

    def _note(self, item: Literal, asked: Any) -> bool:
        """Note what was asked for; tell whether it is as predicted."""
        self.observation.asked[item] = int(asked)
        self.observation.places[item] = places_of(asked)
        return self.observation.agrees(item)

    def _sliced(self, tensor: Tensor, index: Any) -> Any:
        """The index of `tensor[index]`, read or written to, each bound of its slices as predicted."""
        items = list(index) if isinstance(index, tuple) else [index]
        sizes = _sizes_sliced(tensor, items)
        for position, item in enumerate(items):
            queue = self.expected.get((self.path[-1], "slice"))
            if isinstance(item, slice) and not _is_whole(item.start, item.stop) and queue:
                reaches_end = isinstance(item.stop, int) and item.stop >= sizes[position]
                if _is_whole(item.start) and reaches_end and not self._names(queue[0], item.stop, sizes[position]):
                    continue  # all of it, which the trace leaves out
                bounds = {"start": item.start, "end": item.stop}
                for literal in self.literals[queue.popleft()]:
                    asked = bounds.get(literal.argument)
                    if isinstance(asked, int) and not self._note(literal, asked):
                        bounds[literal.argument] = predicted(literal, self.counts)
                items[position] = slice(bounds["start"], bounds["end"], item.step)
        return tuple(items) if isinstance(index, tuple) else items[0]

    def _names(self, node: Node, end: int, size: int) -> bool:
        """Whether a slice of the trace ends at this number, where its prediction is less than `size`."""
        ends = [predicted(item, self.counts) for item in self.literals[node] if item.argument == "end"]
        return arguments(node)["end"] == end and any(found < size for found in ends)

    def _predict(self, node: Node, given: Sequence[Any]) -> Any:
        """Empty tensors of the predicted shapes, on the device of the tensor given, or of the model."""
        value, traced = self.ctx.values[node], node.meta["val"]
        shapes, tensors = (value, traced) if isinstance(value, list) else ([value], [traced])
        device = next((item.device for item in given if isinstance(item, Tensor)), self.device)
        made = [
            torch.empty([axes.count(dim, self.counts) for dim in shape], dtype=tensor.dtype, device=device)
            for shape, tensor in zip(shapes, tensors, strict=True)
        ]
        return tuple(made) if isinstance(value, list) else made[0]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function, or find its result, which has no values, without running its kernel."""
    quick = _without_kernel(func, args, kwargs)
    return func(*args, **kwargs) if quick is None else quick


def _without_kernel(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of some functions, without values, found without running them; None where that is not plain."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else kwargs.get("input")
    if not isinstance(first, Tensor) or not first.is_floating_point() or kwargs.get("dtype") is not None:
        return None
    others = [arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, Tensor)]
    shape: tuple[int, ...] | None = None
    if name == "linear" and others and others[0].dim() == 2 and first.shape[-1] == others[0].shape[1]:
        shape = (*first.shape[:-1], others[0].shape[0])
    elif name in ("matmul", "bmm") and first.dim() > 1 and _same(first, others[0], -2):
        shape = (*first.shape[:-1], others[0].shape[-1]) if first.shape[-1] == others[0].shape[-2] else None
    elif name == "scaled_dot_product_attention" and len(others) == 2 and "enable_gqa" not in kwargs:
        key, value = others
        fits = first.shape[-1] == key.shape[-1] and _same(first, key, -2) and _same(key, value, -1)
        shape = (*first.shape[:-1], value.shape[-1]) if fits else None
    elif name in _ELEMENTWISE and len(args) == 2 and not kwargs:
        fits = _same(first, others[0], None) if others else isinstance(args[1], (int, float))
        shape = tuple(first.shape) if fits and (not others or others[0].dtype == first.dtype) else None
    elif name in _ALIKE:
        width = first.shape[-1] if name == "layer_norm" else first.shape[1] if name == "batch_norm" else None
        shape = tuple(first.shape) if all(tuple(other.shape) == (width,) for other in others) else None
    if shape is None:
        return None
    return first if _IN_PLACE.match(name) else first.new_empty(shape)


def _same(left: Tensor, right: Tensor, end: int | None) -> bool:
    """Whether two tensors have the same shape up to a dimension."""
    return left.dim() == right.dim() and left.shape[:end] == right.shape[:end]


def _sizes_sliced(tensor: Tensor, items: Sequence[Any]) -> list[int]:
    """For each item of an index, the size of the dimension that it is applied to (1 for one that it adds)."""
    taken = [
        0 if item is None or item is Ellipsis
        else item.dim() if isinstance(item, Tensor) and item.dtype is torch.bool
        else 1
        for item in items
    ]  # fmt: skip
    found, dim = [], 0
    for item, count in zip(items, taken, strict=True):
        found.append(tensor.shape[dim] if count else 1)
        dim += tensor.dim() - sum(taken) if item is Ellipsis else count
    return found


def _is_whole(start: Any = None, end: Any = None, *_: Any) -> bool:
    """Whether a slice names no bound."""
    return start in (None, 0) and (end is None or (isinstance(end, int) and end >= sys.maxsize))


def replay(ctx: Context, model: nn.Module, counts: Mapping[Axis, int], *, meta: bool = False) -> Observation:
    """Run a copy of the model narrowed to `counts`, without values; tell which widths its forward asked for.

    Args:
        ctx: the result of the algebra.
        model: the narrower copy.
        counts: the width of each axis.
        meta: whether `model` is on the meta device, which is faster than fake tensors.
    """
    observation, path = Observation(counts), [""]
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: path.pop() and None, always_call=True))
    fake = nullcontext() if meta else FakeTensorMode(allow_non_fake_inputs=True)
    call = ctx.graph.call.to("meta") if meta else ctx.graph.call
    recorder = _Recorder(ctx, observation, path, device_of(model))
    with code_memory_preserved(model), evaluating(model), warnings.catch_warnings(), torch.no_grad(), as_exported():
        warnings.simplefilter("ignore")
        try:
            with quiet(), garbage_collection_paused(), fake, recorder, answering(ctx.graph.answers):
                call.on(ctx.graph.runner(model))
        except Exception as error:  # the user's forward may raise anything
            let_through(error)
            observation.error, observation.culprit = error, culprit(model, error)
    for handle in handles:
        handle.remove()
    return observation


def culprit(model: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose forward an exception passed through."""
    paths = {id(module): name for name, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = paths.get(id(frame.tb_frame.f_locals.get("self")), found)
        frame = frame.tb_next
    return found
