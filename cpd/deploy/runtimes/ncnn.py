"""ncnn on the CPU, of what `pnnx` makes of a traced module. It takes convolutional networks, and one image a run."""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cpd.deploy.export import array_of
from cpd.deploy.runtimes.base import Artifact, Session, check_outputs, own_copy
from cpd.errors import ExportError, InputError, first_line, needs_extra
from cpd.trace.quiet import quiet

#: Seconds that a conversion takes at most.
_CONVERSION_SECONDS = 300


@dataclass(frozen=True)
class Ncnn:
    """ncnn in float32.

    Attributes:
        threads: `opt.num_threads`.
    """

    threads: int = 1
    name: str = "ncnn"
    precision: str = "f32"
    grain: int = 8

    @property
    def version(self) -> str:
        """Of the package."""
        return version("ncnn")

    def prepare(self, artifact: Artifact) -> Session:
        """A network, of which every run takes a new extractor, whose outputs were compared with PyTorch's."""
        with needs_extra("ncnn", "The runtime 'ncnn'"):
            import ncnn
            import pnnx
        module, inputs = artifact.demand_module(self.name), _images(artifact)
        network = ncnn.Net()
        network.opt.num_threads = self.threads
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(network.opt, option, False)
        with tempfile.TemporaryDirectory(prefix="cpd-ncnn-") as name:
            _converted(own_copy(module).cpu(), inputs, Path(name), pnnx.EXEC_PATH)
            opened = [network.load_param(f"{name}/model.ncnn.param"), network.load_model(f"{name}/model.ncnn.bin")]
        if any(opened):
            raise ExportError(f"ncnn cannot open the conversion of {type(module).__name__} by pnnx.")
        images = [ncnn.Mat(np.ascontiguousarray(array_of(tensor)[0])) for tensor in inputs]
        names = list(zip(network.input_names(), images, strict=True))

        def run() -> list[Any]:
            with network.create_extractor() as extractor:
                for name, image in names:
                    extractor.input(name, image)
                return [extractor.extract(name)[1] for name in network.output_names()]

        found = [np.array(value)[None] for value in run()]
        shapes = [array.shape for array in artifact.expected]
        found = [
            array.reshape(shape) if array.size == np.prod(shape) else array
            for array, shape in zip(found, shapes, strict=False)
        ]
        return Session(run, check_outputs(found, artifact, "ncnn", self.precision))


def _images(artifact: Artifact) -> list[Tensor]:
    """The inputs, one sample each.

    Raises:
        InputError: if there are several samples: ncnn knows no batches.
    """
    if artifact.call.samples != 1:
        raise InputError(
            f"ncnn runs one image at a time, but the example inputs hold {artifact.call.samples}: pass one image."
        )
    return [leaf.cpu() for leaf in pytree.tree_leaves(tuple(artifact.call)) if isinstance(leaf, Tensor)]


def _converted(module: torch.nn.Module, inputs: list[Tensor], folder: Path, program: str) -> None:
    """Write `model.ncnn.param` and `model.ncnn.bin` to a folder."""
    source = folder / "model.pt"
    shapes = ",".join(str(list(tensor.shape)).replace(" ", "") for tensor in inputs)
    try:
        with quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.jit.trace(module, tuple(inputs)).save(str(source))
        command = [program, str(source), f"inputshape={shapes}", "fp16=0"]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_CONVERSION_SECONDS, check=False
        )
    except Exception as error:  # what a forward raises when it is traced, and what running a program does
        raise ExportError(f"{type(module).__name__} cannot be converted for ncnn: {first_line(error)}.") from error
    if done.returncode or not (folder / "model.ncnn.bin").exists():
        last = [*done.stderr.strip().splitlines(), f"status {done.returncode}"][-1]
        raise ExportError(f"pnnx cannot convert {type(module).__name__}: {last}.")
