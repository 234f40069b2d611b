"""Tensors of a model by name, and copies: of all of them, of the kept part of one, of the whole model."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cpd.errors import InputError

Container: TypeAlias = "dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | deque[Any]"

#: How deep containers and objects inside an attribute are followed, and what is not.
DEPTH = 3
_OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes, int, float, complex, torch.dtype)
_SIMPLE = {type(None), bool, int, float, str, torch.dtype, torch.device}
#: Bytes that `hash_of` adds up at a time.
BLOCK = 4096
REGISTERED = ("_parameters", "_buffers", "_modules")
#: What every module has.
_OF_MODULE = frozenset(vars(nn.Module()))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a module keeps as a plain attribute, unless it is computed anew before each forward."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and name not in derived(module)
    }


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, every buffer, and every tensor that is a plain attribute."""
    return {**named_tensors(model), **plain_tensors(model)}


def derived(module: nn.Module) -> dict[str, Any]:
    """The attributes that a hook of `torch.nn.utils` computes from parameters before each forward, with the hook.

    Masks of `torch.nn.utils.prune`, and the older `weight_norm` and `spectral_norm`.
    """
    hooks = module._forward_pre_hooks.values()
    found = [hook for hook in hooks if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm))]
    return {hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name: hook for hook in found}


def attributes_of(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module keeps beside its mode, its parameters, buffers, submodules and hooks."""
    return [(name, value) for name, value in vars(module).items() if name not in _OF_MODULE]


def containers(value: Any, seen: set[int], depth: int = DEPTH) -> Iterator[Container]:
    """Every container in a value, itself included, and the attributes of the plain objects in it."""
    kind = type(value)
    if kind in _SIMPLE or (kind is tuple and all(type(item) in _SIMPLE for item in value)):
        return
    if depth == 0 or isinstance(value, _OPAQUE) or id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, (dict, list, tuple, set, deque)):
        value = getattr(value, "__dict__", None)
        if not isinstance(value, dict):
            return
    yield value
    for item in items_of(value):
        yield from containers(item, seen, depth - 1)


def items_of(container: Container) -> list[Any]:
    """What a container holds."""
    return list(container.values() if isinstance(container, dict) else container)


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor in the attributes of the modules, those in containers included."""
    seen: set[int] = set()
    for module in model.modules():
        for _, value in attributes_of(module):
            if isinstance(value, Tensor):
                yield value
            for found in containers(value, seen):
                yield from (item for item in items_of(found) if isinstance(item, Tensor))


def own_buffers(model: nn.Module) -> None:
    """Give a copy of a model buffers of its own, in place of those that it shares; tied ones stay tied."""
    copies = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for module in model.modules():
        module._buffers.update({name: copies.get(id(buffer)) for name, buffer in module._buffers.items()})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def hash_of(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors: of their names, types and shapes, and of the sum of each block of bytes.

    The sums are taken of whole numbers, so they are exact, and the same on every device; 100 million weights take
    about 0.1 s, where hashing every byte takes 0.3 s. What is no tensor (`extra_state`) is left out.
    """
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        plain = tensor.detach().resolve_conj().resolve_neg().flatten().contiguous()
        data = (plain if plain.storage_offset() == 0 else plain.clone()).view(torch.uint8)
        whole = len(data) // BLOCK * BLOCK
        sums = data[:whole].view(torch.int64).view(-1, BLOCK // 8).sum(1)
        for part in (sums, data[whole:]):
            found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write back what `state_of` kept."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor along each dimension named."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model; tensors that hang on the graph of an earlier forward are copied without it.

    Args:
        model: the model.
        memo: what stands in the copy for some objects, by their `id`.

    Raises:
        InputError: if it cannot be copied.
    """
    if memo is None:
        memo = {id(tensor): tensor.detach().clone() for tensor in loose_tensors(model) if not tensor.is_leaf}
    try:
        _copy_modules(model, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may hold anything
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); compress works on a copy. "
            "Detach tensors that the module keeps, or define __deepcopy__."
        ) from error


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put a copy of every module that copies as most do into `memo`, in a third of the time that `deepcopy` takes.

    Most of what a module holds is numbers and the empty dicts of its hooks, which need no looking up. A module that
    copies in its own way may read those within it: all of them are left to `deepcopy`.
    """
    modules = [module for module in model.modules() if id(module) not in memo]
    usual = {kind: _copies_as_usual(kind) for kind in {type(module) for module in modules}}
    own_way = {id(within) for module in modules if not usual[type(module)] for within in module.modules()}
    copies = [(module, type(module).__new__(type(module))) for module in modules if id(module) not in own_way]
    memo.update((id(module), new) for module, new in copies)
    for module, new in copies:
        state: dict[str, Any] = {}
        for name, value in module.__getstate__().items():
            if type(value) in _SIMPLE:
                state[name] = value
            elif name in _OF_MODULE and not value:
                state[name] = type(value)()
            elif name in REGISTERED:
                state[name] = type(value)(
                    (key, memo[id(item)] if id(item) in memo else copy.deepcopy(item, memo))
                    for key, item in value.items()
                )
            else:
                state[name] = copy.deepcopy(value, memo)
        new.__setstate__(state)


def _copies_as_usual(kind: type[nn.Module]) -> bool:
    """Whether `deepcopy` of a module of some class copies its attributes and no more."""
    inherited = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
    return (
        all(getattr(kind, name) is getattr(nn.Module, name) for name in inherited)
        and kind.__setstate__.__module__.startswith("torch.nn.")
        and not any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
        and not any("__slots__" in vars(base) for base in kind.__mro__[:-1])
    )
