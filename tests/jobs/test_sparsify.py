"""Sparsify: whole runs, and what they leave in a folder."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import prune

import cpd
from cpd.files.checkpoint import Checkpoint

LABELS = torch.arange(64) % 4


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def images() -> Tensor:
    """Of four classes that a small network tells apart."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, 8, 8, generator=generator)
    return means[LABELS] + 0.5 * torch.randn(64, 3, 8, 8, generator=generator)


IMAGES = images()
DATA = [(IMAGES[i : i + 16], LABELS[i : i + 16]) for i in range(0, 64, 16)]


def trained() -> nn.Module:
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for x, y in DATA:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def accuracy(model: nn.Module) -> float:
    return 100 * float(model(IMAGES).argmax(1).eq(LABELS).float().mean())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpd.jobs.sparsify.FINAL_SECONDS", 0.05)


def test_a_whole_run(model: nn.Module, tmp_path: Path) -> None:
    before = deepcopy(model.state_dict())
    folder = tmp_path / "out"
    result = cpd.sparsify(
        model, 0.8, data=DATA, evaluate=accuracy, epochs=2, output_dir=folder, checkpoint_minutes=5, progress=False
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert cpd.get_sparsity(result.model) == result.sparsity == pytest.approx(0.8, abs=1e-3)
    assert type(result.model) is type(model)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "masks.safetensors", "model.onnx", "model.safetensors", "plan.json", "report.html", "report.json",
    ]  # fmt: skip
    loaded = cpd.load(folder, build())
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert cpd.Masks.load(folder) == result.masks
    report = result.report
    assert report.zeros == result.sparsity
    assert report.result.metric >= 85
    assert max(row.share for row in report.sparsity) < 0.95  # refits in between do not empty a layer
    assert report.result.metric >= next(row["metric"] for row in report.history if row["epoch"] == 0)
    assert [row.name for row in report.sparsity] == ["0.weight", "3.weight", "7.weight"]
    assert report.stored["plain"] > report.stored["packed"] > report.stored["packed with INT8"]
    assert any("do not make the model faster" in note for note in report.notes)
    html, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "80.0 % of the weights are zero" in html
    assert "Zeros of the layers" in html
    assert "cpd.sparsify(" in card
    assert "narrow" not in card
    assert cpd.Report.from_dict(report.to_dict()) == report
    graph = onnx.load(folder / "model.onnx").graph
    zeros = {item.name: float((numpy_helper.to_array(item) == 0).mean()) for item in graph.initializer if item.dims}
    assert max(zeros.values()) > 0.7


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "sparsity": None},
        {"sparsity": 0.7, "schedule": "cubic", "interval": 3},
        {"sparsity": 0.7, "regrow": "rigl", "interval": 3},
        {"sparsity": 0.7, "regrow": "splice", "interval": 3, "schedule": "linear"},
        {"sparsity": 0.7, "training": cpd.DistillConfig(ema=0.9, mixed_precision="bf16")},
    ],
    ids=["2:4", "cubic", "rigl", "splice", "ema"],
)
def test_runs_of_every_kind_end_at_the_sparsity(model: nn.Module, options: dict[str, Any]) -> None:
    result = cpd.sparsify(model, data=DATA, evaluate=accuracy, epochs=3, progress=False, **options)
    expected = {name: int((~mask).sum()) for name, mask in result.masks.kept.items()}
    rows = {row.name: row.after for row in result.report.sparsity}
    assert all(rows[name] >= zeros for name, zeros in expected.items())
    assert not any(bool(weight[~mask].any()) for weight, mask in result.masks.pairs(result.model))
    assert result.masks.sparsity == pytest.approx(options.get("sparsity") or 0.5, abs=3e-3)
    assert result.report.result.metric >= 85


