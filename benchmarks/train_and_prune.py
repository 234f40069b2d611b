"""Prune and train back: one line a run, of every student, loss, schedule, teacher and seed that is asked for.

Students: `resnet56` (pretrained, 5,085 exact CIFAR-10 images), `resnet56-full` (all 50,000, as JPEG), `resnet20`
(on the exact images; its larger teacher is the pretrained ResNet-56), `vit` and `mobilenetv2` (CIFAR stems, on the
exact images), `lraspp` (torchvision's) and `decoder` (a timm backbone), both on CamVid, `lite0`, a real ImageNet model
on 400 images without labels, tested on 300 of other classes (`imagenet.py`), and `lite0-cifar`, `lite0-digits` and
`lite0-camvid`, the same model on other data (`transfer.py`). `ade20k` is LR-ASPP on a folder
of ADE20K (DATA_DIR is `ADEChallengeData2016`). What has no weights for its data yet is trained first, and kept in
`--weights`. Segmentation tells the IoU of every class (`--classes` prints them). `--by peer` runs Torch-Pruning as its
examples do: group magnitude, as narrow as the MACs or the measured speed ask for, then cross-entropy for as many
epochs. Rows that the JSON file holds are not run again.

    python benchmarks/train_and_prune.py DATA_DIR resnet56 --fewer 2.11 2.55 --seeds 0 1 2 --by cpd peer \\
        --json runs/train_and_prune.json --plot runs/train_and_prune.svg
    python benchmarks/train_and_prune.py DATA_DIR lraspp --speedups 1.9 --kd none kl cwd cirkd --seeds 0 1 2
    python benchmarks/train_and_prune.py DATA_DIR resnet56 --schedules one-shot linear cubic --fewer 2.55
    python benchmarks/train_and_prune.py DATA_DIR resnet20 --fewer 2 --teachers same larger
    python benchmarks/train_and_prune.py DATA_DIR resnet56 --fewer 2.11 2.55 --seeds 0 1 2 \\
        --learning none group-lasso growing batchnorm
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import imagenet
import results
import timm
import torch
import torchvision
import transfer
from coverage import PEER, installed_peer
from image_folders import ADE20K_CLASSES, ade20k, scored
from models import PARTS, CifarResNet, counted_macs
from one_shot import peer_narrowed, peer_steps, vit
from one_shot_measured import APART, AS_FAST, SECONDS
from onnx_latency import separately
from resnet56_cifar10 import FEW_IMAGES, check_files, load_data, load_model, normalise
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import cpd
from cpd.criteria.regularization import STRENGTHS
from cpd.demo import AugmentedLoader, accuracy
from cpd.distillation.distiller import distill
from cpd.model.inputs import as_call
from cpd.tasks.segmentation import EncoderDecoder, SegmentationFolder

LITE0, BORDER = "tf_efficientnet_lite0", 16
CAMVID_CLASSES, CAMVID_SIZE = 11, (360, 480)
CAMVID_NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist"]
KINDS = ("none", "kl", "cwd", "cirkd", "mse")


@dataclass(frozen=True)
class Student:
    """What is pruned, and how it is trained.

    Attributes:
        make: the model, without weights.
        data: (folder, seed, batch size) -> (training loader, evaluate, example inputs).
        metric: what `evaluate` gives.
        dense: the training that it gets before all else; None: its weights are for this data.
        recovery: the training after, or while, it is pruned.
        batch: images a step.
        start: data folder -> the model with weights; None: it has none.
        larger: the model of a larger teacher.
        larger_start: the same with weights for this data; None: it is trained as the student is.
        peer: images a step of the peer's training; None: the peer's example does not fit it.
        labels: whether the peer's training has labels; else it is taught by the unpruned model, as ours is.
        calibration: data folder -> the images, not augmented, that channels are scored on; None: those of the training.
    """

    make: Callable[[], nn.Module]
    data: Callable[[Path, int, int], tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]]
    metric: str
    dense: cpd.DistillConfig | None
    recovery: cpd.DistillConfig
    batch: int = 128
    start: Callable[[Path], nn.Module] | None = None
    larger: Callable[[], nn.Module] | None = None
    larger_start: Callable[[Path], nn.Module] | None = None
    peer: int | None = None
    labels: bool = True
    calibration: Callable[[Path], Iterable[Any]] | None = None


# ---------------------------------------------------------------------------------- data


def exact_images(folder: Path, seed: int, batch: int) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """5,085 training images, cropped and mirrored, and 1,017 test images."""
    check_files(folder)
    data = load_data(folder, seed)
    data.loader.batch_size = batch
    return data.loader, partial(accuracy, images=data.test_images, labels=data.test_labels), data.test_images[:1]


def all_images(folder: Path, seed: int, batch: int) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """All images of CIFAR-10, decoded once from `cifar10-jpeg.zip`, held in memory, on the GPU where there is one."""
    unpacked = _unpacked(folder / "cifar10-jpeg.zip", "cifar10")
    (train, train_labels), (test, test_labels) = (_decoded(unpacked / part) for part in ("train", "test"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = AugmentedLoader(
        normalise(train, 4).to(device), train_labels.to(device), crop=32, batch_size=batch, flip=True, seed=seed
    )
    images, labels = normalise(test), test_labels

    def evaluate(model: nn.Module) -> float:
        where = next(model.parameters()).device
        return accuracy(model, images=images.to(where), labels=labels.to(where))

    return loader, evaluate, images[:1]


def _decoded(folder: Path) -> tuple[Any, Tensor]:
    import numpy as np

    cache = folder.with_suffix(".npz")
    if not cache.exists():
        found = ImageFolder(folder)
        pixels = np.stack([np.asarray(image) for image, _ in found])
        np.savez(cache, pixels=pixels, labels=np.array(found.targets))
    with np.load(cache, allow_pickle=False) as archive:
        return archive["pixels"], torch.from_numpy(archive["labels"]).long()


def _unpacked(archive: Path, name: str) -> Path:
    """The content of a zip file, unpacked once beside the other results."""
    target = Path("runs") / "data" / name
    if not target.exists():
        part = target.with_suffix(".part")
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)
        part.rename(target)
    return target


def imagenet_sample(folder: Path, seed: int, batch: int) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """400 training images, cropped and mirrored, and 300 test images, which are of other classes."""
    images, labels = imagenet.sample(LITE0, folder, "calibration", BORDER)
    test, test_labels = imagenet.sample(LITE0, folder, "test")
    loader = AugmentedLoader(images, labels, crop=test.shape[-1], batch_size=batch, flip=True, seed=seed)
    return loader, partial(accuracy, images=test, labels=test_labels), test[:1]


def camvid(folder: Path, seed: int, batch: int) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """367 training and 233 test images of 11 classes; half the size on a CPU, to end in time."""
    unpacked = _unpacked(folder / "camvid.zip", "camvid")
    size = CAMVID_SIZE if torch.cuda.is_available() else (CAMVID_SIZE[0] // 2, CAMVID_SIZE[1] // 2)
    make = partial(SegmentationFolder, classes=CAMVID_CLASSES, size=size)
    loader = DataLoader(
        make(unpacked / "train", training=True), batch_size=batch, shuffle=True, drop_last=True,
        generator=torch.Generator().manual_seed(seed), num_workers=8 if torch.cuda.is_available() else 0,
    )  # fmt: skip
    test = list(DataLoader(make(unpacked / "test"), batch_size=8))
    return loader, scored(test, CAMVID_CLASSES, CAMVID_NAMES), test[0][0][:1]


def ade20k_images(folder: Path, seed: int, batch: int) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """ADE20K's training and validation images of 150 classes; smaller on a CPU, to end in time."""
    gpu = torch.cuda.is_available()
    return ade20k(folder, seed, batch, (512, 512) if gpu else (256, 256), workers=8 if gpu else 0)


