"""Bounds beside a target: the size of the file, and the memory of a pass, against what is written and what is alive."""

import onnx
import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.memory import PeakMemory
from helpers.tiny import INPUT, Tiny


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Tiny(64).eval()


@pytest.fixture(scope="module")
def combed(model):
    return cpd.comb(model, INPUT)


def test_peak_memory_counts_what_is_alive_at_once(combed):
    pixels, width = 16 * 16, 64
    # at the second convolution: the shortcut, what it reads (written in place by the ReLU), and what it gives
    assert PeakMemory(combed)({}) == 3 * pixels * width
    by_axis = {group.axis: group.name for group in combed.open}
    for axis, name in by_axis.items():
        narrower = PeakMemory(combed)({axis: 32})
        assert narrower == (2 * pixels * 64 + pixels * 32 if "conv1" in name else 3 * pixels * 64 - 2 * pixels * 32)


def test_views_take_no_memory_and_what_works_by_element_takes_none_anew():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (8, 16)))
    assert PeakMemory(cpd.comb(net.eval(), torch.randn(1, 3, 4, 4)))({}) == 3 * 16 + 8 * 16


def test_a_block_that_has_gone_takes_none(combed):
    name = next(branch.name for branch in combed.branches if branch.frozen is None)
    assert PeakMemory(combed.without([name]))({}) < PeakMemory(combed)({})


def test_the_file_is_no_larger_than_was_allowed(model, tmp_path):
    found = cpd.compress(model, target_macs=0.9, max_file_mb=0.12, example_inputs=INPUT, round_to=1)
    file = found.save(tmp_path / "out") / "model.onnx"
    assert 0.11e6 < file.stat().st_size <= 0.12e6
    report = found.report
    assert report.result.file_mb == pytest.approx(file.stat().st_size / 1e6)
    assert report.result.macs < 0.9 * report.original.macs  # the bound asked for less than the target did
    assert any("What decided the widths: the size of the file" in note for note in report.notes)
    assert [row.label for row in report.figure_rows if row.label in ("File", "Peak memory")] == ["File", "Peak memory"]
    assert onnx.load(file).graph.node


@pytest.mark.usefixtures("undeployed")
def test_memory_is_a_bound_as_well(model):
    found = cpd.compress(model, target_macs=0.9, max_memory_mb=0.25, example_inputs=INPUT, round_to=4)
    assert found.report.original.memory_mb > 0.45
    assert 0.2 < found.report.result.memory_mb <= 0.25


def test_a_bound_that_is_out_of_reach_is_an_error_that_says_what_is(model):
    with pytest.raises(
        cpd.TargetError, match=r"max_file_mb=0\.001 cannot be reached: .* take 0\.0.* MB, the original "
    ):
        cpd.compress(model, target_macs=0.9, max_file_mb=0.001, example_inputs=INPUT)
