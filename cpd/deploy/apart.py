"""Two ONNX models timed in a process of their own.

A process that has trained gives the sessions of a runtime other memory than a new process does, which is worth some per
cent in models of a few milliseconds. A result is deployed in a process that never trained.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cpd.deploy.export import as_bytes
from cpd.deploy.rounds import Times, time_rounds
from cpd.deploy.runtimes.base import Artifact, Runtime
from cpd.deploy.runtimes.catalogue import RUNTIMES, runtimes_of
from cpd.model.inputs import Call
from cpd.model.progress import part

log = logging.getLogger(__name__)

#: What the new process may take longer than the timing: it imports torch, opens both models and warms them up.
PATIENCE = 300.0
_COMMAND = "from cpd.deploy.apart import main; main()"


def timed_apart(
    runtime: Runtime, artifacts: Sequence[Artifact], seconds: float, min_runs: int, precision: float
) -> Times | None:
    """As `time_rounds` of these models, in a new process.

    Args:
        runtime: where they run.
        artifacts: the models, whose outputs were compared with PyTorch's before.
        seconds: longest time of the timing.
        min_runs: fewest rounds.
        precision: at which intervals the timing ends early.

    Returns:
        Times in ms `[rounds, models]`; None where the runtime does not run ONNX models on this machine's processor, or
        the process fails, so that only this one can time them.
    """
    if not _is_known(runtime) or not sys.executable or getattr(sys, "frozen", False):
        return None  # of a frozen application the executable is the application itself
    request = {
        "runtime": runtime.name, "threads": runtime.threads, "models": len(artifacts),
        "budget": [seconds, min_runs, precision],
    }  # fmt: skip
    try:
        with TemporaryDirectory(prefix="cpd-timing-") as name, part("timing", undisturbed=True):
            folder = Path(name)
            (folder / "request.json").write_text(json.dumps(request))
            for index, artifact in enumerate(artifacts):
                (folder / f"{index}.onnx").write_bytes(as_bytes(artifact.of(runtime.precision)))
                arrays = {key: np.ascontiguousarray(array) for key, array in artifact.feeds.items()}
                save_file(arrays, folder / f"{index}.safetensors")
            _run(folder, seconds + PATIENCE)
            times: Times = load_file(folder / "times.safetensors")["times"]
    except (OSError, subprocess.SubprocessError, SafetensorError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.debug("The models are timed in this process, as a new one failed: %s", told[-1] if told else "")
        return None
    return times


def _is_known(runtime: Runtime) -> bool:
    """Whether it is the runtime that its name gives a new process too, and one that ONNX models suffice."""
    entry = RUNTIMES.get(runtime.name)
    return entry is not None and entry.runs_files and runtimes_of(runtime.name, runtime.threads) == [runtime]


def _run(folder: Path, seconds: float) -> None:
    """`main` in a new process."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-P", "-c", _COMMAND, str(folder)],
        check=True, timeout=seconds, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def main() -> None:
    """Time what the folder that is given holds, and leave the times there."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    (runtime,) = runtimes_of(request["runtime"], request["threads"])
    sessions = []
    for index in range(request["models"]):
        artifact = Artifact(folder / f"{index}.onnx", Call((), {}))
        artifact.feeds = load_file(folder / f"{index}.safetensors")
        sessions.append(runtime.prepare(artifact))
    save_file({"times": time_rounds(sessions, *request["budget"])}, folder / "times.safetensors")
