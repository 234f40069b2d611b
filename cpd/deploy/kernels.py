"""How long convolutions and matrix products take on this machine, at any widths.

A kernel is measured alone, as a runtime runs it (ONNX Runtime, OpenVINO; in float or in 8-bit integers), at a few
widths of each of its dimensions; the rest follows from how such kernels are built. Time does not fall evenly with a
width: it falls in steps of the vector registers' length (a saw-tooth: 24 channels cost what 32 do), the steps repeat
every few vectors, and widths that fill no vector may take another kernel altogether. What was measured is kept in a
file, one for a machine, a runtime with its precision, and a version of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import platformdirs
from onnx import TensorProto, helper, numpy_helper

from cpd.deploy.machine import environment
from cpd.deploy.runtimes.base import ProfilingRuntime, Runtime
from cpd.deploy.runtimes.catalogue import DEFAULT
from cpd.deploy.runtimes.onnx_runtime import OnnxRuntime
from cpd.model.progress import part

log = logging.getLogger("cpd")

#: Widths up to this one are measured each.
SMALL = 16
#: Beyond it, widths in multiples of this: all vector lengths in use divide it or are multiples of it.
GRAIN = 8
#: The saw-tooth repeats after so many positions: four vectors of AVX-512, eight of AVX2.
PERIOD = 64
#: Kernels measured in one session, and the bytes of their weights and inputs, at most.
CHUNK, CHUNK_BYTES = 48, 2**27
#: Seconds that one session runs.
SECONDS = 0.15


@dataclass(frozen=True)
class Kernel:
    """A convolution or a matrix product; `widths` are its dimensions that can change."""

    widths: ClassVar[tuple[str, ...]] = ()

    @property
    def together(self) -> tuple[str, ...]:
        """Widths that do not act independently: small ones that decide together which kernel is taken."""
        return ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first input."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the second, as ONNX has it."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Of both inputs and of the result: the memory that is touched."""
        raise NotImplementedError

    def node(self, source: str, weight: str, name: str) -> onnx.NodeProto:
        """The ONNX node."""
        raise NotImplementedError

    def at(self, **widths: Any) -> Self:
        """The same kernel at other widths."""
        return replace(self, **widths)


@dataclass(frozen=True)
class Convolution(Kernel):
    """A convolution; `inputs` and `outputs` are channels of one group."""

    batch: int
    groups: int
    inputs: int
    outputs: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    widths: ClassVar[tuple[str, ...]] = ("batch", "groups", "inputs", "outputs")

    @property
    def together(self) -> tuple[str, ...]:
        """The channels of one group, where there are several."""
        return ("inputs", "outputs") if self.groups > 1 and max(self.inputs, self.outputs) <= PERIOD else ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what is convolved."""
        return (self.batch, self.groups * self.inputs, *self.space)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As ONNX has it."""
        if self.transposed:
            return (self.groups * self.inputs, self.outputs, *self.kernel)
        return (self.groups * self.outputs, self.inputs, *self.kernel)

    @property
    def elements(self) -> int:
        """Of image, weight and result."""
        steps = math.prod(self.stride)
        area = math.prod(self.space) * steps if self.transposed else math.prod(self.space) // steps
        result = self.batch * self.groups * self.outputs * area
        return math.prod(self.input_shape) + math.prod(self.weight_shape) + result

    def node(self, source: str, weight: str, name: str) -> onnx.NodeProto:
        """The ONNX node."""
        return helper.make_node(
            "ConvTranspose" if self.transposed else "Conv", [source, weight], [name], name, group=self.groups,
            kernel_shape=self.kernel, strides=self.stride, pads=self.padding * 2, dilations=self.dilation,
        )  # fmt: skip


@dataclass(frozen=True)
class MatrixProduct(Kernel):
    """[batch, rows, inner] times [batch, inner, columns]; of a constant second matrix, the batch is 1."""

    batch: int
    rows: int
    inner: int
    columns: int
    constant: bool

    widths: ClassVar[tuple[str, ...]] = ("batch", "rows", "inner", "columns")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first matrix."""
        return (self.rows, self.inner) if self.constant else (self.batch, self.rows, self.inner)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the second."""
        return (self.inner, self.columns) if self.constant else (self.batch, self.inner, self.columns)

    @property
    def elements(self) -> int:
        """Of the three matrices."""
        return math.prod(self.input_shape) + math.prod(self.weight_shape) + self.batch * self.rows * self.columns

    def node(self, source: str, weight: str, name: str) -> onnx.NodeProto:
        """The ONNX node."""
        return helper.make_node("MatMul", [source, weight], [name], name)


