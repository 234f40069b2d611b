"""PyTorch itself, with its compiler and without, on the device that the model is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cpd.deploy.runtimes.base import Artifact, Run, Session, arrays_of, check_outputs, own_copy
from cpd.errors import InputError, first_line
from cpd.model.inputs import Call, device_of


class _PyTorch:
    """What both have in common."""

    @property
    def version(self) -> str:
        """Of the package."""
        return str(torch.__version__)


@dataclass(frozen=True)
class TorchEager(_PyTorch):
    """PyTorch without a compiler.

    Attributes:
        threads: `torch.set_num_threads` while it runs.
    """

    threads: int = 1
    name: str = "torch"
    precision: str = "f32"
    grain: int = 8

    def prepare(self, artifact: Artifact) -> Session:
        """One forward pass of a copy in eval mode, without gradients."""
        module = artifact.demand_module(self.name)
        return Session(_forward(own_copy(module), artifact.call.to(device_of(module)), self.threads), 0.0)


@dataclass(frozen=True)
class TorchCompile(_PyTorch):
    """PyTorch with `torch.compile`; compiled when it is prepared.

    Attributes:
        threads: `torch.set_num_threads` while it runs.
        mode: as `torch.compile` takes it.
    """

    threads: int = 1
    mode: str = "default"
    name: str = "torch.compile"
    precision: str = "f32"
    grain: int = 8

    def prepare(self, artifact: Artifact) -> Session:
        """One forward pass of a compiled copy."""
        module = artifact.demand_module(self.name)
        compiled = torch.compile(own_copy(module), mode=self.mode)
        run = _forward(compiled, artifact.call.to(device_of(module)), self.threads)
        try:
            found = run()
        except Exception as error:  # no compiler on the machine, or whatever it raises
            raise InputError(
                f"torch.compile failed on {type(module).__name__}: {first_line(error)}. It needs a C++ compiler on a "
                "CPU, and Triton on a GPU; leave this runtime out otherwise."
            ) from error
        return Session(run, check_outputs(arrays_of(found), artifact, self.name, self.precision))


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
