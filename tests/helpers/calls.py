"""A valid call of everything public, on models so small that each takes milliseconds where nothing is exported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import cpd
import cpd.criteria
import cpd.demo
import cpd.lightning
import cpd.picture
import cpd.tasks.segmentation
from cpd.coupling import comb as coupling
from cpd.deploy import export, int8, latency, model_profile
from cpd.jobs import compress as compressing
from cpd.jobs import sparsify as sparsifying
from cpd.picture import drawing

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


@cache
def model() -> nn.Module:
    """Two convolutions, on 6 x 6 images of four classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 4), nn.Flatten()).eval()


@cache
def comb() -> cpd.Comb:
    return cpd.comb(model(), X[:1])


@cache
def plan() -> cpd.Plan:
    return comb().plan({"0": range(4)})


def narrow() -> nn.Module:
    return cpd.shrink(deepcopy(model()), plan())


def data() -> list[tuple[Tensor, Tensor]]:
    return [(X, Y), (X + 1, Y)]


@cache
def onnx() -> bytes:
    return bytes(cpd.export_onnx(model(), X))


@cache
def compared() -> cpd.LatencyComparison:
    return cpd.compare_latency(onnx(), onnx(), X, seconds=0.001, min_runs=6)


@cache
def result() -> cpd.Result:
    return cpd.compress(deepcopy(model()), target_macs=0.6, round_to=1, example_inputs=X[:1])


@cache
def seen() -> cpd.Sensitivity:
    return cpd.sensitivity(model(), comb(), data(), ratios=(0.5,), progress=False)


@cache
def swept() -> cpd.Sweep:
    report = result().report
    return cpd.Sweep(report.original, (cpd.jobs.sweep.SweepPoint(2.0, 1.9, report.result, None),))


@cache
def family() -> cpd.Family:
    found = result()
    figures = found.report.result
    member = cpd.Member(2.0, 1.9, found.model, found.plan, figures)
    return cpd.Family((member,), found.report.original, "metric", {}, None, "Sequential", (X[:1],))


def masks() -> cpd.Masks:
    return cpd.mask(model(), 0.5)


def sparsifier(**options: Any) -> cpd.Sparsifier:
    return cpd.Sparsifier(deepcopy(model()), 0.5, steps=2, **options)


@cache
def sparse() -> cpd.SparseResult:
    exact = result().report
    report = replace(exact, job="sparsify", groups=(), layers=(), shrinks=(), nodes=())
    whole = cpd.Plan({}, {}, {})
    return cpd.SparseResult(masks().apply(deepcopy(model())), report, masks(), whole, None)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def evaluate(one: nn.Module) -> float:
    return float(one(X).argmax(1).eq(Y).float().mean())


def setting() -> cpd.criteria.Setting:
    return cpd.criteria.Setting(model(), comb(), data())


def pruner() -> cpd.Pruner:
    return cpd.Pruner(
        deepcopy(model()), X[:1], steps=2, comb=comb(), target_macs=0.6, round_to=1, criterion="magnitude"
    )


class Began(BaseException):
    """Every argument was taken: the work would begin now."""


def began(*_: Any, **__: Any) -> None:
    raise Began


#: Where the work of what takes seconds begins, once all arguments were looked at.
BEGINS = (
    (compressing, "comb"), (sparsifying, "Sparsifier"), (model_profile, "make_comb"), (cpd.demo, "digits"),
    (coupling, "cold"), (export, "_export"), (int8, "_converted"), (latency, "time_rounds"),
    (timm, "create_model"),
)  # fmt: skip


