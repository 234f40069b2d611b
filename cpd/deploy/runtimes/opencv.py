"""OpenCV 5's own engine on the CPU, of the ONNX export."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cpd.deploy.export import OnnxSource, as_bytes
from cpd.deploy.profiling import MOST_RUNS, NodeTime, Shape
from cpd.deploy.runtimes.base import Array, Artifact, Session, check_outputs
from cpd.errors import InputError, first_line, needs_extra
from cpd.model.progress import part

_WARM_UP_RUNS, _LEAST_RUNS = 2, 8


@dataclass(frozen=True)
class OpenCV:
    """OpenCV's `dnn` module, its new engine.

    Attributes:
        threads: `cv2.setNumThreads`, which holds for the process, while it runs.
    """

    threads: int = 1
    name: str = "opencv"
    precision: str = "f32"
    grain: int = 8

    @property
    def version(self) -> str:
        """Of the package."""
        return str(_cv2().__version__)

    def prepare(self, artifact: Artifact) -> Session:
        """A network that holds its inputs, whose outputs were compared with PyTorch's."""
        network = self._opened(artifact.content, artifact.feeds)
        names = network.getUnconnectedOutLayersNames()
        found = [np.array(array) for array in network.forward(names)]
        difference = check_outputs(found, artifact, "OpenCV", self.precision)
        return Session(lambda: self._run(network), difference)

    def profile(self, artifact: Artifact, seconds: float = 1.0) -> list[NodeTime]:
        """What its profiling mode says."""
        return self._profile(artifact.onnx, artifact.feeds, seconds)

    def kernels(self, model: bytes, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        """What its profiling mode says of operators side by side."""
        shaped = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))  # it wants to know those of results
        return self._profile(shaped, feeds, seconds)

    def _opened(self, content: bytes, feeds: Mapping[str, Array]) -> Any:
        cv2 = _cv2()
        try:
            network = cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8), engine=cv2.dnn.ENGINE_NEW)
            for name, array in feeds.items():
                network.setInput(array, name)
            self._run(network)
        except (cv2.error, AttributeError) as error:
            raise InputError(f"OpenCV's new engine cannot run the model: {first_line(error)}.") from error
        return network

    def _run(self, network: Any) -> object:
        cv2 = _cv2()
        before = cv2.getNumThreads()
        if before != self.threads:
            cv2.setNumThreads(self.threads)
        try:
            return network.forward(network.getUnconnectedOutLayersNames())
        finally:
            if before != self.threads:
                cv2.setNumThreads(before)

    def _profile(self, source: OnnxSource, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        cv2, content = _cv2(), as_bytes(source)
        with part("profile", undisturbed=True):
            network = self._opened(content, feeds)
            network.setProfilingMode(cv2.dnn.DNN_PROFILE_DETAILED)
            ticks, start = list[Array](), time.perf_counter()
            while len(ticks) < _WARM_UP_RUNS + _LEAST_RUNS or (
                len(ticks) < MOST_RUNS and time.perf_counter() - start < seconds
            ):
                self._run(network)
                ticks.append(np.asarray(network.getPerfProfile()[1]).reshape(-1))
        each = [
            statistics.median(column) / cv2.getTickFrequency() * 1e3
            for column in zip(*ticks[_WARM_UP_RUNS:], strict=True)
        ]
        return _nodes(content, list(network.getLayerNames()), each)


def _cv2() -> Any:
    with needs_extra("opencv", "The runtime 'opencv'"):
        import cv2
    return cv2


def _nodes(content: bytes, names: list[str], times: list[float]) -> list[NodeTime]:
    """One entry a layer; a change of layout, which the model does not name, has the shape of what came before it."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content)).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    shapes = {item.name: tuple(dim.dim_value for dim in item.type.tensor_type.shape.dim) for item in values}
    shapes |= {item.name: tuple(item.dims) for item in graph.initializer}
    known = {node.name: node for node in graph.node}
    found, last = list[NodeTime](), tuple[Shape, ...]()
    for name, ms in zip(names, times, strict=True):
        if name not in known:
            found.append(NodeTime(name, "Layout", last, last, ms))
            continue
        node = known[name]
        inputs = tuple(shapes.get(item, ()) for item in node.input if item)
        last = tuple(shapes.get(item, ()) for item in node.output)
        found.append(NodeTime(name, node.op_type, inputs, last, ms))
    return found
