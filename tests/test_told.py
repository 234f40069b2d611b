"""What cannot be used is said before any work, and what a user's own functions raise is told as theirs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.deploy.runtimes.base import Session
from cpd.errors import of_the_user
from helpers.calls import Began, X, Y, began, comb, data, loss, model, narrow, onnx, plan


class OwnError(Exception):
    """Raised by a function of the user's."""


def fails(*_: Any, **__: Any) -> Any:
    raise OwnError("of my own")


class Failing:
    """Data that fails when the second batch is taken from it."""

    def __iter__(self) -> Any:
        yield X, Y
        raise OwnError("of my own")


class Mine:
    name, version, threads, precision, grain = "mine", "", 1, "f32", 8

    def prepare(self, artifact: Any) -> Session:
        return Session(fails)


class Forward(nn.Module):
    """A model whose forward fails for a batch of more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = deepcopy(model())

    def forward(self, x: Tensor) -> Tensor:
        return fails() if len(x) > 1 else self.inner(x)


def run(**given: Any) -> Any:
    return cpd.compress(model(), **{"target_macs": 0.6, "round_to": 1, "epochs": 1, "example_inputs": X[:1], **given})


FAILS: dict[str, tuple[str, Callable[[], Any]]] = {
    "evaluate, before": ("evaluate raised OwnError before pruning", lambda: run(data=data(), evaluate=fails)),
    "loss": ("loss raised OwnError on the first batch of data", lambda: run(data=data(), loss=fails)),
    "criterion": ("The criterion fails raised OwnError", lambda: cpd.score(model(), comb(), criterion=fails)),
    "outputs": ("outputs raised OwnError", lambda: cpd.distill(narrow(), model(), data(), outputs=fails)),
    "data": (
        "data raised OwnError when batch 2 was taken from it",
        lambda: cpd.score(model(), comb(), Failing(), criterion="taylor"),
    ),
    "data of a training": (
        "data raised OwnError when batch 2 was taken from it", lambda: cpd.distill(narrow(), model(), Failing()),
    ),
    "data of compensation": (
        "data raised OwnError when batch 2", lambda: cpd.compensate(narrow(), model(), plan(), Failing()),
    ),
    "forward": (
        "The student raised OwnError on the first batch of data, inputs of [4, 3, 6, 6]",
        lambda: cpd.distill(Forward(), model(), data()),
    ),
    "the teacher's forward": (
        "The teacher raised OwnError on the first batch", lambda: cpd.distill(narrow(), Forward(), data()),
    ),
    "evaluate of an epoch": (
        "evaluate raised OwnError after epoch 1",
        lambda: cpd.distill(narrow(), model(), data(), evaluate=fails, before=0.5),
    ),
    "evaluate of a training": (
        "evaluate raised OwnError before the training", lambda: cpd.distill(narrow(), model(), data(), evaluate=fails),
    ),
    "evaluate of a sensitivity": (
        "evaluate raised OwnError before pruning", lambda: cpd.sensitivity(model(), comb(), data(), evaluate=fails),
    ),
    "a runtime": (
        "A runtime raised OwnError while it ran", lambda: cpd.measure_latency({"a": onnx()}, X, runtime=Mine()),
    ),
    "a device": (
        "The runtime fails raised OwnError when it timed a model",
        lambda: cpd.compare_latency(onnx(), onnx(), X, runtime=fails),
    ),
    "total": (
        "The criterion taylor raised OwnError",
        lambda: cpd.score(model(), comb(), data(), criterion="taylor", total=fails),
    ),
    "stage": (
        "stage raised OwnError for 'comb'",
        lambda: cpd.Pruner(model(), X[:1], steps=1, target_macs=0.6, stage=fails),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_what_a_users_function_raises_is_told_as_its_own(name: str) -> None:
    words, call = FAILS[name]
    with pytest.raises(cpd.InputError) as caught:
        call()
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(": of my own.")
    assert isinstance(caught.value.__cause__, OwnError)


def test_what_stops_a_run_is_let_through() -> None:
    for stop in (KeyboardInterrupt, MemoryError, SystemExit):
        with pytest.raises(stop), of_the_user("evaluate"):
            raise stop
    with pytest.raises(cpd.TargetError), of_the_user("evaluate"):
        raise cpd.TargetError("told already")


# ------------------------------------------------------------------------------------------ before any work


def maps() -> nn.Module:
    """Gives maps of four classes rather than vectors."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def changed(batch: int, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = [(X, Y), (X, Y), (X, Y)]
    found[batch] = (inputs, Y)
    return found


