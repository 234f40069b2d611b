"""`Plan`: which channels of which tensors stay, and what else must change with them. Immutable.

A plan needs nothing but itself to be applied to a model of the original architecture: `cpd.shrink(model, plan)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from cpd.errors import ArtifactError, PlanError
from cpd.files.reading import conform
from cpd.options import instance

FORMAT = 1
#: What torch keeps of every module; no plan changes it.
_OF_MODULES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that a forward reads, before and after.

    Attributes:
        module: path of the module.
        name: name of the attribute, e.g. "groups" or "num_heads".
        old: its value in the unpruned model; lists stand for tuples and lists alike.
        new: its value once the plan is applied.
    """

    module: str
    name: str
    old: int | list[int]
    new: int | list[int]


@dataclass(frozen=True)
class Rescale:
    """Rows of a parameter to be multiplied so that a width-dependent constant keeps its old effect.

    Attributes:
        tensor: name of the parameter.
        dim: the dimension that `positions` lie along.
        positions: positions in the unpruned tensor.
        factor: what the kept ones among them are multiplied by.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Cache:
    """An attribute in which a forward keeps what it computed: emptied when widths change, filled by the next forward.

    Attributes:
        module: path of the module.
        name: name of the attribute.
        cold: what it is before the first forward: "absent", "value", "empty" (a tensor without elements) or "entries"
            (a dict or list without tensors).
        value: that value, where `cold` is "value".
    """

    module: str
    name: str
    cold: Literal["absent", "value", "empty", "entries"]
    value: bool | int | float | str | None = None


@dataclass(frozen=True)
class Replacement:
    """A module that goes, and what takes its place.

    Attributes:
        module: path of the module.
        by: "identity" (`torch.nn.Identity`), or what is left out (`cpd.model.removed`): "nothing" of a sum, "empty" of
            a concatenation, "one" of a product.
        copied: what is left of the sum or product is copied, for something is written to it later.
        shaped: what the module gives has the shape of its first argument.
        outputs: how many the module returns in a tuple; None where it is none.
    """

    module: str
    by: Literal["identity", "nothing", "empty", "one"]
    copied: bool = False
    shaped: bool = False
    outputs: int | None = None


def removes(replacements: Iterable[Replacement], name: str) -> bool:
    """Whether a module, parameter or buffer goes with a module that it lies in."""
    return any(name.startswith(f"{item.module}.") for item in replacements)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What a module is, apart from the values in it.

    Attributes:
        kind: the name of its class.
        parameters: the shape of each parameter that it holds itself.
        buffers: the shape of each buffer that it holds itself and saves.
        settings: what its constructor gave it and the forward reads; an integer inside a container by the keys that
            lead to it, joined by dots.
    """

    kind: str
    parameters: Mapping[str, Shape]
    buffers: Mapping[str, Shape]
    settings: Mapping[str, bool | int | str]

    def difference(self, other: Form, path: str) -> str | None:
        """What differs first, as the end of a sentence; None where nothing does."""
        if self.kind != other.kind:
            return f"{path or 'the model itself'} was a {self.kind}, and is a {other.kind}"
        for name in {**self.parameters, **other.parameters}:
            before, now = (form.parameters.get(name) for form in (self, other))
            if before != now:
                return f"{_joined(path, name)} was {_told(before)}, and is {_told(now)}"
        for ours, theirs in ((self.buffers, other.buffers), (self.settings, other.settings)):
            for name in ours:
                if name in theirs and ours[name] != theirs[name]:  # one alone may be of another version of a library
                    return f"{_joined(path, name)} was {_told(ours[name])}, and is {_told(theirs[name])}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        shapes = [{name: list(shape) for name, shape in part.items()} for part in (self.parameters, self.buffers)]
        return {"kind": self.kind, "parameters": shapes[0], "buffers": shapes[1], "settings": dict(self.settings)}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _told(value: Any) -> str:
    return "absent" if value is None else f"of shape {list(value)}" if isinstance(value, tuple) else repr(value)


