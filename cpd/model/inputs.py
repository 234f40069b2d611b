"""What a user hands in, brought to one form: a model, example inputs, batches of a loader, a model's outputs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from cpd.errors import InputError, TraceError, TrainingError, of_the_user
from cpd.options import LIMIT, shown

LABEL_KEYS = ("labels", "label", "target", "targets")


class Call(NamedTuple):
    """The arguments of one forward pass: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> Call:
        """The same call with every tensor in it moved to `device`."""
        return Call(move(self.args, device), move(self.kwargs, device))

    def on(self, model: nn.Module) -> Any:
        """Run `model` on this call; lists and dicts are its own, since some forwards change what they are given."""
        args, kwargs = tree_map(lambda leaf: leaf, tuple(self))
        return model(*args, **kwargs)

    @property
    def samples(self) -> int:
        """The batch size: the first extent of the first tensor; 1 if there is none."""
        return next((leaf.shape[0] for leaf in tree_leaves(tuple(self)) if isinstance(leaf, Tensor) and leaf.dim()), 1)

    def part(self, samples: int) -> Call:
        """The first samples alone, of every tensor as long as the batch."""
        return self.slice(0, samples)

    def slice(self, start: int, end: int) -> Call:
        """The samples from `start` to before `end`, of every tensor as long as the batch."""
        return self._taken(lambda leaf: leaf[start:end])

    def chosen(self, which: Tensor) -> Call:
        """The samples that `which`, [samples] of truth values, says, of every tensor as long as the batch."""
        return self._taken(lambda leaf: leaf[which.to(leaf.device)])

    def _taken(self, take: Callable[[Tensor], Tensor]) -> Call:
        whole = self.samples

        def cut(leaf: Tensor) -> Tensor:
            return take(leaf) if leaf.dim() and len(leaf) == whole else leaf

        return Call(*tree_map_only(Tensor, cut, tuple(self)))

    def resized(self, samples: int) -> Call:
        """So many samples, repeated or cut, of every tensor as long as the batch.

        Raises:
            InputError: if `samples` is below 1.
        """
        if samples < 1:
            raise InputError(f"The batch size must be at least 1; got {samples}.")
        whole = self.samples

        def tiled(leaf: Tensor) -> Tensor:
            if not leaf.dim() or len(leaf) != whole:
                return leaf
            return leaf[torch.arange(samples, device=leaf.device) % whole]

        return Call(*tree_map_only(Tensor, tiled, tuple(self)))


def joined(calls: Sequence[Call]) -> Call:
    """One call on the samples of several; those of other shapes than the first are left out."""
    leaves, forms = zip(*(tree_flatten(tuple(call)) for call in calls), strict=True)
    alike = [
        items for items, form in zip(leaves, forms, strict=True)
        if form == forms[0] and all(_stacks(one, other) for one, other in zip(items, leaves[0], strict=True))
    ]  # fmt: skip
    stacked = [
        torch.cat(items) if isinstance(items[0], Tensor) and items[0].dim() else items[0]
        for items in zip(*alike, strict=True)
    ]
    return Call(*tree_unflatten(stacked, forms[0]))


def _stacks(left: Any, right: Any) -> bool:
    """Whether two inputs can be joined along their first dimension."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape[1:] == right.shape[1:]
    return type(left) is type(right)


class Batch(NamedTuple):
    """One batch of a loader: how to call the model on it, the target (None where there is none), and which it is.

    Attributes:
        call: the arguments.
        target: what a loss compares the output with.
        number: from 1.
        learn: of a task, `learn(model, call, target)`: the output, and the model's own loss; None: it is inferred.
    """

    call: Call
    target: Any
    number: int = 1
    learn: Callable[[nn.Module, Call, Any], tuple[Any, Any]] | None = None

    @property
    def place(self) -> str:
        """Which batch it is, in words."""
        return "the first batch of data" if self.number == 1 else f"batch {self.number} of data"

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor in it moved to `device`."""
        return self._replace(call=self.call.to(device), target=move(self.target, device))

    def on(self, model: nn.Module, whose: str = "The model") -> Any:
        """Run `model` on it.

        Raises:
            InputError: if the model raises anything: which batch it was, and of what shapes.
        """
        shapes = [list(leaf.shape) for leaf in tree_leaves(tuple(self.call)) if isinstance(leaf, Tensor)]
        with of_the_user(whose, f"on {self.place}, inputs of {', '.join(map(str, shapes))}"):
            return self.call.on(model)


