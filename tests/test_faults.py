"""What once broke a comb: small models of every kind of fault, in `benchmarks/faults.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cpd.coupling.comb import Comb
from cpd.model.inputs import Call, as_call
from cpd.model.tensors import copy_of
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.zoo import BENCHMARKS, comb, frozen, load, random_plan, randomize, sizes

FAULTS = load(BENCHMARKS / "faults.py").FAULTS
check_warm = load(BENCHMARKS / "warm.py").check_warm

pytestmark = [
    pytest.mark.usefixtures("in_double"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]


@pytest.fixture
def in_double() -> Iterator[None]:
    """Float64 for weights, inputs, and what a forward makes anew."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def made(name: str) -> nn.Module:
    """The model of a fault, one that has never run."""
    torch.manual_seed(0)
    return randomize(FAULTS[name].make().eval())


@functools.cache
def call_of(name: str) -> Call:
    return as_call(FAULTS[name].inputs())


@functools.cache
def combed(name: str) -> Comb:
    return comb(made(name), *call_of(name).args)


@pytest.mark.parametrize("name", FAULTS)
def test_is_open_and_masked_equals_shrunk(name: str) -> None:
    found = combed(name)
    assert found.open_share["parameters"] >= FAULTS[name].least, frozen(found)
    for seed, share in enumerate((0.3, 0.6)):
        plan = random_plan(found, share, seed=seed, at_least=1)
        assert masked_error(found.model, shrink(copy_of(found.model), plan), found, plan) <= 1e-9


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_model_did_before_changes_nothing_and_is_left_alone(name: str) -> None:
    assert check_warm(lambda: made(name), call_of(name), combed(name)) == "ok"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("deformable convolution", {"body.0": 32, "body.2": 48, "conv": 40}),
        ("weight norm", {"0": 32, "2": 48}),
        ("spectral norm", {"0": 32, "2": 48}),
        ("container that checks a width", {"0": 32, "2": 48, "4.op": 48, "6": 64}),
        ("nn.Bilinear and cosine_similarity", {"net.0": 64, "net.2": 40, "bilinear": 24}),
        ("RoIAlign", {"body.0": 32, "body.2": 48, "fc": 64}),
        ("complex weight", {"lift": 24}),
        ("Fourier transform over space", {"stem": 32, "mlp.0": 64}),
        ("tokens gathered by an expanded index", {"embed": 48, "mlp.0": 96}),
        ("sizes in pairs", {"heads": 4, "head_dim": 16}),
        ("sizes in a dict", {"heads": 4, "head_dim": 16}),
        ("ties with a factor, one block", {"key_dim": 16, "values": 32, "heads": 4}),
        ("two query heads a key head", {"key heads": 3, "head_dim": 16}),
        ("repeat_interleave with output_size", {"groups": 2, "dim": 16}),
    ],
)
def test_widths_that_must_be_open(name: str, wanted: dict[str, int]) -> None:
    """By size alone, since names are the comb's own; a size as often as it is wanted."""
    found = sorted(sizes(combed(name)).values())
    for size in wanted.values():
        assert size in found, f"{wanted}: {sizes(combed(name))}, {frozen(combed(name))}"
        found.remove(size)


def test_offsets_of_a_deformable_convolution_stay() -> None:
    found = combed("deformable convolution")
    assert sizes(found)["body.2"] == 48
    assert not [group for group in found.open for member in group.members if member.tensor == "offset.bias"]


@pytest.mark.parametrize("name", ["attribute of another method"])
def test_another_method_runs_on_the_narrower_model(name: str) -> None:
    found = combed(name)
    small = shrink(copy_of(found.model), random_plan(found, 0.5))
    x = torch.randn(1, 3, 16, 16)
    assert small.c < 16
    assert torch.allclose(small(x), small.forward_split(x))
