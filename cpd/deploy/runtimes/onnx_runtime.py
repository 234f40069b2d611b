"""ONNX Runtime: on the CPU in float32 or in 8-bit integers, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime

from cpd.deploy.export import open_session, run_session
from cpd.deploy.int8 import with_constant_ranges
from cpd.deploy.profiling import NodeTime, channels_second, profile_nodes
from cpd.deploy.runtimes.base import Array, Artifact, Run, Session, check_outputs
from cpd.errors import InputError


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU: sequential execution, all graph optimisations.

    Attributes:
        threads: intra-op threads.
        precision: "f32", or "int8": models are quantized, statically and by channel, before they are opened.
    """

    threads: int = 1
    precision: str = "f32"

    @property
    def name(self) -> str:
        """`onnxruntime`, with the precision where it is not float32."""
        return "onnxruntime" if self.precision == "f32" else f"onnxruntime:{self.precision}"

    @property
    def version(self) -> str:
        """Of the package."""
        return str(onnxruntime.__version__)

    @property
    def grain(self) -> int:
        """16 in 8-bit integers: its kernels of depthwise convolutions are slow at other widths."""
        return 16 if self.precision == "int8" else 8

    def prepare(self, artifact: Artifact) -> Session:
        """A session of the ONNX model, whose outputs were compared with PyTorch's."""
        session = open_session(artifact.of(self.precision), self.threads)
        arrays = artifact.fed(session)
        outputs = run_session(session, arrays)  # inputs that do not fit are reported here
        compared = artifact.module is not None or self.precision != "f32"
        difference = check_outputs(outputs, artifact, "ONNX Runtime", self.precision) if compared else None
        return Session(lambda: session.run(None, arrays), difference)

    def profile(self, artifact: Artifact, seconds: float = 1.0) -> list[NodeTime]:
        """What its own profiler says."""
        nodes = profile_nodes(artifact.of(self.precision), artifact.feeds, threads=self.threads, seconds=seconds)
        return channels_second(nodes) if self.precision == "int8" else nodes

    def kernels(self, model: bytes, feeds: Mapping[str, Array], seconds: float) -> list[NodeTime]:
        """What its profiler says of operators side by side."""
        source = with_constant_ranges(model) if self.precision == "int8" else model
        return profile_nodes(source, feeds, threads=self.threads, seconds=seconds, min_runs=8)


@dataclass(frozen=True)
class OnnxRuntimeProvider:
    """ONNX Runtime on a GPU; inputs and outputs stay in its memory.

    Attributes:
        threads: intra-op threads of what runs on the CPU.
        provider: the execution provider, one of `onnxruntime.get_available_providers()`.
    """

    threads: int = 1
    provider: str = "CUDAExecutionProvider"
    precision: str = "f32"
    grain: int = 8

    @property
    def name(self) -> str:
        """`onnxruntime`, with the provider."""
        return f"onnxruntime:{self.provider.removesuffix('ExecutionProvider').lower()}"

    @property
    def version(self) -> str:
        """Of the package."""
        return str(onnxruntime.__version__)

    def prepare(self, artifact: Artifact) -> Session:
        """A session of the ONNX model, whose outputs were compared with PyTorch's."""
        if self.provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"This ONNX Runtime has no {self.provider}; it has {', '.join(onnxruntime.get_available_providers())}."
                " Install the package that has it, such as onnxruntime-gpu."
            )
        session = open_session(artifact.onnx, self.threads, provider=self.provider)
        outputs = run_session(session, artifact.fed(session))
        difference = check_outputs(outputs, artifact, self.name, self.precision)
        return Session(_bound(session, artifact.feeds), difference)


def _bound(session: onnxruntime.InferenceSession, arrays: Mapping[str, Array]) -> Run:
    """A run whose inputs and outputs stay where the provider has them."""
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run
