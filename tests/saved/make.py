"""Writes what lies in this folder; see README.md."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import cpd  # noqa: E402
from cpd.cli import app  # noqa: E402
from helpers.folders import write_images  # noqa: E402
from helpers.saved import IMAGES, Interrupted, batches, classifier, trained  # noqa: E402

MODEL = "timm:test_resnet,num_classes=2,channels=[8,8,8,8],stem_width=8"
RECIPE = (
    "--no-pretrained --input-size 32 --batch-size 2 --workers 0 --epochs 2 --target-macs 0.5 --round-to 2 --seed 3 "
    "--criterion taylor --schedule cubic --prune-from 0.1 --prune-until 0.6 --interval 1 --optimizer adamw --lr 1e-3 "
    "--kd kl --temperature 2 --ema 0.9 --data images --output-dir command_line --quiet"
)


def outputs(model: torch.nn.Module, images: torch.Tensor) -> list[list[float]]:
    """What a model gives on images, as JSON holds it."""
    with torch.no_grad():
        return model.eval()(images).tolist()


def interrupted(folder: str, stop: int, **options: object) -> None:
    """A checkpoint of a training that did not end."""
    try:
        trained(Path(folder), stop=stop, **options)
    except Interrupted:
        return
    raise AssertionError("the training has ended")


def main() -> None:
    """Write everything anew."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as the tests run
    sys.modules[cpd.compress.__module__].FINAL_SECONDS = 0.5
    os.chdir(HERE)
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    half = cpd.compress(
        classifier(), target_macs=0.5, data=batches(), epochs=1, lr=1e-2, round_to=1, output_dir="own", progress=False
    )
    half.save_pretrained("hub")
    Path("plan.json").write_text(json.dumps(half.plan.to_dict(), indent=1))
    found = {"digest": half.plan.digest, "own": outputs(half.model, IMAGES)}

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "images", "train"), classes=2, count=8)
        write_images(Path(folder, "images", "val"), classes=2)
        os.chdir(folder)
        app(["compress", MODEL, *RECIPE.split()], standalone_mode=False)
        shutil.copytree("command_line", HERE / "command_line")
        os.chdir(HERE)
    found["command_line"] = outputs(cpd.load("command_line"), IMAGES.repeat(1, 1, 2, 2))

    large = IMAGES[:1].repeat(1, 1, 8, 8)
    cpd.sweep(classifier(), [1.2, 1000], output_dir="sweep", example_inputs=large, round_to=1, progress=False)
    for path in Path("sweep").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    for path in HERE.rglob("report.html"):  # which nobody reads back
        path.unlink()
    Path("outputs.json").write_text(json.dumps(found, indent=1))

    plain = {"criterion": "magnitude", "compensation": False}  # which go on to the same plan as they did then
    interrupted("one_shot", 10, **plain, training=cpd.DistillConfig(optimizer="adamw", ema=0.9))
    schedule = cpd.Schedule("cubic", end=0.6, warmup=0.1)
    interrupted("scheduled", 8, **plain, schedule=schedule, training=cpd.DistillConfig(kd="mse", features=["conv"]))
    schedule = cpd.Schedule("linear", end=0.8, interval=4)
    interrupted("summed", 9, schedule=schedule, criterion="taylor", compensation=False)


if __name__ == "__main__":
    main()
