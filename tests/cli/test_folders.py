"""Folders of images: what is read from them, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cpd.cli.folders import image_folders
from cpd.errors import InputError
from cpd.tasks.metric import metric_name
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
    assert "holds 2 classes (folders), but the model has 1000 outputs" in result.stderr
    result = run("compress", "timm:resnet18,num_classes=2", *options.split())
    assert "different classes" in result.stderr
    assert not fakes.calls


def test_folder_without_images(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    result = run("compress", "timm:resnet18", "--no-pretrained", "--data", tmp_path)
    assert result.exit_code == 2
    assert "no images that can be read" in result.stderr


@LEAKY
def test_scores_see_plain_images_and_the_training_augmented_ones(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    """Of a whole image the middle is known; a crop of a part of it brings the border to other places."""
    for part in ("train", "val"):
        write_images(tmp_path / part, classes=2, count=4)
    options = f"--no-pretrained --input-size 16 --batch-size 8 --workers 0 --data {tmp_path}"
    for augment in ("none", "light", "imagenet"):
        result = run("compress", "timm:resnet18,num_classes=2", *options.split(), "--augment", augment)
        assert result.exit_code == 0, result.stderr
    run("compress", "timm:resnet18,num_classes=2", *options.split())
    calls = fakes.calls
    plain = calls[0]["calibration"].dataset
    reference = [plain[index][0] for index in range(len(plain))]
    for call in calls:
        for index, image in enumerate(reference):
            assert torch.equal(call["calibration"].dataset[index][0], image)
    transforms = [str(call["data"].dataset.transform) for call in calls]
    assert transforms[0] == str(plain.transform)
    assert "Random" not in transforms[0]
    assert "scale=(0.7, 1.0)" in transforms[1]
    assert "RandomHorizontalFlip" in transforms[1]
    assert "ColorJitter" not in transforms[1]
    assert "scale=(0.08, 1.0)" in transforms[2]
    assert "ColorJitter" in transforms[2]
    assert transforms[3] == transforms[1], "light is the default"
    run(
        "compress",
        "timm:resnet18,num_classes=2",
        *options.split(),
        "--auto-augment",
        "rand-m9",
        "--random-erasing",
        "1",
    )
    assert "RandAugment" in str(calls[4]["data"].dataset.transform)
    assert "RandomErasing" in str(calls[4]["data"].dataset.transform)


@LEAKY
def test_mean_and_std(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    write_images(tmp_path, classes=2)
    options = f"--no-pretrained --input-size 16 --workers 0 --augment none --data {tmp_path}"
    image = []
    for model, more, told in (
        ("timm:test_resnet,num_classes=2", "", "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5 (the model's own)"),
        ("torchvision:resnet18,num_classes=2", "", "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225 (ImageNet's)"),
        ("timm:test_resnet,num_classes=2", "--mean 0.25 --std 1,2,4", "mean 0.25, 0.25, 0.25, std 1, 2, 4 (as given)"),
    ):
        result = run("compress", model, *options.split(), *more.split())
        assert result.exit_code == 0, result.stderr
        assert told in result.stderr
        image.append(fakes.calls[-1]["data"].dataset[4][0])
    own, imagenet, given = image
    pixels = 0.5 * own + 0.5
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(imagenet, (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / std, atol=1e-5)
    assert torch.allclose(given, (pixels - 0.25) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1), atol=1e-5)


def test_only_what_is_read_in_the_training_is_augmented(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """`sensitivity` sees plain images: it trains nothing."""
    write_images(tmp_path / "train", classes=2)
    seen: list[Any] = []

    def sensitivity(model: nn.Module, comb: Any, data: Any, **options: Any) -> Any:
        seen.append(data.dataset.transform)
        raise InputError("seen")

    monkeypatch.setattr("cpd.sensitivity", sensitivity, raising=False)
    options = f"--no-pretrained --input-size 32 --workers 0 --batch-size 2 --limit 1 --data {tmp_path}"
    run("sensitivity", "timm:test_resnet,num_classes=2", *options.split())
    assert "Random" not in str(seen[0])