# ---------------------------------------------------------------------------------- students


def mobilenetv2() -> nn.Module:
    """timm's MobileNetV2 of width 1 with strides for images of 32 pixels: the first three of five are dropped."""
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    model.conv_stem.stride = (1, 1)
    for stage in (1, 2):
        model.blocks[stage][0].conv_dw.stride = (1, 1)
    return model


def lraspp(classes: int = CAMVID_CLASSES) -> nn.Module:
    """torchvision's LR-ASPP on MobileNetV3."""
    make = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    return make(weights=None, weights_backbone=None, num_classes=classes)


def large_vit() -> nn.Module:
    """Twice as wide and as deep as `one_shot.vit`."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=256, depth=12, num_heads=8, mlp_ratio=4, num_classes=10,
        class_token=False, global_pool="avg",
    )  # fmt: skip


_sgd = cpd.DistillConfig(epochs=15, lr=0.01, kd="kl")
_mimic = replace(FEW_IMAGES, epochs=15, lr=0.01)
_adamw = cpd.DistillConfig(optimizer="adamw", lr=1e-3, weight_decay=0.05, kd="none", warmup=0.1)
STUDENTS = {
    "resnet56": Student(
        CifarResNet, exact_images, "accuracy", None, _mimic, batch=32, start=load_model, peer=128,
    ),
    "resnet56-full": Student(
        CifarResNet, all_images, "accuracy", replace(_sgd, epochs=60, lr=0.05, kd="none"),
        replace(_sgd, epochs=100, lr=0.02), start=load_model, peer=128,
    ),
    "resnet20": Student(
        partial(CifarResNet, 3), exact_images, "accuracy", replace(_sgd, epochs=60, lr=0.1, kd="none"), _mimic,
        batch=32, larger=CifarResNet, larger_start=load_model, peer=128,
    ),
    "vit": Student(
        vit, exact_images, "accuracy", replace(_adamw, epochs=40), replace(_adamw, epochs=20, kd="kl"),
        larger=large_vit, peer=128,
    ),
    "mobilenetv2": Student(
        mobilenetv2, exact_images, "accuracy", replace(_sgd, epochs=30, lr=0.1, kd="none"), _sgd,
    ),
    "lraspp": Student(
        lraspp, camvid, "mIoU", replace(_adamw, epochs=60), replace(_adamw, epochs=20, kd="cwd"), batch=8,
        larger=partial(EncoderDecoder, "resnet50", CAMVID_CLASSES),
    ),
    "ade20k": Student(
        partial(lraspp, ADE20K_CLASSES), ade20k_images, "mIoU", replace(_adamw, epochs=60),
        replace(_adamw, epochs=20, kd="cwd"), batch=16,
        larger=partial(EncoderDecoder, "resnet50", ADE20K_CLASSES),
    ),
    "decoder": Student(
        partial(EncoderDecoder, "mobilenetv3_large_100", CAMVID_CLASSES), camvid, "mIoU",
        replace(_adamw, epochs=60), replace(_adamw, epochs=20, kd="cwd"), batch=8,
        larger=partial(EncoderDecoder, "resnet50", CAMVID_CLASSES),
    ),
    "lite0": Student(
        partial(timm.create_model, LITE0), imagenet_sample, "accuracy", None,
        replace(_mimic, epochs=10, features=("bn2",), freeze_batchnorm=True), batch=32,
        start=lambda folder: imagenet.load(LITE0, folder, folder), peer=32, labels=False,
        calibration=lambda folder: imagenet.sample(LITE0, folder, "calibration")[0].split(32),
    ),
    "lite0-cifar": Student(
        transfer.classifier, transfer.cifar, "accuracy", replace(_sgd, epochs=8, kd="none"), replace(_sgd, epochs=5),
        batch=64, start=transfer.trained_classifier, peer=64,
    ),
    "lite0-digits": Student(
        transfer.classifier, transfer.written_digits, "accuracy", replace(_sgd, epochs=8, kd="none"),
        replace(_sgd, epochs=5), batch=64, start=transfer.trained_classifier, peer=64,
    ),
    "lite0-camvid": Student(
        transfer.segmenter, camvid, "mIoU", replace(_adamw, epochs=20), replace(_adamw, epochs=8, kd="cwd"), batch=8,
        start=transfer.trained_segmenter, peer=8,
    ),
}  # fmt: skip


def memory_format(options: argparse.Namespace) -> torch.memory_format:
    """How the weights lie in memory."""
    return torch.channels_last if options.channels_last else torch.contiguous_format


def dense_model(name: str, student: Student, options: argparse.Namespace, larger: bool = False) -> nn.Module:
    """The unpruned model or a teacher: from `--weights`, else from the data folder or made anew; trained if need be."""
    make, start = (student.larger, student.larger_start) if larger else (student.make, student.start)
    known = start is not None and (larger or student.dense is None)
    if make is None:
        raise SystemExit(f"{options.student} has no larger teacher here.")
    file = options.weights / f"{name}.safetensors"
    layout = memory_format(options)
    if file.exists():
        model = make().to(memory_format=layout)
        model.load_state_dict(load_file(file))
        return model.eval()
    torch.manual_seed(0)
    model = (make() if start is None else start(options.data_dir)).to(memory_format=layout)
    if known or student.dense is None or options.dense_epochs == 0:
        return model.eval()
    loader, evaluate, _ = student.data(options.data_dir, 0, student.batch)
    epochs = student.dense.epochs if options.dense_epochs is None else options.dense_epochs
    config = replace(student.dense, epochs=epochs)
    print(f"training the dense {name} for {config.epochs:g} epochs", file=sys.stderr)
    records = distill(model, None, loader, evaluate=evaluate, config=config)
    print(f"dense {name}: {records[-1].metric:.2f}", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, file)
    return model.eval()


# ---------------------------------------------------------------------------------- rows


def ours(
    student: Student, dense: nn.Module, teacher: nn.Module | None, setting: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Compress once; what came of it."""
    loader, evaluate, example = student.data(options.data_dir, setting["seed"], options.batch or student.batch)
    changes = {key: value for key, value in vars(options).items() if key in TRAINING and value is not None}
    config = replace(student.recovery, seed=setting["seed"])
    if setting["kd"] != config.kd:  # with what is usual for another loss
        config = replace(config, kd=setting["kd"], features=(), kd_weight=None, task_weight=1.0)
    config = replace(config, **changes)
    target = {"target_speedup": setting["speedup"]} if setting["speedup"] else {"target_macs": 1 / setting["fewer"]}
    learned = setting["learning"] != "none"
    schedule: Any = setting["schedule"]
    if schedule != "one-shot" or learned:
        schedule = cpd.Schedule(
            schedule, start=options.prune_from if learned else 0.0, end=options.prune_until, interval=options.interval
        )
    start = time.perf_counter()
    result = cpd.compress(
        dense, data=loader, evaluate=evaluate, example_inputs=example, training=config, epochs=config.epochs,
        calibration=student.calibration and student.calibration(options.data_dir),
        lr=config.lr, teacher=teacher, schedule=schedule, round_to=8 if setting["speedup"] else 1,
        seed=setting["seed"], score_batches=options.score_batches,
        regularization=setting["learning"] if learned else None,
        regularization_strength=options.strength if learned else None, **target, **PARTS[setting["parts"]],
    )  # fmt: skip
    report, history = result.report, result.report.history
    trained = [row for row in history if row["epoch"]]
    return {
        "dense": report.original.metric,
        "metric": report.result.metric,
        "untrained": next((row["metric"] for row in history if not row["epoch"]), None),
        "history": [row["metric"] for row in history],
        "steps_per_second": [row["steps_per_second"] for row in trained],
        "macs": report.original.macs / report.result.macs,
        "parameters": report.original.parameters / report.result.parameters,
        "removed": len(result.plan.removed),
        "latency": report.speedup,
        "apart": apart(dense, result.model, example),
        "classes": by_class(evaluate, dense=dense, narrow=result.model),
        "seconds": time.perf_counter() - start,
    }


