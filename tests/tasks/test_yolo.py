"""Models of ultralytics, a small one with random weights, on images made here: no network."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cpd
from cpd.model import sources
from cpd.model.recorded import unsafe
from cpd.tasks.task import task_of

pytest.importorskip("ultralytics")

from cpd.tasks.yolo import Yolo, as_yolo, keeping, raw_predictions, validated

pytestmark = pytest.mark.filterwarnings("ignore")  # of ultralytics, which warns of torch's changes

#: A detector of two levels.
TINY = """
nc: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [24, 3, 2]]
  - [-1, 1, SPPF, [24, 3]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 1, C2f, [16]]
  - [[7, 4], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's file, and eight images of bright boxes with their labels."""
    root, rng = tmp_path_factory.mktemp("boxes"), np.random.default_rng(0)
    (root / "tiny.yaml").write_text(TINY)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(4):
            image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            x, y, size = rng.integers(8, 32), rng.integers(8, 32), 20
            image[y : y + size, x : x + size] = 255
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            line = f"{index % 2} {(x + size / 2) / 64} {(y + size / 2) / 64} {size / 64} {size / 64}"
            (root / "labels" / split / f"{index}.txt").write_text(line)
    (root / "boxes.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n")
    return root


def built(folder: Path) -> Any:
    torch.manual_seed(0)
    return sources.resolve(f"ultralytics:{folder / 'tiny.yaml'}").build()


@pytest.fixture(scope="module")
def result(folder: Path) -> cpd.Result:
    task = Yolo(batch_size=2, imgsz=64, augment=False)
    return cpd.compress(
        built(folder), target_macs=0.7, data=folder / "boxes.yaml", task=task, epochs=1, branches=False, round_to=2,
        progress=False,
    )  # fmt: skip


def test_the_data_file_is_all_that_is_given(result: cpd.Result) -> None:
    assert type(result.model).__name__ == "DetectionModel"
    assert result.report.metric_name == "mAP50-95 [%]"
    assert result.report.original.metric is not None
    assert result.report.history[-1]["task_loss"] > 0
    assert result.report.call["training"]["kd"] == "cwd"
    assert result.report.result.macs < 0.72 * result.report.original.macs


def test_its_own_trainer_validator_and_exporter_take_the_result(
    result: cpd.Result, folder: Path, tmp_path: Path
) -> None:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    def size(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    narrow = size(result.model)
    yolo = as_yolo(result.model)
    yolo.save(tmp_path / "small.pt")
    opened = YOLO(tmp_path / "small.pt")
    assert size(opened.model) == narrow
    options: dict[str, Any] = {
        "data": str(folder / "boxes.yaml"), "imgsz": 64, "workers": 0, "plots": False, "project": str(tmp_path),
        "verbose": False, "device": "cpu",
    }  # fmt: skip
    opened.train(trainer=keeping(DetectionTrainer), epochs=1, batch=2, name="opened", **options)
    assert size(opened.model) == narrow
    yolo.train(epochs=1, batch=2, name="trained", **options)
    assert size(yolo.model) == narrow
    assert yolo.val(batch=2, name="val", **options).box.map >= 0
    exported = yolo.export(format="onnx", imgsz=64, simplify=False)
    assert Path(exported).is_file()


def test_a_callback_prunes_while_its_trainer_trains(folder: Path, tmp_path: Path) -> None:
    """As docs/how_to/ultralytics.md has it."""
    from ultralytics import YOLO

    yolo, images = YOLO(folder / "tiny.yaml"), torch.rand(1, 3, 64, 64)
    pruners: list[cpd.Pruner] = []

    def prune(trainer: Any) -> None:
        if not pruners:
            steps = trainer.epochs * len(trainer.train_loader)
            pruners.append(
                cpd.Pruner(
                    trainer.model,
                    images,
                    steps=steps,
                    optimizer=trainer.optimizer,
                    target_macs=0.7,
                    round_to=2,
                    outputs=raw_predictions,
                    schedule="linear",
                    criterion="magnitude",
                    prune_from=0,
                    prune_until=0.5,
                )
            )
        if pruners[0].step():
            trainer.ema.ema = deepcopy(trainer.model).eval()

    wide = sum(p.numel() for p in yolo.model.parameters())
    yolo.add_callback("on_train_batch_end", prune)
    yolo.train(
        data=str(folder / "boxes.yaml"), epochs=2, imgsz=64, batch=2, workers=0, plots=False, project=str(tmp_path),
        name="pruned", verbose=False, device="cpu",
    )  # fmt: skip
    assert pruners[0].done
    assert sum(p.numel() for p in yolo.model.parameters()) < 0.9 * wide


def test_its_own_loss_is_what_its_trainer_takes(folder: Path) -> None:
    model, task = built(folder).train(), Yolo(batch_size=2, imgsz=64, augment=False)
    batch = next(iter(task.batches(model, task.load(model, str(folder / "boxes.yaml")).training)))
    output, loss = task.learn(model, batch.call, batch.target)
    with_arguments = model
    from ultralytics.cfg import get_cfg

    with_arguments.args = get_cfg()
    expected, _ = with_arguments.loss({**batch.target, "img": batch.call.args[0]}, output)
    assert torch.allclose(loss, expected.sum() / 2)  # type: ignore[arg-type]
    assert raw_predictions(output).shape[:2] == (2, 66)
    assert torch.equal(raw_predictions(model.eval()(batch.call.args[0])), raw_predictions(model(batch.call.args[0])[1]))


def test_it_is_known_by_its_published_name_and_by_nothing_else() -> None:
    source = sources.identify(sources.resolve("ultralytics:yolo11n.yaml,nc=3").build())
    assert str(source) == "ultralytics:yolo11n.yaml,nc=3"
    assert source is not None
    assert unsafe(source) is None
    for name, kwargs in (("../yolo11n.yaml", {}), ("yolo11n.pt", {}), ("mine.yaml", {}), ("yolo11n.yaml", {"nc": "x"})):
        assert unsafe(sources.ModelSource("ultralytics", name, kwargs)) is not None
    with pytest.raises(cpd.InputError, match="has no argument 'classes'"):
        sources.resolve("ultralytics:yolo11n.yaml,classes=3").build()
    with pytest.raises(cpd.InputError, match="ultralytics cannot build"):
        sources.resolve("ultralytics:nothing.yaml").build()


def test_wrong_data_is_told_before_any_work(folder: Path, tmp_path: Path) -> None:
    model, task = built(folder), Yolo(imgsz=64)
    assert isinstance(task_of(model), Yolo)
    with pytest.raises(cpd.InputError, match="ultralytics cannot read the data"):
        task.load(model, str(tmp_path / "none.yaml"))
    more = (folder / "boxes.yaml").read_text().replace("1: b", "1: b, 2: c")
    (tmp_path / "more.yaml").write_text(more)
    with pytest.raises(cpd.InputError, match=r"has 3 classes, the model 2: build one of as many \(nc=3\)"):
        task.load(model, str(tmp_path / "more.yaml"))
    with pytest.raises(cpd.InputError, match="imgsz must be"):
        Yolo(imgsz=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert validated(model, str(folder / "boxes.yaml"), 64, 2) >= 0
    assert before.keys() == model.state_dict().keys()


def test_validating_leaves_threads_and_random_numbers_as_they_were(folder: Path) -> None:
    """Ultralytics sets how many threads torch has, and draws of Python's generator."""
    before, model = torch.get_num_threads(), built(folder)
    try:
        torch.set_num_threads(3)
        random.seed(1)
        validated(model, str(folder / "boxes.yaml"), 64, 2)
        found = torch.get_num_threads(), random.random()
    finally:
        torch.set_num_threads(before)
    random.seed(1)
    assert found == (3, random.random())
