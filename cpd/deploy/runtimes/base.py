"""What a runtime is: something that prepares a model once, proves that it computes what PyTorch does, and runs it.

A runtime is a class of some twenty lines: `name`, `version`, `threads`, `precision`, `grain`, and `prepare(artifact)`.
One that can say what each node takes has `profile` and `kernels` too (`Profiler`): latency is then predicted from its
own kernels, else from those of ONNX Runtime, corrected by what is measured.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.deploy.export import (
    OnnxSource,
    array_of,
    as_bytes,
    export_bytes,
    feed,
    open_session,
    relative_difference,
    run_session,
)
from cpd.deploy.int8 import quantized_onnx, samples_of
from cpd.deploy.noise import noisy_nodes
from cpd.deploy.profiling import NodeTime
from cpd.errors import ExportError, InputError, of_the_user
from cpd.model.inputs import Call, check_model, device_of, evaluating
from cpd.model.state import preserved
from cpd.model.tensors import copy_of

Model = nn.Module | OnnxSource
Run = Callable[[], object]
Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

#: The largest difference of outputs, relative to the largest output, that is taken for rounding, by precision. That of
#: float32 is an argument; brain floats keep 8 bits, and of 8-bit integers no more is asked than likeness.
TOLERANCES = {"bf16": 0.15, "f16": 0.05, "int8": 1.0}
#: Images that the ranges of an INT8 model are taken over.
CALIBRATION_IMAGES = 64


class Artifact:
    """One model and the inputs it is timed on, in every form that a runtime may ask for; each is made when asked for.

    Args:
        model: an `nn.Module`, left as it was, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        call: the inputs.
        calibration: batches of the task, over which the ranges of an INT8 model are taken; None: the inputs alone.
        tolerance: the largest relative difference from PyTorch's outputs in float32.
    """

    def __init__(
        self, model: Model, call: Call, calibration: Sequence[Call] | None = None, tolerance: float = 1e-3
    ) -> None:
        self.model, self.call, self.calibration, self.tolerance = model, call, calibration, tolerance
        self._folder: Path | None = None

    @property
    def module(self) -> nn.Module | None:
        """The module, where it is one."""
        return self.model if isinstance(self.model, nn.Module) else None

    def demand_module(self, runtime: str) -> nn.Module:
        """The module.

        Raises:
            InputError: if the model is none.
        """
        if self.module is None:
            raise InputError(f"The runtime {runtime!r} only runs torch.nn.Modules; got {type(self.model).__name__}.")
        return self.module

    @cached_property
    def onnx(self) -> OnnxSource:
        """The float ONNX model, as given or exported."""
        return export_bytes(check_model(self.module), self.call) if self.module is not None else self.model

    @cached_property
    def content(self) -> bytes:
        """The float ONNX model, serialised."""
        return as_bytes(self.onnx)

    @cached_property
    def int8(self) -> bytes:
        """The ONNX model with weights and activations of 8 bits; one that is quantized already as it is."""
        if is_quantized(self.content):
            return self.content
        return quantized_onnx(self.content, self._samples, exclude=self.in_float)

    @cached_property
    def in_float(self) -> list[str]:
        """The nodes that 8 bits cost most, which stay in float; none without data, of which the ranges say nothing."""
        if self.calibration is None or is_quantized(self.content):
            return []
        return noisy_nodes(self.content, self._samples)

    @cached_property
    def _samples(self) -> list[Feeds]:
        """What the ranges of an INT8 model are taken over."""
        calls = [self.call] if self.calibration is None else self.calibration
        return samples_of(open_session(self.content), calls, CALIBRATION_IMAGES)

    def of(self, precision: str) -> OnnxSource:
        """The ONNX model of a precision: that of 8-bit integers, or the float one."""
        return self.int8 if precision == "int8" else self.onnx

    def path(self, precision: str = "f32") -> Path:
        """A file of it, which is there as long as this is."""
        if self._folder is None:
            self._folder = Path(mkdtemp(prefix="cpd-model-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        target = self._folder / f"{precision}.onnx"
        if not target.exists():
            target.write_bytes(as_bytes(self.of(precision)))
        return target

    @cached_property
    def feeds(self) -> Feeds:
        """The inputs, by the names that the ONNX model gives them.

        Raises:
            InputError: if they do not fit.
        """
        return feed(open_session(self.onnx), self.call)

    def fed(self, session: Any) -> Feeds:
        """The same, read off a session of ONNX Runtime that is open already."""
        if "feeds" not in self.__dict__:
            self.feeds = feed(session, self.call)
        return self.feeds

    @cached_property
    def expected(self) -> list[Array]:
        """What PyTorch gives on the inputs; of an ONNX model what ONNX Runtime gives."""
        if self.module is None:
            return run_session(open_session(self.onnx), self.feeds)
        return torch_outputs(self.module, self.call)


def is_quantized(content: bytes) -> bool:
    """Whether an ONNX model holds 8-bit operators."""
    nodes = onnx.load_from_string(content).graph.node
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") for node in nodes)


def torch_outputs(model: nn.Module, call: Call) -> list[Array]:
    """What a module gives in eval mode, tensor by tensor; it is left as found."""
    with preserved(model), evaluating(model), torch.no_grad(), of_the_user("The model", "on the example inputs"):
        found = call.to(device_of(model)).on(model)
    return arrays_of(found)


def arrays_of(output: Any) -> list[Array]:
    """The tensors of an output as arrays."""
    return [array_of(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Session:
    """A model that is ready to run.

    Attributes:
        run: runs it once, on inputs held ready, and returns when it is done.
        difference: how far its outputs are from PyTorch's, relative to the largest; None where they are not seen.
        together: for a device that times several models itself: the times in ms of some sessions, in one go.
        file: what the device is given.
    """

    run: Run
    difference: float | None = None
    together: Callable[[Sequence[Session]], list[float]] | None = None
    file: Path | None = None


class Runtime(Protocol):
    """Something that runs models.

    Attributes:
        name: what it is called in tables, with its precision where that is not float32's.
        version: of its package; times of kernels are kept by it.
        threads: that it uses.
        precision: "f32", "bf16", "f16" or "int8".
        grain: widths in multiples of this are fast.
    """

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def version(self) -> str:
        """Of its package."""
        ...

    @property
    def threads(self) -> int:
        """That it uses."""
        ...

    @property
    def precision(self) -> str:
        """Of its numbers."""
        ...

    @property
    def grain(self) -> int:
        """Widths in multiples of this are fast."""
        ...

    def prepare(self, artifact: Artifact) -> Session:
        """Convert a model, open it, and compare what it gives with PyTorch.

        Raises:
            InputError: if its package is missing, or it cannot open or run the model.
            ExportError: if the model cannot be exported or converted, or computes something else here.
        """
        ...


@runtime_checkable
class Profiler(Protocol):
    """A runtime that says what every node of a model takes."""

    def profile(self, artifact: Artifact, seconds: float = 1.0) -> list[NodeTime]:
        """The time of every node of a model; shapes as in PyTorch, `[N, C, *]`, whatever lies innermost here."""
        ...

    def kernels(self, model: bytes, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        """The time of every node of a float ONNX model of operators side by side, in this runtime's precision."""
        ...