#: What times are measured against, and what it is taken to take, in ms.
UNIT = Convolution(1, 1, 64, 64, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1))
UNIT_MS = 0.3


class KernelTimes:
    """Times of kernels in ms, measured where they are not known yet.

    They are to be compared with one another: the machine's pace is taken out (`UNIT_MS`).

    Args:
        threads: of ONNX Runtime, where no runtime is given.
        path: the file that times are kept in; None: `cache_file(runtime)`. What it holds is used, what is measured is
            added.
        runtime: what runs the kernels; None: ONNX Runtime in float32.
    """

    def __init__(self, threads: int = 1, path: Path | None = None, runtime: ProfilingRuntime | None = None) -> None:
        self.runtime: ProfilingRuntime = runtime or OnnxRuntime(threads)
        self.threads = self.runtime.threads
        self.path = path or cache_file(self.runtime)
        self._known = _read(self.path)
        self._measured: dict[Kernel, float] = {}
        self._curves: dict[tuple[Kernel, str, int], float] = {}

    def __len__(self) -> int:
        """How many kernels are known."""
        return len(self._known)

    def __getitem__(self, kernel: Kernel) -> float:
        """The time of one kernel at its very widths, in ms."""
        if kernel not in self._measured:
            if self._key(kernel) not in self._known:
                self.measure([kernel])
            self._measured[kernel] = self._known[self._key(kernel)]
        return self._measured[kernel]

    def time(self, kernel: Kernel, anchor: Kernel) -> float:
        """The time of a kernel, in ms, from those of `anchor` with one of its widths changed.

        Wide widths are taken to act independently, t(a, b) = t(a, b0) t(a0, b) / t(a0, b0); small ones, and those
        `together`, decide what kernel is taken, and are measured as they are.

        Args:
            kernel: at any widths.
            anchor: the same kernel at the widths of the unpruned model.
        """
        changed = {name: width for name in anchor.widths if (width := getattr(kernel, name)) != getattr(anchor, name)}
        small = {name: width for name, width in changed.items() if width <= SMALL or name in anchor.together}
        anchor = anchor.at(**small) if small else anchor
        found = self._along(anchor, anchor.widths[0], getattr(anchor, anchor.widths[0]))
        for name in changed.keys() - small.keys():
            found *= self._along(anchor, name, changed[name]) / self._along(anchor, name, getattr(anchor, name))
        return found

    def prepare(self, anchors: Iterable[tuple[Kernel, Sequence[str]]]) -> None:
        """Measure what `time` will need, many at once.

        Args:
            anchors: kernels at the widths of the unpruned model, and which of their widths may change.
        """
        wanted = []
        for anchor, names in anchors:
            for name in names:
                wanted += [anchor.at(**{name: width}) for width in _grid(getattr(anchor, name))]
        self.measure(wanted)

    def measure(self, kernels: Iterable[Kernel]) -> None:
        """Measure those of some kernels that are not known, and write the file."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if self._key(kernel) not in self._known]
        with part("kernels", len(missing), undisturbed=True) as measuring:
            for chunk in _chunks(missing):
                for kernel, ms in zip(chunk, _measured(chunk, self.runtime), strict=True):
                    self._known[self._key(kernel)] = ms
                measuring.advance(len(chunk))
        if missing:
            self._known = _write(self.path, self._known)

    def _along(self, anchor: Kernel, name: str, width: int) -> float:
        """The time of `anchor` with one width changed."""
        key = anchor, name, width
        if key not in self._curves:
            self._curves[key] = self._at_width(anchor, name, width)
        return self._curves[key]

    def _at_width(self, anchor: Kernel, name: str, width: int) -> float:
        def at(width: int) -> float:
            return self[anchor.at(**{name: width})]

        if width <= SMALL:
            return at(width)
        if width % GRAIN:
            above = GRAIN * math.ceil(width / GRAIN)
            near = min(above, PERIOD)  # what it costs to be so far from a multiple is measured near there
            return self._along(anchor, name, above) * at(near - (above - width)) / at(near)
        if width <= PERIOD:
            return at(width)
        whole, rest = width // PERIOD * PERIOD, width % PERIOD
        found = _between(at, whole)
        if rest:
            found += (_between(at, whole + PERIOD) - found) * at(rest) / at(PERIOD)
        return found

    def _key(self, kernel: Kernel) -> str:
        values = ["x".join(map(str, v)) if isinstance(v, tuple) else str(int(v)) for v in astuple(kernel)]
        return f"{type(kernel).__name__} {' '.join(values)} threads {self.threads}"


def _between(at: Callable[[int], float], width: int) -> float:
    """A multiple of `PERIOD`, linear between doublings of it."""
    low: int = PERIOD * 2 ** int(math.log2(width // PERIOD))
    if low == width:
        return at(width)
    return at(low) + (at(2 * low) - at(low)) * (width - low) / low


def _grid(size: int) -> list[int]:
    """The widths that `time` looks up for any width up to `size` that is a multiple of `GRAIN`."""
    if size <= SMALL:
        return list(range(1, size + 1))
    fine = range(GRAIN, min(PERIOD, GRAIN * math.ceil(size / GRAIN)) + 1, GRAIN)
    top = math.ceil(math.log2(max(size / PERIOD, 1)))
    return [*fine, *(PERIOD * 2**power for power in range(top + 1) if size > PERIOD)]


def _chunks(kernels: Sequence[Kernel]) -> Iterator[list[Kernel]]:
    """What is measured together."""
    chunk: list[Kernel] = []
    size = 0
    for kernel in kernels:
        own = 4 * (math.prod(kernel.weight_shape) + math.prod(kernel.input_shape))
        if chunk and (len(chunk) == CHUNK or size + own > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(kernel)
        size += own
    if chunk:
        yield chunk


def _measured(kernels: Sequence[Kernel], runtime: ProfilingRuntime) -> list[float]:
    """The time of each kernel, in ms: all side by side in one model, run under the profiler.

    A machine is not equally fast at all times. So one kernel, always the same, runs between them, and times are given
    in units of its own: as if it had taken `UNIT_MS`.
    """
    half = len(kernels) // 2
    every = [UNIT, *kernels[:half], UNIT, *kernels[half:], UNIT]
    units = (0, half + 1, len(every) - 1)
    nodes, weights, feeds = [], [], {}
    for index, kernel in enumerate(every):
        name, weight = f"kernel{index}", f"weight{index}"
        source = f"input{index}" if index in units else "x" + "_".join(map(str, kernel.input_shape))
        feeds[source] = np.full(kernel.input_shape, 0.5, np.float32)
        if isinstance(kernel, MatrixProduct) and not kernel.constant:
            feeds[weight] = np.full(kernel.weight_shape, 0.01, np.float32)
        else:
            weights.append(numpy_helper.from_array(np.full(kernel.weight_shape, 0.01, np.float32), weight))
        nodes.append(kernel.node(source, weight, name))
    graph = helper.make_graph(
        nodes,
        "kernels",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    seconds = SECONDS * len(kernels) / CHUNK
    times = [0.0] * len(every)
    for node in runtime.kernels(model.SerializeToString(), feeds, seconds):
        head = "".join(itertools.takewhile(str.isdigit, node.name.removeprefix("kernel")))
        if node.name.startswith("kernel") and head:
            times[int(head)] += node.ms
    unit = statistics.median(times[index] for index in units)
    found = (ms for index, ms in enumerate(times) if index not in units)
    return [max(ms, 5e-4) * UNIT_MS / unit for ms in found]  # the profiler counts in microseconds


# ---------------------------------------------------------------------------------- the file


def cache_file(runtime: Runtime) -> Path:
    """Where the times of this machine and a version of a runtime are kept: below `$CPD_CACHE_DIR`, if set."""
    folder = os.environ.get("CPD_CACHE_DIR") or platformdirs.user_cache_dir("cpd", appauthor=False)
    found = environment()
    parts = [found["cpu"], found["cores"], runtime.version]
    if runtime.name != DEFAULT:
        parts.append(runtime.name)
    return Path(folder, f"kernels-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.json")


def _read(path: Path) -> dict[str, float]:
    """What is known; nothing, where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): float(ms) for key, ms in content["kernels"].items() if float(ms) > 0}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("The kernel times in %s cannot be read (%s), so they are measured again.", path, error)
        return {}


def _write(path: Path, known: dict[str, float]) -> dict[str, float]:
    """Add to the file what it lacks, whole or not at all; a cache that cannot be written costs time, nothing else."""
    known = {**_read(path), **known}
    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"machine": environment(), "kernels": known}, indent=0), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        log.warning("The kernel times cannot be saved in %s: %s.", path, error)
        with contextlib.suppress(OSError):
            draft.unlink()
    return known