def test_channels_are_shrunk_in_the_end(model: nn.Module, tmp_path: Path) -> None:
    result = cpd.sparsify(
        model, 0.4, pattern="channel", data=DATA, epochs=2, evaluate=accuracy, progress=False,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert result.plan.changes
    assert sum(p.numel() for p in result.model.parameters()) <= 0.62 * sum(p.numel() for p in model.parameters())
    assert torch.equal(cpd.load(tmp_path / "out", build())(IMAGES), result.model(IMAGES))
    assert not (tmp_path / "out" / "masks.safetensors").exists()


def test_packed_weights_are_loaded(model: nn.Module, tmp_path: Path) -> None:
    result = cpd.sparsify(model, 0.8, data=DATA, epochs=0, progress=False)
    for storage in ("plain", "packed", "packed-int8", "plain"):
        result.save(tmp_path / "out", storage=storage)
        names = {file.name for file in (tmp_path / "out").iterdir()}
        assert ("packed.safetensors" in names, "model.safetensors" in names) == (
            storage != "plain", storage == "plain",
        )  # fmt: skip
        loaded = cpd.load(tmp_path / "out", build())
        assert cpd.get_sparsity(loaded) >= 0.8 - 1e-3
        found, expected = loaded(IMAGES), result.model(IMAGES)
        if storage == "packed-int8":
            assert float((found - expected).detach().norm() / expected.detach().norm()) < 0.05
        else:
            assert torch.equal(found, expected)
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(cpd.ArtifactError, match="truncated"):
        cpd.load(tmp_path / "out", build())


def test_a_narrow_model_becomes_sparse_and_is_loaded(model: nn.Module, tmp_path: Path) -> None:
    narrow = cpd.compress(model, target_macs=0.6, round_to=1, data=DATA, epochs=0, branches=False, progress=False)
    dense = deepcopy(narrow.model)
    result = cpd.sparsify(narrow.model, 0.5, plan=narrow.plan, data=DATA, epochs=0, progress=False)
    assert result.plan.digest == narrow.plan.digest
    assert result.sparsity == pytest.approx(0.5, abs=3e-3)
    assert result.report.original.parameters == sum(p.numel() for p in dense.parameters())
    for storage in ("plain", "packed", "packed-int8"):
        folder = result.save(tmp_path / storage, storage=storage)
        loaded = cpd.load(folder, build())  # a fresh one of the original widths
        assert cpd.Masks.load(folder) == result.masks
        assert not any(bool(weight[~mask].any()) for weight, mask in result.masks.pairs(loaded))
        assert storage == "packed-int8" or torch.equal(loaded(IMAGES), result.model(IMAGES))
    zeros, wanted = int8_zeros(folder / "model.onnx", tmp_path / "int8.onnx"), result.masks.zeros
    assert zeros >= wanted > 0
    whole = {name: torch.ones_like(mask) for name, mask in result.masks.kept.items()}
    whole["0.weight"][[0, 2]] = whole["3.weight"][:, [0, 2]] = False  # two channels, in both of their layers
    masks = cpd.Masks(whole)
    masked = masks.apply(deepcopy(result.model))
    plan = masks.plan(cpd.comb(masked, IMAGES[:1]))
    narrower = cpd.shrink(deepcopy(masked), plan)
    assert len(narrower[0].weight) == len(masked[0].weight) - 2
    assert torch.allclose(narrower(IMAGES), masked(IMAGES), atol=1e-5)
    masks.narrowed(plan).pairs(narrower)
    with pytest.raises(cpd.InputError, match=r"The plan was made for another model .* Pass result\.plan"):
        cpd.sparsify(model, 0.5, plan=narrow.plan, data=DATA, epochs=0)
    with pytest.raises(cpd.InputError, match="pattern='channel' removes channels, and so did the plan"):
        cpd.sparsify(dense, 0.5, plan=narrow.plan, pattern="channel", data=DATA, epochs=0)


def int8_zeros(path: Path, quantized: Path) -> int:
    """The zeros of the weights in the file that an ONNX model is quantized to."""
    cpd.quantize_onnx(path, DATA, quantized, seconds=0.05)
    arrays = [numpy_helper.to_array(item) for item in onnx.load(quantized).graph.initializer]
    return sum(int((array == 0).sum()) for array in arrays if array.dtype == np.int8 and array.ndim >= 2)


def test_int8_keeps_the_zeros(model: nn.Module, tmp_path: Path) -> None:
    result = cpd.sparsify(model, 0.8, data=DATA, epochs=0, progress=False, output_dir=tmp_path / "out")
    assert int8_zeros(tmp_path / "out" / "model.onnx", tmp_path / "int8.onnx") >= result.masks.zeros


def test_a_lottery_ticket_and_from_scratch(model: nn.Module) -> None:
    early = build().state_dict()
    ticket = cpd.sparsify(model, 0.5, data=DATA, epochs=0, rewind=early, progress=False)
    masks = cpd.mask(model, 0.5)
    assert ticket.masks == masks
    for name, mask in masks.kept.items():
        assert torch.equal(dict(ticket.model.named_parameters())[name], early[name] * mask)
    scratch = cpd.sparsify(model, 0.5, data=DATA, epochs=0, rewind="init", progress=False)
    assert scratch.masks == masks
    again = cpd.sparsify(model, 0.5, data=DATA, epochs=0, rewind="init", progress=False)
    weights = [item.model.state_dict() for item in (scratch, again)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["0.weight"], masks.apply(deepcopy(model)).state_dict()["0.weight"])
    with pytest.raises(cpd.InputError, match="not a state dict of this model"):
        cpd.sparsify(model, 0.5, data=DATA, epochs=0, rewind={"a": torch.ones(1)}, progress=False)
    with pytest.raises(cpd.InputError, match="masks that are chosen once"):
        cpd.sparsify(model, 0.5, data=DATA, epochs=1, rewind="init", schedule="cubic", progress=False)


def test_masks_of_torch_are_taken_up(model: nn.Module) -> None:
    other = deepcopy(model)
    prune.l1_unstructured(other[3], "weight", amount=0.5)
    zeros = other[3].weight == 0
    result = cpd.sparsify(other, 0.6, scope="layer", data=DATA, epochs=0, progress=False)
    assert not result.model[3].weight[zeros].any()
    assert {*dict(result.model.named_parameters())} == {*dict(model.named_parameters())}
    assert prune.is_pruned(other)


def test_without_data(model: nn.Module) -> None:
    result = cpd.sparsify(model, 0.5, example_inputs=IMAGES[:1], progress=False)
    assert cpd.get_sparsity(result.model) == pytest.approx(0.5, abs=1e-3)
    assert any("No data was given" in note for note in result.report.notes)
    with pytest.raises(cpd.InputError, match="prunes during the training"):
        cpd.sparsify(model, 0.5, example_inputs=IMAGES[:1], schedule="cubic", progress=False)


class Killed(BaseException):
    """In the place of a signal that ends the process."""


@pytest.mark.parametrize("regrow", [None, "rigl", "splice"])
def test_a_run_that_was_killed_goes_on_to_the_same_masks_and_weights(
    model: nn.Module, regrow: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoint.write
    left = 0

    def killed(self: Checkpoint, state: Any) -> None:
        nonlocal left
        write(self, state)
        left -= 1
        if left == 0:
            raise Killed

    def run(name: str, *, resume: bool = False) -> cpd.SparseResult:
        return cpd.sparsify(
            model, 0.8, data=DATA, epochs=2, schedule="one-shot" if regrow else "cubic", interval=2, regrow=regrow,
            prune_until=0.9, evaluate=accuracy, output_dir=tmp_path / name, resume=resume, checkpoint_minutes=1e-9,
            progress=False, score_batches=1,
        )  # fmt: skip

    whole = run("whole")
    monkeypatch.setattr(Checkpoint, "write", killed)
    for number, writes in enumerate((2, 3, 2)):
        left = writes
        with pytest.raises(Killed):
            run("killed", resume=number > 0)
    left = 1000
    result = run("killed", resume=True)
    assert result.masks == whole.masks
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor), name