class ProfilingRuntime(Runtime, Profiler, Protocol):
    """A runtime with a profile of its own."""


def profiles(runtime: Runtime) -> TypeGuard[ProfilingRuntime]:
    """Whether a runtime has a profile of its own."""
    return isinstance(runtime, Profiler)


def like(precision: str, tolerance: float) -> float:
    """The largest relative difference from PyTorch that is rounding in a precision."""
    return max(tolerance, TOLERANCES.get(precision, 0.0))


def check_outputs(found: Sequence[Array], artifact: Artifact, runtime: str, precision: str) -> float:
    """How far the outputs of a runtime are from PyTorch's, relative to the largest.

    Raises:
        ExportError: if their shapes differ, or they do by more than the precision explains.
    """
    expected, what = artifact.expected, type(artifact.model).__name__
    source = "PyTorch" if artifact.module is not None else "ONNX Runtime"
    shapes = [array.shape for array in expected], [array.shape for array in found]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"{runtime} returns outputs of shapes {shapes[1]}, but {source} returns {shapes[0]}: this {what} was not "
            "converted correctly, so timing it would mean nothing."
        )
    pairs = zip(expected, found, strict=True)
    difference = float(np.max([relative_difference(a, b.astype(a.dtype, copy=False)) for a, b in pairs], initial=0.0))
    limit = like(precision, artifact.tolerance)
    if not difference <= limit:  # a NaN fails too
        raise ExportError(
            f"{runtime}'s outputs differ from {source}'s by {difference:.1e} of the largest value; at most "
            f"{limit:.1e} is allowed. {_advice(what, precision)}"
        )
    return difference


def _advice(what: str, precision: str) -> str:
    if precision == "int8":
        return (
            f"The ranges for 8-bit integers do not fit this {what}: pass data (or calibration) of the task, or deploy "
            "it in float."
        )
    return (
        f"Look for code in {what}.forward that branches on values or on tracing, or for outputs that are not finite; "
        "if the model is only ill-conditioned, raise `tolerance`."
    )


def own_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode."""
    return copy_of(module).eval()


def file_of(source: OnnxSource) -> bytes | str:
    """An ONNX model as most runtimes read it: the path of its file, or its bytes."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else as_bytes(source)
