"""What a user hands in: every accepted form gives the same call, every other one an `InputError`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.errors import InputError, TrainingError
from cpd.model.arguments import REPEATED_DATA
from cpd.model.inputs import Batch, Call, as_batch, as_call, batches, check_model, device_of, evaluating, logits, move

X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([0, 1])


class Pair(NamedTuple):
    image: Tensor
    name: str


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return (a + b) * scale


# Models


def test_check_model_gives_the_module_back_and_refuses_the_rest() -> None:
    model = nn.Linear(3, 2)
    assert check_model(model) is model
    for wrong in (model.state_dict(), nn.Linear, "resnet18", None):
        with pytest.raises(InputError, match=rf"nn\.Module, got {type(wrong).__name__}"):
            check_model(wrong)


def test_device_of_looks_at_parameters_then_buffers_then_says_cpu() -> None:
    mixed = nn.BatchNorm1d(3, device="meta")
    mixed.running_mean = torch.zeros(3)
    assert device_of(mixed) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_evaluating_restores_the_mode_of_each_module_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before

    def fail() -> None:
        with evaluating(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before


# Calls


def test_as_call_of_a_tensor() -> None:
    call = as_call(X)
    assert call.args[0] is X
    assert len(call.args) == 1
    assert call.kwargs == {}


@pytest.mark.parametrize("kind", [tuple, list])
def test_as_call_of_positional_arguments(kind: type) -> None:
    call = as_call(kind([X, X + 1]))
    assert isinstance(call.args, tuple)
    assert torch.equal(call.on(Add()), 2 * X + 1)


def test_as_call_of_arguments_and_keywords() -> None:
    keywords = {"scale": 3.0}
    call = as_call(((X, X), keywords))
    assert torch.equal(call.on(Add()), 6 * X)
    call.kwargs["scale"] = 0.0
    assert keywords == {"scale": 3.0}  # the user's dict is not ours to change
    assert as_call(((), {"x": X})) == Call((), {"x": X})


def test_a_dict_that_follows_a_tensor_is_an_argument() -> None:
    assert as_call((X, {"mask": Y})).args[1] == {"mask": Y}


def test_as_call_leaves_a_call_alone() -> None:
    call = Call((X,), {"scale": 2.0})
    assert as_call(call) is call


@pytest.mark.parametrize("wrong", [(), [], {"x": X}, None, 3, "image.png"])
def test_as_call_refuses(wrong: object) -> None:
    with pytest.raises(InputError, match=f"example_inputs .* got {type(wrong).__name__}"):
        as_call(wrong)


# Batches


@pytest.mark.parametrize("kind", [tuple, list])
def test_as_batch_of_a_pair(kind: type) -> None:
    call, target, *_ = as_batch(kind([X, Y]))
    assert call.args[0] is X
    assert target is Y


def test_as_batch_of_several_arguments() -> None:
    call, target, *_ = as_batch(((X, X), Y))
    assert torch.equal(call.on(Add()), 2 * X)
    assert target is Y


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_as_batch_of_keywords_takes_the_label_out(kind: type, key: str) -> None:
    item = kind(a=X, **{key: Y})
    call, target, *_ = as_batch(item)
    assert target is Y
    assert call.args == ()
    assert list(call.kwargs) == ["a"]
    assert call.kwargs["a"] is X
    assert list(item) == ["a", key]  # the loader's own mapping is left as it was


def test_as_batch_without_a_target() -> None:
    assert as_batch({"a": X}).target is None
    call, target, *_ = as_batch(X)
    assert call.args[0] is X
    assert target is None


def test_as_batch_leaves_a_batch_alone() -> None:
    batch = Batch(Call((X,), {"scale": 2.0}), Y)
    assert as_batch(batch) == batch


@pytest.mark.parametrize("wrong", [(X,), (X, Y, Y), None, 3, "image.png"])
def test_as_batch_refuses(wrong: object) -> None:
    with pytest.raises(InputError, match=f"loader gave {type(wrong).__name__}"):
        as_batch(wrong)


class Counted:
    """Gives batches numbered from 0, and knows how many were taken."""

    def __init__(self, length: int) -> None:
        self.length, self.taken = length, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number in range(self.length):
            self.taken += 1
            yield X, number


class Loader:
    """Batches as some loaders of other libraries give them: it is its own iterator, and starts afresh each time."""

    def __iter__(self) -> Iterator[Tensor]:
        self.left = 2
        return self

    def __next__(self) -> Tensor:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return torch.zeros(1, 3)

    def __len__(self) -> int:
        return 2


def test_what_is_read_several_times_can_be() -> None:
    loader = Loader()
    REPEATED_DATA.demand("data", loader)
    assert [len(list(batches(loader))) for _ in range(2)] == [2, 2]
    for once in (iter([torch.zeros(1)]), (item for item in ()), zip([torch.zeros(1)]), map(len, [])):
        with pytest.raises(InputError, match="only once"):
            REPEATED_DATA.demand("data", once)


@pytest.mark.parametrize(("limit", "expected"), [(None, 5), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_batches_takes_no_item_beyond_its_limit(limit: int | None, expected: int) -> None:
    data = Counted(5)
    assert [batch.target for batch in batches(data, limit)] == list(range(expected))
    assert data.taken == expected


def test_batches_leaves_the_rest_of_an_iterator() -> None:
    data = iter(Counted(5))
    assert [batch.target for batch in batches(data, 2)] == [0, 1]
    assert [batch.target for batch in batches(data, 2)] == [2, 3]
    assert [batch.target for batch in batches(data, 2)] == [4]
    with pytest.raises(TrainingError, match="no batch"):
        next(batches(data, 2))


def test_batches_of_nothing() -> None:
    with pytest.raises(TrainingError, match="no batch"):
        next(batches([]))


@pytest.mark.parametrize("limit", [0, -1, 2.0])
def test_batches_refuses_a_limit_and_reads_nothing(limit: object) -> None:
    data = Counted(5)
    with pytest.raises(InputError, match=r"^limit must be an integer from 1"):
        next(batches(data, limit))
    assert data.taken == 0


# Moving


def test_move_reaches_tensors_at_any_depth_and_keeps_the_containers() -> None:
    moved = move([X, (Y, {"a": [X], "b": 7}), "text", None], "meta")
    assert isinstance(moved, list)
    assert isinstance(moved[1], tuple)
    assert [moved[0].device.type, moved[1][0].device.type, moved[1][1]["a"][0].device.type] == ["meta"] * 3
    assert moved[0].shape == X.shape
    assert [moved[1][1]["b"], *moved[2:]] == [7, "text", None]
    assert X.device.type == "cpu"


def test_move_of_a_namedtuple() -> None:
    moved = move({"pair": Pair(X, "cat")}, "meta")["pair"]
    assert type(moved) is Pair
    assert moved.image.device.type == "meta"
    assert moved.name == "cat"
    batch = move(Batch(Call((X,), {"b": X}), Y), "meta")
    assert type(batch) is Batch
    assert type(batch.call) is Call
    devices = {batch.call.args[0].device.type, batch.call.kwargs["b"].device.type, batch.target.device.type}
    assert devices == {"meta"}


def test_a_call_moves_its_arguments_and_keywords() -> None:
    call = Call((X, Pair(X, "cat")), {"b": X}).to("meta")
    devices = {call.args[0].device.type, call.args[1].image.device.type, call.kwargs["b"].device.type}
    assert devices == {"meta"}


# Outputs


@pytest.mark.parametrize(
    "output",
    [
        X,
        (X, Y),
        [X],
        ((X, Y), Y),
        {"logits": X, "loss": Y},
        {"aux": Y, "logits": X},
        {"aux": Y, "out": X},  # torchvision's segmentation models
        {"first": X, "second": Y},
        SimpleNamespace(loss=Y, logits=X),
        SimpleNamespace(logits=(X, Y)),
        {"out": SimpleNamespace(logits=X)},
    ],
)
def test_logits_finds_the_tensor(output: object) -> None:
    assert logits(output) is X


@pytest.mark.parametrize("output", [None, 3.0, "cat", (), [], {}, (None,), {"logits": None}, SimpleNamespace(loss=X)])
def test_logits_of_an_output_without_any(output: object) -> None:
    with pytest.raises(InputError, match="holds no tensor"):
        logits(output)


class ChangesWhatItIsGiven(torch.nn.Module):
    """Puts what it computes into the list that it is given, as SlowFast does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        maps[0] = self.a(maps[0])
        return self.b(maps[0])


def test_a_forward_may_change_the_list_that_it_is_given() -> None:
    given = [torch.randn(1, 3, 4, 4)]
    first = given[0]
    model = ChangesWhatItIsGiven()
    combed = cpd.comb(model, (given,))
    assert given == [first]
    assert [group.size for group in combed.open] == [8]
