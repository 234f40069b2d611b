"""What several tests share: weights at which errors show, random plans, independent oracles, the models of the issue.

(Not named `models.py`: `benchmarks/models.py` is imported under that name.)
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import timm
import torch
import torchvision
from torch import Tensor, nn

from cpd.coupling.comb import Comb
from cpd.coupling.comb import comb as comb_model
from cpd.criteria.score import Scores
from cpd.model.tensors import named_tensors
from cpd.plan import Plan
from cpd.selection.common import Common
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector
from cpd.surgery.masked import shape_mismatch
from cpd.trace.graph import op_name


def load(path: Path) -> ModuleType:
    """A module by its path, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
models = load(BENCHMARKS / "models.py")
randomize, random_plan, resnet56 = models.randomize, models.random_plan, models.resnet56
random_branches = models.random_branches


def dense(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode, in float64, with randomised weights."""
    return randomize(model.eval().double(), seed)


def comb(model: nn.Module, *inputs: Tensor) -> Comb:
    """`cpd.comb` on positional inputs."""
    return comb_model(model, inputs)


def going_on(combed: Comb, first: Plan, seed: int, round_to: int) -> Selector:
    """A selector that goes on from a plan, with random scores of what the plan has left."""
    generator, scores = torch.Generator().manual_seed(seed), {}
    for group in combed.open:
        scores[group.name] = torch.full((group.size,), -torch.inf, dtype=torch.double)
        left = list(first.groups[group.name])
        scores[group.name][left] = torch.rand(len(left), generator=generator, dtype=torch.double)
    start = {name: len(positions) for name, positions in first.groups.items()}
    return Selector(combed, scores, Limits(round_to=round_to), start=start)


def around(combed: Comb, inner: Plan, seed: int, round_to: int) -> Selector:
    """A selector of plans that keep all that another one keeps, with random scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = {item.name: torch.rand(item.size, generator=generator, dtype=torch.double) for item in combed.open}
    held, _ = Common(around=inner).held(combed, combed.plan({}), Scores(scores, {}, {}))
    return Selector(combed, held, Limits(round_to=round_to))


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the unpruned model with every removed slice set to zero: what pruning an exact group means."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in plan.kept.items():
            tensor = attrgetter(name)(masked)
            for dim, kept in dims.items():
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[kept] = False
                tensor.index_fill_(dim, gone.nonzero().squeeze(1), 0)
    return masked


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def group(combed: Comb, name: str):
    """The group of that name."""
    return {item.name: item for item in combed.groups}[name]


def sizes(combed: Comb) -> dict[str, int]:
    """Sizes of the groups that can be pruned."""
    return {item.name: item.size for item in combed.open}


def frozen(combed: Comb) -> dict[str, str]:
    """Reasons of the groups that cannot."""
    return {item.name: item.frozen for item in combed.groups if item.frozen is not None}


def conv(inputs: int, outputs: int, size: int = 1, **options: int) -> nn.Conv2d:
    """A convolution that keeps the size of its maps."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def counts(combed: Comb, plan: Plan) -> dict:
    """How many positions of each group's axis a plan keeps."""
    return {item.axis: len(plan.groups[item.name]) for item in combed.groups}


def assert_shapes_as_predicted(combed: Comb, plan: Plan, again: Comb) -> None:
    """Compare every node's op and shape in the shrunk model with what the comb predicts at the plan's widths."""
    old, new = combed.operations.operations, again.operations.operations
    assert plan.removed or [op_name(node) for node in old] == [op_name(node) for node in new]
    assert shape_mismatch(combed, plan, again.operations) is None


def snapshot(model: nn.Module) -> tuple:
    """Everything of a model that a comb or a failed shrink must leave as it was, comparable with `==`."""
    tensors = named_tensors(model)
    return (
        [(path, type(module), _plain(vars(module))) for path, module in model.named_modules()],
        [
            (name, id(t), t.dtype, tuple(t.shape), t.stride(), t.requires_grad, t.detach().numpy().tobytes())
            for name, t in tensors.items()
        ],
        [(name, None if t.grad is None else t.grad.numpy().tobytes()) for name, t in tensors.items()],
    )


def _plain(attributes: dict) -> dict[str, str]:
    """Attributes as text; what torch.nn keeps its tensors, children and hooks in, by identity of its items."""

    def text(name: str, value: object) -> str:
        if isinstance(value, dict) and (name in ("_parameters", "_buffers", "_modules") or "hooks" in name):
            return repr([(key, id(item)) for key, item in value.items()])
        if isinstance(value, list) and any(isinstance(item, weakref.ref) for item in value):
            return repr([id(item and item()) for item in value])  # torch makes the references anew
        return (
            repr(value) if isinstance(value, (int, float, str, tuple, list, dict, set, type(None))) else str(id(value))
        )

    return {name: text(name, value) for name, value in attributes.items()}


# ---------------------------------------------------------------- the models of the issue


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None)


#: name -> (constructor, side of the images it is combed on).
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_timm("resnet18"), 224),
    "resnet50": (_timm("resnet50"), 64),
    "mobilenetv2_100": (_timm("mobilenetv2_100"), 64),
    "densenet121": (_timm("densenet121"), 64),
    "convnext_atto": (_timm("convnext_atto"), 64),
    "vit_tiny_patch16_224": (_timm("vit_tiny_patch16_224", img_size=64), 64),
    "swin_t": (_torchvision("swin_t"), 112),
    "shufflenet_v2_x1_0": (_torchvision("shufflenet_v2_x1_0"), 64),
    "resnet56": (resnet56, 32),
}


def images(side: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Random images [batch, 3, side, side] in float64."""
    return torch.randn(batch, 3, side, side, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def names_of(groups: Iterable) -> list[str]:
    """The names of some groups, in order."""
    return [item.name for item in groups]
