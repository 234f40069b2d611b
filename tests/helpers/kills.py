"""Writers that are killed before each of their operations on files: `python kills.py RESULTS PLACE`.

A process of its own, with one thread, as it forks a child for every operation. RESULTS holds what `result.save` wrote
of an `old` and a `new` result. PLACE gets a folder for each of `WRITERS`: `old` and `new` as nobody disturbed them, and
`0`, `1`, ... as they are after a kill before that operation. Where safetensors writes the file of a checkpoint, one
kill falls into the midst of its writing.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import cpd
from cpd.files.checkpoint import Checkpoint
from cpd.files.folder import write_files
from cpd.report.artifacts import add_files, read_document, read_report
from helpers.files import OPERATIONS
from helpers.tiny import Tiny

#: Bytes that one call of `os.write` takes, so that files are half written too; what a checkpoint may grow to then.
SHORT, HALF = 2**14, 10_000

#: Writes into a folder, once the older and then the newer of two things.
Writer = Callable[[Path, str], Any]


def state_of(which: str) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"name": which, "weights": torch.full((5000,), float(which == "new"))}


def writers(results: Path) -> dict[str, Writer]:
    """What writes files in `cpd`."""

    def result(which: str) -> cpd.Result:
        folder = results / which
        plan = cpd.Plan.from_dict(read_document(folder)["plan"])
        model = cpd.load(folder, model=Tiny())
        return cpd.Result(model, read_report(folder), plan, (folder / "model.onnx").read_bytes())

    def files(folder: Path, which: str) -> None:
        content = {name: which.encode() * 5000 for name in "abc"}
        write_files(folder, content | ({"gone": b"old"} if which == "old" else {}), gone=["gone"])

    def save(folder: Path, which: str) -> None:
        two[which].save(folder)
        if which == "old":
            add_files(folder, {"recipe.yaml": b"# cpd compress\n"})

    two = {which: result(which) for which in ("old", "new")}
    return {
        "files": files,
        "save": save,
        "save_pretrained": lambda folder, which: two[which].save_pretrained(folder),
        "checkpoint": lambda folder, which: Checkpoint(folder, {}).write(state_of(which)),
    }


def kill_before(stop: int) -> None:
    """Let the process end by SIGKILL before an operation on files, counted from 0."""
    done = itertools.count()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if next(done) == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return operation

    def save_file(*arguments: Any) -> None:
        if next(done) == stop:  # the kernel ends the process, where the file grows beyond that
            import resource  # not of Windows

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))
        saved(*arguments)

    write, saved = os.write, safetensors.torch.save_file
    os.write = lambda handle, content: write(handle, content[:SHORT])
    safetensors.torch.save_file = counting(save_file)
    for name in (*OPERATIONS, "close", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))


def main(results: Path, place: Path) -> None:
    """Every writer, killed before every operation."""
    torch.set_num_threads(1)
    for name, write in writers(results).items():
        for which in ("old", "new"):
            (place / name / which).mkdir(parents=True)
            write(place / name / which, "old")
        write(place / name / "new", "new")
        for stop in itertools.count():
            folder = shutil.copytree(place / name / "old", place / name / str(stop))
            child = os.fork()
            if child == 0:
                kill_before(stop)
                write(folder, "new")
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                shutil.rmtree(folder)
                break
            if not os.WIFSIGNALED(status):
                raise SystemExit(f"{name} failed before operation {stop}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
