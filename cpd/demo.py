"""The main job on real data that every machine has: scikit-learn's handwritten digits, offline, in a few minutes.

A small residual CNN is trained on the spot; it is the teacher. `cpd.compress` then makes it twice as fast in ONNX
Runtime and distills it against itself. Read `run_demo` first: it is also how you would call `cpd` on your own data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.errors import InputError, needs_extra, of_the_user
from cpd.model.arguments import MODEL, TENSOR
from cpd.model.inputs import device_of, evaluating
from cpd.model.progress import part, shown
from cpd.options import FLAG, LIMIT, PATH, SEED, checked, instance, integer, number, several
from cpd.tasks.metric import named

if TYPE_CHECKING:
    from cpd.jobs.outcome import Result

SIDE = 16
"""Pixels that a digit measures after upsampling (8 as it comes), so that convolutions carry real cost."""

log = logging.getLogger("cpd")

TEST_COUNT = 600
"""Digits held back for testing; the other 1,197 are trained on."""

SHIFT = 2
"""Pixels by which augmentation moves a digit at most, in any direction."""


class AugmentedLoader:
    """Batches of randomly cropped (and mirrored) images, in a new order each time it is iterated.

    Works on whole batches of tensors, so it costs next to nothing beside the network. Two loaders of the same
    seed give the same batches: in the first pass, in the second, and so on.
    """

    @checked(images=TENSOR, labels=TENSOR, crop=LIMIT, batch_size=LIMIT, flip=FLAG, seed=SEED)
    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        crop: int,
        batch_size: int,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        """Hold the data.

        Args:
            images: `[N, C, H, W]`, normalised, with the border already added that crops may reach into.
            labels: `[N]`, class indices.
            crop: side S of the square that is cut out at random; at most H and W.
            batch_size: images a batch; the last of a pass may be smaller.
            flip: mirror each image left to right with a chance of one half.
            seed: of the order, the crops and the flips.
        """
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.flip = flip
        self._windows = images.unfold(2, crop, 1).unfold(3, crop, 1)  # [N, C, rows, columns, S, S], a view
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of `[B, C, S, S]` images and `[B]` labels."""
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.split(self.batch_size):
            yield self._cut(chosen), self.labels[chosen]

    def _cut(self, chosen: Tensor) -> Tensor:
        """One random crop, perhaps mirrored, of each chosen image."""
        count, (rows, columns) = len(chosen), self._windows.shape[2:4]
        top = torch.randint(rows, (count,), generator=self.generator)
        left = torch.randint(columns, (count,), generator=self.generator)
        cut = self._windows[chosen, :, top, left].contiguous()
        if not self.flip:
            return cut
        mirrored = torch.rand(count, 1, 1, 1, generator=self.generator) < 0.5
        return torch.where(mirrored.to(cut.device), cut.flip(3), cut)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


_WIDTHS = several(LIMIT.accepts, "widths of at least one stage, as (48, 96)")


