"""Numbers and sizes as they are written on the command line."""

from __future__ import annotations

import pytest

from cpd.cli.arguments import parse_numbers, parse_size
from cpd.errors import InputError


def test_numbers_with_commas() -> None:
    assert parse_numbers("1.5, 2,3") == [1.5, 2.0, 3.0]
    with pytest.raises(InputError, match="Give numbers with commas"):
        parse_numbers("fast")


def test_parse_size() -> None:
    assert [parse_size(text) for text in ("224", "224,320", "64x32")] == [(224, 224), (224, 320), (64, 32)]
    for text in ("", "0", "-3", "1,2,3", "a", "1.5"):
        with pytest.raises(InputError):
            parse_size(text)