THIRD = "batch 3 of data"
NAN = X.clone()
NAN[1, 0, 0, 0] = float("nan")
EARLY: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "criterion": (cpd.InputError, r"^criterion must be .*; got 'taylro'\. Is taylor meant\?$", {"criterion": "taylro"}),
    "option": (cpd.InputError, r"has no option round_two\. Is round_to meant\?", {"round_two": 8}),
    "features": (
        cpd.InputError, "The student has no module 'layer'",
        {"training": cpd.DistillConfig(kd="mse", features=["layer"])},
    ),
    "a loss of maps on vectors": (cpd.InputError, "maps", {"training": cpd.DistillConfig(kd="cwd")}),
    "a teacher of another task": (
        cpd.InputError, "of the same shape", {"teacher": nn.Sequential(maps(), nn.Flatten())},
    ),
    "a teacher of other inputs": (
        cpd.InputError, "^The teacher raised RuntimeError on the first batch", {"teacher": nn.Linear(5, 4)},
    ),
    "a loss without gradient": (
        cpd.InputError, "has no gradient", {"loss": lambda output, target: loss(output, target).detach()},
    ),
    "a loss of many numbers": (cpd.InputError, "one number", {"loss": lambda output, target: output}),
    "lr": (cpd.InputError, r"^lr must be a number above 0, or None; got 0\.$", {"lr": 0}),
    "an example batch of no samples": (
        cpd.InputError, r"^example_inputs holds a tensor without values, of shape \[0, 3, 6, 6\]",
        {"example_inputs": X[:0]},
    ),
    "example inputs of NaN": (cpd.InputError, r"^example_inputs holds values that are not", {"example_inputs": NAN}),
    "a shape for inputs": (cpd.InputError, "torch.randn", {"example_inputs": (1, 3, 6, 6)}),
    "a first batch of NaN": (cpd.TrainingError, "first batch of data hold values", {"data": [(NAN, Y)]}),
    "no batch": (cpd.TrainingError, "no batch", {"data": []}),
    "threads": (cpd.InputError, r"^threads must be an integer from 1 to 1024; got 1000000\.$", {"threads": 10**6}),
    "a class for a loss": (cpd.InputError, "got the class CrossEntropyLoss", {"loss": nn.CrossEntropyLoss}),
}  # fmt: skip


@pytest.mark.parametrize("name", EARLY)
def test_it_is_said_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpd.jobs import compress

    monkeypatch.setattr(compress, "comb", began)
    kind, words, given = EARLY[name]
    with pytest.raises(kind, match=words):
        run(**{"data": data(), **given})
    with pytest.raises(Began):
        run(data=data(), loss=loss)


@pytest.mark.parametrize("found", [float("nan"), float("inf"), "0.5", None, torch.zeros(2), 1j])
def test_a_metric_is_a_finite_number(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpd.Pruner, "prune", began)
    with pytest.raises(cpd.InputError, match=r"evaluate must return one finite number, .* before pruning it gave "):
        run(data=data(), evaluate=lambda model: found)
    with pytest.raises(Began):
        run(data=data(), evaluate=lambda model: torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("call", "inputs", "kind", "words"),
    [
        (lambda given: cpd.score(model(), comb(), given, criterion="taylor"), X[:, :2], cpd.InputError, THIRD),
        (lambda given: cpd.score(model(), comb(), given, criterion="obs"), NAN, cpd.TrainingError, THIRD),
        (lambda given: cpd.distill(narrow(), model(), given), X[:, :2], cpd.InputError, THIRD),
        (lambda given: cpd.compensate(narrow(), model(), plan(), given), NAN, cpd.TrainingError, THIRD),
        (lambda given: cpd.sensitivity(model(), comb(), given), X[:, :2], cpd.InputError, THIRD),
    ],
)  # fmt: skip
def test_a_later_batch_that_differs_is_named(call: Any, inputs: Tensor, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        call(changed(2, inputs))


def test_a_later_target_that_differs_is_named() -> None:
    given = [(X, Y), (X, Y + 7)]
    with pytest.raises(cpd.InputError, match=r"the targets hold others: 7.* \(on batch 2 of data\)"):
        cpd.distill(narrow(), model(), given)


def test_targets_of_more_classes_than_the_model_has_are_told_as_such() -> None:
    given = [(X, torch.arange(len(X)) + 5)]
    with pytest.raises(cpd.InputError, match=r"hold others: .*Pass a model of as many classes as the data has"):
        cpd.distill(narrow(), model(), given)
