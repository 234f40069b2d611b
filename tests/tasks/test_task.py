"""Tasks: how a batch is read, which loss a model learns from, what of it is compared, and an adapter of one's own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.model.inputs import Call
from cpd.tasks.loss import loss_on, read_by_loss_alone
from cpd.tasks.metric import named
from cpd.tasks.task import Loaded, TaskBatches, as_itself, itself, on_itself, task_of

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counter(nn.Module):
    """A model that finds things: losses in train mode, a list of findings, one an image, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        maps = self.head(self.body(images))
        if self.training:
            return {"loss": F.mse_loss(maps.mean((2, 3)), targets)}
        return [one[one > 0] for one in maps]


class Counting(cpd.Task):
    """The adapter that a user would write for it."""

    def read(self, model: nn.Module, item: Any) -> Any:
        return item["pictures"], item["counts"]

    def learn(self, model: Any, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        maps = self.mimicked(model, *call.args)
        return maps, F.mse_loss(maps.mean((2, 3)), target)

    def mimicked(self, model: Any, images: Tensor) -> Any:
        return model.head(model.body(images))

    def training(self, model: nn.Module) -> dict[str, Any]:
        return {"kd": "cwd", "lr": 0.05}

    def load(self, model: nn.Module, data: Any) -> Loaded:
        @named("findings")
        def findings(model: nn.Module) -> float:
            assert type(model) is Counter
            return float(sum(map(len, model(IMAGES))))

        return Loaded(items(), evaluate=findings)


def items() -> list[dict[str, Tensor]]:
    return [{"pictures": IMAGES, "counts": torch.zeros(8, 2)}] * 2


def test_an_adapter_of_ones_own_compresses_what_returns_no_logits() -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    result = cpd.compress(
        model, target_macs=0.6, data="things", task=Counting(), example_inputs=IMAGES[:1], epochs=2, progress=False
    )
    assert type(model) is Counter
    assert type(result.model) is Counter
    assert result.model.body[0].out_channels < 16
    assert result.model.head.out_channels == 2
    assert result.report.metric_name == "findings"
    assert result.report.history[-1]["task_loss"] < result.report.history[1]["task_loss"]
    assert result.report.call["training"] == {"kd": "cwd"}
    assert result.speedup is not None
    assert [len(found.shape) for found in result.model(IMAGES)] == [1] * 8  # it finds things, as before


def test_a_name_of_data_needs_a_task_that_reads_it() -> None:
    with pytest.raises(
        cpd.InputError,
        match=r"^data='things' is a name, but cpd cannot load data by name for models of this kind \(Sequential\)",
    ):
        cpd.compress(nn.Sequential(nn.Linear(4, 4)), target_macs=0.5, data="things")
    with pytest.raises(cpd.InputError, match=r"^task must be an object of a class derived from"):
        cpd.compress(nn.Linear(4, 4), target_macs=0.5, task=Counting)  # type: ignore[arg-type]


def test_a_view_is_of_the_class_that_it_is_taken_for() -> None:
    model, task = Counter().eval(), Counting()
    with task.viewed(model):
        assert isinstance(model(IMAGES), Tensor)
        copy = deepcopy(model)
        with as_itself(copy):
            assert isinstance(copy(IMAGES), list)
        assert isinstance(copy(IMAGES), Tensor)
        assert (type(model).__name__, type(model).__module__) == (Counter.__name__, Counter.__module__)
        evaluate = on_itself(named("things [%]")(lambda model: float(len(model(IMAGES)))))
        assert evaluate is not None
        assert evaluate(copy) == 8.0
        assert evaluate.metric == "things [%]"  # type: ignore[attr-defined]
    assert type(model) is Counter
    assert isinstance(itself(copy)(IMAGES), list)
    with pytest.raises(ZeroDivisionError), task.viewed(model):
        raise ZeroDivisionError
    assert type(model) is Counter
    with cpd.Task().viewed(model):
        assert type(model) is Counter


def test_a_task_without_a_way_of_its_own_leaves_a_loader_as_it_is() -> None:
    model, data = nn.Linear(4, 2), [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    assert type(task_of(model)) is cpd.Task
    assert cpd.Task().batches(model, data) is data
    read = Counting().batches(model, items())
    assert isinstance(read, TaskBatches)
    assert len(read) == 2
    assert [batch.target.shape for batch in read] == [(8, 2), (8, 2)]
    assert Counting().batches(model, read) is read


class Helped(nn.Module):
    """A model that an auxiliary head helps to learn, as its own loss has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.helper = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.body(x).relu()
        found = {"logits": self.head(x), "helper": self.helper(x)}
        if labels is not None:
            found["loss"] = sum(F.cross_entropy(found[name], labels) for name in ("logits", "helper"))
        return found


class Helping(cpd.Task):
    def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        output = model(*call.args, labels=target)
        return output, output["loss"]

    def outputs(self, model: nn.Module) -> str:
        return "logits"


def test_what_the_own_loss_alone_reads_stays_whole() -> None:
    model, data = Helped(), [(torch.randn(6, 4), torch.arange(6) % 3)]
    model.head.bias.requires_grad_(False)
    batch = Helping().batch(model, data[0])
    assert read_by_loss_alone(model, batch, lambda output: output["logits"]) == {"helper.weight", "helper.bias"}
    assert [name for name, item in model.named_parameters() if not item.requires_grad] == ["head.bias"]
    result = cpd.compress(model, target_macs=0.6, data=data, task=Helping(), round_to=1, epochs=1, progress=False)
    small: Any = result.model
    assert small.helper.out_features == small.head.out_features == 3
    assert small.body.out_features < 8
    assert not result.report.call.get("ratios")


def test_the_models_own_loss_is_taken_unless_another_is_given() -> None:
    model, data = Helped().eval(), (torch.randn(6, 4), torch.arange(6) % 3)
    batch = Helping().batch(model, data)
    output, value = loss_on(batch, model)
    assert value is not None
    assert torch.equal(value, output["loss"])
    given = loss_on(batch, model, lambda output, target: output["helper"].sum())[1]
    assert torch.equal(given, model(data[0])["helper"].sum())  # type: ignore[arg-type]
    inferred = loss_on(cpd.Task().batch(model, data), model, read=lambda output: output["logits"])[1]
    assert torch.equal(inferred, F.cross_entropy(model(data[0])["logits"], data[1]))  # type: ignore[arg-type]


def test_a_loss_of_its_own_that_is_none_is_refused() -> None:
    class Wrong(Helping):
        def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
            return call.on(model), torch.ones(3)

    model, data = Helped(), (torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.raises(cpd.InputError, match=r"^The model's own loss must return a tensor of one number, not a tensor"):
        loss_on(Wrong().batch(model, data), model)


def test_a_model_by_its_name_and_options_that_the_user_sets_win() -> None:
    torch.manual_seed(0)
    result = cpd.compress(
        Counter(), target_macs=0.7, data=items(), task=Counting(), example_inputs=IMAGES[:1], progress=False,
        training=cpd.DistillConfig(epochs=1, kd="none"),
    )  # fmt: skip
    assert result.report.call["training"] == {"kd": "none"}
    assert result.report.history[-1]["kd_loss"] is None


class Painter(Counter):
    """A counter with a second head, of which its task says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.paint = nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        found = super().forward(images, targets)
        return found if self.training else (found, self.paint(self.body(images)))


@pytest.mark.parametrize("evaluate", [None, lambda model: float(len(model(IMAGES)))])
def test_a_head_that_mimicked_leaves_out_is_told(evaluate: Any) -> None:
    with pytest.raises(cpd.ShrinkError, match=r"the model itself does not: .*let mimicked\(\) give what that layer"):
        cpd.compress(
            Painter().eval(), target_macs=0.6, data=items(), task=Counting(), epochs=0, round_to=1, branches=False,
            example_inputs=IMAGES[:1], evaluate=evaluate, progress=False, criterion="magnitude",
        )  # fmt: skip
