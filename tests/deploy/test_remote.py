"""Devices that are reached by a program: `ssh`, `scp` and `adb` are stand-ins here, which do it on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.runtimes.remote import over_adb, over_ssh
from cpd.deploy.runtimes.time_onnx import main

IMAGE = torch.randn(1, 3, 16, 16)
STAND_INS = {
    "ssh": 'shift\nexec sh -c "$*"\n',
    "scp": 'shift\nexec cp "$1" "${2#*:}"\n',
    "adb": 'if [ "$1" = -s ]; then shift 2; fi\n'
    'case "$1" in\npush) exec cp "$2" "$3";;\nshell) shift; exec sh -c "$*";;\nesac\n',
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def models() -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(3, 64, 3), nn.Conv2d(3, 8, 3)


def test_over_ssh_files_are_copied_and_timed_there(programs):
    """A script there that takes the size of a file for its time."""
    script = "import os, sys; print(*(os.path.getsize(f) / 1e3 for f in sys.argv[1:]), sep=chr(10))"
    there = f"{programs}/a board"
    device = over_ssh("board", f"{sys.executable} -c '{script}' {{files}}", folder=there)
    found = cpd.compare_latency(*models(), IMAGE, runtime=device, seconds=0.1)
    assert found.speedup > 2
    assert found.runtime == "board"
    assert sorted(os.listdir(there)) == ["model0.onnx", "model1.onnx", "time_onnx.py"]


def test_the_script_that_is_copied_times_files_in_turn(tmp_path):
    wide, narrow = nn.Conv2d(3, 256, 3), nn.Conv2d(3, 8, 3)
    paths = [
        str(cpd.export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / f"{i}.onnx"))
        for i, model in enumerate((wide, narrow))
    ]
    slow, fast = main(paths, seconds=0.2)
    assert slow > 2 * fast > 0


def test_by_adb_what_a_program_prints_is_read(programs):
    told = 'printf "Average inference time cost total: %s ms\\n" $(wc -c < {file})'
    device = over_adb(told, folder=str(programs), serial="abc")
    found = cpd.compare_latency(*models(), IMAGE, runtime=device, seconds=0.1)
    assert found.speedup > 2
    assert found.runtime == "android"
    with pytest.raises(cpd.InputError, match="printed no time that matches"):
        cpd.compare_latency(*models(), IMAGE, runtime=over_adb("echo no", folder=str(programs)))


def test_a_program_that_fails_is_told_with_what_it_said(programs, monkeypatch):
    with pytest.raises(cpd.InputError, match="failed with status 3: no such board"):
        cpd.compare_latency(
            *models(), IMAGE, runtime=over_ssh("board", "echo no such board >&2; exit 3", folder=str(programs))
        )
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(cpd.InputError, match="The program 'adb' is not installed on this machine"):
        cpd.compare_latency(*models(), IMAGE, runtime=over_adb(folder=str(programs)))
