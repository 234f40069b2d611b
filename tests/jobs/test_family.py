"""A family: nested plans, one run for several speeds, one training for all, saved, loaded, picked from."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise

import onnx
import pytest
import torch
from torch import nn

import cpd
from cpd.distillation import slimmable
from cpd.distillation.slimmable import Slimmable, distill_together
from cpd.files.reading import signed
from cpd.jobs import family as making
from cpd.jobs.compress import compressed
from cpd.model.tensors import copy_of
from cpd.selection.branching import in_order
from cpd.selection.common import Common
from cpd.surgery.shrink import slice_of


class Net(nn.Module):
    """Two residual blocks between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 3, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)) for _ in range(2)
    ]


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data()) / 2


@pytest.fixture(autouse=True)
def not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is exported and timed: that takes ten seconds a model, and is tested elsewhere."""

    def probe(*_, **__):
        raise cpd.ExportError("not timed")

    monkeypatch.setattr(cpd.jobs.compress, "LatencyProbe", probe)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def nested(wide: cpd.Plan, narrow: cpd.Plan) -> bool:
    narrow.since(wide)  # raises where it keeps what the other has removed
    return all(set(narrow.groups[name]) <= set(wide.groups[name]) for name in wide.groups)


def test_plans_within_one_another_and_what_is_shared(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    combed, scored = [], []
    real_comb, real_score = cpd.jobs.compress.comb, cpd.pruner.score
    monkeypatch.setattr(cpd.jobs.compress, "comb", lambda *a, **k: combed.append(1) or real_comb(*a, **k))
    monkeypatch.setattr(cpd.pruner, "score", lambda *a, **k: scored.append(1) or real_score(*a, **k))
    common, plans = Common(), []
    for left in (0.3, 0.7):
        found = compressed(net, {"target_macs": left, "round_to": 2}, common=common, data=data(), epochs=0)
        plans.append(found.plan)
        common.around = found.plan
        assert found.report.result.macs <= left * found.report.original.macs
    assert all(nested(wide, narrow) for narrow, wide in pairwise(plans))
    assert (combed, scored) == ([1], [1])
    # with nothing to lie around, the plan and the weights are those of a run of its own, to the last bit
    common.around = None
    again = compressed(
        net, {"target_macs": 0.5, "round_to": 2}, common=common, data=data(), epochs=0
    ).model.state_dict()
    alone = cpd.compress(net, target_macs=0.5, round_to=2, data=data(), epochs=0).model.state_dict()
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[name], alone[name]) for name in alone)


@pytest.mark.parametrize("whole", ["0", "2"])
def test_a_group_that_is_whole_in_the_narrower_plan_stays_whole_without_data(whole: str) -> None:
    """Scores of weights are set in proportion to their group's mean: one that is held entirely has a mean, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    images, common = torch.randn(1, 3, 16, 16), Common()
    combed = cpd.comb(net, images)
    keep = {group.name: range(group.size) for group in combed.groups}
    common.around = combed.plan({**keep, {"0": "2", "2": "0"}[whole]: range(16)})

    def measure(paths: list[str]) -> list[float]:
        return [sum(math.prod(item.dims) for item in onnx.load(path).graph.initializer) / 1e4 for path in paths]

    found = compressed(net, {"target_speedup": 2, "runtime": measure}, common=common, example_inputs=images)
    assert nested(found.plan, common.around)
    assert found.plan.changes


