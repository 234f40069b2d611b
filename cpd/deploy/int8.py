"""The INT8 model of an ONNX model: weights and activations of 8 bits, by ONNX Runtime's own tools, in QDQ format.

Every runtime here that takes ONNX reads that format, so one quantization serves them all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cpd.deploy.export import feed, open_session
from cpd.errors import ExportError, first_line
from cpd.model.inputs import Call
from cpd.trace.quiet import quiet

Arrays = dict[str, np.ndarray[Any, Any]]

#: How the ranges of activations are taken; what ONNX Runtime calls it.
CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
#: The scale of activations and weights where only times are asked for.
_ANY_SCALE = 0.01


def samples_of(session: Any, calls: Iterable[Call], most: int | None = None) -> list[Arrays]:
    """Batches as an ONNX model takes them, in parts as large as its own batch.

    Args:
        session: of the model.
        calls: the batches; no more are read than are needed.
        most: samples at most; None: all.

    Raises:
        InputError: if they do not fit the model.
    """
    found, count = list[Arrays](), 0
    for call in calls:
        for piece in parts(session, call):
            found.append(feed(session, piece))
            count += piece.samples
            if most is not None and count >= most:
                return found
    return found


def parts(session: Any, call: Call) -> Iterator[Call]:
    """A batch in parts of the size that the model was exported with; the last one filled up."""
    size = session.get_inputs()[0].shape[0] if session.get_inputs()[0].shape else None
    if not isinstance(size, int) or call.samples == size:
        yield call
        return
    for start in range(0, call.samples, size):
        yield call.slice(start, start + size).resized(size)


def quantized_onnx(
    content: bytes,
    samples: Sequence[Arrays],
    calibration: str = "minmax",
    per_channel: bool = True,
    exclude: Iterable[str] = (),
) -> bytes:
    """The static INT8 model.

    Args:
        content: the float model.
        samples: inputs that the ranges of activations are taken over.
        calibration: a name in `CALIBRATIONS`.
        per_channel: one scale for each output channel of a weight rather than one for all.
        exclude: names of nodes that stay in float.

    Raises:
        ExportError: if ONNX Runtime cannot quantize the model, or cannot run what it made.
    """
    return _converted(content, lambda given, made: _static(given, made, samples, calibration, per_channel, exclude))


def dynamic_onnx(content: bytes, per_channel: bool = True, exclude: Iterable[str] = ()) -> bytes:
    """The dynamic INT8 model: weights of matrix products of 8 bits, ranges of activations taken while it runs.

    Args:
        content: the float model.
        per_channel: one scale for each output channel of a weight rather than one for all.
        exclude: names of nodes that stay in float.

    Raises:
        ExportError: if ONNX Runtime cannot quantize the model, or cannot run what it made.
    """

    def convert(given: Path, made: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(given), str(made), per_channel=per_channel, weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude), op_types_to_quantize=["MatMul", "Gemm", "Attention", "LSTM", "Gather"],
        )  # fmt: skip

    return _converted(content, convert)


def _static(
    given: Path, made: Path, samples: Sequence[Arrays], calibration: str, per_channel: bool, exclude: Iterable[str]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as convert

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(samples)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    convert(
        str(given), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=list(exclude),
        calibrate_method=CalibrationMethod[CALIBRATIONS[calibration]],
    )  # fmt: skip


def _converted(content: bytes, convert: Callable[[Path, Path], None]) -> bytes:
    """What a tool of ONNX Runtime makes of a model, prepared for it as it recommends."""
    with _path_kept(), tempfile.TemporaryDirectory(prefix="cpd-int8-") as folder:
        given, prepared, made = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "int8"))
        given.write_bytes(_without_shapes_of_weights(content))
        try:
            from onnxruntime.quantization.shape_inference import quant_pre_process

            with quiet():
                quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
                convert(prepared, made)
            result = made.read_bytes()
            open_session(result)
        except Exception as error:  # its tools raise anything
            raise ExportError(
                f"ONNX Runtime cannot quantize the model: {first_line(error)}. Name the nodes that cause this in "
                "exclude=[…], or deploy the float model."
            ) from error
    return result


def _without_shapes_of_weights(content: bytes) -> bytes:
    """A model that says the shapes of its weights once, in the weights: torch 2.9 repeats them.

    Those who transpose a weight leave the repetition as it is, and then find that the two differ.
    """
    model = onnx.load_from_string(content)
    weights = {item.name for item in model.graph.initializer}
    others = [item for item in model.graph.value_info if item.name not in weights]
    if len(others) == len(model.graph.value_info):
        return content
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    return bytes(model.SerializeToString())


@contextmanager
def _path_kept() -> Iterator[None]:
    """Where Python looks for modules: ONNX Runtime's tools put a folder of theirs there, and leave it."""
    before = sys.path.copy()
    try:
        yield
    finally:
        sys.path[:] = before


def with_constant_ranges(content: bytes) -> bytes:
    """A float model of operators side by side, each in 8 bits, for its time alone: all scales are the same.

    Args:
        content: a model whose every node reads inputs and initializers of the model and gives one of its outputs.
    """
    model = onnx.load_from_string(content)
    graph = model.graph
    scale, zero = (
        numpy_helper.from_array(np.float32(_ANY_SCALE), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
    )
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes, constants, outputs = list[onnx.NodeProto](), [scale, zero], list[onnx.ValueInfoProto]()
    for item in graph.input:
        nodes.append(helper.make_node("QuantizeLinear", [item.name, "scale", "zero"], [f"{item.name} in 8 bits"]))
    for node in graph.node:
        for index, name in enumerate(node.input):
            read = f"{node.name} reads {index}"
            if name in weights:
                axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, weights[name].ndim - 1)
                scales = np.full(weights[name].shape[axis], _ANY_SCALE, np.float32)
                constants += [
                    numpy_helper.from_array(np.ones(weights[name].shape, np.int8), name),
                    numpy_helper.from_array(scales, f"{name} scales"),
                    numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name} zeros"),
                ]
                given = [name, f"{name} scales", f"{name} zeros"]
                nodes.append(helper.make_node("DequantizeLinear", given, [read], axis=axis))
            else:
                nodes.append(helper.make_node("DequantizeLinear", [f"{name} in 8 bits", "scale", "zero"], [read]))
            node.input[index] = read
        output, float_output = node.output[0], f"{node.output[0]} in float"
        node.output[0] = float_output
        nodes += [node, helper.make_node("QuantizeLinear", [float_output, "scale", "zero"], [output])]
        outputs.append(helper.make_tensor_value_info(output, TensorProto.UINT8, None))
    made = helper.make_graph(nodes, graph.name, list(graph.input), outputs, constants)
    quantized = helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(quantized.SerializeToString())
