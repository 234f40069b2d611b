"""State that a forward keeps beside parameters and buffers: attributes that it sets, caches in dicts and lists.

A forward may keep what it once computed: a grid of anchors, a mask, a table of positions. Traced, it keeps tensors
without values, which break the model; and a model that has run shows its trace constants where a new one shows how they
come about. So what a forward keeps is put back after each run of ours (`preserved`), and a model is combed as if it had
never run (`cold`): each cache is emptied, if the forward then fills it again and gives the same output.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.errors import let_through
from cpd.model.inputs import Call, evaluating
from cpd.model.skeleton import skeleton
from cpd.model.tensors import DEPTH, REGISTERED, Container, attributes_of, containers, derived, items_of, own_buffers
from cpd.plan import Cache

_NOTHING: dict[Any, Any] = {}
#: What is called beside a module's forward. A forward may add to it when it first runs, and note that it has.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class _Kept:
    """A container at some moment.

    Args:
        module: path of the module that it belongs to.
        name: the attribute of the module that holds it; "" for the module's own attributes.
        container: the container itself, changed by the forward.

    Attributes:
        content: what it held.
    """

    __slots__ = ("container", "content", "module", "name")

    def __init__(self, module: str, name: str, container: Container) -> None:
        self.module, self.name, self.container = module, name, container
        self.content: Container = container
        if not isinstance(container, tuple):
            self.content = container.copy() if container or not isinstance(container, dict) else _NOTHING

    def changed(self) -> bool:
        """Whether it holds other objects now."""
        now, before = self.container, self.content
        if isinstance(now, dict) and isinstance(before, dict):
            return len(now) != len(before) or any(before.get(key, _ABSENT) is not now[key] for key in now)
        if isinstance(now, (set, tuple)):
            return now != before
        return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))

    def restore(self) -> None:
        """Put back what it held."""
        if isinstance(self.container, tuple) or not self.changed():
            return
        self.container.clear()
        if isinstance(self.container, (list, deque)):
            self.container.extend(self.content)
        else:
            self.container.update(self.content)


_ABSENT = object()


#: The path of a module and the name of an attribute of it.
Site: TypeAlias = tuple[str, str]


class Snapshot:
    """What the modules of a model keep at some moment: their attributes, and what the containers in them hold.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[_Kept] = []
        self.modules = dict(model.named_modules())
        seen: set[int] = set()
        for path, module in self.modules.items():
            own = module.__dict__
            self.kept.append(_Kept(path, "", own))
            self.kept += [_Kept(path, name, own[name]) for name in (*REGISTERED, *_HOOKS) if name in own]
            for name, value in attributes_of(module):
                self.kept += (_Kept(path, name, found) for found in containers(value, seen))

    def restore(self, *, registered: bool = True) -> None:
        """Put everything back; parameters, buffers and submodules only if `registered`."""
        for one in self.kept:
            if registered or one.name not in REGISTERED:
                one.restore()

    def changed(self) -> dict[Site, Any]:
        """Attributes of modules that are or hold other objects now, with what they were; buffers that were none."""
        found: dict[Site, Any] = {}
        for one in self.kept:
            now, before = one.container, one.content
            if one.name in ("_parameters", "_modules", *_HOOKS) or not one.changed():
                continue
            if one.name not in ("", "_buffers"):
                found.setdefault((one.module, one.name), one.container)
            elif isinstance(now, dict) and isinstance(before, dict):
                names = [name for name in now if before.get(name, _ABSENT) is not now[name]]
                new = {(one.module, name): before.get(name, _ABSENT) for name in names}
                found.update(new if not one.name else {at: was for at, was in new.items() if was in (_ABSENT, None)})
        return found

    def filled(self, changed: Iterable[Site]) -> set[Site]:
        """Those of the attributes that hold tensors now."""
        return {(path, name) for path, name in changed if holds_tensor(getattr(self.modules[path], name, None))}

    def caches(self) -> list[Cache]:
        """How each attribute is emptied that has changed since, in modules that keep tensors in one of them."""
        changed = self.changed()
        modules = {path for path, _ in self.filled(changed)}
        emptied = (_emptied(path, name, before) for (path, name), before in changed.items() if path in modules)
        return [cache for cache in emptied if cache is not None]


def holds_tensor(value: Any, depth: int = DEPTH, *, values: bool = False) -> bool:
    """Whether a value is a tensor but no parameter, or a container of some; if `values`, one that has elements."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and (not values or value.numel() > 0)
    if depth == 0 or not isinstance(value, (dict, list, tuple, set, deque)):
        return False
    return any(holds_tensor(item, depth - 1, values=values) for item in items_of(value))


def _emptied(module: str, name: str, cold: Any) -> Cache | None:
    """How an attribute becomes again what it was before the first forward; None where that cannot be written down."""
    if cold is _ABSENT:
        return Cache(module, name, "absent")
    if cold is None or isinstance(cold, (bool, int, float, str)):
        return Cache(module, name, "value", cold)
    if isinstance(cold, Tensor) and cold.numel() == 0:
        return Cache(module, name, "empty")
    return Cache(module, name, "entries") if isinstance(cold, (dict, list)) else None


def forget(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Empty caches of a model, in place; those that it does not have, or does not fill, are as they should be."""
    modules = dict(model.named_modules())
    for cache in caches:
        module = modules.get(cache.module)
        own: dict[str, Any] = {} if module is None else module.__dict__
        if module is not None and cache.name in module._buffers:
            own = module._buffers
        if module is None or cache.name not in own:
            continue
        if cache.cold == "absent" or (own is not module._buffers and isinstance(_of_class(module, cache.name), Tensor)):
            del own[cache.name]  # what its class has is what a model that never ran has
        elif cache.cold == "entries":
            own[cache.name] = _without_tensors(own[cache.name])
        else:
            own[cache.name] = torch.empty(0) if cache.cold == "empty" else cache.value


