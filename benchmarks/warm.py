"""Whether what a comb finds depends on what the model did before, and whether it leaves the model as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

import cpd
from cpd.coupling.comb import Comb
from cpd.errors import CPDError
from cpd.model.inputs import Call


def _run(model: nn.Module, call: Call) -> None:
    with torch.no_grad():
        call.on(model)


def _train(model: nn.Module, call: Call) -> None:
    model.train()
    call.resized(2).on(model)
    model.eval()


#: What a model did before it is combed.
HISTORIES: dict[str, Callable[[nn.Module, Call], Any]] = {
    "a forward without gradients": _run,
    "a forward": lambda model, call: call.on(model),
    "a forward in train mode": _train,
}


def groups_of(comb: Comb) -> list[tuple]:
    """All that a user reads of the groups, but for the wording of the reasons."""
    return [
        (group.name, group.size, group.minimum, group.frozen is None, group.exact, sorted(map(str, group.members)))
        for group in comb.groups
    ]


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every object that the modules hold, those in their containers too, by place; a tuple is what it holds."""
    paths = model.named_modules(remove_duplicate=False)
    return {place: item for path, module in paths for place, item in _opened(f"{path}.", vars(module))}


def _opened(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, weakref.ref):  # torch makes those of recurrent layers anew
        value = value()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    yield place, len(value) if isinstance(value, tuple) else value
    for key, item in items:
        yield from _opened(f"{place}[{key!r}]", item)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Places that hold another object, or none, or one that was not there."""
    return [place for place in {**before, **after} if before.get(place, changed) is not after.get(place, changed)]


def check_warm(make: Callable[[], nn.Module], call: Call, cold: Comb) -> str:
    """The groups of a model that has run are those of a new one; comb and export leave every attribute as it was."""
    model = make()
    _left_alone(model, "comb", lambda: cpd.comb(model, call))
    _left_alone(model, "the export", lambda: _exported(model, call))
    for history, run in HISTORIES.items():
        model = make()
        try:
            run(model, call)
        except Exception:  # batch statistics of one value, say
            continue
        after = _left_alone(model, f"comb after {history}", lambda model=model: cpd.comb(model, call))
        found, wanted = groups_of(after), groups_of(cold)
        other = [one[:4] for one in found if one not in wanted] + [one[:4] for one in wanted if one not in found]
        assert not other, f"after {history}, {len(other)} groups differ: {other[:3]}"
    return "ok"


def _left_alone(model: nn.Module, what: str, act: Callable[[], Any]) -> Any:
    """What `act` gives, once it is seen that it left every attribute of the model the object that it was."""
    before, modes = attributes(model), [module.training for module in model.modules()]
    result = act()
    assert not (places := changed(before, attributes(model))), f"{what} changed {places[:5]}"
    assert modes == [module.training for module in model.modules()]
    return result


def _exported(model: nn.Module, call: Call) -> None:
    with suppress(CPDError):  # not every model can be exported
        cpd.export_onnx(model, call, check=False)