def by_class(evaluate: Callable[[nn.Module], float], **models: nn.Module) -> dict[str, dict[str, float]] | None:
    """The scores of each class by some models; None where the metric has none."""
    each = getattr(evaluate, "by_class", None)
    return None if each is None else {name: each(model) for name, model in models.items()}


def apart(dense: nn.Module, narrow: nn.Module, example: Tensor) -> float:
    """How many times as fast the narrow model is in ONNX Runtime, on one thread, as another process measures it."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"dense": dense, "narrow": narrow}
        files = [cpd.export_onnx(model.cpu(), example, Path(folder, f"{name}.onnx")) for name, model in models.items()]
        return separately(*files, threads=1)


def theirs(
    tp: Any, student: Student, dense: nn.Module, setting: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Torch-Pruning's group magnitude, then cross-entropy, as its examples train: SGD 0.01 with a cosine.

    Without labels it is trained as ours.
    """
    loader, evaluate, example = student.data(options.data_dir, setting["seed"], student.peer or student.batch)
    start = time.perf_counter()
    if setting["fewer"]:
        model = peer_narrowed(tp, "magnitude", dense, example, setting["fewer"])
    else:
        model = as_fast(tp, dense, example, setting["speedup"])
    model = model.requires_grad_(True).to(memory_format=memory_format(options))
    epochs = options.epochs or student.recovery.epochs
    config = cpd.DistillConfig(lr=0.01, kd="none", warmup=0.0, weight_decay=5e-4)
    config = replace(config if student.labels else student.recovery, epochs=epochs, seed=setting["seed"])
    teacher = None if student.labels else copy.deepcopy(dense)
    records = distill(model, teacher, loader, evaluate=evaluate, config=config)
    call = as_call(example)
    return {
        "dense": evaluate(dense),
        "metric": records[-1].metric,
        "untrained": None,
        "history": [record.metric for record in records],
        "steps_per_second": [record.steps_per_second for record in records],
        "macs": counted_macs(dense, call) / counted_macs(model, call),
        "parameters": sum(p.numel() for p in dense.parameters()) / sum(p.numel() for p in model.parameters()),
        "latency": cpd.compare_latency(dense, model.eval(), example, seconds=10).speedup,
        "apart": apart(dense, model, example),
        "seconds": time.perf_counter() - start,
    }


