"""Devices that are reached by a program: over ssh, as boards are, and by adb, as phones are.

    cpd.compress(model, target_speedup=2, data=loader, runtime=over_ssh("pi@board"))

Both are functions of some twenty lines that call a program: what runs the model on the device is up to you.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpd.deploy.runtimes.device import Device
from cpd.errors import InputError

#: Seconds that one program takes at most.
SECONDS = 600.0
#: How ONNX Runtime's own `onnxruntime_perf_test` tells the mean time of a run.
PERF_TEST = r"Average inference time cost[^:]*:\s*([\d.]+)\s*ms"


def over_ssh(
    host: str,
    command: str = "python3 {folder}/time_onnx.py {files}",
    *,
    folder: str = "/tmp/cpd",
    name: str | None = None,
    **settings: Any,
) -> Device:
    """A device that `ssh` and `scp` reach without a password.

    Args:
        host: as `ssh` takes it.
        command: what times the files there and prints a number in ms a line, one a file, in their order. The default
            runs a script that is copied with them: it needs Python with ONNX Runtime on the device.
        folder: where files are put there.
        name: what the device is called in reports; `host` if None.
        settings: other attributes of `Device`, as `precision="int8"`.

    Raises:
        InputError: when a program fails, with what it said last.
    """

    def measure(paths: list[str]) -> list[float]:
        _done(["ssh", host, f"mkdir -p {shlex.quote(folder)}"])
        files = _numbered(paths, folder)
        script = Path(__file__).with_name("time_onnx.py")
        for source, target in [(str(script), f"{folder}/time_onnx.py"), *zip(paths, files, strict=True)]:
            _done(["scp", "-q", source, f"{host}:{target}"])
        filled = command.format(folder=shlex.quote(folder), files=" ".join(map(shlex.quote, files)))
        return [float(line) for line in _done(["ssh", host, filled]).split()]

    return Device(measure, name or host, **settings)


def over_adb(
    command: str = "{folder}/onnxruntime_perf_test -e cpu -x 1 -y 1 -m times -r 50 -I {file}",
    *,
    folder: str = "/data/local/tmp",
    serial: str | None = None,
    pattern: str = PERF_TEST,
    name: str = "android",
    **settings: Any,
) -> Device:
    """A phone that `adb` reaches; original and candidate are run one after the other, again and again.

    Args:
        command: what times one file there. The default is ONNX Runtime's `onnxruntime_perf_test`, which you put into
            `folder` beforehand (`adb push`).
        folder: where files are put there.
        serial: which phone, where there are several (`adb devices`).
        pattern: a regular expression whose first group is the time in ms, in what the command prints.
        name: what the phone is called in reports.
        settings: other attributes of `Device`, as `precision="int8"`.

    Raises:
        InputError: when a program fails, with what it said last, or prints no time.
    """
    adb = ["adb", *(["-s", serial] if serial else [])]

    def measure(paths: list[str]) -> list[float]:
        times, files = [], _numbered(paths, folder)
        for path, file in zip(paths, files, strict=True):
            _done([*adb, "push", path, file])
        for file in files:
            told = _done([*adb, "shell", command.format(folder=shlex.quote(folder), file=shlex.quote(file))])
            found = re.search(pattern, told)
            if found is None:
                raise InputError(f"The command on {name} printed no time that matches {pattern!r}: {_last(told)}")
            times.append(float(found[1]))
        return times

    return Device(measure, name, **settings)


def _numbered(paths: Sequence[str], folder: str) -> list[str]:
    """Where files go on the device: all have the same name here."""
    return [f"{folder}/model{index}.onnx" for index in range(len(paths))]


def _done(command: Sequence[str]) -> str:
    """What a program prints.

    Raises:
        InputError: if it is missing, fails, or takes too long.
    """
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise InputError(f"The program {command[0]!r} is not installed on this machine.") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{shlex.join(command)} took more than {SECONDS:g} s.") from error
    if found.returncode:
        raise InputError(f"{shlex.join(command)} failed with status {found.returncode}: {_last(found.stderr)}")
    return found.stdout


def _last(text: str) -> str:
    """The last line of what a program said."""
    return ["nothing", *text.strip().splitlines()][-1]