def _of_class(module: nn.Module, name: str) -> Any:
    return getattr(type(module), name, None)


def _without_tensors(value: Any) -> Any:
    """A dict without the entries that hold tensors, a list with empty tensors in their place."""
    if isinstance(value, dict):
        left = value.copy()
        for key in [key for key, item in value.items() if holds_tensor(item)]:
            del left[key]
        return left
    return [torch.empty(0) if isinstance(item, Tensor) else item for item in value]


# ---------------------------------------------------------------- preserved


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """What a model keeps, and what its code remembers, is put back after a block; the snapshot tells what changed."""
    snapshot = Snapshot(model)
    with code_memory_preserved(model):
        try:
            yield snapshot
        finally:
            snapshot.restore()


@contextmanager
def code_memory_preserved(model: nn.Module) -> Iterator[None]:
    """What the code of a model remembers beside its instances is put back after a block.

    Functions that remember tensors (`functools.lru_cache`) forget them, before and after.
    """
    tables = _tables(model)
    functions = [one for one in _code_memory(_kinds(model)) if not isinstance(one, (dict, list))]
    _forget_results(functions)
    try:
        yield
    finally:
        _forget_results(functions)
        for table in tables:
            table.restore()


def _kinds(model: nn.Module) -> frozenset[type]:
    return frozenset(map(type, model.modules()))


def _tables(model: nn.Module) -> list[_Kept]:
    """The dicts and lists in which the code of a model could keep tensors."""
    return [_Kept("", "", one) for one in _code_memory(_kinds(model)) if isinstance(one, (dict, list))]


#: The type of a function that remembers its results.
_REMEMBERING = type(functools.lru_cache(lambda: None))


@functools.lru_cache(maxsize=64)
def _code_memory(kinds: frozenset[type]) -> list[Any]:
    """What could cache tensors beside the instances: memoized functions, and dicts and lists of classes and files."""
    spaces: dict[int, Any] = {}
    for kind in kinds:
        for base in kind.__mro__:
            root = base.__module__.partition(".")[0]
            if root not in ("torch", "builtins", "cpd") and base.__module__ in sys.modules:
                spaces[id(base)] = vars(base)
                spaces[id(vars(sys.modules[base.__module__]))] = vars(sys.modules[base.__module__])
    found: dict[int, Any] = {}
    for space in spaces.values():
        for name, value in space.items():
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            is_table = isinstance(value, (dict, list)) and not name.startswith("__")
            if (is_table and (not value or holds_tensor(value))) or isinstance(function, _REMEMBERING):
                found[id(function)] = function
    return list(found.values())


def _forget_results(functions: Iterable[Any]) -> None:
    """Clear the memory of those functions whose remembered results hold tensors."""
    for function in functions:
        if function.cache_info().currsize and _remembers_tensor(function):
            function.cache_clear()


def _remembers_tensor(function: Any) -> bool:
    pending, seen = gc.get_referents(function), set[int]()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            return True
        if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType, nn.Module, str, int)):
            continue
        seen.add(id(item))
        if isinstance(item, (dict, list, tuple)) or type(item).__module__ == "functools":
            pending += gc.get_referents(item)
    return False


# ---------------------------------------------------------------- cold

#: Attributes that may tell a forward whether a cache still holds, and what they are in a model that has never run.
_KEYS: tuple[tuple[tuple[type, ...], Any], ...] = (
    ((tuple, torch.Size, torch.device, torch.dtype), None), ((bool,), False), ((int,), 0),
)  # fmt: skip
#: Attributes tried as the key of one cache.
MAX_KEYS = 8


def cold(model: nn.Module, call: Call) -> tuple[nn.Module, list[Cache]]:
    """A copy of a model as if it had never run, and the caches that were emptied in it.

    An attribute that holds tensors is a cache if the copy without it fills it again and gives the same output.
    Parameters are shared with the model, buffers are not. Caches of classes and files are emptied too, until the block
    of `preserved` ends in which this runs.

    Args:
        model: the model; left as it is.
        call: the example inputs.
    """
    base = skeleton(model, {})
    own_buffers(base)
    sites = _sites(base)
    alone = _calls(base, call, [paths[0] for paths, _ in sites]) if sites else {}
    expected: _Run | None = None
    emptied: list[Cache] = []
    for paths, names in sites:
        known: set[str] = set()
        for trial, concerned in _trials(base, paths, names):
            if not concerned - known or not _may_fill(base, paths[0], alone, trial, concerned):
                continue
            expected = expected or _ran(base, call, ())
            found = _ran(base, call, [*emptied, *trial])
            if expected is not None and found is not None and _same(found.output, expected.output):
                filled = {name for name in concerned if all((path, name) in found.filled for path in paths)}
                again = {name for name in filled if (paths[0], name) in expected.filled}  # by every forward
                filled -= again if len(concerned) > 1 else set()
                emptied += trial if filled - known else ()
                known |= filled
    forget(base, emptied)
    _empty_tables(base, call)
    return base, emptied


