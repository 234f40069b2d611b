"""What commands do with folders that hold files of the user's, and with sources that a folder names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import cpd
from cpd.cli.arguments import opened
from cpd.files.folder import JOURNAL, write_files
from helpers.fakes import Fakes
from helpers.files import Killed, stopped
from helpers.folders import write_images
from helpers.tiny import INPUT, Tiny

COMPRESS = ("compress", "helpers.tiny:Tiny", "--no-pretrained", "--input-size", "16", "--target-macs", "0.5")


def test_files_of_the_user_stop_a_command_before_any_work(run: Any, tmp_path: Path) -> None:
    for name in ("README.md", "sweep.json"):
        (tmp_path / name).write_text("mine")
    for arguments in (COMPRESS, ("sweep", *COMPRESS[1:5], "--speedups", "1.2")):
        result = run(*arguments, "--output-dir", tmp_path)
        assert result.exit_code == 2, result.output
        assert "--overwrite" in result.stderr
        assert "comb" not in result.stderr.lower()
    result = run("demo", "--output-dir", tmp_path)
    assert (result.exit_code, "README.md" in result.stderr) == (2, True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"README.md": "mine", "sweep.json": "mine"}
    result = run(*COMPRESS, "--output-dir", tmp_path, "--overwrite")
    assert result.exit_code == 0, result.output
    assert cpd.load(tmp_path, model=Tiny())
    assert "overwrite" not in yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (tmp_path / "sweep.json").read_text() == "mine"


@pytest.mark.parametrize("command", [("compress", "timm:test_resnet"), ("demo",), ("sweep", "x", "--speedups", "2")])
def test_an_empty_text_is_no_folder(run: Any, command: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*command, "--output-dir", "")
    assert (result.exit_code, "not a folder" in result.stderr) == (2, True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: ''\n")
    result = run(*command, "--config", recipe)
    assert (result.exit_code, "not a folder" in result.stderr) == (2, True)
    for other in (("report", ""), ("quantize", "", "--data", tmp_path)):
        assert run(*other).exit_code == 2


def test_a_recipe_of_the_user_is_left(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("target_macs: 0.5  # mine\n")
    result = run("compress", "timm:test_resnet", "--no-pretrained", "--config", recipe, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "was not written by cpd, so it was not replaced" in " ".join(result.stderr.split())
    assert recipe.read_text() == "target_macs: 0.5  # mine\n"
    run("compress", "timm:test_resnet", "--no-pretrained", "--output-dir", tmp_path, "--overwrite")
    assert recipe.read_text().startswith("# cpd compress")


@pytest.fixture(scope="module")
def of_a_factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result whose source is a factory, and images of its classes."""
    folder = tmp_path_factory.mktemp("factory")
    cpd.compress(Tiny(), target_macs=0.5, example_inputs=INPUT, source="a_module:net", output_dir=folder / "out")
    write_images(folder / "data" / "train", classes=12)
    (folder / "a_module.py").write_text(
        "from pathlib import Path\nfrom helpers.tiny import Tiny as net\nPath('ran').touch()\n"
    )
    return folder


def test_a_factory_of_a_folder_is_imported_only_if_told(
    of_a_factory: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def quantize(onnx: Any, data: Any, output: Any, *, original: Any, **_: Any) -> Any:
        found.append(original)
        raise cpd.ExportError("far enough")

    monkeypatch.setattr(cpd, "quantize_onnx", quantize)
    monkeypatch.chdir(of_a_factory)
    arguments = ("quantize", "out", "--data", "data", "--input-size", "16", "--workers", "0", "--batch-size", "2")
    result = run(*arguments)
    assert (result.exit_code, "--trust-source" in result.stderr) == (1, True), result.output
    assert not Path("ran").exists()
    for told in (("--trust-source",), ("--model", "a_module:net"), ("--model", "helpers.tiny:Tiny")):
        result = run(*arguments, *told)
        assert (result.exit_code, "far enough" in result.stderr) == (1, True), result.output
    assert [type(model) for model in found] == [Tiny, Tiny, Tiny]
    assert run(*arguments, "--model", "no.such:thing").exit_code == 2


def test_what_is_timed_is_of_a_save_that_was_killed_while_it_was_put_in_place(tmp_path: Path) -> None:
    write_files(tmp_path, {"model.onnx": b"before"})
    for after in range(50):
        with pytest.raises(Killed), stopped(after):
            write_files(tmp_path, {"model.onnx": b"now"})
        if (tmp_path / JOURNAL).exists():
            break
    assert (tmp_path / "model.onnx").read_bytes() == b"before"
    path, _ = opened(str(tmp_path), None, ())
    assert Path(path).read_bytes() == b"now"


@pytest.mark.parametrize("command", [COMPRESS, ("sweep", *COMPRESS[1:5], "--speedups", "1.2")])
def test_a_factory_of_a_teacher_is_imported_only_if_told(
    of_a_factory: Path, run: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    found: list[Any] = []

    def begun(model: Any = None, *, teacher: Any, **_: Any) -> Any:
        found.append(teacher)
        raise cpd.ExportError("far enough")

    monkeypatch.setattr(cpd, command[0], begun)
    monkeypatch.chdir(of_a_factory)
    Path("ran").unlink(missing_ok=True)
    sys.modules.pop("a_module", None)
    result = run(*command, "--teacher", "out")
    assert (result.exit_code, "--trust-source" in result.stderr) == (1, True), result.output
    assert not Path("ran").exists()
    result = run(*command, "--teacher", "out", "--trust-source")
    assert (result.exit_code, "far enough" in result.stderr) == (1, True), result.output
    assert [type(model) for model in found] == [Tiny]


def test_a_report_needs_no_model(of_a_factory: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpd.model.sources.resolve", lambda *_: pytest.fail("a model is built"))
    result = run("report", of_a_factory / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["source"] == "a_module:net"


@pytest.mark.parametrize("command", [lambda path: ("report", path), lambda path: ("latency", path, "--seconds", "0.1")])
def test_a_folder_that_is_none_is_told(run: Any, tmp_path: Path, command: Callable[[Path], tuple[Any, ...]]) -> None:
    (tmp_path / "report.json").write_text("[" * 100_000)
    result = run(*command(tmp_path))
    assert result.exit_code in (1, 2)
    assert str(tmp_path) in result.stderr.replace("\n", "")
