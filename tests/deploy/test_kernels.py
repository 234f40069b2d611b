"""Times of single kernels: few are measured, the rest follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest

from cpd.deploy import kernels
from cpd.deploy.kernels import UNIT, Convolution, Kernel, KernelTimes, MatrixProduct
from cpd.model.progress import Part

CONV = Convolution(1, 1, 128, 256, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1))


def by(formula: Callable[[Kernel], float]) -> Callable[..., list[float]]:
    """A stop watch that gives each kernel what a formula says."""
    return lambda chunk, runtime: [formula(kernel) for kernel in chunk]


def saw(kernel: Kernel) -> float:
    """A convolution of whole vectors of 16, the first vector of four at double cost; its inputs by whole vectors."""
    outputs = math.ceil(kernel.outputs / 16)
    whole, rest = divmod(outputs, 4)
    return (5.0 * whole + (rest + 1 if rest else 0)) * math.ceil(kernel.inputs / 16) * 1e-3


def test_a_saw_tooth_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_measured", by(saw))
    times = KernelTimes(path=tmp_path / "kernels.json")
    times.prepare([(CONV, ("inputs", "outputs"))])
    known = len(times)
    for inputs in (128, 96, 72, 64, 24):
        for outputs in (256, 248, 200, 136, 64, 40, 24):
            kernel = CONV.at(inputs=inputs, outputs=outputs)
            assert times.time(kernel, CONV) == pytest.approx(saw(kernel)), (inputs, outputs)
    assert len(times) == known  # nothing had to be measured for it
    assert times.time(CONV.at(outputs=24), CONV) == times.time(CONV.at(outputs=32), CONV)


def test_widths_that_fill_no_vector_cost_what_they_do_near_there(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_measured", by(lambda k: saw(k) * (1 if k.inputs % 4 == 0 else 3)))
    times = KernelTimes(path=tmp_path / "kernels.json")
    assert times.time(CONV.at(inputs=126), CONV) == pytest.approx(3 * times.time(CONV, CONV))
    assert times.time(CONV.at(inputs=124), CONV) == pytest.approx(times.time(CONV, CONV))


def test_small_widths_are_measured_together(tmp_path, monkeypatch):
    """Where two small widths decide together, their product of ratios would be wrong."""
    monkeypatch.setattr(kernels, "_measured", by(lambda k: 9.0 if k.inputs < 16 and k.outputs < 16 else 1.0))
    times = KernelTimes(path=tmp_path / "kernels.json")
    assert times.time(CONV.at(inputs=8, outputs=8), CONV) == 9.0
    assert times.time(CONV.at(inputs=8), CONV) == 1.0
    grouped = replace(CONV, groups=8, inputs=32, outputs=32)
    monkeypatch.setattr(kernels, "_measured", by(lambda k: 5.0 if k.inputs < 32 and k.outputs < 32 else 1.0))
    assert times.time(grouped.at(inputs=24, outputs=24), grouped) == 5.0


def test_kernels_are_measured_for_real(tmp_path, monkeypatch):
    times = KernelTimes(path=tmp_path / "kernels.json")
    small, large = CONV.at(inputs=32, outputs=32), CONV
    seen = []

    @contextmanager
    def noted(name, total, **_):
        yield (found := Part(name, total))
        seen.append((found.done, found.total))

    monkeypatch.setattr(kernels, "part", noted)
    times.measure([small, large, MatrixProduct(2, 49, 16, 49, False), MatrixProduct(1, 49, 64, 128, True)])
    assert seen == [(4, 4)]  # what the progress line shows
    assert 0 < 4 * times[small] < times[large]
    transposed = Convolution(1, 1, 16, 8, (7, 7), (2, 2), (2, 2), (0, 0), (1, 1), transposed=True)
    assert times[transposed] > 0
    assert 0.3 < times[UNIT] / kernels.UNIT_MS < 3


def test_what_was_measured_is_kept(tmp_path, monkeypatch, caplog):
    path = tmp_path / "cache" / "kernels.json"
    monkeypatch.setattr(kernels, "_measured", by(saw))
    first, second = KernelTimes(path=path), KernelTimes(path=path)
    first[CONV], second[CONV.at(outputs=64)]
    monkeypatch.setattr(kernels, "_measured", by(lambda kernel: math.nan))
    again = KernelTimes(path=path)
    assert again[CONV] == saw(CONV) and again[CONV.at(outputs=64)] == saw(CONV.at(outputs=64))  # noqa: PT018
    assert len(KernelTimes(threads=2, path=path)) == 2  # both are known, but of one thread
    for damaged in ("{", "[]", '{"kernels": {"a": "b"}}'):
        path.write_text(damaged)
        assert len(KernelTimes(path=path)) == 0
    assert caplog.text.count("measured again") == 3
    assert [item.name for item in path.parent.iterdir()] == ["kernels.json"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "_measured", by(saw))
    assert KernelTimes(path=tmp_path / "file" / "kernels.json")[CONV] == saw(CONV)
    assert "cannot be saved in" in caplog.text
