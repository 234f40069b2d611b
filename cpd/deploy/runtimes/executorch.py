"""ExecuTorch with XNNPACK, of what `torch.export` gives. Its times on this machine are those of no phone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cpd.deploy.runtimes.base import Artifact, Session, arrays_of, check_outputs, own_copy
from cpd.errors import ExportError, InputError, first_line, needs_extra
from cpd.trace.quiet import quiet, silent

#: How many threads were set in this process.
_threads: dict[str, int] = {}


@dataclass(frozen=True)
class ExecuTorch:
    """ExecuTorch in float32, operators lowered to XNNPACK where it has them.

    Attributes:
        threads: of its thread pool, which is the process's: it is set once, for what was loaded before would crash.
    """

    threads: int = 1
    name: str = "executorch"
    precision: str = "f32"
    grain: int = 8

    @property
    def version(self) -> str:
        """Of the package."""
        return version("executorch")

    def prepare(self, artifact: Artifact) -> Session:
        """The method of a program, whose outputs were compared with PyTorch's; lowering takes tens of seconds."""
        with needs_extra("executorch", "The runtime 'executorch'"), quiet(), silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import executorch  # noqa: F401 - what is imported next fails otherwise where it is missing
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        self._set_threads(portable_lib)
        module, call = artifact.demand_module(self.name), artifact.call.to("cpu")
        try:
            with quiet(), silent(), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exported = torch.export.export(own_copy(module).cpu(), call.args, call.kwargs)
                lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
                content = lowered.to_executorch().buffer
                program = Runtime.get().load_program(content)
                method = program.load_method("forward")
        except Exception as error:  # its passes raise anything
            raise ExportError(
                f"{type(module).__name__} cannot be lowered for ExecuTorch: {first_line(error)}."
            ) from error
        inputs = [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, torch.Tensor)]

        def run(alive: Any = (content, program)) -> Any:  # a method refers to both, and does not hold them
            return method.execute(inputs)

        return Session(run, check_outputs(arrays_of(run()), artifact, "ExecuTorch", self.precision))

    def _set_threads(self, library: Any) -> None:
        """The threads of the process, before anything is loaded.

        Raises:
            InputError: if another number was set before.
        """
        if _threads.setdefault("set", self.threads) != self.threads:
            raise InputError(
                f"ExecuTorch uses {_threads['set']} thread(s) in this process, which cannot be changed once a model "
                f"was loaded: time it with {self.threads} in another process."
            )
        if library._threadpool_get_thread_count() != self.threads:
            with silent():
                library._unsafe_reset_threadpool(self.threads)
