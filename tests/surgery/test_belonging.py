"""Plans, combs and models that do not belong together are told apart, and those that do are not."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.errors import CheckpointError, InputError, PlanError, ShrinkError
from cpd.model.architecture import architecture_of
from cpd.plan import Architecture, Plan

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES, torch.tensor([0, 1]))]


class Attention(nn.Module):
    """Two heads of four, counted by an attribute; remembers what it saw, and how often it ran."""

    def __init__(self, heads: int = 2, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.heads, self.calls, self.seen = heads, 0, None
        self.activation = activation
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = tuple(x.shape)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.activation(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    """A convolution, an activation, attention over its pixels, and a head."""

    def __init__(
        self, act: nn.Module | None = None, *, stride: int = 2, heads: int = 2, classes: int = 4,
        activation: Callable[[Tensor], Tensor] = F.relu, norm_first: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.act = act or nn.GELU()
        parts = {"0": nn.BatchNorm2d(8), "1": nn.Conv2d(8, 8, 3, padding=1), "2": nn.Conv2d(8, 8, 3, padding=1)}
        self.body = nn.Sequential(OrderedDict((name, parts[name]) for name in ("012" if norm_first else "102")))
        self.attention = Attention(heads, activation)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.act(self.stem(x))).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.attention(self.features(x))).mean(1))


def combed() -> tuple[Net, cpd.Comb, Plan]:
    model = Net().eval()
    comb = cpd.comb(model, IMAGES)
    name = next(group.name for group in comb.open if group.name.startswith("body.1"))
    return model, comb, comb.plan({name: range(5)})


@pytest.fixture(scope="module", name="made")
def _made() -> tuple[Net, cpd.Comb, Plan]:
    return combed()


# ---------------------------------------------------------------- of one architecture


def ran(model: nn.Module) -> nn.Module:
    for size in (8, 10):
        model(torch.randn(3, 3, size, size))
    return model


def used(model: nn.Module) -> nn.Module:
    """What trainers do to a model: hooks, attributes of their own, another dropout, switches."""
    model.head.register_forward_hook(lambda *_: None)
    model.epoch, model.best, model.drop.p, model.body[0].momentum = 3, 0.9, 0.5, 0.01
    model.act.inplace = True
    return model.requires_grad_(False)


def other_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def other_head(model: nn.Module) -> nn.Module:
    model.head = nn.Linear(8, 4)
    return model


class Reporting(Net):
    """Adds what the forward does not use."""

    def report(self) -> str:
        return "nothing"


class Doubling(Net):
    """Changes what the forward uses, but not the forward."""

    def features(self, x: Tensor) -> Tensor:
        return 2 * super().features(x)


SAME: dict[str, Callable[[], nn.Module]] = {
    "a copy": lambda: copy.deepcopy(Net()),
    "in train mode": lambda: Net().train(),
    "of another type": lambda: Net().double(),
    "on another device": lambda: Net().to("meta"),
    "with other weights": lambda: other_weights(Net()),
    "that ran": lambda: ran(Net()),
    "that was used": lambda: used(Net()),
    "with another head of one shape": lambda: other_head(Net()),
    "of a class that adds nothing": Reporting,
    "of a class defined elsewhere": lambda: type("Net", (Net,), {"__module__": "__main__"})(),
}


@pytest.mark.parametrize("name", SAME)
def test_models_of_one_architecture_take_a_plan(made: tuple[Net, cpd.Comb, Plan], name: str) -> None:
    _, comb, plan = made
    model = SAME[name]()
    assert comb.architecture.difference(architecture_of(model)) is None
    narrow = cpd.shrink(model, plan)
    assert comb.architecture.narrowed(plan).difference(architecture_of(narrow)) is None
    assert narrow.body[1].out_channels == 5


def test_a_compiled_model_is_the_one_within(made: tuple[Net, cpd.Comb, Plan]) -> None:
    _, comb, plan = made
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    assert cpd.score(compiled, comb, criterion="magnitude")
    cpd.shrink(compiled, plan)
    assert model.body[1].out_channels == 5


def test_a_plan_keeps_its_digest_and_says_what_it_is_for(made: tuple[Net, cpd.Comb, Plan]) -> None:
    _, comb, plan = made
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.architecture.fingerprint == comb.architecture.fingerprint == architecture_of(Net()).fingerprint
    assert again.digest == plan.digest == replace(plan, architecture=None).digest
    assert architecture_of(Net(nn.ReLU())).fingerprint != comb.architecture.fingerprint


def test_a_plan_of_an_older_version_still_fits(made: tuple[Net, cpd.Comb, Plan]) -> None:
    written = made[2].to_dict()
    del written["architecture"]
    assert cpd.shrink(Net(nn.ReLU()), Plan.from_dict(written)).body[1].out_channels == 5


def test_settings_that_only_one_version_of_a_library_has_are_no_difference(made: tuple[Net, cpd.Comb, Plan]) -> None:
    written = made[2].to_dict()
    for form in written["architecture"]["forms"]:
        form["settings"].pop("padding.0", None)
        form["settings"]["of another version"] = 3
    cpd.shrink(Net(), Plan.from_dict(written))


# ---------------------------------------------------------------- of others, with tensors of the same names and shapes

OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: Net(nn.ReLU()), "act was a GELU, and is a ReLU"),
    "kind of GELU": (lambda: Net(nn.GELU("tanh")), "act.approximate was 'none', and is 'tanh'"),
    "function": (lambda: Net(activation=F.gelu), "attention.activation was 'relu', and is 'gelu'"),
    "stride": (lambda: Net(stride=1), "stem.stride.0 was 2, and is 1"),
    "heads": (lambda: Net(heads=4), "attention.heads was 2, and is 4"),
    "order of layers": (lambda: Net(norm_first=False), "body.0 stood where body.1 stands in the order of the modules"),
    "head": (lambda: Net(classes=5), r"head.weight was of shape \[4, 8\], and is of shape \[5, 8\]"),
    "part of the forward": (Doubling, "the model itself was a Net, and is a Doubling"),
    "one more": (lambda: nn.Sequential(Net()), "the model itself was a Net, and is a Sequential"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_are_refused_and_left_as_they_were(made: tuple[Net, cpd.Comb, Plan], name: str) -> None:
    model, comb, plan = made
    make, told = OTHERS[name]
    other = make().eval()
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    with pytest.raises(ShrinkError, match=told if name not in ("heads", "one more") else "The plan"):
        cpd.shrink(other, plan)
    with pytest.raises(InputError, match=f"The comb was made for another model.*{told}.*narrowed"):
        cpd.score(other, comb, criterion="magnitude")
    with pytest.raises(InputError, match=f"{told}.*as original"):
        cpd.compensate(narrow, other, plan, DATA)
    with pytest.raises(InputError, match="Applying the plan to original gives another model"):
        cpd.compensate(other, model, plan, DATA)
    with pytest.raises(InputError, match=f"{told}.*comb="):
        cpd.Pruner(other, IMAGES, target_macs=0.5, steps=1, comb=comb)
    with pytest.raises(PlanError, match="to which only this plan was applied"):
        comb.narrowed(other, plan)
    with pytest.raises(InputError, match=told):
        cpd.sensitivity(other, comb, DATA)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state_dict().items())


def test_the_order_in_a_list_counts() -> None:
    def build(*names: str) -> nn.Module:
        return nn.Sequential(nn.ModuleDict({name: nn.Conv2d(4, 4, 1) for name in names}))

    found = architecture_of(build("a", "b")).difference(architecture_of(build("b", "a")))
    assert found == "0.a stood where 0.b stands in the order of the modules"
    assert architecture_of(build("a")).difference(architecture_of(build("a", "b"))) == "0.b was absent, and is a Conv2d"
    assert architecture_of(build("a", "b")).difference(architecture_of(build("a"))) == "0.b was a Conv2d, and is absent"


# ---------------------------------------------------------------- stages


def test_a_plan_of_another_stage_is_refused(made: tuple[Net, cpd.Comb, Plan]) -> None:
    model, comb, plan = made
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    with pytest.raises(ShrinkError, match="not to one already shrunk"):
        cpd.shrink(narrow, plan)
    with pytest.raises(InputError, match=r"comb\.narrowed\(model, plan\)"):
        cpd.score(narrow, comb, criterion="magnitude")
    later = comb.narrowed(narrow, plan)
    assert cpd.score(narrow, later, criterion="magnitude")
    with pytest.raises(PlanError, match="unpruned"):
        later.plan({})
    with pytest.raises(PlanError, match="two plans belong to different models"):
        plan.since(cpd.comb(Net(nn.ReLU()).eval(), IMAGES).plan({}))
    with pytest.raises(PlanError, match="another model than the comb"):
        cpd.comb(Net(nn.ReLU()).eval(), IMAGES).narrowed(narrow, plan)


def test_a_model_that_its_own_comb_shrinks_step_by_step(made: tuple[Net, cpd.Comb, Plan]) -> None:
    """The comb plans for the model as it was, also when that is narrower by now, its integers included."""
    model = Net().eval()
    comb = cpd.comb(model, IMAGES)
    heads = next(group.name for group in comb.open if group.name.startswith("attention.qkv") and group.size == 2)
    name = next(group.name for group in comb.open if group.name.startswith("body.1"))
    first = comb.plan({heads: [1]})
    assert {item.name for item in first.attributes} == {"heads"}
    cpd.shrink(model, first)
    second = comb.plan({heads: [1], name: range(4)})
    assert [(item.old, item.new) for item in second.attributes] == [(2, 1)]
    step = second.since(first)
    assert step.architecture.difference(architecture_of(model)) is None
    cpd.shrink(model, step)
    expected = cpd.shrink(Net(), second)
    assert architecture_of(model).difference(architecture_of(expected)) is None
    assert model(IMAGES).shape == (2, 4)


def test_a_pruner_of_a_model_and_its_comb_counts_the_heads_once() -> None:
    model = Net().eval()
    comb = cpd.comb(model, IMAGES[:1])
    pruner = cpd.Pruner(
        model, IMAGES[:1], target_macs=0.4, steps=4, data=DATA, schedule="linear", interval=1, round_to=1,
        comb=comb, criterion="magnitude",
    )  # fmt: skip
    while not pruner.done:
        pruner.prune()
    assert comb.architecture.narrowed(pruner.plan).difference(architecture_of(model)) is None
    state = pruner.state_dict()
    with pytest.raises(CheckpointError, match="act was a GELU, and is a ReLU"):
        cpd.Pruner(Net(nn.ReLU()).eval(), IMAGES[:1], target_macs=0.4, steps=4).load_state_dict(state)
    del state["architecture"]  # as it was written before
    again = cpd.Pruner(Net().eval(), IMAGES[:1], target_macs=0.4, steps=4, round_to=1)
    again.load_state_dict(state)
    assert again.plan.digest == pruner.plan.digest


def test_a_folder_is_loaded_by_the_model_that_it_is_of_alone(tmp_path) -> None:
    result = cpd.compress(Net().eval(), target_macs=0.7, example_inputs=IMAGES, round_to=1)
    folder = result.save(tmp_path / "out")
    assert torch.equal(cpd.load(folder, Net())(IMAGES), result.model(IMAGES))
    with pytest.raises(cpd.ArtifactError, match="act was a GELU, and is a ReLU"):
        cpd.load(folder, Net(nn.ReLU()))


@pytest.mark.parametrize(
    "broken", [3, {}, {"forms": [], "modules": {"": 0}}, {"forms": [{"kind": "A"}], "modules": {}}]
)
def test_an_architecture_that_is_none_is_refused(made: tuple[Net, cpd.Comb, Plan], broken: object) -> None:
    with pytest.raises(cpd.ArtifactError, match="not an architecture"):
        Plan.from_dict({**made[2].to_dict(), "architecture": broken})


def layers() -> Iterator[nn.Module]:
    """Layers of torch that keep widths beside their weights."""
    yield nn.MultiheadAttention(8, 2)
    yield nn.LSTM(8, 8, proj_size=4)
    yield nn.GroupNorm(2, 8)
    yield nn.TransformerEncoderLayer(8, 2, 16)


def test_an_architecture_is_read_back_as_it_was_written() -> None:
    for layer in layers():
        found = architecture_of(layer)
        again = Architecture.from_dict(json.loads(json.dumps(found.to_dict())))
        assert again == found
        assert again.fingerprint == found.fingerprint
    one, other = (architecture_of(nn.TransformerEncoderLayer(8, 2, 16, norm_first=first)) for first in (True, False))
    assert one.difference(other) == "norm_first was True, and is False"
