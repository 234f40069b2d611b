"""Values that a forward reads while it is traced: `int(lengths.max())`, `x[mask]`, `nonzero(x)`.

A trace, and a narrower copy, know shapes alone. So the model runs once on the example inputs, and what its forward asks
of values is noted (`asked`); wherever it runs without values it is told the same (`answering`), as `torch.jit.trace`
would: numbers, and how many elements are selected. What is selected stays an operation on values, of a known size.

A forward that decides by a value what it does is not answered, unless the value follows from the model alone.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from cpd.errors import TraceError
from cpd.model.inputs import Call, as_exported, in_mode
from cpd.model.skeleton import skeleton
from cpd.model.state import code_memory_preserved
from cpd.model.tensors import own_buffers
from cpd.trace.graph import Answer, is_own_code, is_user_code

#: The op that marks, in a graph, a tensor whose values are read as numbers; what it gives is used by nothing.
READ = "read_value"
torch.library.define(f"cpd::{READ}", "(Tensor self) -> Tensor")
torch.library.impl(f"cpd::{READ}", "CompositeExplicitAutograd")(lambda tensor: tensor.new_empty(()))
torch.library.register_fake(f"cpd::{READ}")(lambda tensor: tensor.new_empty(()))
torch.fx.node.has_side_effect(torch.ops.cpd.read_value.default)

_NUMBERS = {
    "item", "__int__", "__float__", "__index__", "__complex__", "__bool__", "__contains__", "is_nonzero",
    "equal", "allclose",
}  # fmt: skip
#: Functions that are given numbers, by how many arguments come before those; a tensor of one element may stand for one.
_GIVEN_NUMBERS = {
    **dict.fromkeys(("arange", "zeros", "ones", "empty", "full", "rand", "randn", "eye"), 0),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_empty", "new_full", "full_like", "view", "reshape", "expand", "repeat", "tile",
         "narrow", "split", "split_with_sizes", "chunk", "topk", "roll", "unflatten", "unfold", "pad", "interpolate"),
        1,
    ),
}  # fmt: skip
#: Functions whose result does not depend on the values of what they are given.
_SHAPES_ALONE = {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "size", "dim"}
#: Functions whose result depends on values in a way that has no answer.
_UNANSWERED = {"nms", "numpy", "combinations"}
_IN_PLACE = re.compile(r"[a-z]\w*[^_]_$|__i\w+__$|__setitem__$")


class Values(TorchFunctionMode):
    """While active, a forward that asks for values is told what `answers` say, in their order.

    Args:
        answers: to every question that the forward asks.
    """

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        super().__init__()
        self.answers = iter(answers)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _NUMBERS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            return self._number(tensors, lambda: func(*args, **kwargs))
        if name in _GIVEN_NUMBERS:
            start = _GIVEN_NUMBERS[name]
            rest, named = tree_map_only(Tensor, self._told, (args[start:], kwargs))
            return func(*args[:start], *rest, **named)
        if name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor):
            return self._made(func, args, kwargs)
        answered: Callable[..., Any] | None = _ANSWERED.get(name)
        return func(*args, **kwargs) if answered is None else answered(self, func, *args, **kwargs)

    def ask(self, question: str, tensors: Sequence[Tensor], read: Callable[[], Any]) -> Any:
        """The answer to a question about the values of tensors.

        Args:
            question: what is asked.
            tensors: of what.
            read: finds the answer, where there are values.

        Raises:
            TraceError: if the forward asks what it did not ask on the example inputs.
        """
        answer, place = next(self.answers, None), _place()
        if answer is None or (answer.question, answer.place) != (question, place):
            raise TraceError(f"here the forward reads a value ({place}) that it does not read at the full width")
        return answer.value

    def _number(self, tensors: Sequence[Tensor], read: Callable[[], Any]) -> Any:
        """A number that is read from tensors."""
        for tensor in tensors:
            torch.ops.cpd.read_value(tensor)
        return self.ask("number", tensors, read)

    def _told(self, leaf: Tensor) -> Any:
        """An argument that may be a number: the number of a tensor of no dimension."""
        return leaf if leaf.dim() else self._number([leaf], leaf.item)

    def _tolist(self, func: Any, tensor: Tensor) -> Any:
        return self._listed(tensor, tensor)

    def _listed(self, tensor: Tensor, source: Tensor) -> Any:
        """Number by number, as a tensor without values is made a list."""
        if tensor.dim():
            return [self._listed(item, source) for item in tensor.unbind()]
        torch.ops.cpd.read_value(tensor)
        return self.ask("number", [source], tensor.item)

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor made of numbers, some of them tensors."""
        kinds = {leaf.dtype if isinstance(leaf, Tensor) else None for leaf in tree_leaves(args[0])}
        if len(kinds) == 1 and None not in kinds:
            kwargs = {"dtype": kinds.pop(), **kwargs}
        return func(tree_map_only(Tensor, self._told, args[0]), *args[1:], **kwargs)

    # ------------------------------------------------------------ results whose size depends on values

    def _positions(self, tensor: Tensor, *sources: Tensor) -> Tensor:
        """[n, dims]: where a tensor, that was made of the sources if there are any, is not zero."""
        count = self.ask("nonzero", sources or (tensor,), lambda: int(tensor.count_nonzero()))
        return torch.nonzero_static(tensor, size=count, fill_value=0)

    def _nonzero(self, func: Any, input: Tensor, *, as_tuple: bool = False) -> Any:
        found = self._positions(input)
        return found.unbind(1) if as_tuple else found

    def _where(self, func: Any, condition: Tensor, *others: Any, **named: Any) -> Any:
        return func(condition, *others, **named) if others or named else self._positions(condition).unbind(1)

    def _masked_select(self, func: Any, input: Tensor, mask: Tensor) -> Tensor:
        values, where = torch.broadcast_tensors(input, mask)
        selected: Tensor = values[self._positions(where, input, mask).unbind(1)]
        return selected

    def _getitem(self, func: Any, tensor: Tensor, index: Any) -> Any:
        return func(tensor, self._index(index))

    def _setitem(self, func: Any, tensor: Tensor, index: Any, value: Any) -> Any:
        return func(tensor, self._index(index, masks=isinstance(value, Tensor) and value.dim() > 0), value)

    def _index(self, index: Any, *, masks: bool = True) -> Any:
        """An index of numbers, slices of numbers and positions: the positions in the place of a mask."""
        found: list[Any] = []
        for item in index if isinstance(index, tuple) else (index,):
            if isinstance(item, slice):
                bounds = (item.start, item.stop, item.step)
                found.append(slice(*(self._told(bound) if isinstance(bound, Tensor) else bound for bound in bounds)))
            elif not isinstance(item, Tensor) or item.is_floating_point():
                found.append(item)
            elif item.dtype in (torch.bool, torch.uint8):
                found += self._positions(item).unbind(1) if masks and item.dim() else [item]
            else:
                found.append(self._told(item))
        return tuple(found) if isinstance(index, tuple) or len(found) != 1 else found[0]

    def _unique(self, func: Any, input: Tensor, sorted: bool = True, **named: Any) -> Any:
        flat, order = input.flatten().sort(stable=True)
        return self._runs(input, flat, order, **named)

    def _unique_consecutive(self, func: Any, input: Tensor, **named: Any) -> Any:
        return self._runs(input, input.flatten(), None, **named)

    def _runs(
        self,
        input: Tensor,
        flat: Tensor,
        order: Tensor | None,
        return_inverse: bool = False,
        return_counts: bool = False,
        dim: None = None,
    ) -> Any:
        """The first of each run of equal values, the number of the run of each element, and the lengths of the runs."""
        first = torch.cat([torch.ones_like(flat[:1], dtype=torch.bool), flat[1:] != flat[:-1]])
        starts = self._positions(first, input)[:, 0]
        results = [flat[starts]]
        if return_inverse:
            runs = first.cumsum(0) - 1
            found = runs if order is None else torch.zeros_like(runs).scatter(0, order, runs)
            results.append(found.view(input.shape))
        if return_counts:
            results.append(torch.cat([starts, starts.new_full((1,), len(flat))]).diff())
        return tuple(results) if len(results) > 1 else results[0]

    def _repeat_interleave(self, func: Any, *args: Any, **named: Any) -> Any:
        given = {**dict(zip(("input", "repeats", "dim"), args, strict=False)), **named}
        repeats, dim = given.get("repeats", given.get("input")), given.get("dim")
        if not isinstance(repeats, Tensor) or given.get("output_size") is not None:
            return func(*args, **named)
        source = given["input"] if "repeats" in given else torch.arange(len(repeats), device=repeats.device)
        source, dim = (source.flatten(), 0) if dim is None else (source, dim)
        repeats = repeats.expand(source.shape[dim])
        size = self.ask("size", [repeats], lambda: int(repeats.sum()))
        return source.index_select(dim, torch.repeat_interleave(repeats, output_size=size))

    def _bincount(self, func: Any, input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        size = self.ask("size", [input], lambda: len(func(input, weights, minlength)))
        if weights is None:
            weights = torch.ones_like(input, dtype=torch.long)
        elif weights.dtype is not torch.float:
            weights = weights.double()
        return weights.new_zeros(size).scatter_add(0, input.long().clamp(max=size - 1), weights)

    def _one_hot(self, func: Any, tensor: Tensor, num_classes: int = -1) -> Any:
        if num_classes == -1:
            num_classes = self.ask("size", [tensor], lambda: func(tensor).shape[-1])
        return func(tensor, num_classes)


_ANSWERED: dict[str, Callable[..., Any]] = {
    "nonzero": Values._nonzero, "argwhere": Values._nonzero, "where": Values._where,
    "masked_select": Values._masked_select, "__getitem__": Values._getitem, "__setitem__": Values._setitem,
    "tolist": Values._tolist, "unique": Values._unique, "unique_consecutive": Values._unique_consecutive,
    "repeat_interleave": Values._repeat_interleave, "bincount": Values._bincount, "one_hot": Values._one_hot,
}  # fmt: skip


class _Asking(Values):
    """While active, notes what a forward asks for values, and the answers.

    Args:
        call: the inputs of the forward; what follows from their values must not decide what it does.

    Attributes:
        found: the answers.
        from_inputs: the tensors whose values follow from those of the inputs.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.found: list[Answer] = []
        self.from_inputs = WeakTensorKeyDictionary()
        self._follow(tuple(call))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UNANSWERED or (name in ("unique", "unique_consecutive") and (kwargs or {}).get("dim") is not None):
            raise TraceError(f"what {name} gives depends on values")
        result = super().__torch_function__(func, types, args, kwargs)
        if name not in _SHAPES_ALONE and any(map(self._depends, tree_leaves((args, kwargs)))):
            self._follow((result, args[0] if args and _IN_PLACE.match(name) else None, (kwargs or {}).get("out")))
        return result

    def ask(self, question: str, tensors: Sequence[Tensor], read: Callable[[], Any]) -> Any:
        """Read the answer, and note it.

        Raises:
            TraceError: if it decides what the forward does, and depends on the inputs.
        """
        value, depends = read(), any(map(self._depends, tensors))
        if depends and isinstance(value, bool):
            raise TraceError("what the forward does depends on a value")
        self.found.append(Answer(question, _place(), value, depends))
        return value

    def _follow(self, value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.from_inputs[_base(leaf)] = True

    def _depends(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _base(value) in self.from_inputs


def _base(tensor: Tensor) -> Tensor:
    """The tensor that a view shows."""
    return tensor if tensor._base is None else tensor._base


def _place() -> str:
    """`file:line` of the innermost line that runs in a user's file; of the innermost forward where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    found = ""
    while frame is not None and not is_own_code(filename := frame.f_code.co_filename):
        if is_user_code(filename) or (frame.f_code.co_name == "forward" and not found):
            found = f"{Path(filename).name}:{frame.f_lineno}"
        if is_user_code(filename):
            break
        frame = frame.f_back
    return found


def asked(model: nn.Module, call: Call, *, training: bool = False) -> tuple[Answer, ...]:
    """What the forward of a model asks for values on a call, with the answers; the model is left as it was.

    Raises:
        TraceError: if the values of the inputs decide what the forward does.
    """
    copy = skeleton(model, {})
    own_buffers(copy)
    asking = _Asking(call)
    with (
        code_memory_preserved(copy),
        in_mode(copy, training),
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        as_exported(),
    ):
        warnings.simplefilter("ignore")
        with asking:
            call.on(copy)
    return tuple(asking.found)


def answering(answers: tuple[Answer, ...]) -> AbstractContextManager[Any]:
    """A block in which a forward that asks for values is told these answers."""
    return Values(answers) if answers else nullcontext()


def reads_values(nodes: Iterable[Node]) -> bool:
    """Whether a size or a number in a graph is known only once the tensors have values."""
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(
        isinstance(size, symbols)
        for node in nodes
        for leaf in tree_leaves(node.meta.get("val"))
        for size in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))
    )
