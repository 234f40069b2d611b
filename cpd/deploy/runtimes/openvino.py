"""OpenVINO on the CPU, of the ONNX export: in float32, in brain floats, or in 8-bit integers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from cpd.deploy.export import OnnxSource
from cpd.deploy.int8 import with_constant_ranges
from cpd.deploy.profiling import NodeTime, Shape
from cpd.deploy.runtimes.base import Array, Artifact, Session, check_outputs, file_of
from cpd.errors import InputError, first_line, needs_extra
from cpd.model.progress import part

#: What its operators are called in ONNX; the rest keep their names.
_OPERATORS = {
    "Convolution": "Conv", "GroupConvolution": "Conv", "ConvolutionBackpropData": "ConvTranspose",
    "GroupConvolutionBackpropData": "ConvTranspose", "Deconvolution": "ConvTranspose", "FullyConnected": "MatMul",
    "Convert": "Cast",
}  # fmt: skip
#: Left out of a profile: what is not run, and changes of layout, which take longer alone than in the model.
_LEFT_OUT = ("Reorder", "Const", "Input", "Output")
#: Runs before anything is counted, and blocks of a profile, each of which is as long as all before it.
_FIRST_BLOCK, _LEAST_BLOCKS, _BLOCKS = 4, 4, 8


@dataclass(frozen=True)
class OpenVINO:
    """OpenVINO's CPU plugin, for latency.

    Attributes:
        threads: `INFERENCE_NUM_THREADS`.
        precision: "f32"; "bf16", which OpenVINO takes by itself on processors that have it; or "int8": models are
            quantized, statically and by channel, as for ONNX Runtime.
    """

    threads: int = 1
    precision: str = "f32"
    grain: int = 8

    @property
    def name(self) -> str:
        """`openvino`, with the precision where it is not float32."""
        return "openvino" if self.precision == "f32" else f"openvino:{self.precision}"

    @property
    def version(self) -> str:
        """Of the package."""
        return version("openvino")

    def prepare(self, artifact: Artifact) -> Session:
        """An inference request of the compiled model, whose outputs were compared with PyTorch's."""
        request = self._request(artifact.of(self.precision), artifact.feeds)
        outputs = [np.array(value) for value in request.infer().values()]
        difference = check_outputs(outputs, artifact, f"OpenVINO ({self.precision})", self.precision)
        return Session(lambda: request.infer(share_outputs=True), difference)

    def profile(self, artifact: Artifact, seconds: float = 1.0) -> list[NodeTime]:
        """What its performance counters say."""
        return self._profile(artifact.of(self.precision), artifact.feeds, seconds)

    def kernels(self, model: bytes, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        """What its performance counters say of operators side by side."""
        source = with_constant_ranges(model) if self.precision == "int8" else model
        return self._profile(source, feeds, seconds)

    def _request(self, source: OnnxSource, feeds: Mapping[str, Array], **settings: Any) -> Any:
        """A request that holds its inputs."""
        with needs_extra("openvino", "The runtime 'openvino'"):
            import openvino

        settings |= {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "ENABLE_CPU_PINNING": False,  # what else runs on a core must not be in one model's times alone
        }
        core = openvino.Core()
        try:
            request = core.compile_model(core.read_model(file_of(source)), "CPU", settings).create_infer_request()
            for name, array in feeds.items():
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            request.infer()
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot open the model: {first_line(error)}.") from error
        return request

    def _profile(self, source: OnnxSource, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        with part("profile", undisturbed=True):
            request = self._request(source, feeds, PERF_COUNT=True)
            start, runs, means = time.perf_counter(), 1, list[dict[str, float]]()  # one run when it was opened
            while len(means) < _LEAST_BLOCKS or (len(means) < _BLOCKS and time.perf_counter() - start < seconds):
                more = runs if means else _FIRST_BLOCK - runs
                for _ in range(more):
                    request.infer(share_outputs=True)
                runs += more
                # all of them: a node that takes less than a microsecond is told as not run
                means.append({node.node_name: node.real_time.total_seconds() * 1e3 for node in request.profiling_info})
            return _nodes(request, _medians(means))


def _medians(means: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The time of each node, in ms: the median over blocks of runs of the mean within a block.

    OpenVINO counts the mean over all runs since a model was compiled, the first one with its preparations among them.
    Of a block that is as long as all before it, the mean is twice that of all less that of those before.
    """
    return {
        name: max(
            statistics.median(2 * now.get(name, 0.0) - before.get(name, 0.0) for before, now in pairwise(means)), 0.0
        )
        for name in means[-1]
    }


def _nodes(request: Any, times: Mapping[str, float]) -> list[NodeTime]:
    """The nodes that were executed, in their order, with the shapes that they have in the model."""
    nodes = []
    for item in request.get_compiled_model().get_runtime_model().get_ordered_ops():
        name = item.get_friendly_name()
        kind = str(item.get_rt_info()["layerType"].astype(str))
        if kind in _LEFT_OUT or name not in times:
            continue
        inputs: tuple[Shape, ...] = tuple(tuple(port.get_shape()) for port in item.inputs())
        op = _OPERATORS.get(kind, kind)
        # of a contraction the first input says enough, and the others may be what was fused into it
        shown = inputs[:1] if op in ("Conv", "ConvTranspose", "MatMul") else inputs
        outputs = tuple(tuple(port.get_shape()) for port in item.outputs())
        nodes.append(NodeTime(name, op, shown, outputs, times[name]))
    return nodes
