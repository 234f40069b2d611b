"""The architecture of a model: what a plan, a comb or a checkpoint that was made of one model asks of another.

Two models are of one architecture if they have the same modules under the same paths and in the same order, and each
pair of modules

- has classes of one name (their files may be others: a script is `__main__` when it is run). A class that changes
  nothing of what the forward uses counts as the one that it is derived from;
- holds parameters of the same names and shapes, and saved buffers of the same shapes;
- was given the same settings: integers, also inside tuples and plain objects, texts, functions, and what torch's layers
  list in `__constants__`; as far as the forward reads them. So stride, groups, padding, the kind of a `GELU` and the
  number of heads count.

What does not count, so that nobody is refused for it:

- the values of weights, their type and their device; a plan is a list of channels, and holds for all of them;
- the mode, hooks, gradients, what `torch.compile` wraps, and attributes that no forward reads (an epoch, a best score);
- what a forward writes: a model that ran is the one that it was. Buffers that are not saved, and tensors in plain
  attributes, are mostly computed; `cpd.shrink` compares those that a plan narrows by themselves;
- fractions (the share of a dropout, an epsilon, a momentum), which bear on no channel and are tuned while one trains,
  and whether an activation writes over its input;
- the widths that torch's layers keep beside their weights, whose shapes say the same;
- settings and buffers that one of the two lacks: another version of a library has others. Parameters and modules must
  all be there.

A last layer that was replaced by another of its class and shape is thus the same; one for more classes is not.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

from cpd.errors import CPDError
from cpd.model import kept
from cpd.model.skeleton import WIDTHS
from cpd.model.tensors import attributes_of
from cpd.plan import Architecture, Form


def architecture_of(model: nn.Module) -> Architecture:
    """What a model is, apart from the values in it."""
    named = dict(model.named_modules())
    read, written = _attributes_of_forward(frozenset(map(type, named.values())))
    return Architecture({path: _form(module, read, written) for path, module in named.items()})


def check_architecture(
    model: nn.Module, wanted: Architecture | None, error: type[CPDError], what: str, remedy: str
) -> None:
    """Raise unless a model is of an architecture.

    Args:
        model: the model.
        wanted: the architecture; None, where it is not known, fits all.
        error: what is raised.
        what: the beginning of the sentence, such as "The plan was made for".
        remedy: what to do, as a sentence.
    """
    found = None if wanted is None else wanted.difference(architecture_of(model))
    if found is not None:
        raise error(f"{what} another model than this {type(model).__name__}: {found}. {remedy}")


def _form(module: nn.Module, read: frozenset[str], written: frozenset[str]) -> Form:
    unsaved = module._non_persistent_buffers_set
    return Form(
        _kind(type(module), read),
        {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)},
        {
            name: tuple(tensor.shape)
            for name, tensor in module.named_buffers(recurse=False)
            if name not in unsaved and name not in written
        },
        dict(_settings(module, read - written)),
    )


def _kind(kind: type[nn.Module], read: frozenset[str]) -> str:
    """The name of the class that decides what the forward does: the first that has something of what it uses."""
    bases = (base for base in kind.__mro__ if base.__module__.startswith("torch.") or read & vars(base).keys())
    return next(bases, kind).__name__


def _settings(module: nn.Module, names: frozenset[str]) -> Iterator[tuple[str, bool | int | str]]:
    """What a module was given that its forward reads: integers, texts and functions; switches that torch declares."""
    for name, value in kept.integers(module):
        if name.split(".")[0] in names and name not in WIDTHS:
            yield name, value
    declared = {*getattr(type(module), "__constants__", ())} - {"inplace"}
    for name, value in attributes_of(module):
        if (name in names and isinstance(value, str)) or (name in declared and isinstance(value, bool)):
            yield name, value
        elif inspect.isroutine(value) and name in names:
            yield name, value.__name__


@lru_cache(maxsize=64)
def _attributes_of_forward(kinds: frozenset[type[nn.Module]]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of all attributes that forwards of these classes, and the methods that they call, read and write."""
    methods: dict[str, list[Any]] = {}
    for base in {base for kind in kinds for base in kind.__mro__} - {nn.Module, object}:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            methods.setdefault(name, []).append(inspect.unwrap(function) if callable(function) else None)
    read, written, pending = {"forward"}, set[str](), ["forward"]
    while pending:
        codes = [getattr(function, "__code__", None) for function in methods.get(pending.pop(), ())]
        for instruction in _instructions(code for code in codes if code is not None):
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                written.add(instruction.argval)
            elif instruction.opname in _READS and instruction.argval not in read:
                read.add(instruction.argval)
                pending.append(instruction.argval)
    return frozenset(read), frozenset(written)


_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


def _instructions(codes: Iterable[CodeType]) -> Iterator[dis.Instruction]:
    """The instructions of some functions, and of the functions within them."""
    for code in codes:
        yield from dis.get_instructions(code)
        yield from _instructions(part for part in code.co_consts if isinstance(part, CodeType))