def move(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in its tuples, lists and mappings moved to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = (move(item, device) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a namedtuple takes fields
    return value


def as_module(model: object) -> nn.Module:
    """Return `model` if it is an `nn.Module`; raise `InputError` otherwise."""
    if isinstance(model, nn.Module):
        return model
    raise InputError(
        f"Expected a torch.nn.Module, got {type(model).__name__}. Pass the model object itself, "
        "not its state dict, its class or its name."
    )


def check_model(model: object) -> nn.Module:
    """The module that is worked on: `model`, or the one that `torch.compile` has wrapped.

    Raises:
        InputError: if `model` is no `nn.Module`, or wraps one for several devices.
        TraceError: if it, or a module in it, has no forward in Python or no weights in floating point.
    """
    found = as_module(model)
    if type(found).__name__ == "OptimizedModule":  # the class itself is in the compiler, which loads for seconds
        found = found.get_submodule("_orig_mod")
    if isinstance(found, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"{type(found).__name__} keeps the widths that the model had when it was wrapped: pass the inner model, "
            "model.module, and wrap the result."
        )
    for path, module in found.named_modules():
        if (why := _untraceable(module)) is not None:
            where = f"{type(found).__name__} holds {path}, which" if path else type(found).__name__
            raise TraceError(f"{where} {why}")
    return found


def _untraceable(module: nn.Module) -> str | None:
    """Why no forward in Python and in floating point is left of a module, and what to do; None where one is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit.script or torch.jit.trace: pass the Python module that it was made of."
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_PREPARED):
            return (
                "is prepared for quantization (it observes or rounds its values): pass the float model, and prepare "
                "the result."
            )
        if kind.__module__.startswith(_QUANTIZED) and kind.__name__ != "FloatFunctional":
            return (
                "is quantized, its weights are packed integers: pass the float model, and quantize the result "
                "(cpd.quantize_onnx, or torch.ao.quantization on it)."
            )
    return None


#: Where torch keeps modules that observe or round values, and modules of integers. They are told by name: importing
#: them takes long, and they are to leave torch.
_PREPARED = (
    "torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize", "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat", "torch.ao.nn.quantizable",
)  # fmt: skip
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, else of its first buffer; the CPU if it has neither."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """`model` in eval mode for the length of a block, each submodule's own mode restored after it."""
    return in_mode(model, False)


def evaluated(evaluate: Callable[[nn.Module], float] | None, model: nn.Module, when: str) -> float | None:
    """What a user's `evaluate` gives, in eval mode and without gradients; None without one.

    Args:
        evaluate: the user's.
        model: what it is called with.
        when: in words that end a sentence, as "before pruning".

    Raises:
        InputError: if it raises anything, or gives no finite number.
    """
    if evaluate is None:
        return None
    with torch.no_grad(), evaluating(model), of_the_user("evaluate", when):
        found = evaluate(model)
    return metric_of(found, when)


def metric_of(found: Any, when: str) -> float:
    """What `evaluate` gave as a number.

    Raises:
        InputError: if it is none, or is not finite.
    """
    try:
        value = float(found) if isinstance(found, (Real, Tensor, np.ndarray, np.generic)) else math.nan
    except (TypeError, ValueError, RuntimeError):  # several numbers, or complex ones
        value = math.nan
    if math.isfinite(value):
        return value
    raise InputError(f"evaluate must return one finite number, where higher is better; {when} it gave {shown(found)}.")


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval mode for the length of a block, each submodule's own mode restored after it.

    What is compiled runs as it is written meanwhile, so that each of its operations can be seen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _PlainAttention:
    """The fast path of attention is one switch for all threads: the first block turns it off, the last one back."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.blocks:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.blocks += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks:
                torch.backends.mha.set_fastpath_enabled(self.before)


_PLAIN_ATTENTION = _PlainAttention()


def plain_attention() -> AbstractContextManager[None]:
    """`torch.nn.MultiheadAttention` without its inference fast path, one op that hides its layers, in a block."""
    return _PLAIN_ATTENTION


@contextmanager
def as_exported() -> Iterator[None]:
    """A forward as `torch.export` runs it, in a block: one that asks `torch.compiler.is_exporting()` is told yes."""
    with plain_attention(), _compiling_state_context():
        yield


def as_call(example_inputs: Any) -> Call:
    """Bring example inputs to a `Call`.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or `(tuple, dict)` as in `torch.onnx.export`.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        items = tuple(example_inputs)
        if len(items) == 2 and isinstance(items[0], tuple) and isinstance(items[1], dict):
            return Call(items[0], dict(items[1]))
        if items:
            return Call(items, {})
    raise InputError(
        f"example_inputs must be a tensor, a non-empty tuple, or (tuple, dict); got {type(example_inputs).__name__}."
    )


def of_shape(given: Any, like: Call) -> Call:
    """Example inputs, or random values of a shape.

    Args:
        given: what `as_call` takes, or a shape as `(8, 3, 224, 224)`.
        like: inputs of the same model, whose type and device the random values have.

    Raises:
        InputError: if it is neither, or a shape is given for a model of several inputs or of integers.
    """
    if not (isinstance(given, (tuple, list)) and given and all(isinstance(size, int) for size in given)):
        return as_call(given)
    shape = "x".join(map(str, given))
    first = like.args[0] if len(like.args) == 1 and not like.kwargs else None
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise InputError(f"The shape {shape} does not describe all inputs of this model: pass the inputs themselves.")
    if len(given) != first.dim() or min(given) < 1:
        raise InputError(f"The shape {shape} must have {first.dim()} sizes above 0, like {list(first.shape)}.")
    values = torch.randn(*given, generator=torch.Generator().manual_seed(0))
    return Call((values.to(first.device, first.dtype),), {})


def as_batch(batch: Any) -> Batch:
    """Bring one item of a loader to a `Batch`.

    Args:
        batch: `(input, target)`, where input is a tensor or a tuple of arguments; a mapping of keyword
            arguments as Hugging Face loaders give, its label popped; or a bare tensor without target.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        target = next((kwargs.pop(key) for key in LABEL_KEYS if key in kwargs), None)
        return Batch(Call((), kwargs), target)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return Batch(as_call(batch[0]), batch[1])
    if isinstance(batch, Tensor):
        return Batch(as_call(batch), None)
    raise InputError(
        f"A batch must be (input, target), a mapping or a tensor, but the loader gave {type(batch).__name__}. "
        "Wrap the loader so that it yields pairs."
    )


def batches(data: Iterable[Any], limit: int | None = None, *, finite: bool = False) -> Iterator[Batch]:
    """The first `limit` batches of `data` (all if None); no item beyond them is taken from it.

    Args:
        data: anything that can be iterated.
        limit: at most so many.
        finite: whether an input that is not finite is refused.

    Raises:
        InputError: if `limit` is below 1, `data` raises anything, or an item is no batch.
        TrainingError: if `data` is empty, or an input is not finite.
    """
    LIMIT.demand("limit", limit, optional=True)
    with of_the_user("data", "when its iteration began"):
        items = iter(data)
    for number in count(1) if limit is None else range(1, limit + 1):
        with of_the_user("data", f"when batch {number} was taken from it"):
            item = next(items, _END)
        if item is _END and number == 1:
            raise TrainingError(
                "The data loader gave no batch: check its dataset, and that it can be iterated more than once."
            )
        if item is _END:
            return
        found = as_batch(item)._replace(number=number)
        if finite and not_finite(found.call):
            raise TrainingError(f"The inputs of {found.place} hold values that are not finite (NaN or infinity).")
        yield found


_END = object()
_CHECKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_finite(call: Call) -> bool:
    """Whether an input holds NaN or infinity. Minus infinity is let through: a mask that is added may hold it."""
    return any(
        bool((leaf.isnan() | leaf.isposinf()).any())
        for leaf in tree_leaves(tuple(call))
        if isinstance(leaf, Tensor)
        and leaf.dtype in _CHECKED_DTYPES
        and leaf.layout is torch.strided
        and not leaf.is_meta
    )


def logits(output: Any) -> Tensor:
    """The tensor that a loss is taken of: the output itself, its `logits`, or its first tensor.

    Raises:
        InputError: if the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if key in output:
                return logits(output[key])
        output = list(output.values())
    if hasattr(output, "logits"):
        return logits(output.logits)
    if isinstance(output, (tuple, list)) and output:
        return logits(output[0])
    raise InputError(f"The model's output ({type(output).__name__}) holds no tensor from which a loss can be computed.")