def as_fast(tp: Any, dense: nn.Module, example: Tensor, speedup: float) -> nn.Module:
    """The peer's first model that is as fast, widths in multiples of 8; its narrowest where none is."""
    last, call, narrow = math.inf, as_call(example), dense
    with tempfile.TemporaryDirectory() as folder:
        file = cpd.export_onnx(dense, example, Path(folder, "dense.onnx"))
        for narrow in peer_steps(tp, "magnitude", dense, example, round_to=8):
            macs = counted_macs(narrow, call)
            if macs > APART * last:
                continue
            last = macs
            if cpd.compare_latency(file, narrow, example, seconds=SECONDS, min_runs=6).speedup >= AS_FAST * speedup:
                break
    narrow.zero_grad()
    return narrow


def settings(options: argparse.Namespace, peer: bool) -> Iterator[dict[str, Any]]:
    """Every run that is asked for."""
    targets = [(fewer, None) for fewer in options.fewer] + [(None, speedup) for speedup in options.speedups]
    for fewer, speedup in targets:
        for seed in options.seeds:
            for kd in (options.kd or [None]) if "cpd" in options.by else []:
                for schedule in options.schedules:
                    for teacher in options.teachers:
                        for parts, learning in product(options.parts, options.learning):
                            yield {"by": "cpd", "fewer": fewer, "speedup": speedup, "kd": kd, "schedule": schedule,
                                   "teacher": teacher, "parts": parts, "learning": learning, "seed": seed}  # fmt: skip
            if peer:
                kd = "none" if STUDENTS[options.student].labels else None
                yield {"by": PEER, "fewer": fewer, "speedup": speedup, "kd": kd, "schedule": "one-shot",
                       "teacher": "same", "parts": "widths", "learning": "none", "seed": seed}  # fmt: skip


