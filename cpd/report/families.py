"""A family of models in one folder: the weights of the widest whole, of the others only what is not a slice of it.

family.safetensors   0/NAME: a tensor of the widest; 1/NAME, 2/NAME, …: one of another member that is no slice of it;
                     inputs/0, …: what latency is measured on, where those are plain tensors
family.json          the plans, the figures, how a fresh model is built, and the checksum of the weights
report.html          the members compared

No pickle is read or written. The files are put in place as a whole, as those of a single result are.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from cpd.errors import ArtifactError, PlanError, ShrinkError
from cpd.files.folder import reading, write_files
from cpd.files.reading import check_signed, conform, naming, read_json, signed
from cpd.model.recorded import rebuilt
from cpd.model.tensors import copy_of
from cpd.plan import Plan
from cpd.report.artifacts import FAMILY_SHEET as SHEET
from cpd.report.artifacts import FAMILY_WEIGHTS as WEIGHTS
from cpd.report.artifacts import PAGE, check_fit, unique_tensors
from cpd.report.records import Figures, SweepPoint, plain_fields
from cpd.report.report import sweep_page
from cpd.surgery.shrink import shrink

FORMAT = "cpd-family-1"


class _Saved(TypedDict):
    """What `family.json` holds; the architecture that all plans are of is written once."""

    format: str
    source: str | None
    model_class: str
    metric_name: str
    original: Figures
    points: tuple[SweepPoint, ...]
    architecture: Any
    plans: tuple[dict[str, Any], ...]
    weights_sha256: str


@dataclass(frozen=True)
class FamilyRecord:
    """A family as it is written and read.

    Attributes:
        models: the members, the widest first.
        plans: what each keeps of the original.
        points: one a speed-up that was asked for, those out of reach among them.
        original: figures of the unpruned model.
        source: how a fresh model is built by name.
        model_class: its class.
        metric_name: what was evaluated.
        inputs: what latency is measured on; empty where those are no plain tensors.
    """

    models: tuple[nn.Module, ...]
    plans: tuple[Plan, ...]
    points: tuple[SweepPoint, ...]
    original: Figures
    source: str | None
    model_class: str
    metric_name: str
    inputs: tuple[Tensor, ...]


def save_family(folder: Path, record: FamilyRecord) -> None:
    """Write a family; all files are there at once, or what was there before.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    tensors = {f"0/{name}": tensor for name, tensor in unique_tensors(record.models[0]).items()}
    for index, (model, sliced) in enumerate(zip(record.models, _slices(record.models[0], record.plans), strict=True)):
        same = unique_tensors(sliced)
        tensors |= {
            f"{index}/{name}": tensor
            for name, tensor in unique_tensors(model).items()
            if index and not (name in same and torch.equal(same[name], tensor))
        }
    tensors |= {f"inputs/{index}": tensor.detach().cpu().contiguous() for index, tensor in enumerate(record.inputs)}
    weights, plans = save(tensors), [plan.to_dict() for plan in record.plans]
    content = {
        "format": FORMAT,
        "source": record.source,
        "model_class": record.model_class,
        "metric_name": record.metric_name,
        "original": plain_fields(record.original),
        "points": [plain_fields(point) for point in record.points],
        "architecture": plans[0].get("architecture"),
        "plans": [{key: value for key, value in plan.items() if key != "architecture"} for plan in plans],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    page = sweep_page(record.original, record.points, record.metric_name)
    files = {WEIGHTS: weights, SHEET: json.dumps(signed(content)).encode(), PAGE: page.encode()}
    write_files(folder, files)


def read_family(folder: Path, model: nn.Module | None, *, trust_source: bool) -> FamilyRecord:
    """The family of a folder.

    Args:
        folder: what `save_family` wrote.
        model: a fresh model of the original architecture, left as it is; None builds one by the name that was saved.
        trust_source: whether a `package.module:factory` that was saved is imported and called, which runs its code.

    Raises:
        ArtifactError: if a file is missing, truncated, changed or foreign, or does not fit the model.
    """
    try:
        with reading(folder) as files:
            path = files.file(SHEET)
            found = _read_sheet(path)
            weights = files.file(WEIGHTS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}.") from error
    with naming(path):
        shared = {} if found["architecture"] is None else {"architecture": found["architecture"]}
        plans = tuple(Plan.from_dict({**plan, **shared}) for plan in found["plans"])
    if len(plans) != sum(point.figures is not None for point in found["points"]) or not plans:
        raise ArtifactError(f"{path} is not a family that cpd wrote: the numbers of plans and members differ.")
    if hashlib.sha256(weights).hexdigest() != found["weights_sha256"]:
        raise ArtifactError(f"{folder / WEIGHTS} is truncated, or is not the file that was saved with {SHEET}.")
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {error}.") from error
    fresh = rebuilt(found["source"], found["model_class"], trust=trust_source) if model is None else copy_of(model)
    inputs = [tensors[f"inputs/{index}"] for index in range(sum(name.startswith("inputs/") for name in tensors))]
    return FamilyRecord(
        _models(fresh, plans, tensors, folder), plans, found["points"], found["original"], found["source"],
        found["model_class"], found["metric_name"], tuple(inputs),
    )  # fmt: skip


def family_figures(folder: Path) -> tuple[Figures, tuple[SweepPoint, ...], str]:
    """Of a saved family: the figures of the original and of every speed-up asked for, and what was evaluated.

    Raises:
        ArtifactError: if the file is missing, changed or foreign.
    """
    with reading(folder) as files:
        found = _read_sheet(files.file(SHEET))
    return found["original"], found["points"], found["metric_name"]


def _read_sheet(path: Path) -> _Saved:
    content = read_json(path, finite=False)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a family that this version of cpd wrote ({FORMAT}).")
    check_signed(content, path)
    with naming(path):
        return conform(content, _Saved, "a family")


def _models(
    fresh: nn.Module, plans: Sequence[Plan], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[nn.Module, ...]:
    """The members, rebuilt from a fresh model."""

    def own(index: int) -> dict[str, Tensor]:
        start = f"{index}/"
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    check_fit(fresh, plans[0], own(0))
    try:
        widest = _given(shrink(fresh, plans[0]), own(0))
        members = [widest]
        for index, narrower in enumerate(_slices(widest, plans)):
            if index:
                members.append(_given(narrower, own(index)))
    except (PlanError, ShrinkError, RuntimeError) as error:
        raise ArtifactError(f"The plans in {folder / SHEET} do not fit the model: {error}") from error
    return tuple(members)


def _slices(widest: nn.Module, plans: Sequence[Plan]) -> list[nn.Module]:
    """The widest member, and what each other plan leaves of it."""
    return [widest, *(shrink(copy_of(widest), plan.since(plans[0])) for plan in plans[1:])]


def _given(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model with some tensors of its own, in eval mode."""
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # versions that safetensors drops
    model.load_state_dict(state, strict=False)
    return model.eval()
