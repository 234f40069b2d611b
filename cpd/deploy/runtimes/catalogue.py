"""Every runtime by its name; none is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpd.options import Check, is_function

if TYPE_CHECKING:  # torch takes seconds to import
    from collections.abc import Callable

    from cpd.deploy.runtimes.base import Runtime

#: What `runtime=` is where it is not given.
DEFAULT = "onnxruntime"
#: Channels that a vector holds at most in most kernels: widths in multiples of it are fast everywhere.
GRAIN = 8


@dataclass(frozen=True)
class Entry:
    """A runtime that has a name.

    Attributes:
        module: in `cpd.deploy.runtimes`.
        kind: the class in it.
        settings: what its constructor is given, beside `threads`.
        package: what must be installed for it, to tell whether it is; None: always there.
        grain: widths in multiples of this are fast.
        runs_files: whether ONNX models are all that it needs, on the CPU: the last timing can be done in a new process.
    """

    module: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    package: str | None = None
    grain: int = GRAIN
    runs_files: bool = False


#: ONNX Runtime's INT8 kernels of depthwise convolutions fall back to slow ones where channels are no multiple of 16.
RUNTIMES = {
    "onnxruntime": Entry("onnx_runtime", "OnnxRuntime", runs_files=True),
    "onnxruntime:int8": Entry("onnx_runtime", "OnnxRuntime", {"precision": "int8"}, grain=16, runs_files=True),
    "onnxruntime:cuda": Entry("onnx_runtime", "OnnxRuntimeProvider", {"provider": "CUDAExecutionProvider"}),
    "onnxruntime:tensorrt": Entry("onnx_runtime", "OnnxRuntimeProvider", {"provider": "TensorrtExecutionProvider"}),
    "openvino": Entry("openvino", "OpenVINO", package="openvino", runs_files=True),
    "openvino:bf16": Entry("openvino", "OpenVINO", {"precision": "bf16"}, package="openvino", runs_files=True),
    "openvino:int8": Entry("openvino", "OpenVINO", {"precision": "int8"}, package="openvino", runs_files=True),
    "opencv": Entry("opencv", "OpenCV", package="cv2", runs_files=True),
    "ncnn": Entry("ncnn", "Ncnn", package="ncnn"),
    "mnn": Entry("mnn", "Mnn", package="MNN", runs_files=True),
    "executorch": Entry("executorch", "ExecuTorch", package="executorch"),
    "torch": Entry("pytorch", "TorchEager"),
    "torch.compile": Entry("pytorch", "TorchCompile"),
}


def _is_runtime(value: object) -> bool:
    """Whether a value is one runtime: a name, names with commas between, an object that prepares, or a function."""
    if isinstance(value, str):
        return bool(value) and all(name.strip() in RUNTIMES for name in value.split(","))
    return is_function(value) or (
        not isinstance(value, type) and callable(getattr(value, "prepare", None)) and hasattr(value, "name")
    )


def _are_runtimes(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_runtime, value))
    return _is_runtime(value)


RUNTIME = Check(
    f"one of {', '.join(RUNTIMES)}, a cpd.deploy.runtimes.base.Runtime, or a function measure(paths) -> [ms]; or "
    "several of them",
    _are_runtimes,
    names=lambda: RUNTIMES,
)


def names_of(given: Any) -> tuple[str, ...]:
    """What runtimes are called, without loading them."""
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(","))
    if isinstance(given, (list, tuple)):
        return tuple(name for item in given for name in names_of(item))
    found = str(getattr(given, "name", None) or getattr(given, "__name__", "device"))
    return (found if found != "<lambda>" else "device",)


def grain_of(given: Any) -> int:
    """The multiple of channels that is fast in every one of these runtimes."""
    if isinstance(given, (list, tuple)):
        return max(map(grain_of, given))
    if isinstance(given, str):
        return max(RUNTIMES[name].grain for name in names_of(given))
    return int(getattr(given, "grain", GRAIN))


def runtimes_of(given: Any, threads: int) -> list[Runtime]:
    """The runtimes that an argument names.

    Args:
        given: a name, several with commas between, a `Runtime`, a function for a device, or several of all these.
        threads: of those that are given by name.
    """
    if isinstance(given, (list, tuple)):
        return [found for item in given for found in runtimes_of(item, threads)]
    if isinstance(given, str):
        return [_loaded(RUNTIMES[name], threads) for name in names_of(given)]
    if is_function(given):
        from cpd.deploy.runtimes.device import Device

        return [Device(given, names_of(given)[0])]
    return [given]


def _loaded(entry: Entry, threads: int) -> Runtime:
    kind: Callable[..., Runtime] = getattr(importlib.import_module(f"cpd.deploy.runtimes.{entry.module}"), entry.kind)
    return kind(threads=threads, **entry.settings)


def others_installed(given: Any) -> list[str]:
    """The runtimes for CPUs that are installed and not asked for, in the precisions asked for and in float32."""
    asked = names_of(given)
    precisions = {name.partition(":")[2] for name in asked} & {"int8", "bf16"} | {""}
    quick = [name for name, entry in RUNTIMES.items() if entry.package or entry.module == "onnx_runtime"]
    quick.remove("executorch")  # which lowers a model for tens of seconds
    return [name for name in installed(quick) if name not in asked and name.partition(":")[2] in precisions]


def installed(names: Sequence[str] = tuple(RUNTIMES)) -> list[str]:
    """The names of the runtimes whose package is installed."""
    return [
        name for name in names
        if (package := RUNTIMES[name].package) is None or importlib.util.find_spec(package) is not None
    ]  # fmt: skip