def _empty_tables(model: nn.Module, call: Call) -> None:
    """Empty the dicts and lists of a model's classes and files that its forward fills, to give the same."""
    tables = [table for table in _tables(model) if holds_tensor(table.container)]
    expected = _ran(model, call, ()) if tables else None
    for table in tables:
        table.container.clear()  # type: ignore[union-attr]
    found = _ran(model, call, ()) if expected is not None else None
    same = expected is not None and found is not None and _same(found.output, expected.output)
    for table in tables:
        if found is None or not same or id(table.container) not in found.tables:
            table.restore()


def _calls(model: nn.Module, call: Call, paths: Iterable[str]) -> dict[str, Call] | None:
    """How a forward calls some modules, without values; None where the model needs some."""
    copy = skeleton(model, {}, meta=True)
    found: dict[str, Call] = {}
    for path in paths:
        copy.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: found.setdefault(path, Call(args, kwargs)) and None, with_kwargs=True
        )
    return found if _ran_on(copy, call.to("meta")) is not None else None


def _may_fill(
    model: nn.Module, path: str, calls: dict[str, Call] | None, trial: list[Cache], concerned: set[str]
) -> bool:
    """Whether a module alone, without values, fills a buffer again: told at little cost, as many models have some."""
    if any(name in dict(attributes_of(model.get_submodule(path))) for name in concerned):
        return True  # rare, and filling it may take values
    if calls is None or path not in calls:
        return False
    module = skeleton(model.get_submodule(path), {}, meta=True)
    forget(module, [replace(cache, module="") for cache in trial if cache.module == path])
    run = _ran_on(module, calls[path])
    return run is not None and any(("", name) in run.filled for name in concerned)


def _sites(model: nn.Module) -> list[tuple[list[str], list[str]]]:
    """The modules of each class that keep values in attributes or in buffers that are not saved; the names of those."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for path, module in model.named_modules():
        ours = derived(module)
        names = [name for name, value in attributes_of(module) if name not in ours and holds_tensor(value, values=True)]
        unsaved = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        if names or unsaved:
            found.setdefault((type(module), *names, *unsaved), []).append(path)
    return [(paths, names) for (_, *names), paths in found.items()]


def _trials(model: nn.Module, paths: list[str], names: list[str]) -> Iterator[tuple[list[Cache], set[str]]]:
    """Ways to empty caches of some modules of one class, each with the attributes that may then be filled again.

    First the keys: one that does not fit makes a forward fill anew what it keeps under it. Then each attribute itself.

    Args:
        model: the model.
        paths: of the modules.
        names: of the attributes that hold tensors.
    """
    own = dict(attributes_of(model.get_submodule(paths[0])))
    keys = {name: new for kinds, new in _KEYS for name, value in own.items() if type(value) in kinds and value != new}
    shapes = {name: None for name, new in keys.items() if new is None}
    plain = {name for name in names if name in own}
    singles = [{name: new} for name, new in list(keys.items())[:MAX_KEYS]]
    for reset in (*singles, shapes) if plain else ():
        if reset:
            yield [Cache(path, name, "value", new) for path in paths for name, new in reset.items()], plain
    for name in names:
        single = isinstance(own.get(name), Tensor) or name not in own
        for way in ("value", "absent", *(("empty",) if name in own else ())) if single else ("entries",):
            yield [Cache(path, name, way) for path in paths], {name}


@dataclass(frozen=True)
class _Run:
    """What a forward gave, and the attributes, and the tables of its code (by `id`), that then held tensors."""

    output: list[Any]
    filled: set[Site]
    tables: set[int]


def _ran(model: nn.Module, call: Call, caches: Iterable[Cache]) -> _Run | None:
    """Run a copy of a model with some caches emptied; None where that fails."""
    trial = skeleton(model, {})
    forget(trial, caches)
    return _ran_on(trial, call)


def _ran_on(model: nn.Module, call: Call) -> _Run | None:
    """Run a model that is thrown away; None where that fails."""
    snapshot = Snapshot(model)
    with code_memory_preserved(model), torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        torch.manual_seed(0)
        try:
            output = tree_leaves(call.on(model))
        except Exception as error:  # the user's forward may raise anything
            let_through(error)
            return None
        held = {id(one.container) for one in _tables(model) if holds_tensor(one.container)}
    return _Run(output, snapshot.filled(snapshot.changed()), held)


def _same(left: list[Any], right: list[Any]) -> bool:
    """Whether two outputs are equal."""
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(left, right, strict=True)
    )