# ---------------------------------------------------------------------------------- what is printed


MEANS = ("macs", "parameters", "latency", "apart")
#: Of which the classes are scored.
MODELS = ("dense", "narrow")
GROUPED = ("student", "by", "fewer", "speedup", "kd", "schedule", "teacher", "parts", "learning", "epochs")


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for all seeds of a run: mean and spread."""
    heads = ("student", "by", "asked", "kd", "schedule", "teacher", "parts", "learning", "epochs", "seeds",
             "dense",
             "untrained", "trained")  # fmt: skip
    found = Table(*heads, "change", "MACs", "parameters", "ONNX", "measured apart", "steps/s first, last", "s")
    for key in dict.fromkeys(tuple(row[name] for name in GROUPED) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in GROUPED) == key]
        metrics = [row["metric"] for row in alike]
        spread = f" ± {statistics.stdev(metrics):.2f}" if len(metrics) > 1 else ""
        untrained = [row["untrained"] for row in alike if row["untrained"] is not None]
        mean = {name: statistics.fmean(row.get(name) or 0 for row in alike) for name in MEANS}
        student, by, fewer, speedup, kd, schedule, teacher, parts, learning, epochs = key
        dense = alike[0]["dense"]
        found.add_row(
            student, by, f"{fewer:g}x MACs" if fewer else f"{speedup:g}x", kd, schedule, teacher, parts,
            learning, f"{epochs:g}",
            str(len(alike)), f"{dense:.2f}", f"{statistics.fmean(untrained):.2f}" if untrained else "-",
            f"{statistics.fmean(metrics):.2f}{spread}", f"{statistics.fmean(metrics) - dense:+.2f}",
            *(f"{mean[name]:.2f}x" for name in MEANS),
            f"{alike[0]['steps_per_second'][0]:.2f}, {alike[0]['steps_per_second'][-1]:.2f}",
            f"{statistics.fmean(row['seconds'] for row in alike):.0f}",
        )  # fmt: skip
    return found


def class_table(rows: list[dict[str, Any]]) -> Table:
    """The score of every class before and after, mean over seeds; classes from the one that lost most."""
    found = Table("student", "asked", "kd", "class", "dense", "trained", "change")
    for key in dict.fromkeys(tuple(row[name] for name in GROUPED) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in GROUPED) == key and row.get("classes")]
        student, _, fewer, speedup, kd, *_ = key
        means = [
            (name, *(statistics.fmean(row["classes"][model].get(name, 0.0) for row in alike) for model in MODELS))
            for name in (alike[0]["classes"]["dense"] if alike else ())
        ]
        for name, before, after in sorted(means, key=lambda item: item[2] - item[1]):
            asked = f"{fewer:g}x MACs" if fewer else f"{speedup:g}x"
            figures = (f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
            found.add_row(student, asked, kd, name, *figures)
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The metric over epochs, one line a run (the first seed), one picture a student."""
    import matplotlib.pyplot as plt

    students = list(dict.fromkeys(row["student"] for row in rows))
    figure, plots = plt.subplots(1, len(students), figsize=(8 * len(students), 5), squeeze=False)
    for student, area in zip(students, plots[0], strict=True):
        mine = [row for row in rows if row["student"] == student]
        seen = set()
        for row in mine:
            key = tuple(row[name] for name in GROUPED)
            if key in seen:
                continue
            seen.add(key)
            asked = f"{row['fewer']:g}x MACs" if row["fewer"] else f"{row['speedup']:g}x"
            label = f"{row['by'].split('==')[0]} {asked} {row['kd']} {row['schedule']} {row['teacher']} {row['parts']} "
            label += row["learning"]
            first = 0 if row["untrained"] is not None else 1
            style = "-" if row["by"] == "cpd" else "--"
            area.plot(range(first, first + len(row["history"])), row["history"], style, marker="o", ms=3, label=label)
        area.axhline(mine[0]["dense"], color="grey", lw=1)
        low = min(min(row["history"]) for row in mine)
        area.set(title=student, xlabel="epoch", ylabel=STUDENTS[student].metric, ylim=(max(low, 0) - 1, None))
        area.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


