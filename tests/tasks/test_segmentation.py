"""Segmentation: label maps, the metric, the encoder-decoder, and models of maps through the whole path."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v3_small
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import LRASPP
from typer.testing import CliRunner

import cpd
from cpd.cli import app
from cpd.errors import InputError
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from cpd.tasks.segmentation import EncoderDecoder, SegmentationFolder, class_iou, mean_iou
from helpers.zoo import comb, dense, random_plan


def write(root: Path, count: int = 4, classes: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        labels = generator.integers(0, classes + 1, (12, 16), dtype=np.uint8)
        Image.fromarray(labels).save(root / "labels" / f"{index}.png")
        Image.fromarray(np.stack([80 * labels] * 3, -1)).save(root / "images" / f"{index}.jpg", quality=100)
    return root


def test_images_and_labels_move_together(tmp_path: Path) -> None:
    """Brightness tells the class, so that an image mirrored without its labels would show."""
    root = write(tmp_path)
    for training in (False, True):
        torch.manual_seed(0)
        folder = SegmentationFolder(root, 3, (12, 16), training=training, mean=[0.0] * 3, std=[1.0] * 3)
        assert len(folder) == 4
        for image, target in folder:
            assert image.shape == (3, 12, 16)
            assert target.shape == (12, 16)
            assert type(image) is Tensor and image.dtype == torch.float32 and target.dtype == torch.int64  # noqa: PT018
            assert set(target.unique().tolist()) <= {0, 1, 2, -100}
            if not training:
                inside = target >= 0
                assert float((image.mean(0)[inside] * 255 / 80 - target[inside]).abs().mean()) < 0.2


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folders"):
        SegmentationFolder(tmp_path, 3, (8, 8))
    root = write(tmp_path / "data")
    (root / "labels" / "2.png").unlink()
    with pytest.raises(InputError, match=r"without label maps: \['2.jpg'\]"):
        SegmentationFolder(root, 3, (8, 8))


def test_a_range_of_factors_is_two_numbers_above_0(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    assert len(SegmentationFolder(root, 3, np.array([12, 16]), training=True, scales=(0.8, 1.2))) == 4
    for wrong in (2.0, (0.5,), (0, 2), ("0.5", "2"), None):
        with pytest.raises(InputError, match="scales must be two numbers above 0"):
            SegmentationFolder(root, 3, (8, 8), scales=wrong)


def test_the_metric_equals_the_formula() -> None:
    target = torch.tensor([[[0, 0, 1], [1, 1, -100]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 2]]])

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float()

    found = mean_iou(Fixed(), [(torch.zeros(1, 3, 2, 3), target)], 3)
    assert found == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)  # class 2 occurs only where it is ignored
    each = class_iou(Fixed(), [(torch.zeros(1, 3, 2, 3), target)], 3)
    assert each[:2] == pytest.approx([100 / 3, 50])
    assert np.isnan(each[2])


def test_labels_below_the_first_class_are_of_none(tmp_path: Path) -> None:
    root, plain = write(tmp_path), {"mean": [0.0] * 3, "std": [1.0] * 3}
    for (_, labels), (_, shifted) in zip(
        SegmentationFolder(root, 4, (12, 16), **plain), SegmentationFolder(root, 3, (12, 16), first=1, **plain),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(shifted, (labels - 1).where(labels > 0, -100))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050"])
def test_an_encoder_decoder_is_open_and_exact(backbone: str) -> None:
    model = dense(EncoderDecoder(backbone, 5))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    assert model(x).shape == (1, 5, 64, 96)
    combed = comb(model, x)
    assert combed.open_share["parameters"] > 0.9
    plan = random_plan(combed, 0.3, at_least=1)

    assert masked_error(model, shrink(copy.deepcopy(model), plan), combed, plan) < 1e-9


def lraspp() -> LRASPP:
    """On the first blocks of the small MobileNet; the large one is compressed from the command line, below."""
    layers = mobilenet_v3_small(weights=None).features[:6]
    backbone = IntermediateLayerGetter(layers, {"2": "low", "5": "high"})
    return LRASPP(backbone, layers[2].out_channels, layers[5].out_channels, 3)


@pytest.mark.parametrize("kd", ["cwd", "cirkd"])
def test_lraspp_is_compressed_against_its_teacher(tmp_path: Path, kd: str) -> None:
    model = lraspp()
    folder = SegmentationFolder(write(tmp_path), 3, (64, 64), training=True)
    loader = DataLoader(folder, batch_size=2, shuffle=True)
    result = cpd.compress(
        model, target_macs=0.6, data=loader, epochs=1, lr=1e-3, score_batches=1, schedule="one-shot",
        training=cpd.DistillConfig(kd=kd), evaluate=lambda candidate: mean_iou(candidate, loader, 3),
    )  # fmt: skip
    assert result.report.result.macs <= 0.6 * result.report.original.macs
    assert type(result.model) is type(model)
    with torch.no_grad():
        assert result.model(torch.randn(1, 3, 64, 64))["out"].shape == (1, 3, 64, 64)


def test_the_command_line_takes_label_maps(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train", 8)
    write(tmp_path / "data" / "val", 2)
    options = f"--data {tmp_path / 'data'} --no-pretrained --input-size 64 --target-macs 0.6 --epochs 1 --batch-size 4"
    name = "torchvision:lraspp_mobilenet_v3_large,num_classes=3"
    done = CliRunner().invoke(app, ["compress", name, *options.split(), "--workers", "0", "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["call"]["training"] == {"kd": "cwd"}
    assert 0 <= report["result"]["metric"] <= 100
    done = CliRunner().invoke(app, ["compress", "timm:resnet18,num_classes=3", *options.split()])
    assert done.exit_code == 2
    assert "is not a map of classes" in " ".join(done.stderr.split())
