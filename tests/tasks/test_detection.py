"""Detectors of torchvision, small ones with random weights, on boxes made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection as library
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import MultiScaleRoIAlign

import cpd
from cpd.tasks.detection import Detection, feature_modules, mean_average_precision, padded, raw_predictions
from cpd.tasks.task import itself, task_of

SIDE = 64


class Backbone(nn.Module):
    """Two maps of features, as a detector's heads read them."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.levels = nn.ModuleList(nn.Conv2d(32, 32, 3, 2, 1) for _ in range(levels))
        self.out_channels = 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, found = self.stem(x), {}
        for name, level in enumerate(self.levels):
            x = level(x).relu() if name == 0 else level(x)
            found[str(name)] = x
        return found


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"min_size": SIDE, "max_size": SIDE}
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    backbone = Backbone()
    if kind == "ssd":
        boxes = DefaultBoxGenerator([[2], [2]])
        head = library.ssd.SSDHead([32, 32], boxes.num_anchors_per_location(), 4)
        return library.ssd.SSD(backbone, boxes, (SIDE, SIDE), 4, head=head).eval()
    if kind == "faster_rcnn":
        heads = {"box_head": library.faster_rcnn.TwoMLPHead(32 * 49, 16), "box_predictor": None}
        heads["box_predictor"] = library.faster_rcnn.FastRCNNPredictor(16, 4)
        return library.FasterRCNN(backbone, rpn_anchor_generator=anchors, **heads, **sizes).eval()
    if kind == "fcos":
        return library.FCOS(backbone, 4, anchor_generator=anchors, **sizes).eval()
    return library.RetinaNet(backbone, 4, anchor_generator=anchors, **sizes).eval()


def data() -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIDE, SIDE, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 24.0, 60.0, 50.0]])
    return [(images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images])]


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos", "ssd"])
def test_a_detector_is_compressed_by_its_own_losses(kind: str) -> None:
    model = built(kind)
    assert isinstance(task_of(model), Detection)
    seen = []

    def found(model: nn.Module) -> float:
        seen.append(type(model))
        return float(sum(len(one["boxes"]) for one in model(data()[0][0])))

    result = cpd.compress(
        model, target_params=0.8, data=data(), evaluate=found, epochs=1, round_to=1, branches=False, progress=False,
        criterion="magnitude",
    )  # fmt: skip
    assert set(seen) == {type(model)} == {type(result.model)}
    assert result.report.history[-1]["task_loss"] > 0
    assert result.report.history[-1]["kd_loss"] >= 0
    assert result.speedup is not None  # what the heads say at every place, exported and timed
    assert all({"boxes", "scores", "labels"} <= one.keys() for one in result.model(data()[0][0]))
    assert result.report.result.parameters < 0.85 * result.report.original.parameters


def test_losses_leave_norms_in_their_mode() -> None:
    model, task = built("retinanet"), Detection()
    batch = task.batch(model, data()[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output, loss = task.learn(model, batch.call, batch.target)
    assert not any(module.training for module in model.modules())
    assert loss is not None
    assert loss.requires_grad
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert torch.equal(output, raw_predictions(model, batch.call.args[0]))
    with pytest.raises(cpd.InputError, match=r"^A batch of a detector is \(images, targets\), in lists"):
        task.batch(model, torch.zeros(1, 3, 8, 8))


def test_what_a_second_stage_says_of_masks_and_points_is_read() -> None:
    """Its layers read features that become narrower: they were left as they are, and the result failed."""
    model: Any = built("faster_rcnn")
    pool = MultiScaleRoIAlign(["0", "1"], 14, 2)
    heads = model.roi_heads
    heads.mask_roi_pool, heads.mask_head = pool, library.mask_rcnn.MaskRCNNHeads(32, [16], 1)
    heads.mask_predictor = library.mask_rcnn.MaskRCNNPredictor(16, 16, 4)
    heads.keypoint_roi_pool, heads.keypoint_head = pool, library.keypoint_rcnn.KeypointRCNNHeads(32, [16])
    heads.keypoint_predictor = library.keypoint_rcnn.KeypointRCNNPredictor(16, 5)
    images = padded(data()[0][0])[:1]
    with task_of(model).viewed(model):
        comb = cpd.comb(model, images)
        (stream,) = (group for group in comb.open if group.size == 32 and "mask_head.0.0.weight" in str(group))
        small = itself(cpd.shrink(model, comb.plan({stream.name: range(20)})))
    assert small.roi_heads.mask_head[0][0].in_channels == small.roi_heads.keypoint_head[0].in_channels == 20
    assert {"masks", "keypoints"} <= small(list(images))[0].keys()


def test_a_second_stage_is_asked_in_the_type_of_the_model() -> None:
    model, images = built("faster_rcnn"), padded(data()[0][0])
    single = raw_predictions(model, images)
    found = raw_predictions(model.double(), images.double())
    assert found.dtype is torch.float64
    assert torch.allclose(found.float(), single, atol=1e-4)


def test_the_features_that_heads_read_are_found() -> None:
    assert feature_modules(built("ssd")) == ("backbone.levels.1",)  # the first goes through an activation
    assert padded([torch.ones(3, 4, 6), torch.ones(3, 5, 2)]).shape == (2, 3, 5, 6)
    assert padded([torch.ones(3, 4, 6), torch.ones(3, 5, 2)])[1, :, :, 2:].sum() == 0


def test_the_mean_average_precision_of_what_is_right_is_100() -> None:
    pytest.importorskip("pycocotools")

    class Right(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{**target, "scores": torch.ones(2)} for target in data()[0][1]]

    assert mean_average_precision(Right(), data()) == pytest.approx(100)
    assert 0 <= mean_average_precision(built("fcos"), data()) < 50
