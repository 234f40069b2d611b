"""Integers that remember where they come from."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from cpd.proof.provenance import Place, Traced, integers, places_of, trace_integers

A, B = Place("m", "a"), Place("m.inner", "b.1")


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift"])
def test_traced_integers_hand_on_where_they_come_from(name: str) -> None:
    function = getattr(operator, name)
    left, right = Traced(7, frozenset([A])), Traced(2, frozenset([B]))
    for args, places in (((left, 2), {A}), ((7, right), {B}), ((left, right), {A, B}), ((left, left), {A})):
        found = function(*args)
        assert type(found) is Traced
        assert found == function(*map(int, args))
        assert found.places == places


def test_traced_integers_are_integers() -> None:
    traced = Traced(6, frozenset([A]))
    assert (-traced).places == (+traced).places == abs(traced).places == {A}
    assert (-traced, +traced, abs(-traced)) == (-6, 6, 6)
    assert isinstance(traced, int)
    assert [*range(traced)][traced - 1] == 5
    assert hash(traced) == hash(6)
    assert places_of(3 * traced // 2) == {A}
    for plain in (traced / 4, traced**-0.5, traced * 0.5, int(traced), 5, True, "a"):
        assert places_of(plain) == frozenset()
    assert (traced / 4, traced**-1) == (1.5, 6**-1)
    assert torch.zeros(2, traced).view(traced, -1).shape == (6, 2)


def test_integers_of_a_model_are_found_and_traced_in_place() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.flag, self.rate, self.sizes, self.names = 3, True, 0.5, (4, 5.0, 6), ["a", 7]

    model = nn.ModuleDict({"inner": Inner()})
    found = {place.name: value for place, value in integers(model, "inner")}
    assert found == {"width": 3, "sizes.0": 4, "sizes.2": 6, "names.1": 7}
    assert all(place.module == "inner" for place, _ in integers(model, "inner"))
    trace_integers(model)
    inner = model["inner"]
    assert places_of(inner.width) == {Place("inner", "width")}
    assert places_of(inner.sizes[2] - inner.width) == {Place("inner", "sizes.2"), Place("inner", "width")}
    assert (type(inner.sizes), type(inner.names)) == (tuple, list)
    assert (inner.flag, inner.rate, inner.sizes, inner.names) == (True, 0.5, (4, 5.0, 6), ["a", 7])
    assert type(inner.flag) is bool
