"""Comb, Prune, Distill: give it a trained vision model and a target, get back the same class of model, faster.

    import cpd, timm
    result = cpd.compress(timm.create_model("resnet18", pretrained=True), target_speedup=2, data=loader)
    result.model, result.speedup       # the same class, physically narrower; measured in ONNX Runtime
    result.save("out")                 # model.safetensors, plan.json, model.onnx, report.html, README.md
    model = cpd.load("out")

Step by step, one tiny model through the pipeline:

    comb = cpd.comb(model, torch.randn(1, 3, 224, 224))   # which channels must go together, and why others cannot
    scores = cpd.score(model, comb, loader)               # {group: Tensor[size]}
    plan = comb.plan({"layer1.0.conv1": range(32)})       # immutable: every tensor's kept indices
    cpd.shrink(model, plan)                               # in place
    cpd.compare_latency(original, model, inputs).speedup  # exported, checked, timed in turn
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cpd.errors import (
    ArtifactError,
    CheckpointError,
    CPDError,
    ExportError,
    InputError,
    NothingToPruneError,
    PlanError,
    ShrinkError,
    TargetError,
    TraceError,
    TrainingError,
)

if TYPE_CHECKING:
    from cpd.config import PruneConfig
    from cpd.coupling.branches import Branch
    from cpd.coupling.comb import Comb, comb
    from cpd.coupling.groups import Group
    from cpd.criteria.score import score
    from cpd.deploy.export import export_onnx
    from cpd.deploy.latency import LatencyComparison, LatencyTable, compare_latency, measure_latency
    from cpd.deploy.model_profile import ModelProfile, profile_model
    from cpd.deploy.quantize import OnnxModule, Quantized, quantize_onnx
    from cpd.distillation.config import DistillConfig
    from cpd.distillation.distiller import distill
    from cpd.jobs.compress import compress
    from cpd.jobs.family import family
    from cpd.jobs.members import Family, Member
    from cpd.jobs.outcome import Result
    from cpd.jobs.sensitivity import Sensitivity, sensitivity
    from cpd.jobs.sparsify import SparseResult, sparsify
    from cpd.jobs.sweep import Sweep, sweep
    from cpd.plan import Plan
    from cpd.pruner import Pruner
    from cpd.report.artifacts import from_pretrained, load
    from cpd.report.report import Report
    from cpd.selection.schedule import Schedule
    from cpd.sparsity.config import SparseConfig
    from cpd.sparsity.masking import get_sparsity, mask
    from cpd.sparsity.masks import Masks
    from cpd.sparsity.sparsifier import Sparsifier
    from cpd.surgery.compensation import compensate
    from cpd.surgery.shrink import shrink
    from cpd.tasks.task import Task

__version__ = "0.1.0"

#: Where the other public names come from. They are imported when they are first used, as torch takes seconds to import.
_ROOMS = {
    "cpd.config": ("PruneConfig",),
    "cpd.coupling.branches": ("Branch",),
    "cpd.coupling.comb": ("Comb", "comb"),
    "cpd.coupling.groups": ("Group",),
    "cpd.criteria.score": ("score",),
    "cpd.deploy.export": ("export_onnx",),
    "cpd.deploy.latency": (
        "LatencyComparison",
        "LatencyTable",
        "compare_latency",
        "measure_latency",
    ),
    "cpd.deploy.model_profile": (
        "ModelProfile",
        "profile_model",
    ),
    "cpd.deploy.quantize": (
        "OnnxModule",
        "Quantized",
        "quantize_onnx",
    ),
    "cpd.distillation.config": ("DistillConfig",),
    "cpd.distillation.distiller": ("distill",),
    "cpd.jobs.compress": ("compress",),
    "cpd.jobs.family": ("family",),
    "cpd.jobs.members": (
        "Family",
        "Member",
    ),
    "cpd.jobs.outcome": ("Result",),
    "cpd.jobs.sensitivity": (
        "Sensitivity",
        "sensitivity",
    ),
    "cpd.jobs.sparsify": (
        "SparseResult",
        "sparsify",
    ),
    "cpd.jobs.sweep": (
        "Sweep",
        "sweep",
    ),
    "cpd.plan": ("Plan",),
    "cpd.pruner": ("Pruner",),
    "cpd.report.artifacts": (
        "from_pretrained",
        "load",
    ),
    "cpd.report.report": ("Report",),
    "cpd.selection.schedule": ("Schedule",),
    "cpd.sparsity.config": ("SparseConfig",),
    "cpd.sparsity.masking": (
        "get_sparsity",
        "mask",
    ),
    "cpd.sparsity.masks": ("Masks",),
    "cpd.sparsity.sparsifier": ("Sparsifier",),
    "cpd.surgery.compensation": ("compensate",),
    "cpd.surgery.shrink": ("shrink",),
    "cpd.tasks.task": ("Task",),
}
_HOMES = {name: module for module, names in _ROOMS.items() for name in names}
#: Modules that users reach as attributes, and where they lie.
_MODULES = {
    **{name: f"cpd.{name}" for name in ("cli", "criteria", "demo", "lightning", "picture", "rules", "tasks")},
    "segmentation": "cpd.tasks.segmentation",
}

__all__ = [
    "ArtifactError",
    "Branch",
    "CPDError",
    "CheckpointError",
    "Comb",
    "DistillConfig",
    "ExportError",
    "Family",
    "Group",
    "InputError",
    "LatencyComparison",
    "LatencyTable",
    "Masks",
    "Member",
    "ModelProfile",
    "NothingToPruneError",
    "OnnxModule",
    "Plan",
    "PlanError",
    "PruneConfig",
    "Pruner",
    "Quantized",
    "Report",
    "Result",
    "Schedule",
    "Sensitivity",
    "ShrinkError",
    "SparseConfig",
    "SparseResult",
    "Sparsifier",
    "Sweep",
    "TargetError",
    "Task",
    "TraceError",
    "TrainingError",
    "comb",
    "compare_latency",
    "compensate",
    "compress",
    "distill",
    "export_onnx",
    "family",
    "from_pretrained",
    "get_sparsity",
    "load",
    "mask",
    "measure_latency",
    "profile_model",
    "quantize_onnx",
    "score",
    "sensitivity",
    "shrink",
    "sparsify",
    "sweep",
]


class _Moved(ModuleType):
    """A module that lies elsewhere now: `from cpd.segmentation import mean_iou` goes on working."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks for
            raise AttributeError(name)
        return getattr(importlib.import_module(_MODULES[self.__name__.removeprefix("cpd.")]), name)


sys.modules.setdefault("cpd.segmentation", _Moved("cpd.segmentation"))


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'cpd' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
