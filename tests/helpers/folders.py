"""Folders of small images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

LEAKY = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's image reader


def write_images(root: Path, classes: int, count: int = 3) -> None:
    """A folder a class, of as many images each."""
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 16), (80 * label, 30 * index, 0)).save(folder / f"{index}.png")
