"""What runs a model when its latency is taken: ONNX Runtime, PyTorch itself, or OpenVINO.

A backend opens a model once and gives a function that runs it once on inputs held ready. Another runtime is a class of
twenty lines: `name`, and `open(model, call)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from cpd.deploy.export import OnnxSource, check_parity, export_bytes, feed, open_session, run_session
from cpd.errors import InputError, first_line, needs_extra
from cpd.model.inputs import Call, check_model, device_of
from cpd.model.tensors import copy_of

Model = nn.Module | OnnxSource
Run = Callable[[], object]


class Backend(Protocol):
    """Something that runs models.

    Attributes:
        name: what it is called in a table.
    """

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def open(self, model: Model, call: Call) -> Run:
        """A function that runs `model` once on `call`, and returns when it is done.

        Raises:
            InputError: if this backend cannot open or run it.
            ExportError: if it has to be exported, and that fails or computes something else.
        """
        ...


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime: sequential execution, all graph optimisations.

    Attributes:
        threads: intra-op threads.
        provider: the execution provider, one of `onnxruntime.get_available_providers()`. On another than the CPU,
            inputs and outputs stay in its memory.
        tolerance: the largest relative difference between a module's outputs here and in PyTorch.
    """

    threads: int = 1
    provider: str = "CPUExecutionProvider"
    tolerance: float = 1e-3

    @property
    def name(self) -> str:
        """`onnxruntime`, and the provider where it is not the CPU's."""
        return "onnxruntime" + ("" if self.provider.startswith("CPU") else f" ({self.provider})")

    def open(self, model: Model, call: Call) -> Run:
        """A session's run; a module is exported and compared with PyTorch first."""
        source = exported(model, call, self.tolerance)
        if self.provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"This ONNX Runtime has no {self.provider}; it has {', '.join(onnxruntime.get_available_providers())}."
                " Install the build that has it (onnxruntime-gpu, for one)."
            )
        session = open_session(source, self.threads, provider=self.provider)
        arrays = feed(session, call)
        run_session(session, arrays)  # inputs that do not fit are reported here
        if self.provider.startswith("CPU"):
            return lambda: session.run(None, arrays)
        device = "cuda" if "CUDA" in self.provider or "Tensorrt" in self.provider else "cpu"
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        for output in session.get_outputs():
            binding.bind_output(output.name, device)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


@dataclass(frozen=True)
class TorchEager:
    """PyTorch without a compiler, on the device that the model is on.

    Attributes:
        threads: `torch.set_num_threads` while it runs.
    """

    threads: int = 1
    name: str = "torch"

    def open(self, model: Model, call: Call) -> Run:
        """One forward pass of a copy in eval mode, without gradients."""
        module = _module(model, self.name)
        return _forward(copy_of(module).eval(), call.to(device_of(module)), self.threads)


@dataclass(frozen=True)
class TorchCompile:
    """PyTorch with `torch.compile`; compiled when it is opened.

    Attributes:
        threads: `torch.set_num_threads` while it runs.
        mode: as `torch.compile` takes it.
    """

    threads: int = 1
    mode: str = "default"
    name: str = "torch.compile"

    def open(self, model: Model, call: Call) -> Run:
        """One forward pass of a compiled copy."""
        module = _module(model, self.name)
        compiled = torch.compile(copy_of(module).eval(), mode=self.mode)
        run = _forward(compiled, call.to(device_of(module)), self.threads)
        try:
            run()
        except Exception as error:  # no compiler on the machine, or whatever it raises
            raise InputError(
                f"torch.compile failed on {type(module).__name__}: {first_line(error)}. It needs a C++ compiler on a "
                "CPU, and Triton on a GPU; leave this backend out otherwise."
            ) from error
        return run


@dataclass(frozen=True)
class OpenVINO:
    """OpenVINO on the CPU, of the ONNX export (`pip install openvino`).

    Attributes:
        threads: `INFERENCE_NUM_THREADS`.
        tolerance: the largest relative difference between a module's outputs in ONNX Runtime and in PyTorch.
    """

    threads: int = 1
    tolerance: float = 1e-3
    name: str = "openvino"

    def open(self, model: Model, call: Call) -> Run:
        """An inference request of the compiled model."""
        with needs_extra("openvino", "The backend 'openvino'"):
            import openvino
        source = exported(model, call, self.tolerance)
        arrays = feed(open_session(source), call)
        read = os.fspath(source) if isinstance(source, (str, os.PathLike)) else _serialised(source)
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(core.read_model(read), "CPU", settings)
        request = compiled.create_infer_request()
        values: dict[str, np.ndarray[Any, Any]] = dict(arrays)
        return lambda: request.infer(values)


#: Every backend by the name that `measure_latency` and `cpd latency` take.
BACKENDS: dict[str, Callable[[int], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "cuda": lambda threads: OnnxRuntime(threads, "CUDAExecutionProvider"),
    "torch": TorchEager,
    "torch.compile": TorchCompile,
    "openvino": OpenVINO,
}


def exported(model: Model, call: Call, tolerance: float) -> OnnxSource:
    """What ONNX Runtime can open of `model`: a module is exported, and compared with PyTorch."""
    if isinstance(model, (bytes, str, os.PathLike, onnx.ModelProto)):
        return model
    source = export_bytes(check_model(model), call)
    check_parity(model, source, call, tolerance)
    return source


def _serialised(source: bytes | onnx.ModelProto) -> bytes:
    return source if isinstance(source, bytes) else bytes(source.SerializeToString())


def _module(model: Model, backend: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    raise InputError(f"The backend {backend!r} runs torch.nn.Modules; got {type(model).__name__}.")


def _forward(model: Callable[..., Any], call: Call, threads: int) -> Run:
    gpu = any(leaf.is_cuda for leaf in torch.utils._pytree.tree_leaves(tuple(call)) if isinstance(leaf, torch.Tensor))

    def run() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                found = model(*call.args, **call.kwargs)
            if gpu:
                torch.cuda.synchronize()
            return found
        finally:
            torch.set_num_threads(before)

    return run
