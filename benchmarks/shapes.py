"""Images of shapes with exact boxes, masks and corners, made on the spot, as data of ultralytics and as tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

NAMES = ("square", "disc", "triangle")


class Shape(NamedTuple):
    """One shape of an image: its class, and its outline in pixels, [points, 2] of (x, y)."""

    label: int
    outline: np.ndarray[Any, Any]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        (left, top), (right, bottom) = self.outline.min(0), self.outline.max(0)
        return float(left), float(top), float(right), float(bottom)


def drawn(side: int, seed: int) -> tuple[Image.Image, list[Shape]]:
    """One image of noise with one to four shapes on it, that do not overlap much."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(40, 216, 3)
    pixels = np.clip(ground + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
    image, found = Image.fromarray(pixels), list[Shape]()
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 5))):
        for _ in range(20):
            radius = float(rng.uniform(0.08, 0.22)) * side
            x, y = rng.uniform(radius, side - radius, 2)
            if all(_apart((x, y), radius, shape.box) for shape in found):
                break
        else:
            continue
        label, turn = int(rng.integers(len(NAMES))), float(rng.uniform(0, math.tau))
        corners = {0: 4, 1: 24, 2: 3}[label]
        angles = turn + np.arange(corners) * math.tau / corners
        outline = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        colour = rng.integers(0, 256, 3)
        if np.abs(colour - ground).max() < 60:
            colour = 255 - ground
        pen.polygon([tuple(point) for point in outline], fill=tuple(int(value) for value in colour))
        found.append(Shape(label, outline))
    return image, found


def _apart(middle: tuple[float, float], radius: float, box: tuple[float, float, float, float]) -> bool:
    left, top, right, bottom = box
    return math.dist(middle, ((left + right) / 2, (top + bottom) / 2)) > radius + (right - left) / 2


def yolo_line(shape: Shape, side: int, task: str) -> str:
    """A line of a label file: class and box, outline, or box and four points, as shares of the image."""
    left, top, right, bottom = (value / side for value in shape.box)
    box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    outline = (shape.outline / side).clip(0, 1)
    if task == "segment":
        values = outline.ravel().tolist()
    elif task == "pose":
        points = outline[np.linspace(0, len(outline) - 1, 4).round().astype(int)]
        values = [*box, *(value for x, y in points for value in (x, y, 2))]
    else:
        values = box
    return " ".join([str(shape.label), *(f"{value:.6f}" for value in values)])


def write_yolo(
    folder: Path, task: str = "detect", train: int = 8, val: int = 8, side: int = 320, seed: int = 0
) -> Path:
    """A data set of ultralytics: images, labels and the file that names them, which is returned."""
    for number, (split, count) in enumerate({"train": train, "val": val}.items()):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, shapes = drawn(side, 10**6 * (2 * seed + number) + index)
            image.save(folder / "images" / split / f"{index:06}.png")
            lines = [yolo_line(shape, side, task) for shape in shapes]
            (folder / "labels" / split / f"{index:06}.txt").write_text("\n".join(lines))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(NAMES))
    points = "kpt_shape: [4, 3]\nflip_idx: [0, 1, 2, 3]\n" if task == "pose" else ""
    file = folder / "shapes.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\n{points}names:\n{names}")
    return file


def batch_of_boxes(images: int, side: int, seed: int = 0) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images [3, H, W] in 0 to 1, and their boxes and labels (from 1), as torchvision's detectors take them."""
    pictures, targets = [], []
    for index in range(images):
        image, shapes = drawn(side, 10**6 * (seed + 7) + index)
        pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
        boxes = torch.tensor([shape.box for shape in shapes]).clamp(0, side)
        targets.append({"boxes": boxes, "labels": torch.tensor([shape.label + 1 for shape in shapes])})
    return pictures, targets