#: Options that are passed on to the training.
TRAINING = (
    "epochs", "lr", "optimizer", "kd_weight", "temperature", "mixup", "cutmix", "ema", "weight_decay", "warmup",
    "task_weight",
)  # fmt: skip


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("student", choices=list(STUDENTS))
    parser.add_argument("--fewer", nargs="*", type=float, default=[], help="times fewer MACs")
    parser.add_argument("--speedups", nargs="*", type=float, default=[], help="measured in ONNX Runtime")
    parser.add_argument("--kd", nargs="+", choices=KINDS, help="default: the student's usual one")
    parser.add_argument("--schedules", nargs="+", default=["one-shot"], choices=("one-shot", "linear", "cubic"))
    parser.add_argument("--teachers", nargs="+", default=["same"], choices=("same", "larger"))
    parser.add_argument("--parts", nargs="+", default=["both"], choices=list(PARTS), help="what may go")
    parser.add_argument(
        "--learning", nargs="+", default=["none"], choices=("none", *STRENGTHS), help="sparse learning before shrinks"
    )
    parser.add_argument("--strength", type=float, help="of the sparse learning; default: what is usual")
    parser.add_argument("--prune-from", type=float, default=0.3, help="share of the training before, if it is learned")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--by", nargs="+", default=["cpd"], choices=("cpd", "peer"), help=f"peer: {PEER}")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--score-batches", type=int, default=16)
    parser.add_argument("--prune-until", type=float, default=0.5, help="share of the training, if gradual")
    parser.add_argument("--interval", type=int, help="steps between shrinks, if gradual")
    parser.add_argument("--dense-epochs", type=float, help="of the unpruned model, where it is trained; 0: as it is")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights"), help="where dense weights are kept")
    for name in TRAINING:
        kind = str if name == "optimizer" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of the training after pruning")
    parser.add_argument("--device", default="cpu", help="where the model is scored and refitted")
    parser.add_argument("--channels-last", action="store_true", help="train in torch.channels_last: faster on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--classes", action="store_true", help="print the score of every class")
    return parser.parse_args()


