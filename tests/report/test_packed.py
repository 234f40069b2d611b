"""Packed weights: a bitmap and the values, smaller, and the same again."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save
from torch import Tensor

from cpd.report.packed import pack, unpack


def sparse(shape: tuple[int, ...], share: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator).to(dtype)
    return found * (torch.rand(shape, generator=generator) >= share)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_exactly_the_same(shape: list[int], share: float, seed: int, dtype: torch.dtype) -> None:
    tensors = {
        "a": sparse(tuple(shape), share, seed, dtype), "b": sparse((5, 9), 0.9, seed), "bias": torch.randn(5),
        "steps": torch.tensor(3), "none": torch.zeros(0, 3),
    }  # fmt: skip
    found = unpack(pack(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_int8_keeps_every_zero_and_rounds_the_rest_to_a_step() -> None:
    tensor = sparse((16, 40), 0.8)
    tensor[3] = 0
    found = unpack(pack({"a": tensor}, int8=True))["a"]
    assert not found[tensor == 0].any()
    small = sparse((16, 40), 0.8) * torch.logspace(-2, 0, 16)[:, None]  # of small rows the steps are finer
    error = (unpack(pack({"a": small}, int8=True))["a"] - small).square().sum(1).sqrt()
    assert bool((error <= 0.04 * small.square().sum(1).sqrt()).all())


def test_sizes() -> None:
    tensor = sparse((256, 576), 0.8)
    plain = len(save({"a": tensor}))
    assert len(pack({"a": tensor})) / plain <= 0.24
    assert len(pack({"a": tensor}, int8=True)) / plain <= 0.08  # of random numbers; trained weights take less


def test_what_is_damaged_or_foreign_is_refused() -> None:
    content = pack({"a": sparse((9, 9), 0.8), "bias": torch.ones(3)})
    for wrong in (b"", content[:-5], content[: len(content) // 2], save({"a": torch.ones(2)})):
        with pytest.raises(ValueError, match="no packed weights"):
            unpack(wrong)
    for place in range(60, len(content), 37):
        other = bytearray(content)
        other[place] ^= 0xFF
        try:
            unpack(bytes(other))
        except ValueError:
            continue
        except BaseException as error:  # no other
            pytest.fail(f"{place}: {error!r}")