def test_branches_that_have_gone_stay_gone(net: nn.Module) -> None:
    comb = cpd.comb(net, torch.randn(1, 3, 8, 8))
    one, two = (branch.name for branch in comb.branches)
    errors, saved = {one: 1.0, two: 2.0}, {one: 1.0, two: 1.0}
    assert in_order(comb, errors, saved, 1.0) == [one, two]
    assert in_order(comb, errors, saved, 0.5, [two]) == [two]  # however dear it is
    assert in_order(comb, errors, saved, 0.5, stay=[one]) == [two]  # half of both, not of what may go


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that takes MACs for what is measured: speed-up s is 1/s of the MACs; nothing is exported."""

    def by_macs(model, options, *, common, **given):
        (speedup,) = (options.pop("target_speedup"),)
        if speedup > 50:
            raise cpd.TargetError("out of reach")
        found = compressed(model, {"target_macs": 1 / speedup, **options}, common=common, **given)
        latency = {"speedup": speedup, "original_ms": 1.0, "candidate_ms": 1 / speedup}
        object.__setattr__(found.report, "latency", {**(found.report.latency or {}), **latency})
        return found

    monkeypatch.setattr(making, "compressed", by_macs)


def test_the_unpruned_model_is_evaluated_once(net: nn.Module, quick: None) -> None:
    whole = sum(p.numel() for p in net.parameters())
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(sum(p.numel() for p in model.parameters()) == whole)
        return accuracy(model)

    found = cpd.family(net, [1.5, 3], data=data(), epochs=0, round_to=2, evaluate=evaluate, progress=False)
    assert seen.count(True) == 1
    assert seen[0]
    assert {member.report.original.metric for member in found.members} == {accuracy(net)}


def test_a_family_is_saved_as_slices_and_loaded(net: nn.Module, quick: None, tmp_path) -> None:
    found = cpd.family(
        net, [3, 1.5, 100], data=data(), epochs=1, lr=0.01, round_to=2, evaluate=accuracy, together=True,
        output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert [member.asked for member in found.members] == [1.5, 3]
    assert found.missing == {100: "out of reach"}
    wide, narrow = found.members
    assert nested(wide.plan, narrow.plan)
    assert narrow.figures.metric == pytest.approx(accuracy(narrow.model))
    assert "Trained together with 1 other member" in narrow.report.notes[-1]
    # all but norms is a slice of the widest
    sliced = cpd.shrink(copy_of(wide.model), narrow.plan.since(wide.plan)).state_dict()
    own = {name for name, value in narrow.model.state_dict().items() if not torch.equal(value, sliced[name])}
    norms = {
        f"{path}.{name}" for path, module in narrow.model.named_modules() if isinstance(module, nn.BatchNorm2d)
        for name in module.state_dict()
    }  # fmt: skip
    assert own
    assert own <= norms
    assert sorted(path.name for path in tmp_path.iterdir()) == ["family.json", "family.safetensors", "report.html"]

    again = cpd.Family.load(tmp_path, Net())
    assert again.missing == found.missing
    assert again.original == found.original
    for one, two in zip(found.members, again.members, strict=True):
        assert one.plan.digest == two.plan.digest
        assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())
        assert (one.figures, one.asked, one.speedup) == (two.figures, two.asked, two.speedup)
    assert torch.equal(again.inputs[0], found.inputs[0])
    again.save(tmp_path)  # over what it wrote itself
    assert again[3] is again.members[1]
    with pytest.raises(cpd.InputError, match=r"This family has no member 100; it has 1\.5, 3\. It was out of reach: "):
        again[100]

    content = json.loads((tmp_path / "family.json").read_text())
    del content["sha256"]
    for change, match in (
        ({"format": "cpd-1"}, "not a family that this version"), ({"plans": []}, "numbers of plans and members differ"),
        ({"weights_sha256": "0"}, "truncated"), ({"plans": content["plans"][::-1]}, "fit|shape|makes it|lacks"),
    ):  # fmt: skip
        (tmp_path / "family.json").write_text(json.dumps(signed({**content, **change})))
        with pytest.raises(cpd.ArtifactError, match=match):
            cpd.Family.load(tmp_path, Net())
    (tmp_path / "family.json").write_text(json.dumps({**content, "sha256": "0"}))
    with pytest.raises(cpd.ArtifactError, match="not as it was saved"):
        cpd.Family.load(tmp_path, Net())
    with pytest.raises(cpd.InputError, match=r"family\.json.*changed since"):
        found.save(tmp_path)
    with pytest.raises(cpd.ArtifactError, match=r"cannot be read|no family|is missing"):
        cpd.Family.load(tmp_path / "none", Net())


def test_members_picked_by_their_time_here(net: nn.Module, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpd.family(net, [1.5, 3], data=data(), epochs=0, round_to=2, branches=False)
    rows = tuple(
        cpd.deploy.latency.Timing(name, "onnxruntime", ms, ms, 1.0, 1.0, 1.0) for name, ms in (("1.5", 9.0), ("3", 5.0))
    )
    asked = []
    table = cpd.LatencyTable(rows, 6, 1, 1, {})
    monkeypatch.setattr(cpd.jobs.members, "measure_latency", lambda *_, **given: asked.append(given) or table)
    assert found.pick(9) is found[1.5]
    assert found.pick(8.9) is found[3]
    assert len(asked) == 1  # timed once
    with pytest.raises(cpd.TargetError, match=r"the fastest, 3x, takes 5 ms\. Ask for 5"):
        found.pick(4)
    found.pick(9, runtime="torch", threads=2)
    assert asked[1]["threads"] == 2
    object.__setattr__(found, "inputs", ())
    with pytest.raises(cpd.InputError, match="pass example_inputs"):
        found.pick(9)


def test_the_sandwich_rule(net: nn.Module) -> None:
    """The widest, the narrowest and one between learn of each batch; gradients reach the widest's weights alone."""
    comb = cpd.comb(net, torch.randn(1, 3, 8, 8))
    name = next(group.name for group in comb.open if group.size == 32)
    plans = [comb.plan({name: range(width)}) for width in (32, 24, 16, 8)]
    members = [cpd.shrink(copy_of(net), plan) for plan in plans]
    steps = [plan.since(plans[0]) for plan in plans[1:]]
    slices = [partial(slice_of, plan=step) for step in steps]
    seen = []
    original = Slimmable._index
    Slimmable._index = lambda self: seen.append(original(self)) or seen[-1]  # type: ignore[method-assign]
    try:
        config = cpd.DistillConfig(epochs=2, lr=0.05, progress=False)
        records = distill_together(members, slices, copy_of(net), data(), config=config)
    finally:
        Slimmable._index = original  # type: ignore[method-assign]
    assert len(seen) == 2 * len(data()) * 3
    assert all((seen[at], seen[at + 1]) == (0, 3) for at in range(0, len(seen), 3))
    assert {seen[at + 2] for at in range(0, len(seen), 3)} <= {1, 2}
    assert records[-1].kd_loss < records[0].kd_loss
    narrow = members[3].state_dict()
    sliced = cpd.shrink(copy_of(members[0]), steps[2]).state_dict()
    assert torch.equal(narrow["head.weight"], sliced["head.weight"])
    assert not torch.equal(narrow["stem.1.weight"], sliced["stem.1.weight"])  # a norm of its own
    assert not torch.equal(members[0].state_dict()["head.weight"], net.state_dict()["head.weight"])
    assert all(parameter.requires_grad for member in members for parameter in member.parameters())


def test_batches_are_repeated_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(slimmable._Repeated([1, 2], 3)) == [1, 1, 1, 2, 2, 2]
    monkeypatch.setattr(slimmable.processes, "count", lambda: 2)
    repeated = slimmable._Repeated([1, 2, 3, 4, 5], 2)
    assert list(repeated) == [1, 2, 1, 2, 3, 4, 3, 4]
    assert len(repeated) == 8


def test_what_a_family_does_not_take(net: nn.Module) -> None:
    for options, match in (
        ({"target_macs": 0.5}, "family takes its targets from speedups"), ({"resume": True}, "no checkpoint"),
        ({"schedule": "cubic"}, "one-shot"), ({"round_two": 1}, "cpd.family has no option round_two"),
        ({"training": cpd.DistillConfig(kd="mse"), "together": True, "data": data()}, "only logits"),
        ({"training": cpd.DistillConfig(mixup=0.1), "together": True, "data": data()}, "mixup"),
    ):  # fmt: skip
        with pytest.raises(cpd.InputError, match=match):
            cpd.family(net, [2], example_inputs=torch.zeros(1, 3, 8, 8), **options)
