"""Memory that is used again: what the C library is told, and when."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest

from cpd.model import allocator
from cpd.model.allocator import memory_reused

KEPT = [("mallopt", -4, 0), ("mallopt", -1, -1)]
AS_BEFORE = [("mallopt", -4, 65536), ("mallopt", -3, 2**25), ("mallopt", -1, 2**26), ("malloc_trim", 0)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    library = SimpleNamespace(
        mallopt=lambda *given: found.append(("mallopt", *given)),
        malloc_trim=lambda *given: found.append(("malloc_trim", *given)),
    )
    monkeypatch.setattr(allocator, "_library", lambda: library)
    return found


def test_freed_memory_is_kept_in_the_outermost_block_alone(told: list[tuple[object, ...]]) -> None:
    with memory_reused():
        assert told == KEPT
        with memory_reused():
            assert told == KEPT
        assert told == KEPT
    assert told == KEPT + AS_BEFORE


def test_all_goes_back_where_the_block_fails(told: list[tuple[object, ...]]) -> None:
    with pytest.raises(KeyError), memory_reused():
        raise KeyError
    assert told == KEPT + AS_BEFORE


@pytest.mark.parametrize(("libc", "variable"), [(("", ""), None), (("glibc", "2.36"), "GLIBC_TUNABLES")])
def test_other_libraries_and_what_the_user_has_set_are_left_alone(
    libc: tuple[str, str], variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    if variable:
        monkeypatch.setenv(variable, "glibc.malloc.trim_threshold=1")
    assert allocator._library.__wrapped__() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_the_library_takes_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    library = allocator._library.__wrapped__()
    assert library.mallopt(-4, 65536) == 1
    assert library.mallopt(-3, 2**25) == 1
