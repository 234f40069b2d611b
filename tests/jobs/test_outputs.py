"""Outputs that nobody reads: only those that matter keep their width, and are what everything is compared by."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.surgery.masked import masked_error
from helpers.zoo import dense, random_plan

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Found(NamedTuple):
    hidden: list[Tensor]
    logits: Tensor
    beside: dict[str, Any]


class Verbose(nn.Module):
    """A residual network that returns all that it has computed, hidden states first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = nn.Conv2d(3, 16, 3, 1, 1), nn.Linear(16, 4), nn.Linear(16, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 1)) for _ in "ab")

    def forward(self, x: Tensor) -> Found:
        hidden = [self.stem(x)]
        for block in self.blocks:
            hidden.append(hidden[-1] + block(hidden[-1]))
        pooled = hidden[-1].mean((2, 3))
        return Found(hidden, self.head(pooled), {"aux": (self.aux(pooled), None)})


def loader() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(2)]


# ------------------------------------------------------------------------------------------ what is frozen

CHOSEN: dict[str, tuple[Any, set[str], set[str]]] = {
    "all": (None, {"hidden.0", "hidden.1", "hidden.2", "logits", "beside.aux.0"}, {"blocks.0.0", "blocks.1.0"}),
    "a name": ("logits", {"logits"}, {"blocks.0.0", "blocks.1.0", "stem", "aux"}),
    "a position": (1, {"logits"}, {"blocks.0.0", "blocks.1.0", "stem", "aux"}),
    "inside another": ("2.aux.0", {"beside.aux.0"}, {"blocks.0.0", "blocks.1.0", "stem", "head"}),
    "several": (("logits", "hidden.-1"), {"logits", "hidden.2"}, {"blocks.0.0", "blocks.1.0", "aux"}),
    "a list": ("hidden", {"hidden.0", "hidden.1", "hidden.2"}, {"blocks.0.0", "blocks.1.0", "head", "aux"}),
    "given back": (lambda found: found.logits, {"logits"}, {"blocks.0.0", "blocks.1.0", "stem", "aux"}),
    "read": (
        lambda found: found.logits.softmax(-1) + found.beside["aux"][0][:, :4],
        {"logits", "beside.aux.0"},
        {"blocks.0.0", "blocks.1.0", "stem"},
    ),
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_what_matters_keeps_its_width_and_the_rest_may_shrink(kind: str) -> None:
    outputs, names, open_groups = CHOSEN[kind]
    model = dense(Verbose())
    combed = cpd.comb(model, IMAGE.double(), outputs=outputs)
    assert set(combed.outputs) == names
    assert {group.name for group in combed.open} == open_groups
    frozen = [group.frozen for group in combed.groups if group.frozen and "the model's output" in group.frozen]
    assert all(any(f"the model's output {name} [" in reason for name in names) for reason in frozen)
    for share in (0.3, 0.6):
        plan = random_plan(combed, share, at_least=1)
        narrow = cpd.shrink(copy.deepcopy(model), plan)
        assert masked_error(model, narrow, combed, plan) <= 1e-9
        again = cpd.comb(narrow, IMAGE.double(), outputs=outputs)
        assert {group.name for group in again.open} <= open_groups


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ("logit", "has no part 'logit'; outputs can be: hidden.0, hidden.1, hidden.2, logits, beside.aux.0"),
        ("hidden.7", "has no part 'hidden.7'"),
        ("beside.aux.1", "selects no tensor"),
        (lambda found: found["logits"], "The function outputs= fails on the model's output, a Found"),
        (lambda found: None, "selects no tensor"),
    ],
)
def test_a_part_that_there_is_not_is_refused(outputs: Any, words: str) -> None:
    with pytest.raises(cpd.InputError, match=words):
        cpd.comb(Verbose().eval(), IMAGE, outputs=outputs)


def test_a_model_of_one_output_has_no_parts() -> None:
    with pytest.raises(cpd.InputError, match="returns a single tensor"):
        cpd.comb(nn.Linear(3, 3), torch.randn(1, 3), outputs=0)
    assert cpd.comb(nn.Linear(3, 3), torch.randn(1, 3)).outputs == ("",)


class Auxiliary(Verbose):
    """Returns its logits and an auxiliary output, in train mode by a layer more, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        if self.training:
            return {"logits": found.logits, "extra": self.extra(found.hidden[1].mean((2, 3)))}
        return {"logits": found.logits, "middle": found.hidden[1]}


@pytest.mark.parametrize(("outputs", "extra"), [("logits", None), (lambda found: found["middle"], "")])
def test_in_train_mode_the_same_parts_matter_or_all_where_they_are_not_there(outputs: Any, extra: str | None) -> None:
    combed = cpd.comb(Auxiliary().eval(), IMAGE, outputs=outputs)
    named = {group.name: group for group in combed.groups}
    assert (named["stem"].frozen is None) == (outputs == "logits")
    assert "used in train mode alone" in named["extra"].frozen or "the model's output" in named["extra"].frozen
    plan = random_plan(combed, 0.5, at_least=1)
    cpd.shrink(combed.model, plan)
    combed.model.train()(torch.cat([IMAGE, IMAGE]))


# ------------------------------------------------------------------------------------------ whole runs


def test_a_run_compares_by_what_matters() -> None:
    data = [(x, F.one_hot(y, 4).float()) for x, y in loader()]
    found = cpd.compress(
        Verbose().eval(), target_macs=0.5, data=data, epochs=1, outputs=("logits",), round_to=1, ratios={"stem": 0.5},
        progress=False,
    )  # fmt: skip
    before, after = Verbose()(IMAGE), found.model(IMAGE)
    assert after.logits.shape == before.logits.shape
    assert after.hidden[0].shape[1] < before.hidden[0].shape[1]
    assert found.report.checks["masked equals shrunk"] < 1e-4
    assert found.report.call["outputs"] == ("logits",)
    assert "These outputs keep their width: logits. The others may become narrower." in found.report.notes
    assert found.speedup is not None
    refused = cpd.PruneConfig(target_macs=0.1, max_ratio=0.99, round_to=1)
    with pytest.raises(cpd.TargetError, match=r"the model's output hidden\.0"):
        cpd.compress(Verbose().eval(), data=data, config=refused)


@pytest.mark.parametrize("criterion", ["hessian", "fisher", "taylor", "obs", "apoz"])
def test_every_score_is_of_what_matters(criterion: str) -> None:
    model = Verbose().eval()
    combed = cpd.comb(model, IMAGE, outputs="logits")
    scores = cpd.score(model, combed, loader(), criterion=criterion)
    assert all(value.isfinite().all() for value in scores.values())
    if criterion != "apoz":
        assert scores["aux"].abs().max() <= 1e-12
        assert scores["stem"].abs().max() > 0
    pruner = cpd.Pruner(model, IMAGE, target_params=0.5, steps=1, data=loader(), outputs=1, round_to=1)
    pruner.prune()
    assert pruner.comb.outputs == ("logits",)
    assert model(IMAGE).logits.shape == (1, 4)
    found = cpd.sensitivity(Verbose().eval(), combed, loader(), ratios=(0.5,))
    assert all(point.error >= 0 for point in found.points)