@dataclass(frozen=True, repr=False)
class Architecture:
    """What a model is, apart from the values in it: `cpd.model.architecture` says what counts.

    Attributes:
        modules: the form of every module by its path, in the order of the model.
    """

    modules: Mapping[str, Form]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it: equal for models that a plan, a comb or a checkpoint of one fits."""
        made = self.to_dict()
        return hashlib.sha256(json.dumps([made["forms"], [*made["modules"].items()]]).encode()).hexdigest()

    def difference(self, other: Architecture) -> str | None:
        """What differs first, as the end of a sentence: "act was a ReLU, and is a GELU"; None where nothing does."""
        for path, form in self.modules.items():
            if path not in other.modules:
                return f"{path} was a {form.kind}, and is absent"
            if (found := form.difference(other.modules[path], path)) is not None:
                return found
        for path, form in other.modules.items():
            if path not in self.modules:
                return f"{path} was absent, and is a {form.kind}"
        return next(
            (
                f"{before} stood where {now} stands in the order of the modules"
                for before, now in zip(self.modules, other.modules, strict=True)
                if before != now
            ),
            None,
        )

    def narrowed(self, plan: Plan) -> Architecture:
        """What a model of this architecture is once a plan of it has been applied."""
        modules = {path: form for path, form in self.modules.items() if not removes(plan.replacements, path)}
        modules |= {
            item.module: Form("Identity" if item.by == "identity" else "Removed", {}, {}, {})
            for item in plan.replacements
            if item.module in modules
        }

        def change(path: str, part: str, new: Mapping[str, Any]) -> None:
            old: Mapping[str, Any] = getattr(modules[path], part) if path in modules else {}
            if new.keys() & old.keys():
                values: Any = {name: new.get(name, value) for name, value in old.items()}
                modules[path] = replace(modules[path], **{part: values})

        for tensor, dims in plan.kept.items():
            path, _, name = tensor.rpartition(".")
            shape = tuple(len(dims.get(dim, range(size))) for dim, size in enumerate(plan.shapes[tensor]))
            change(path, "parameters", {name: shape})
            change(path, "buffers", {name: shape})
        for item in plan.attributes:
            if isinstance(item.new, list):
                change(item.module, "settings", {f"{item.name}.{at}": part for at, part in enumerate(item.new)})
            else:
                change(item.module, "settings", {item.name: item.new})
        for cache in plan.caches:  # emptied, whatever was in it
            if cache.module in modules:
                form = modules[cache.module]
                left = {name: value for name, value in form.settings.items() if name.split(".")[0] != cache.name}
                modules[cache.module] = replace(form, settings=left)
        return Architecture(modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Each form is stored once, however many modules have it."""
        numbers: dict[str, int] = {}
        modules = {
            path: numbers.setdefault(json.dumps(form.to_dict(), sort_keys=True), len(numbers))
            for path, form in self.modules.items()
        }
        return {"forms": [json.loads(text) for text in numbers], "modules": modules}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote.

        Raises:
            ArtifactError: if `data` is none.
        """
        saved = conform(data, _SavedArchitecture, "an architecture")
        forms, numbers = saved["forms"], saved["modules"]
        if any(not 0 <= number < len(forms) for number in numbers.values()):
            raise ArtifactError("This is not an architecture that cpd wrote: a module has a form that is not there.")
        return Architecture({path: forms[number] for path, number in numbers.items()})


class _SavedArchitecture(TypedDict):
    """What `Architecture.to_dict` gives."""

    forms: tuple[Form, ...]
    modules: dict[str, int]


class _Saved(TypedDict):
    """What `Plan.to_dict` gives."""

    format: int
    groups: dict[str, tuple[int, ...]]
    indices: tuple[tuple[int, ...], ...]
    kept: dict[str, dict[str, int]]
    shapes: dict[str, tuple[int, ...]]
    attributes: tuple[Attribute, ...]
    rescales: tuple[Rescale, ...]
    adjusted: tuple[str, ...]
    caches: NotRequired[tuple[Cache, ...]]
    architecture: NotRequired[Any]
    removed: NotRequired[tuple[str, ...]]
    replacements: NotRequired[tuple[Replacement, ...]]


@dataclass(frozen=True, repr=False)
class Plan:
    """Which channels of a model are kept, and everything else that changes with them. A plan cannot be changed.

    Attributes:
        kept: {parameter or buffer name: {dim: LongTensor of kept indices, ascending}}, for the tensors that change.
        groups: {group name: kept channels}, for every group.
        shapes: Shape in the unpruned model of every tensor in `kept`.
        attributes: Module attributes that change with the widths.
        rescales: Rows of parameters that are multiplied by a factor, so that constants that depend on a width keep
            their effect.
        adjusted: One sentence for each group that keeps more channels than asked for, because a tie requires it.
        caches: Attributes in which the forward stored values at the old widths. They are emptied.
        architecture: The architecture to which the plan can be applied; None in plans of early versions of cpd.
        removed: Names of the branches that are removed as a whole.
        replacements: The modules that are removed with branches, and what replaces each.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    groups: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: tuple[Attribute, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    adjusted: tuple[str, ...] = field(default=())
    caches: tuple[Cache, ...] = field(default=())
    architecture: Architecture | None = None
    removed: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = ()

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(dims)) for name, dims in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(frozen))
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))

    def __repr__(self) -> str:
        """A summary of what changes; the channels themselves are in `groups` and `kept`."""
        count = len(self.removed)
        removed = f"{count} branch{'es' * (count > 1)} removed, " if count else ""
        told = f"{len(self.kept)} tensors narrower, {len(self.groups)} groups, {len(self.attributes)} attributes"
        return f"Plan({removed}{told})"

    @property
    def changes(self) -> bool:
        """Whether the plan removes anything."""
        return bool(self.kept or self.replacements)

    def since(self, earlier: Plan) -> Plan:
        """The plan that leads from a model already shrunk by `earlier` to the result of this plan.

        Args:
            earlier: A plan of the same original model, which keeps everything that this plan keeps.

        Raises:
            PlanError: If this plan keeps what the earlier one removes, or if it belongs to another architecture.
        """
        PLAN.demand("earlier", earlier)
        if self.architecture and earlier.architecture:
            found = earlier.architecture.difference(self.architecture)
            if found is not None:
                raise PlanError(
                    f"The two plans belong to different models: in this one, {found}. Make both with the same comb."
                )
        back = sorted(set(earlier.removed) - set(self.removed))
        if back:
            raise PlanError(f"This plan keeps {back[0]}, which the earlier one removes.")
        kept, shapes = dict[str, dict[int, Tensor]](), dict[str, tuple[int, ...]]()
        for name in (name for name in {**earlier.kept, **self.kept} if not removes(self.replacements, name)):
            before, now = earlier.kept.get(name, {}), self.kept.get(name, {})
            full = self.shapes.get(name) or earlier.shapes[name]
            narrower = tuple(len(before.get(dim, range(size))) for dim, size in enumerate(full))
            for dim in sorted({*before, *now}):
                left = before.get(dim, torch.arange(full[dim]))
                index = _within(left, now.get(dim, torch.arange(full[dim])), f"{name} dim {dim}")
                if len(index) < len(left):
                    kept.setdefault(name, {})[dim] = index
            if name in kept:
                shapes[name] = narrower
        groups = {
            name: tuple(_within(torch.tensor(earlier.groups[name]), torch.tensor(positions), name).tolist())
            for name, positions in self.groups.items()
        }
        return Plan(
            kept, groups, shapes, self._attributes_since(earlier), self._rescales_since(earlier), self.adjusted,
            self.caches, earlier.architecture and earlier.architecture.narrowed(earlier),
            tuple(name for name in self.removed if name not in earlier.removed),
            tuple(item for item in self.replacements if item not in earlier.replacements),
        )  # fmt: skip

    def _attributes_since(self, earlier: Plan) -> tuple[Attribute, ...]:
        ours, theirs = ({(item.module, item.name): item for item in plan.attributes} for plan in (self, earlier))
        steps = [
            Attribute(
                *key,
                theirs[key].new if key in theirs else ours[key].old,
                ours[key].new if key in ours else theirs[key].old,
            )
            for key in {**theirs, **ours}
            if not removes(self.replacements, f"{key[0]}.{key[1]}")
        ]
        return tuple(step for step in steps if step.old != step.new)

    def _rescales_since(self, earlier: Plan) -> tuple[Rescale, ...]:
        factors: dict[tuple[str, int, tuple[int, ...]], float] = {}
        for plan, power in ((earlier, -1), (self, 1)):
            for item in plan.rescales:
                key = (item.tensor, item.dim, item.positions)
                factors[key] = factors.get(key, 1.0) * item.factor**power
        found = []
        for (tensor, dim, positions), factor in factors.items():
            if removes(self.replacements, tensor):
                continue
            left = earlier.kept.get(tensor, {}).get(dim)
            if left is not None:
                stays = torch.isin(left, torch.tensor(positions))
                positions = tuple(stays.nonzero()[:, 0].tolist())
            if factor != 1 and positions:
                found.append(Rescale(tensor, dim, positions, factor))
        return tuple(found)

    @property
    def digest(self) -> str:
        """SHA-256 of all kept channels. It is equal for plans that make the same model."""
        made = {
            key: value for key, value in self.to_dict().items() if key not in ("adjusted", "caches", "architecture")
        }
        return hashlib.sha256(json.dumps(made | {"adjusted": []}, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types. A list of kept indices that several tensors share is stored once."""
        table: dict[tuple[int, ...], int] = {}

        def number(indices: Tensor) -> int:
            return table.setdefault(tuple(indices.tolist()), len(table))

        kept = {name: {str(dim): number(index) for dim, index in dims.items()} for name, dims in self.kept.items()}
        return {
            "format": FORMAT,
            "groups": {name: list(positions) for name, positions in self.groups.items()},
            "indices": [list(indices) for indices in table],
            "kept": kept,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": [vars(attribute) for attribute in self.attributes],
            "rescales": [{**vars(item), "positions": list(item.positions)} for item in self.rescales],
            "adjusted": list(self.adjusted),
            **({"caches": [vars(cache) for cache in self.caches]} if self.caches else {}),
            **({} if self.architecture is None else {"architecture": self.architecture.to_dict()}),
            **({"removed": list(self.removed)} if self.removed else {}),
            **({"replacements": [vars(item) for item in self.replacements]} if self.replacements else {}),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from the dict that `to_dict` returned.

        Raises:
            ArtifactError: If `data` is not a plan, or has another format.
        """
        if isinstance(data, Mapping) and data.get("format", FORMAT) != FORMAT:
            raise ArtifactError(f"The plan has format {data['format']!r}, but this version of cpd reads {FORMAT}.")
        found = conform(data, _Saved, "a plan")
        if fault := _fault(found):
            raise ArtifactError(f"This is not a plan that cpd wrote: {fault}.")
        indices = [torch.tensor(item, dtype=torch.long) for item in found["indices"]]
        return Plan(
            kept={
                name: {int(dim): indices[number] for dim, number in dims.items()}
                for name, dims in found["kept"].items()
            },
            groups=found["groups"],
            shapes=found["shapes"],
            attributes=found["attributes"],
            rescales=found["rescales"],
            adjusted=found["adjusted"],
            caches=found.get("caches", ()),
            architecture=Architecture.from_dict(found["architecture"]) if "architecture" in found else None,
            removed=found.get("removed", ()),
            replacements=found.get("replacements", ()),
        )


def _fault(found: _Saved) -> str | None:
    """What of a plan makes no sense, whatever the model is."""
    shapes, indices = found["shapes"], found["indices"]
    for what, channels in (*found["groups"].items(), *(("the table of indices", item) for item in indices)):
        if any(first >= second for first, second in pairwise((-1, *channels))):
            return f"the channels kept of {what} are not ascending from 0 on"
    for name, dims in found["kept"].items():
        shape = shapes.get(name, ())
        for dim, number in dims.items():
            if not (dim.isdecimal() and dim.isascii() and int(dim) < len(shape) and 0 <= number < len(indices)):
                return f"{name} has no dim {dim}, or there is no list {number} of what is kept of it"
            if not indices[number] or indices[number][-1] >= shape[int(dim)]:
                return f"what is kept of {name} does not lie within its {shape[int(dim)]} channels"
    for rescale in found["rescales"]:
        if rescale.dim < 0 or min(rescale.positions, default=0) < 0:
            return f"a dim or a channel of {rescale.tensor} that is scaled is below 0"
    settings: list[Attribute | Cache] = [*found["attributes"], *found.get("caches", ())]
    for item in settings:
        if item.name.startswith("__") or ".__" in item.name or item.name.partition(".")[0] in _OF_MODULES:
            return f"{item.module}.{item.name} is no setting of a module"
    for attribute in found["attributes"]:
        old, new = attribute.old, attribute.new
        lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
        if not lists and not (isinstance(old, int) and isinstance(new, int)):
            return f"{attribute.module}.{attribute.name} is {old} before and {new} after"
    return None


PLAN = instance(Plan, "a plan: the result of comb.plan({group: channels})")


def _within(left: Tensor, kept: Tensor, what: str) -> Tensor:
    """Where in `left`, ascending, each of `kept` is.

    Raises:
        PlanError: if one is not.
    """
    index = torch.searchsorted(left, kept).clamp_max(len(left) - 1)
    if not torch.equal(left[index], kept):
        raise PlanError(f"This plan keeps channels of {what} that the earlier one removes.")
    return index
