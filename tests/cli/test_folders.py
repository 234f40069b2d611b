"""Folders of images: what is read from them, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cpd.cli.folders import image_folders
from cpd.errors import InputError
from cpd.model.metric import metric_name
from helpers.fakes import Fakes
from helpers.folders import LEAKY, write_images


@LEAKY
def test_compress_reads_image_folders(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=2)
    write_images(tmp_path / "val", classes=2)
    options = f"--no-pretrained --input-size 32 --batch-size 2 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18,num_classes=2", *options.split())
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    batches = list(call["data"])
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 32, 32)] * 3
    assert sorted(int(label) for _, labels in batches for label in labels) == [0, 0, 0, 1, 1, 1]

    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0]).expand(len(images), 2)

    model = Always().train()
    assert call["evaluate"](model) == 50.0  # per cent
    assert metric_name(call["evaluate"]) == "top-1 accuracy [%]"
    assert model.training


@LEAKY
def test_grayscale_folder_without_validation(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    write_images(tmp_path, classes=2)
    options = f"--no-pretrained --input-size 32 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18,num_classes=2,in_chans=1", *options.split())
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert "evaluate" not in call
    assert next(iter(call["data"]))[0].shape == (6, 1, 32, 32)


def test_image_folders_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "onlyval" / "val" / "a").mkdir(parents=True)
    for name, message in (
        ("file", "not a folder"),
        ("no", "not a folder"),
        ("empty", "no folders"),
        ("onlyval", "no train/"),
    ):
        with pytest.raises(InputError, match=message):
            image_folders(tmp_path / name)


def test_classes_that_are_not_the_models(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=2)
    write_images(tmp_path / "val", classes=3)
    options = f"--no-pretrained --input-size 32 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18", *options.split())
    assert "holds 2 classes (folders), the model has 1000 outputs" in result.stderr
    result = run("compress", "timm:resnet18,num_classes=2", *options.split())
    assert "different classes" in result.stderr
    assert not fakes.calls


def test_folder_without_images(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    result = run("compress", "timm:resnet18", "--no-pretrained", "--data", tmp_path)
    assert result.exit_code == 2
    assert "no images that can be read" in result.stderr