class DigitsNet(nn.Module):
    """A residual CNN for grey images of ten classes: a stem, stages of residual blocks, pooling, a linear layer."""

    @checked(widths=_WIDTHS, blocks=LIMIT)
    def __init__(self, widths: Sequence[int] = (48, 96), blocks: int = 2) -> None:
        """Build it with random weights.

        Args:
            widths: channels of each stage; every stage but the first halves height and width.
            blocks: residual blocks a stage.
        """
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages = []
        for index, (inputs, outputs) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            first = ResidualBlock(inputs, outputs, stride=2 if index else 1)
            rest = (ResidualBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of images `[N, 1, H, W]`."""
        features: Tensor = self.stages(self.stem(x))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@checked(count=LIMIT, test_count=integer(0))
def split(count: int, test_count: int = TEST_COUNT) -> tuple[Tensor, Tensor]:
    """Indices for training and for testing: a shuffle of `count`, always the same one, cut in two."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[test_count:], order[:test_count]


@checked(batch_size=LIMIT, seed=SEED)
def digits(batch_size: int = 64, seed: int = 0) -> tuple[AugmentedLoader, Tensor, Tensor]:
    """The handwritten digits of scikit-learn (1,797 of them, part of the package: nothing is downloaded).

    Args:
        batch_size: images a training batch.
        seed: of the training loader's order and shifts; the split does not depend on it.

    Returns:
        The training loader, the test images `[600, 1, 16, 16]` in [0, 1], and the test labels `[600]`.
    """
    with needs_extra("demo", "The demo"):
        from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(targets, dtype=torch.int64)
    train, test = split(len(images))
    padded = F.pad(images[train], [SHIFT] * 4)
    loader = AugmentedLoader(padded, labels[train], crop=SIDE, batch_size=batch_size, seed=seed)
    return loader, images[test], labels[test]


@checked(
    loader=instance(AugmentedLoader, "what cpd.demo.digits gives first"), epochs=LIMIT,
    lr=number("above 0", lambda value: value > 0), seed=SEED, progress=FLAG,
)  # fmt: skip
def train_teacher(
    loader: AugmentedLoader,
    *,
    epochs: int = 8,
    lr: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
) -> DigitsNet:
    """A `DigitsNet` trained from scratch by SGD under a one-cycle schedule.

    Args:
        loader: the training data.
        epochs: passes over it.
        lr: the peak learning rate.
        seed: of the first weights; the state of PyTorch's own generator is left as found.
        progress: False shows no progress line; else there is one where stderr is a terminal.

    Returns:
        The trained model, in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    with shown(progress), part("train the teacher", steps) as training:
        for _ in range(epochs):
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                training.advance()
    return model.eval()


def _each_right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    """`[N]`: 100 for each image that `model` puts in the class of its label, 0 for the others."""
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        starts = range(0, len(images), batch_size)
        with of_the_user("The model", f"on images of shape {list(images.shape)}"):
            predicted = torch.cat([model(images[start : start + batch_size].to(device)).argmax(1) for start in starts])
    if labels.shape != predicted.shape:
        raise InputError(
            f"labels must be of shape {list(predicted.shape)}, one for each image; got {list(labels.shape)}."
        )
    return 100.0 * (predicted == labels.to(predicted.device))


@named("top-1 accuracy [%]", each=_each_right)
@checked(model=MODEL, images=TENSOR, labels=TENSOR, batch_size=LIMIT)
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of `images` `[N, C, H, W]` that `model` puts in the class of `labels` `[N]`, in per cent.

    The model runs in eval mode, without gradients, on its own device; its training flags are left as found.
    """
    correct = int((_each_right(model, images, labels, batch_size) > 0).sum())
    return 100 * correct / len(images)


@checked(output_dir=PATH, seed=SEED, progress=FLAG, overwrite=FLAG)
def run_demo(
    output_dir: Path | None = None, seed: int = 0, progress: bool | None = None, overwrite: bool = False
) -> Result:
    """Train a teacher on the digits and compress it to half its ONNX Runtime latency on one thread.

    Args:
        output_dir: where the artifacts go; None writes none.
        seed: of the teacher's training and of the compression.
        progress: False shows no progress line; else there is one where stderr is a terminal.
        overwrite: as for `cpd.compress`.

    Returns:
        What `cpd.compress` returns; its report's metric is the accuracy on the test digits in per cent.
    """
    from cpd.jobs.compress import compress
    from cpd.report.artifacts import check_output_dir

    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite)
    loader, images, labels = digits(seed=seed)
    log.info("Training a small CNN on scikit-learn's digits, to be compressed afterwards …")
    teacher = train_teacher(loader, seed=seed, progress=progress)
    return compress(
        teacher,
        target_speedup=2,
        data=loader,
        example_inputs=images[:1],
        evaluate=partial(accuracy, images=images, labels=labels),
        epochs=6,
        lr=0.01,
        output_dir=output_dir,
        overwrite=overwrite,
        seed=seed,
        threads=1,
        progress=progress,
    )
