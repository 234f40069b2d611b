"""Samples in arrays and data sets: put into batches as they are asked for, none read before."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cpd
from cpd.model.samples import as_batches
from helpers.forks import started

IMAGES, LABELS = torch.randn(80, 3, 8, 8), torch.arange(80) % 5


class Counted(Dataset[tuple[Tensor, int]]):
    """Says what was read of it."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, list[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)), index % 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def mapped(folder: Path) -> dict[str, object]:
    """The images and labels in every form in which a file is mapped."""
    np.save(folder / "images.npy", IMAGES.numpy())
    np.save(folder / "labels.npy", LABELS.numpy())
    torch.save({"x": IMAGES, "y": LABELS}, folder / "set.pt")
    save_file({"x": IMAGES, "y": LABELS}, folder / "set.safetensors")
    numpy = tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
    saved = torch.load(folder / "set.pt", mmap=True)
    with safe_open(folder / "set.safetensors", "pt") as file:
        slices = tuple(file.get_slice(name) for name in "xy")
    return {"numpy": numpy, "torch": (saved["x"], saved["y"]), "safetensors": slices}


@pytest.mark.parametrize("form", ["numpy", "torch", "safetensors"])
def test_arrays_of_any_library_are_put_into_batches(tmp_path: Path, form: str) -> None:
    found = list(as_batches(mapped(tmp_path)[form]))
    assert [len(x) for x, _ in found] == [64, 16]
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert not torch.equal(labels, LABELS)  # in another order
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(LABELS[(image == IMAGES).flatten(1).all(1)], label[None])


def test_inputs_alone_and_data_sets_of_samples_are_put_into_batches() -> None:
    assert [len(x) for x in as_batches(IMAGES)] == [64, 16]
    assert [len(x) for x, _ in as_batches(Counted(70))] == [64, 6]
    assert [len(x) for x, _ in as_batches(TensorDataset(IMAGES, LABELS))] == [64, 16]


@pytest.mark.parametrize(
    "data",
    [[IMAGES, IMAGES], (IMAGES, IMAGES), [(IMAGES, LABELS)], DataLoader(TensorDataset(IMAGES, LABELS), 4), [IMAGES]],
)
def test_batches_are_left_as_they_are(data: object) -> None:
    assert as_batches(data) is data


def test_as_many_samples_are_read_whatever_the_length_of_the_set() -> None:
    read = []
    for length in (2000, 20000):
        data = Counted(length)
        cpd.compress(model(), target_macs=0.5, data=data, epochs=0, round_to=1, score_batches=4)
        read.append(len(data.read))
    assert read[0] == read[1] < 1500


def test_sparsify_takes_arrays() -> None:
    found = cpd.sparsify(model(), 0.5, data=(IMAGES.numpy(), LABELS.numpy()), epochs=0)
    assert found.sparsity == pytest.approx(0.5, abs=0.01)


def use(path: str, length: int) -> None:
    """Compress a model by a set of so many images in a file, and say how much memory that took beside the file's."""
    images, peak, over = np.memmap(path, np.float32, "r", shape=(length, 3, 32, 32)), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
            peak[0] = max(peak[0], resident - of_files)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpd.compress(model(), target_macs=0.5, data=images, epochs=0, round_to=1, score_batches=2)
    over.set()
    watcher.join()
    print("TOOK" + json.dumps(peak[0] * os.sysconf("SC_PAGE_SIZE") / 2**20))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory that a process takes")
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    took, path = [], tmp_path / "images.bin"
    for length in (400, 16000):  # 5 and 197 MB
        file = np.memmap(path, np.float32, "w+", shape=(length, 3, 32, 32))
        file.reshape(-1, 400, 3, 32, 32)[:] = np.random.default_rng(0).standard_normal((400, 3, 32, 32), np.float32)
        file.flush()
        del file
        process = started("model.test_samples:use", str(path), length, output=tmp_path / "said.txt")
        process.join(120)
        said = (tmp_path / "said.txt").read_text()
        assert process.exitcode == 0, said
        took.append(float(said.split("TOOK")[1]))
    assert took[1] < took[0] + 40, took
