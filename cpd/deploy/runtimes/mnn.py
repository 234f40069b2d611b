"""MNN on the CPU, of the ONNX export."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cpd.deploy.runtimes.base import Artifact, Session, check_outputs
from cpd.errors import ExportError, first_line, needs_extra
from cpd.trace.quiet import silent


@dataclass(frozen=True)
class Mnn:
    """MNN in float32.

    Attributes:
        threads: `numThread`.
    """

    threads: int = 1
    name: str = "mnn"
    precision: str = "f32"
    grain: int = 8

    @property
    def version(self) -> str:
        """Of the package."""
        return version("mnn")

    def prepare(self, artifact: Artifact) -> Session:
        """A module of MNN, whose outputs were compared with PyTorch's."""
        with needs_extra("mnn", "The runtime 'mnn'"), silent():
            import _tools as tools
            import MNN.expr as expr
            import MNN.nn as mnn
        graph = onnx.load_from_string(artifact.content).graph
        inputs, outputs = ([item.name for item in items] for items in (graph.input, graph.output))
        what = type(artifact.model).__name__
        with tempfile.TemporaryDirectory(prefix="cpd-mnn-") as folder, silent():
            made = Path(folder, "model.mnn")
            # the compiled converter itself: the program `mnnconvert` around it installs a package, and sends what was
            # converted to its makers
            tools.mnnconvert([
                "mnnconvert", "-f", "ONNX", "--modelFile", str(artifact.path()), "--MNNModel", str(made), "--bizCode",
                "cpd",
            ])  # fmt: skip
            if not made.exists():
                raise ExportError(f"MNN cannot convert {what}.")
            manager = mnn.create_runtime_manager(({"backend": "CPU", "numThread": self.threads, "precision": "high"},))
            try:
                module = mnn.load_module_from_file(str(made), inputs, outputs, runtime_manager=manager)
            except Exception as error:  # the binding raises what it likes
                raise ExportError(f"MNN cannot open its own conversion of {what}: {first_line(error)}.") from error
        variables = [_variable(expr, artifact.feeds[name]) for name in inputs]

        def run() -> list[Any]:
            return [value.read() for value in module.onForward(variables)]

        found = [np.array(value) for value in run()]
        return Session(run, check_outputs(found, artifact, "MNN", self.precision))


def _variable(expr: Any, array: np.ndarray[Any, Any]) -> Any:
    kind = expr.float if array.dtype == np.float32 else expr.int
    given = array if array.dtype == np.float32 else array.astype(np.int32)
    return expr.const(np.ascontiguousarray(given), list(array.shape), expr.NCHW, kind)
