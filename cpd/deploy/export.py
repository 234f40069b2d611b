"""From a model to one ONNX file, and the proof that ONNX Runtime computes what PyTorch does.

    path = export_onnx(model, example_inputs, "model.onnx")
    onnx_parity(model, path, example_inputs)  # about 1e-6

The file has the shapes of the example inputs, batch size included: what is measured is what is deployed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import ExportError, InputError, first_line, of_the_user
from cpd.model.arguments import INPUTS, MODEL
from cpd.model.inputs import Call, as_call, check_model, device_of, evaluating
from cpd.model.state import preserved
from cpd.options import FLAG, PATH, Check, checked, number
from cpd.trace.quiet import quiet

OnnxSource: TypeAlias = bytes | str | os.PathLike[str] | onnx.ModelProto
"""A serialised ONNX model, the path of its file, or the protobuf that `onnx.load` gives."""

ONNX_MODEL = Check(
    "an ONNX model: the path of its file, its bytes, or an onnx.ModelProto",
    lambda value: isinstance(value, (bytes, onnx.ModelProto)) or PATH.accepts(value),
)
EITHER_MODEL = Check(
    f"a torch.nn.Module, or {ONNX_MODEL.wanted}",
    lambda value: isinstance(value, nn.Module) or ONNX_MODEL.accepts(value),
)
TOLERANCE = number("above 0", lambda value: value > 0)

PROTOBUF_LIMIT = 2**31
"""Bytes: no protobuf message, hence no ONNX model without external data, is larger."""

#: How the exporter names the op that it cannot translate.
_UNTRANSLATED = re.compile(r"translating node .*?target=torch\.ops\.([\w.]+?)(?:\.default)?\]", re.DOTALL)

#: Types of numbers that ONNX Runtime has kernels of, whatever the operator.
_USUAL = {torch.float32, torch.float16}

# ONNX Runtime's exceptions share no base class but Exception.
_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


@overload
def export_onnx(
    model: nn.Module, example_inputs: Any, path: None = None, *, check: bool = True, tolerance: float = 1e-3
) -> bytes: ...


@overload
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    check: bool = True,
    tolerance: float = 1e-3,
) -> Path: ...


@checked(model=MODEL, example_inputs=INPUTS, path=PATH, check=FLAG, tolerance=TOLERANCE)
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    check: bool = True,
    tolerance: float = 1e-3,
) -> Path | bytes:
    """Export a model in eval mode to ONNX, with its weights, and compare ONNX Runtime with PyTorch.

    The model is not changed: its weights, its gradient flags and the training mode of every submodule stay. The file
    is written completely or not at all, and only after the comparison has passed.

    Args:
        model: The model to export, on any device.
        example_inputs: A tensor, a tuple, or (tuple, dict), as for `torch.onnx.export`. The exported model takes
            exactly these shapes, batch size included. Random values test more than zeros.
        path: The file to write. A model too large for one protobuf (2 GB; the exporter's limit is 1.5 GB) gets its
            weights in `<path>.data` beside it. Default: no file is written.
        check: Whether to compare the outputs on `example_inputs`.
        tolerance: Largest relative difference of the outputs that passes the check.

    Returns:
        The path of the file, or the serialised model if `path` is None.

    Raises:
        InputError: If `path` cannot be written, or an argument cannot be used. This is raised before the export.
        ExportError: If the export fails, or the outputs differ by more than `tolerance`.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> images = torch.randn(1, 3, 8, 8)
        >>> path = cpd.export_onnx(model, images, "model.onnx")
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession(path)
        >>> (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        >>> logits.shape
        (1, 10)
    """
    call = as_call(example_inputs)
    model = check_model(model)
    target = None if path is None else writable(path)

    def verify(source: OnnxSource) -> None:
        if check:
            check_parity(model, source, call, tolerance)

    if target is not None:
        return _write(_export(model, call), target, verify)
    serialised = export_bytes(model, call)
    verify(serialised)
    return serialised


def export_bytes(model: nn.Module, call: Call) -> bytes:
    """The ONNX model of `model`, serialised in memory; `model` is left as found.

    Raises:
        ExportError: if the export fails, or the weights exceed what one protobuf can hold (2 GB).
    """
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    size = sum(tensor.nbytes for tensor in weights.values())
    if size >= PROTOBUF_LIMIT:
        raise ExportError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of weights, but an ONNX model in memory can hold 2 GB. "
            "Export it to a file with export_onnx(model, example_inputs, path), and pass that path."
        )
    serialised: bytes = _export(model, call).model_proto.SerializeToString()
    return serialised


def onnx_parity(model: nn.Module, onnx_model: OnnxSource, example_inputs: Any) -> float:
    """How far ONNX Runtime (CPU) is from PyTorch (eval mode, no gradients) on `example_inputs`.

    Args:
        model: the PyTorch model; left as found.
        onnx_model: its export: a path, serialised bytes, or an `onnx.ModelProto`.
        example_inputs: a tensor, a tuple, or (tuple, dict). The outputs may be
            tensors in tuples, lists and dicts.

    Returns:
        The maximum over the outputs of `max|a - b| / max|a|`, a being PyTorch's. Infinite where a is all
        zero and b is not; NaN where only one of the two is NaN.

    Raises:
        InputError: if the ONNX model cannot be opened, or does not take these inputs.
        ExportError: if the numbers of outputs or their shapes differ.
    """
    model = check_model(model)
    call = as_call(example_inputs).to(device_of(model))
    session = open_session(onnx_model)
    found = run_session(session, feed(session, call))
    with (
        preserved(model),
        evaluating(model),
        torch.no_grad(),
        of_the_user("The model", "on the example inputs"),
    ):
        expected = [leaf for leaf in pytree.tree_leaves(call.on(model)) if isinstance(leaf, Tensor)]
    expected_shapes = [tuple(tensor.shape) for tensor in expected]
    found_shapes = [array.shape for array in found]
    if expected_shapes != found_shapes:
        raise ExportError(
            f"The ONNX model returns outputs of shapes {found_shapes}, but PyTorch returns {expected_shapes}. "
            f"Check that the file was exported from this {type(model).__name__}, at these input shapes."
        )
    differences = [relative_difference(array_of(a), b) for a, b in zip(expected, found, strict=True)]
    return float(np.max(differences, initial=0.0))  # np.max, unlike max, hands a NaN on


def check_parity(model: nn.Module, onnx_model: OnnxSource, call: Call, tolerance: float) -> None:
    """Raise `ExportError` unless `onnx_parity` is at most `tolerance`."""
    difference = onnx_parity(model, onnx_model, call)
    if not difference <= tolerance:  # a NaN fails too
        raise ExportError(
            f"ONNX Runtime's outputs differ from PyTorch's by {difference:.1e} of the largest value; at most "
            f"{tolerance:.1e} is allowed. Look for code in {type(model).__name__}.forward that branches on values or "
            "on tracing, or for outputs that are not finite. If the model is only ill-conditioned, raise `tolerance`."
        )


def open_session(
    onnx_model: OnnxSource, threads: int = 1, *, provider: str = "CPUExecutionProvider", profile: Path | None = None
) -> Any:
    """Open an `onnxruntime.InferenceSession`: sequential execution, all graph optimisations.

    Threads spin while a run lasts, as is the default, but not after it: two sessions timed in turn would
    otherwise take the cores from each other.

    Args:
        onnx_model: a path, serialised bytes, or an `onnx.ModelProto`.
        threads: the number of threads that share one operator (intra-op).
        provider: the execution provider.
        profile: where the profile of all runs goes, once `end_profiling` is called; its name is longer than this.

    Raises:
        InputError: if ONNX Runtime cannot open the model.
    """
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if isinstance(onnx_model, onnx.ModelProto):
        onnx_model = onnx_model.SerializeToString()
    source = onnx_model if isinstance(onnx_model, bytes) else os.fspath(onnx_model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=[provider])
    except _RUNTIME_ERRORS as error:
        name = "the serialised model" if isinstance(source, bytes) else repr(source)
        raise InputError(
            f"ONNX Runtime cannot open {name}: {first_line(error)}. Pass the path or the bytes of an ONNX "
            "model with standard operators, such as export_onnx writes."
        ) from error


def check_runs(model: nn.Module, call: Call) -> None:
    """Raise where ONNX Runtime has no kernels for a model's type of numbers: tried where it is not a usual one.

    Raises:
        InputError: naming the types.
    """
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    unusual = sorted(str(dtype).removeprefix("torch.") for dtype in found - _USUAL)
    if not unusual:
        return
    try:
        onnx_parity(model, export_bytes(model, call), call)
    except ExportError:
        return  # what else is wrong is told by what needs the export
    except InputError as error:
        raise InputError(
            f"ONNX Runtime cannot run {type(model).__name__} in {', '.join(unusual)}, so its latency cannot be "
            f"measured: {first_line(error.__cause__ or error)}. Compress it in float32 (model.float(), with inputs of "
            "that type) and convert the result, or use a target that is not measured: target_macs, target_params or "
            "target_memory."
        ) from error


def feed(session: Any, call: Call) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of `call` under the input names of `session`.

    A keyword argument goes to the input of its name; all other tensors go to the remaining inputs in order.

    Raises:
        InputError: if their number or a shape does not fit.
    """
    inputs = {item.name: item.shape for item in session.get_inputs()}
    named = {name: value for name, value in call.kwargs.items() if name in inputs and isinstance(value, Tensor)}
    others = {name: value for name, value in call.kwargs.items() if name not in named}
    tensors = [leaf for leaf in pytree.tree_leaves((call.args, others)) if isinstance(leaf, Tensor)]
    free = [name for name in inputs if name not in named]
    if len(free) != len(tensors):
        raise InputError(
            f"The ONNX model takes {len(inputs)} inputs ({', '.join(inputs)}), but example_inputs hold "
            f"{len(named) + len(tensors)} tensors. Pass the example inputs with which it was exported."
        )
    arrays = {name: array_of(tensor) for name, tensor in (*named.items(), *zip(free, tensors, strict=True))}
    for name, array in arrays.items():
        _check_shape(name, inputs[name], array.shape)
    return arrays


def random_inputs(model: OnnxSource) -> Call:
    """Standard normal inputs of an ONNX model, from a fixed seed; sizes that it leaves open are 1.

    Raises:
        InputError: if the model cannot be opened, or an input is no tensor of floats.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for item in open_session(model).get_inputs():
        if item.type != "tensor(float)":
            raise InputError(
                f"The input {item.name!r} is a {item.type}: cannot generate example values for it. Pass "
                "example_inputs=(…) from Python."
            )
        shape = [size if isinstance(size, int) else 1 for size in item.shape]
        found[item.name] = torch.randn(shape, generator=generator)
    return Call((), found)


def run_session(session: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The outputs of `session` on `arrays`.

    Raises:
        InputError: if ONNX Runtime refuses the inputs, or fails on them.
    """
    try:
        return [np.asarray(output) for output in session.run(None, arrays)]
    except _RUNTIME_ERRORS as error:
        raise InputError(
            f"ONNX Runtime cannot run the model on these inputs: {first_line(error)}. "
            "Pass example inputs of the types and shapes with which it was exported."
        ) from error


def _export(model: nn.Module, call: Call) -> Any:
    """The `torch.onnx.ONNXProgram` of `model`, less the stack traces and source paths noted in it."""
    args, kwargs = call.to(device_of(model))
    if not kwargs and args and isinstance(args[-1], dict):
        args = (*args, {})  # else the exporter takes the last argument for the keyword arguments
    try:
        with preserved(model), evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
            assert program is not None
    except Exception as error:  # whatever the exporter or the traced forward raises; chained, not hidden
        raise ExportError(
            f"torch.onnx.export failed on {type(model).__name__}: {_shown(error)} "
            "Targets that are not measured (target_macs, target_params) need no export."
        ) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    return program


def _shown(error: BaseException) -> str:
    """Why the export failed, with the op where it is one's fault, and what to do."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if found := _UNTRANSLATED.search(str(cause)):
            return (
                f"it cannot translate the operator {found[1]} to ONNX. Replace it by operators that can be translated, "
                "or compress a part of the model without it and export the whole with the custom_translation_table of "
                "torch.onnx.export."
            )
    return (
        f"{first_line(error.__cause__ or error)}. Check that model(*args, **kwargs) runs on the example inputs, and "
        "that its forward does not branch on tensor values. The traceback above shows the cause."
    )


def _write(program: Any, target: Path, verify: Callable[[OnnxSource], None]) -> Path:
    """Save to a folder beside `target`, verify there, then move into place, the model last."""
    with tempfile.TemporaryDirectory(prefix=".cpd-onnx-", dir=target.parent) as folder:
        draft = Path(folder, target.name)
        with quiet():
            program.save(draft)
        verify(draft)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):
            os.replace(file, target.parent / file.name)
    return target


def as_bytes(model: OnnxSource) -> bytes:
    """An ONNX model, serialised.

    Raises:
        InputError: if there is no such file.
    """
    if isinstance(model, bytes):
        return model
    if isinstance(model, onnx.ModelProto):
        return bytes(model.SerializeToString())
    try:
        return bytes(onnx.load(os.fspath(model)).SerializeToString())
    except Exception as error:  # protobuf's and the operating system's own
        raise InputError(f"{os.fspath(model)!r} cannot be read as an ONNX model: {first_line(error)}.") from error


def writable(path: str | os.PathLike[str]) -> Path:
    """`path` as a `Path`; raises `InputError` unless a file can be put there."""
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{str(target)!r} is a directory: pass the path of a file, such as 'model.onnx' in it.")
    if not target.parent.is_dir():
        raise InputError(f"The folder {str(target.parent)!r} of {target.name!r} does not exist: create it first.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"The folder {str(target.parent)!r} is not writable: choose another path.")
    return target


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """`tensor` as a contiguous array in main memory."""
    if tensor.dtype == torch.bfloat16:
        raise InputError("NumPy has no bfloat16: convert the model and its example inputs with .float() first.")
    return np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(tensor.shape)


def _check_shape(name: str, expected: list[int | str | None], found: tuple[int, ...]) -> None:
    """Raise `InputError` unless `found` fits `expected`, where a name or None stands for any size."""
    fits = len(expected) == len(found) and all(
        size == want for want, size in zip(expected, found, strict=True) if isinstance(want, int)
    )
    if not fits:
        raise InputError(
            f"The input {name!r} of the ONNX model has shape {list(expected)}, but the example input has "
            f"{list(found)}. Pass example inputs of the exported shape, or export the model again."
        )


def relative_difference(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """max|a - b| / max|a|, values equal on both sides (infinities and NaN too) counted as no difference."""
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    a, b = expected.astype(wide), found.astype(wide)
    differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not differs.any():
        return 0.0
    largest = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    difference = np.abs(a[differs] - b[differs]).max()
    return float(difference / largest) if largest > 0 else float("inf")
