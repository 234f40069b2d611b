"""ImageNet and ADE20K in their own folders, made up and small, through the benchmarks that read them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> object:
    """A module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def images(folder: Path, names: list[str], size: int = 40) -> None:
    """Some images, each of one colour."""
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        Image.new("RGB", (size, size + 8), (40 * index % 256, 90, 10 * len(str(folder)) % 256)).save(folder / name)


def imagenet(root: Path, names: tuple[str, ...]) -> Path:
    """train/ and val/ with a folder for each class."""
    for part, count in (("train", 6), ("val", 2)):
        for name in names:
            images(root / part / name, [f"{name}_{index}.JPEG" for index in range(count)])
    return root


def ade20k(root: Path) -> Path:
    """images/ and annotations/, of training/ and validation/; labels are 0 (none) to 3."""
    generator = np.random.default_rng(0)
    for part in ("training", "validation"):
        names = [f"ADE_{part}_{index:08}" for index in range(4)]
        images(root / "images" / part, [f"{name}.jpg" for name in names])
        (root / "annotations" / part).mkdir(parents=True)
        for name in names:
            labels = generator.integers(0, 4, (48, 40), dtype=np.uint8)
            Image.fromarray(labels).save(root / "annotations" / part / f"{name}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\tthing {i}, object" for i in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return root


def test_a_folder_of_imagenet_is_read_as_it_is_handed_out(tmp_path: Path, benchmark: ModuleType) -> None:
    folders = benchmark("image_folders")
    data = folders.ImageNet(imagenet(tmp_path / "names", ("n01440764", "n01443537")), "test_efficientnet", 5)
    assert (data.classes, len(data.training.dataset), len(data.validation.dataset)) == (2, 12, 4)
    assert data.example.shape[:2] == (1, 3)
    torch.manual_seed(0)
    (first, labels), *_ = data.plain
    assert len(first) == 5
    assert set(labels.tolist()) <= {0, 1}
    numbered = folders.ImageNet(imagenet(tmp_path / "numbers", ("007", "120")), "test_efficientnet", 4)
    assert numbered.classes == 121
    assert {label for _, label in numbered.validation.dataset.samples} == {7, 120}
    with pytest.raises(SystemExit, match="no val/"):
        folders.ImageNet(tmp_path / "numbers" / "train" / "007" / "..", "test_efficientnet", 4)


def test_imagenet_is_compressed_by_command(
    tmp_path: Path, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = benchmark("imagenet")
    folder, file = imagenet(tmp_path / "data", ("a", "b")), tmp_path / "rows.json"
    given = f"imagenet.py {folder} --models test_efficientnet --fewer 2 --batch 6 --no-pretrained --json {file}"
    monkeypatch.setattr(sys, "argv", given.split())
    assert command.main() == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["macs"] >= 2
    assert row["images"] == 4
    assert {"dense", "metric", "agreement", "speedup"} <= row.keys()
    assert "test_efficientnet" in capsys.readouterr().out
    assert command.main() == 0  # what is there is not run again
    assert len(json.loads(file.read_text())["rows"]) == 1


class Constant(nn.Module):
    """Says the first class everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(0), 150).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.scores[None, :, None, None].expand(len(x), 150, *x.shape[2:])


def test_a_folder_of_ade20k_tells_the_score_of_each_class(tmp_path: Path, benchmark: ModuleType) -> None:
    folders = benchmark("image_folders")
    loader, evaluate, example = folders.ade20k(ade20k(tmp_path), 0, 4, (24, 20))
    assert example.shape == (1, 3, 24, 20)
    ((pixels, labels),) = loader
    assert (pixels.shape, labels.shape) == ((4, 3, 24, 20), (4, 24, 20))
    assert set(labels.unique().tolist()) <= {-100, 0, 1, 2}
    found = evaluate.by_class(Constant())
    assert list(found) == ["thing 1", "thing 2", "thing 3"]  # those that occur
    assert found["thing 1"] == pytest.approx(100 / 3, abs=5)
    assert found["thing 2"] == found["thing 3"] == 0
    assert evaluate(Constant()) > 0
    with pytest.raises(SystemExit, match="ADEChallengeData2016"):
        folders.ade20k(tmp_path / "images", 0, 4)


def test_scores_of_classes_are_kept_and_printed(tmp_path: Path, benchmark: ModuleType) -> None:
    runs, folders = benchmark("train_and_prune"), benchmark("image_folders")
    _, evaluate, _ = folders.ade20k(ade20k(tmp_path), 0, 4, (24, 20))
    found = runs.by_class(evaluate, dense=Constant(), narrow=Constant())
    assert found["dense"] == found["narrow"]
    assert runs.by_class(lambda model: 0.0, dense=Constant()) is None
    row = {**dict.fromkeys(runs.GROUPED), "student": "ade20k", "fewer": 2.0, "kd": "cwd", "classes": found}
    table = runs.class_table([row])
    assert table.row_count == 3
    assert list(table.columns[3].cells) == ["thing 1", "thing 2", "thing 3"]


def test_every_table_of_the_paper_is_a_command_on_each_set(
    tmp_path: Path, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, runs, command = benchmark("paper"), benchmark("train_and_prune"), benchmark("imagenet")
    called, timed = list[list[str]](), list[dict]()

    class Done:
        returncode = 0

    monkeypatch.setattr(paper.subprocess, "run", lambda command, check: called.append(command) or Done())
    monkeypatch.setattr(paper.results, "write", lambda path, rows: timed.extend(rows))
    folders = ["--imagenet", "IMAGES", "--ade20k", "ADE", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["paper.py", "DATA", "all", *folders])
    assert paper.main() == 0
    assert [row["table"] for row in timed] == list(paper.TABLES)
    assert {call[2] for call in called} == {"DATA", "IMAGES", "ADE"}
    for _, script, *given in called:  # each is one that its script takes
        monkeypatch.setattr(sys, "argv", [script, *given])
        if script.endswith("train_and_prune.py"):
            assert runs.parsed().student in runs.STUDENTS
        else:
            assert script.endswith("imagenet.py")
            assert command.parsed().folder == Path("IMAGES")
    pages = (BENCHMARKS.parent / "docs" / "paper.md").read_text()
    for name in paper.TABLES:
        assert f"`python benchmarks/paper.py DATA_DIR {name}`" in pages


def test_what_more_processes_would_take_follows_from_two(benchmark: ModuleType) -> None:
    scaling = benchmark("scaling")
    assert scaling.split(10.0, 6.0) == (2.0, 8.0)
    assert scaling.split(10.0, 12.0) == (10.0, 0.0)  # what two do no faster is serial
    assert scaling.split(10.0, 4.0) == (0.0, 10.0)
    assert scaling.predicted({"score": 10.0, "comb": 1.0}, {"score": 6.0, "comb": 1.5}, 8) == {
        "score": 3.0,
        "comb": 1.0,
    }
