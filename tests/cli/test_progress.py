"""What a run looks like while it works: in terminals of 80 and 120 columns, and as a log file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.folders import write_images
from helpers.forks import ALONE
from helpers.terminal import Screen, run_in_terminal

EPOCHS = 12
COMMAND_LINE = "helpers.hasty:command_line"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes, as the model has outputs."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        write_images(root / part, classes=12, count=2)
    return root


def of_tiny(arguments: str) -> list[str]:
    """A command and its options, on a small model."""
    return [*arguments.split(), "helpers.tiny:Tiny", "--input-size", "16"]


def training(images: Path) -> list[str]:
    """A training of twelve epochs that takes seconds."""
    options = f"--workers 0 --batch-size 2 --target-macs 0.5 --epochs {EPOCHS} --lr 1e-4"
    return of_tiny(f"compress --data {images} {options}")


@pytest.mark.parametrize("width", [80, 120])
def test_twelve_epochs_in_a_terminal(images: Path, width: int) -> None:
    code, text = run_in_terminal(COMMAND_LINE, *training(images), width=width, folder=images)
    assert code == 0, text
    screen = Screen(width).send(text)
    lines = [line.rstrip() for line in screen.lines]
    assert not screen.wrapped
    assert screen.cursor
    assert "Nothing will be written: without --output-dir" in " ".join(lines)
    for epoch in range(1, EPOCHS + 1):
        (found,) = [line for line in lines if f"Epoch {epoch} of {EPOCHS}:" in line]
        assert re.search(r"^\d\d:\d\d:\d\d Epoch .* top-1 accuracy \d+\.\d\d %, loss \S+, \S+ steps/s$", found)
    assert not [line for line in lines if "stage " in line or "━━╸" in line], "no bar is left"
    live = [line for line in screen.seen if "stage 7 of 8: distill, epoch" in line]
    assert all(len(line.rstrip()) < width for line in live)
    assert any(re.search(r"━ +\d+% \d+:\d\d left$", line.rstrip()) for line in live)
    shares = [int(found[1]) for line in live if (found := re.search(r"(\d+)% ", line))]
    assert shares == sorted(shares), "one bar over all epochs"
    assert shares[-1] > 50  # it is drawn a few times a second, the end not always


def test_twelve_epochs_as_a_log_file(images: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "helpers.hasty", *training(images)]
        environment = {**os.environ, **ALONE}
        done = subprocess.run(command, cwd=images, env=environment, stdout=subprocess.PIPE, stderr=log, check=False)
    text = (tmp_path / "log").read_text()
    assert done.returncode == 0, text
    assert "\x1b" not in text + done.stdout.decode()
    assert "\r" not in text
    assert "━" not in text
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines), "a line a message"
    epochs = [line for line in lines if " Epoch " in line]
    assert len(epochs) == EPOCHS
    assert all(re.search(r"top-1 accuracy \d+\.\d\d %, loss ", line) for line in epochs)
    assert "Top-1 accuracy" in done.stdout.decode()


def test_ctrl_c_brings_the_cursor_back_and_exits_with_130(images: Path) -> None:
    code, text = run_in_terminal(
        COMMAND_LINE, *training(images), width=80, folder=images, interrupt_at=f"Epoch 3 of {EPOCHS}"
    )
    screen = Screen(80).send(text)
    assert code == 130, text
    assert screen.cursor
    assert "interrupted. Nothing was written." in " ".join(screen.lines)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("comb", ["comb"]),
        ("profile --check 1", ["narrower copy 1 of 1, timing"]),
        ("latency --seconds 1", ["timing"]),
        ("sweep --speedups 1.1,1.2 --tolerance 0.5",
         ["target 1 of 2: 1.1x, stage 3 of 6: select", "target 2 of 2: 1.2x, stage 6 of 6: deploy"]),
    ],
    ids=["comb", "profile", "latency", "sweep"],
)  # fmt: skip
def test_other_commands_show_where_they_are(arguments: str, shown: list[str], tmp_path: Path) -> None:
    code, text = run_in_terminal(COMMAND_LINE, *of_tiny(arguments), width=120, folder=tmp_path)
    assert code in (0, 3), text
    screen = Screen(120).send(text)
    assert not screen.wrapped
    for part in shown:
        assert any(part in line for line in screen.seen), (part, screen.seen)


def test_sensitivity_shows_one_bar_over_all_groups(images: Path) -> None:
    arguments = of_tiny(f"sensitivity --data {images} --workers 0")
    code, text = run_in_terminal(COMMAND_LINE, *arguments, width=80, folder=images)
    screen = Screen(80).send(text)
    assert code == 0, text
    assert any(re.search(r"sensitivity .*\d+%", line) for line in screen.seen)


def test_quiet_shows_no_line(images: Path) -> None:
    code, text = run_in_terminal(COMMAND_LINE, *of_tiny("comb -q"), width=80, folder=images)
    assert code == 0, text
    assert "\x1b[2K" not in text
