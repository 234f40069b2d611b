"""Wrong input, by kind, over all commands: the documented exit code, one sentence, and options in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.folders import write_images

MODEL = "timm:test_resnet,num_classes=2"
SMALL = ("--no-pretrained", "--input-size", "32", "--workers", "0", "--batch-size", "2")
LABELLED = {"compress": ("--target-macs", "0.5"), "sensitivity": (), "sweep": ("--speedups", "2")}


def no_such_folder(root: Path) -> Path:
    return root / "none"


def a_file(root: Path) -> Path:
    (root / "file").write_text("no folder")
    return root / "file"


def an_empty_folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def empty_classes(root: Path) -> Path:
    for name in ("a", "b"):
        (root / "classes" / name).mkdir(parents=True)
    return root / "classes"


def one_class(root: Path) -> Path:
    write_images(root / "one" / "train", classes=1)
    return root / "one"


def an_image_that_is_none(root: Path) -> Path:
    write_images(root / "broken" / "train", classes=2)
    (root / "broken" / "train" / "class1" / "2.png").write_bytes(b"no image")
    return root / "broken"


def a_truncated_image(root: Path) -> Path:
    write_images(root / "truncated" / "train", classes=2)
    path = root / "truncated" / "train" / "class0" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    return root / "truncated"


FOLDERS = [no_such_folder, a_file, an_empty_folder, empty_classes, one_class, an_image_that_is_none, a_truncated_image]


def check(result: Any, code: int = 2) -> str:
    """What a command said: one sentence, with the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "error: unexpected" not in result.stderr
    return str(result.stderr)


@pytest.mark.parametrize("command", list(LABELLED))
@pytest.mark.parametrize("make", FOLDERS)
def test_folders_of_images(run: Any, tmp_path: Path, command: str, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    result = run(command, MODEL, *SMALL, *LABELLED[command], "--data", folder, "-q")
    said = check(result)
    assert str(folder) in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_an_image_that_a_worker_cannot_read(run: Any, tmp_path: Path) -> None:
    folder = an_image_that_is_none(tmp_path)
    options = (*SMALL[:3], "--workers", "1", "--batch-size", "8", "--target-macs", "0.5")
    said = check(run("compress", MODEL, *options, "--data", folder, "-q"))
    assert said.startswith(f"error: {folder}/train/class1/2.png cannot be read as an image")
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["no image", "colours", "another size"])
def test_label_maps_that_are_none(run: Any, tmp_path: Path, kind: str) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index in range(4):
        Image.new("RGB", (40, 32)).save(tmp_path / "images" / f"{index}.png")
        path = tmp_path / "labels" / f"{index}.png"
        if kind == "no image":
            path.write_text("none")
        else:
            Image.new(*(("RGB", (40, 32)) if kind == "colours" else ("L", (20, 32)))).save(path)
    model = "cpd.tasks.segmentation:EncoderDecoder,backbone=test_resnet,classes=3"
    result = run(
        "compress", model, "--input-size", "32", "--workers", "0", "--target-macs", "0.5", "--data", tmp_path, "-q"
    )
    assert str(tmp_path / "labels") in check(result)


@pytest.mark.parametrize("command", ["compress", "comb", "profile", "latency", "sweep"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnet81", "Did you mean"),
        ("resnet18", "timm:resnet18"),
        ("torchvision:resnet81", "Did you mean"),
        ("no.such.package:thing", "no module"),
        ("os.path:join", "os.path:join raised TypeError"),
        ("os.path:nothing", "nothing"),
    ],
)
def test_models(run: Any, command: str, model: str, message: str) -> None:
    more = ("--speedups", "2") if command == "sweep" else ()
    assert message in check(run(command, model, *more))


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sensitivity", ("model", "--criterion", "taylro"), "--criterion must be a name in cpd.criteria.CRITERIA"),
        ("quantize", (".", "--calibration", "max"), "--calibration must be one of minmax, entropy, percentile"),
    ],
)
def test_names_are_looked_at_before_anything_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in ("cpd.cli.analysing.Images", "cpd.cli.compressing.Images", "cpd.cli.work.Images"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("images are looked for"))
    monkeypatch.setattr("cpd.cli.compressing.result_folder", lambda *_: pytest.fail("a folder is read"))
    assert message in check(run(command, *options, "--data", tmp_path))