def main() -> int:
    """Run what is asked for, print the table."""
    options = parsed()
    student = STUDENTS[options.student]
    rows = results.read(options.json)
    rows = [{"learning": "none", **row} for row in rows]
    with ExitStack() as stack:
        folder = stack.enter_context(installed_peer("peer" in options.by))
        sys.path[:0] = [folder] if folder else []
        dense = dense_model(options.student, student, options)
        teachers: dict[str, nn.Module | None] = {"same": None}
        if "larger" in options.teachers:
            teachers["larger"] = dense_model(f"{options.student}-larger", student, options, larger=True)
        for setting in settings(options, "peer" in options.by and student.peer is not None):
            setting["kd"] = setting["kd"] or student.recovery.kd
            epochs = options.epochs if options.epochs is not None else student.recovery.epochs
            head = {"student": options.student, "epochs": epochs, **setting}
            if any(all(row.get(key) == value for key, value in head.items()) for row in rows):
                continue
            if setting["by"] == "cpd":
                model = copy.deepcopy(dense).to(options.device)
                found = ours(student, model, teachers[setting["teacher"]], setting, options)
            else:
                import torch_pruning as tp

                found = theirs(tp, student, dense, setting, options)
            rows.append({**head, **found})
            print({key: value for key, value in rows[-1].items() if key != "history"}, file=sys.stderr, flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                results.write(options.json, rows)
    rows = [row for row in rows if row["student"] == options.student]
    Console(width=220).print(table(rows))
    if options.classes:
        Console(width=120).print(class_table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
