"""The demo's data and model, and the parts of the CIFAR-10 benchmark that need no data."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from cpd.demo import SIDE, AugmentedLoader, DigitsNet, accuracy, digits, split, train_teacher

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_split_is_disjoint_complete_and_the_same_each_time() -> None:
    train, test = split(1797)
    assert (len(train), len(test)) == (1197, 600)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
    assert torch.equal(train, split(1797)[0])


def test_digits_gives_the_same_data_and_the_same_batches_again() -> None:
    (loader, images, labels), (again, images_again, _) = digits(seed=3), digits(seed=3)
    assert images.shape == (600, 1, SIDE, SIDE)
    assert labels.shape == (600,)
    assert torch.equal(images, images_again)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    for _ in range(2):  # both passes agree, and cover every image once
        passes = list(loader), list(again)
        assert len(passes[0]) == len(loader) == 19
        for (x, y), (other_x, other_y) in zip(*passes, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
        assert sorted(torch.cat([y for _, y in passes[0]]).tolist()) == sorted(loader.labels.tolist())


def test_passes_over_the_loader_differ() -> None:
    loader, _, _ = digits()
    first, second = (next(iter(loader))[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_lie_inside_their_image(flip: bool) -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    images = torch.stack([rows, columns]).repeat(40, 1, 1, 1)
    loader = AugmentedLoader(images, torch.zeros(40), crop=4, batch_size=40, flip=flip)
    (crops, _), *rest = loader
    assert not rest
    assert crops.shape == (40, 2, 4, 4)
    assert crops.is_contiguous()
    assert set(crops[:, 0, 0, 0].tolist()) == {0, 1, 2}
    assert (crops[:, 0].diff(dim=1) == 1).all()
    steps = crops[:, 1].diff(dim=2).flatten(1)
    assert (steps == steps[:, :1]).all()
    assert set(steps[:, 0].tolist()) == ({-1, 1} if flip else {1})


def test_digits_net_takes_any_batch_and_side() -> None:
    model = DigitsNet().eval()
    assert model(torch.zeros(1, 1, SIDE, SIDE)).shape == (1, 10)
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_accuracy_is_in_per_cent_and_leaves_training_flags() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(1.0))
    model[0].eval()
    images = torch.eye(4).view(4, 1, 2, 2)
    assert accuracy(model, images, torch.tensor([0, 1, 2, 0]), batch_size=3) == 75
    assert [module.training for module in model.modules()] == [True, False, True]


def test_train_teacher_learns_and_leaves_the_random_state() -> None:
    images = torch.zeros(64, 1, 8, 8)
    images[32:, :, :, 4:] = 1
    labels = torch.arange(2).repeat_interleave(32)
    loader = AugmentedLoader(images, labels, crop=8, batch_size=16)
    state = torch.get_rng_state()
    model = train_teacher(loader, epochs=6, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert accuracy(model, images, labels) == 100


def test_resnet56_has_the_documented_size_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = benchmark_module("models", monkeypatch).resnet56()
    assert sum(parameter.numel() for parameter in model.parameters()) == 853_018
    layer = r"layer[123]\.[0-8]\.(conv[12]|bn[12])"
    known = re.compile(rf"(conv1|bn1|{layer}|linear)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
    keys = list(model.state_dict())
    assert all(known.fullmatch(key) for key in keys)
    assert sum(not key.endswith("num_batches_tracked") for key in keys) == 277
    assert [model.layer2[0].shortcut.pad, model.layer3[0].shortcut.pad] == [8, 16]
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 10)


def test_padded_shortcut_keeps_every_second_pixel_between_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    shortcut = benchmark_module("models", monkeypatch).PaddedShortcut(2, 4)
    x = torch.randn(1, 2, 4, 4)
    y = shortcut(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_benchmark_says_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = benchmark_module("resnet56_cifar10", monkeypatch)
    for arguments in ([], [str(tmp_path / "nowhere")], [str(tmp_path)]):
        assert benchmark.main(arguments) == 2
        message = capsys.readouterr().err
        assert "resnet56-cifar10.safetensors" in message
        assert "cifar10-subset.npz" in message
        assert "[5085, 32, 32, 3]" in message


@pytest.mark.parametrize("name", ["resnet56-cifar10.safetensors", "cifar10-subset.npz"])
def test_benchmark_names_the_file_that_is_damaged(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark = benchmark_module("resnet56_cifar10", monkeypatch)
    (tmp_path / name).write_bytes(b"not it")
    load = benchmark.load_model if name.endswith("safetensors") else lambda folder: benchmark.load_data(folder, 0)
    with pytest.raises(benchmark.MissingDataError, match=re.escape(name)):
        load(tmp_path)