@pytest.mark.parametrize("folder", [no_such_folder, a_file])
@pytest.mark.parametrize("command", ["report", "quantize", "latency"])
def test_folders_of_results(run: Any, tmp_path: Path, command: str, folder: Callable[[Path], Path]) -> None:
    write_images(tmp_path / "images", classes=2)
    more = ("--data", tmp_path / "images") if command == "quantize" else ()
    assert str(folder(tmp_path)) in check(run(command, folder(tmp_path), *more))


def test_models_to_be_timed(run: Any, tmp_path: Path) -> None:
    assert "none.onnx does not exist" in check(run("latency", tmp_path / "none.onnx"))
    assert "holds no model.onnx" in check(run("latency", tmp_path))
    assert "onnxruntime" in check(run("latency", MODEL, "--input-size", "32", "--runtime", "nix"))


#: (command, options, what the message speaks of)
NUMBERS = [
    ("compress", "--target-speedup 0.5", "--target-speedup must be"),
    ("compress", "--target-speedup nan", "--target-speedup must be"),
    ("compress", "--target-speedup fast", "--target-speedup"),
    ("compress", "--target-macs 2 --target-speedup 2", "--target-speedup, --target-macs"),
    ("compress", "--epochs -1", "--epochs must be"),
    ("compress", "--lr 0", "--lr must be"),
    ("compress", "--batch-size 0", "--batch-size"),
    ("compress", "--threads 0", "--threads"),
    ("compress", "--round-to 0", "--round-to must be"),
    ("compress", "--seed -1", "--seed must be"),
    ("compress", "--input-size 0", "--input-size takes"),
    ("compress", "--schedule cubik", "--schedule must be"),
    ("compress", "--kd klx", "--kd must be"),
    ("compress", "--augment hard", "--augment must be one of none, light, imagenet"),
    ("compress", "--augment none --random-erasing 0.5", "--random-erasing"),
    ("compress", "--mean 0.5", "--mean and --std belong together"),
    ("compress", "--mean 0.5 --std 0", "--std takes"),
    ("compress", "--mean a --std 1", "for --mean"),
    ("compress", "--mean 1,2 --std 1", "--mean takes"),
    ("compress", "--nonsense 1", "--nonsense"),
    ("sweep", "--speedups fast", "for --speedups"),
    ("sweep", "--speedups 2,nan", "for --speedups"),
    ("sweep", "--speedups 0.5,2", "--speedups must each be"),
    ("sweep", "", "--speedups"),
    ("comb", "--proof-copies 0", "--proof-copies"),
    ("comb", "--plot groups.txt", "groups.txt"),
    ("profile", "--check -1", "--check"),
    ("latency", "--seconds -1", "--seconds"),
    ("sensitivity", "", "--data"),
]


@pytest.mark.parametrize(("command", "options", "message"), NUMBERS)
def test_options(run: Any, command: str, options: str, message: str) -> None:
    assert message in " ".join(check(run(command, MODEL, *options.split())).replace("│", " ").split())


def test_what_is_out_of_reach_is_told_by_the_option(run: Any) -> None:
    result = run("compress", MODEL, "--no-pretrained", "--input-size", "32", "--target-macs", "0.0001", "-q")
    assert check(result, 3).startswith("error: --target-macs 0.0001 cannot be reached")


def test_what_nobody_foresaw_ends_with_1_and_says_how_to_see_more(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("cpd.deploy.model_profile.profile_model", broken)
    result = run("profile", MODEL, "--input-size", "32")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: unexpected ZeroDivisionError: by zero. Run the command with --debug to see the traceback.\n"
    )
    assert isinstance(run("profile", MODEL, "--input-size", "32", "--debug").exception, ZeroDivisionError)


def test_the_demo_looks_at_its_folder_before_it_trains(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("cpd.demo.train_teacher")
    assert "is a file" in check(run("demo", "--output-dir", a_file(tmp_path)))


def test_nothing_is_left_behind(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check(run("compress", MODEL, "--output-dir", out, "--data", no_such_folder(tmp_path)))
    assert not out.exists()