@dataclass(frozen=True)
class Valid:
    """A call that is valid: of what, and with which arguments. Those that have defaults and are not given keep them."""

    call: Callable[..., Any]
    given: Callable[[], dict[str, Any]]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What it takes by name."""
        every = inspect.signature(self.call).parameters.values()
        return {item.name: item for item in every if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)}


def _calls() -> dict[str, Valid]:
    small = {"seconds": 0.001, "min_runs": 6}
    models = {"model": model, "example_inputs": lambda: X[:1]}
    whole = {**models, "target_macs": lambda: 0.6, "data": data, "loss": lambda: loss, "epochs": lambda: 1}
    made: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "comb": (cpd.comb, models),
        "score": (cpd.score, {"model": model, "comb": comb, "data": data, "loss": lambda: loss, "limit": lambda: 1}),
        "shrink": (cpd.shrink, {"model": lambda: deepcopy(model()), "plan": plan}),
        "compensate": (cpd.compensate, {"model": narrow, "original": model, "plan": plan, "data": data}),
        "compress": (cpd.compress, {**whole, "evaluate": lambda: evaluate}),
        "mask": (cpd.mask, {"model": model, "sparsity": lambda: 0.5}),
        "get_sparsity": (cpd.get_sparsity, {"model": model}),
        "sparsify": (
            cpd.sparsify, {**models, "sparsity": lambda: 0.5, "data": data, "loss": lambda: loss, "epochs": lambda: 1},
        ),
        "Sparsifier": (
            cpd.Sparsifier, {"model": lambda: deepcopy(model()), "sparsity": lambda: 0.5, "steps": lambda: 2},
        ),
        "SparseConfig": (cpd.SparseConfig, {}),
        "Sparsifier.note": (lambda text: sparsifier().note(text), {"text": lambda: "A sentence."}),
        "Sparsifier.load_state_dict": (
            lambda state: sparsifier().load_state_dict(state), {"state": lambda: sparsifier().state_dict()},
        ),
        "Masks.apply": (lambda model: masks().apply(model), {"model": lambda: deepcopy(model())}),
        "Masks.pairs": (lambda model: masks().pairs(model), {"model": model}),
        "Masks.keep": (
            lambda model, optimizer: masks().keep(model, optimizer),
            {"model": lambda: deepcopy(model()), "optimizer": lambda: torch.optim.SGD(narrow().parameters(), 0.1)},
        ),
        "Masks.save": (lambda path: masks().save(path), {"path": lambda: "m.safetensors"}),
        "Masks.load": (cpd.Masks.load, {"path": lambda: "masks.safetensors"}),
        "Masks.to_torch": (lambda model: masks().to_torch(model), {"model": lambda: deepcopy(model())}),
        "Masks.from_torch": (cpd.Masks.from_torch, {"model": lambda: masks().to_torch(deepcopy(model()))}),
        "Masks.plan": (lambda comb: masks().plan(comb), {"comb": comb}),
        "Masks.narrowed": (lambda plan: masks().narrowed(plan), {"plan": plan}),
        "SparseResult.save": (lambda directory: sparse().save(directory), {"directory": lambda: "sparse"}),
        "sweep": (cpd.sweep, {**models, "speedups": lambda: [2]}),
        "family": (cpd.family, {**models, "speedups": lambda: [2]}),
        "Family.save": (lambda directory: family().save(directory), {"directory": lambda: "family"}),
        "Family.load": (cpd.Family.load, {"directory": lambda: "family", "model": lambda: deepcopy(model())}),
        "Family.pick": (lambda latency_ms: family().pick(latency_ms, seconds=0.001), {"latency_ms": lambda: 1e3}),
        "distill": (
            cpd.distill,
            {"student": narrow, "teacher": model, "data": data, "config": lambda: cpd.DistillConfig(epochs=1)},
        ),
        "sensitivity": (cpd.sensitivity, {"model": model, "comb": comb, "data": data, "ratios": lambda: (0.5,)}),
        "export_onnx": (cpd.export_onnx, {**models}),
        "quantize_onnx": (
            cpd.quantize_onnx, {"model": onnx, "data": data, "path": lambda: "int8.onnx", "seconds": lambda: 0.001},
        ),
        "OnnxModule": (cpd.OnnxModule, {"model": onnx}),
        "measure_latency": (
            cpd.measure_latency,
            {"models": lambda: {"a": onnx()}, "example_inputs": lambda: X, **_constant(small)},
        ),
        "compare_latency": (
            cpd.compare_latency,
            {"original": onnx, "candidate": onnx, "example_inputs": lambda: X, **_constant(small)},
        ),
        "LatencyProbe": (latency.LatencyProbe, {"original": onnx, "example_inputs": lambda: X}),
        "profile_model": (cpd.profile_model, {**models, "seconds": lambda: 0.001}),
        "load": (cpd.load, {"directory": lambda: "saved", "model": lambda: deepcopy(model())}),
        "from_pretrained": (cpd.from_pretrained, {"name": lambda: "saved", "model": lambda: deepcopy(model())}),
        "Pruner": (cpd.Pruner, {**models, "comb": comb, "steps": lambda: 2, "target_macs": lambda: 0.6}),
        "Schedule": (cpd.Schedule, {}),
        "PruneConfig": (cpd.PruneConfig, {}),
        "DistillConfig": (cpd.DistillConfig, {}),
        "Comb.plan": (
            lambda keep, remove=(), strict=False: comb().plan(keep, remove=remove, strict=strict),
            {"keep": lambda: {"0": [0, 1]}},
        ),
        "Comb.removal": (lambda names: comb().removal(names), {"names": list}),
        "Comb.without": (lambda names: comb().without(names), {"names": list}),
        "Comb.narrowed": (lambda model, plan: comb().narrowed(model, plan), {"model": narrow, "plan": plan}),
        "Comb.left_alone": (lambda plan: comb().left_alone(plan), {"plan": plan}),
        "Plan.since": (lambda earlier: plan().since(earlier), {"earlier": plan}),
        "Plan.from_dict": (cpd.Plan.from_dict, {"data": lambda: plan().to_dict()}),
        "Schedule.of": (cpd.Schedule.of, {"schedule": lambda: "cubic"}),
        "Schedule.events": (lambda steps: cpd.Schedule().events(steps), {"steps": lambda: 100}),
        "Pruner.prune": (lambda between=None: pruner().prune(between), {}),
        "Pruner.start_over": (
            lambda model, found: pruner().start_over(model, found), {"model": model, "found": compared},
        ),
        "Pruner.would_meet": (lambda found: pruner().would_meet(found), {"found": compared}),
        "Pruner.note": (lambda text: pruner().note(text), {"text": lambda: "A sentence."}),
        "Pruner.load_state_dict": (
            lambda state: pruner().load_state_dict(state), {"state": lambda: pruner().state_dict()},
        ),
        "Result.save": (lambda directory: result().save(directory), {"directory": lambda: "out"}),
        "Result.save_pretrained": (
            lambda directory: result().save_pretrained(directory), {"directory": lambda: "out"},
        ),
        "Report.from_dict": (cpd.Report.from_dict, {"data": lambda: result().report.to_dict()}),
        "Sweep.from_dict": (cpd.Sweep.from_dict, {"data": lambda: swept().to_dict()}),
        "Sweep.plot": (lambda path: swept().plot(path), {"path": lambda: "a.png"}),
        "Sensitivity.heading": (lambda state: seen().heading(state), {"state": lambda: "unpruned"}),
        "Sensitivity.value": (lambda found: seen().value(found), {"found": lambda: 0.5}),
        "Sensitivity.plot": (lambda path: seen().plot(path), {"path": lambda: "a.png"}),
        "picture.draw": (cpd.picture.draw, {"comb": comb, "path": lambda: "a.svg"}),
        "picture.check_path": (drawing.check_path, {"path": lambda: "a.svg"}),
        "segmentation.has_maps": (cpd.tasks.segmentation.has_maps, {"folder": lambda: Path("saved")}),
        "segmentation.SegmentationFolder": (
            cpd.tasks.segmentation.SegmentationFolder,
            {"root": lambda: Path("maps"), "classes": lambda: 2, "size": lambda: (8, 8)},
        ),
        "segmentation.mean_iou": (
            cpd.tasks.segmentation.mean_iou,
            {"model": lambda: model()[:3], "data": lambda: [(X, Y[:, None, None].expand(4, 1, 1))],
             "classes": lambda: 4},
        ),
        "segmentation.class_iou": (
            cpd.tasks.segmentation.class_iou,
            {"model": lambda: model()[:3], "data": lambda: [(X, Y[:, None, None].expand(4, 1, 1))],
             "classes": lambda: 4},
        ),
        "segmentation.EncoderDecoder": (
            cpd.tasks.segmentation.EncoderDecoder, {"backbone": lambda: "test_resnet", "classes": lambda: 2},
        ),
        "lightning.PrunerCallback": (
            cpd.lightning.PrunerCallback, {"example_inputs": lambda: X[:1], "target_macs": lambda: 0.6},
        ),
        "demo.run_demo": (cpd.demo.run_demo, {}),
        "demo.split": (cpd.demo.split, {"count": lambda: 10, "test_count": lambda: 2}),
        "demo.accuracy": (
            cpd.demo.accuracy, {"model": model, "images": lambda: X, "labels": lambda: Y},
        ),
        "criteria.magnitude": (cpd.criteria.CRITERIA["magnitude"], {"setting": setting}),
    }  # fmt: skip
    every = cpd.criteria.CRITERIA.items()
    made.update({f"criteria.{name}": (call, {"setting": setting}) for name, call in every if inspect.isfunction(call)})

    def arguments(makers: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        return lambda: {name: make() for name, make in makers.items()}

    return {name: Valid(call, arguments(makers)) for name, (call, makers) in made.items()}


def _constant(values: dict[str, Any]) -> dict[str, Any]:
    return {name: lambda value=value: value for name, value in values.items()}


CALLS = _calls()
