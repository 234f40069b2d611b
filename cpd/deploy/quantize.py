"""Quantize: static INT8 of an ONNX model by ONNX Runtime's own tools, calibrated, compared and timed.

    quantized = quantize_onnx("out/model.onnx", loader, "out/model.int8.onnx", original=model)
    quantized.parity, quantized.agreement    # against the float model, on the calibration data
    quantized.latency                        # original, quantized alone, pruned alone, both: in one run

Quantization comes after pruning: it makes each multiplication cheaper, pruning makes them fewer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cpd.deploy.export import (
    EITHER_MODEL,
    ONNX_MODEL,
    OnnxSource,
    as_bytes,
    export_bytes,
    feed,
    open_session,
    run_session,
    writable,
)
from cpd.deploy.int8 import CALIBRATIONS, Arrays, dynamic_onnx, parts, quantized_onnx, samples_of
from cpd.deploy.latency import LatencyTable, measure_latency
from cpd.deploy.machine import cores
from cpd.deploy.noise import noisy_nodes
from cpd.errors import ExportError, InputError
from cpd.model.arguments import DATA
from cpd.model.inputs import Call, batches, evaluated
from cpd.model.progress import part
from cpd.options import EVALUATE, FLAG, LIMIT, PATH, SECONDS, THREADS, Check, checked, choice
from cpd.tasks.metric import UNNAMED, metric_name, told, written

log = logging.getLogger("cpd")


@dataclass(frozen=True)
class Quantized:
    """The result of `cpd.quantize_onnx`: an INT8 model, compared with the float model.

    Attributes:
        path: The file of the INT8 model.
        parity: Largest difference of the outputs on the calibration data, relative to the largest output.
        agreement: Share of calibration samples for which both models predict the same class; None if the first output
            is not of the form `[N, classes, …]`.
        metric: The value of `evaluate` for the INT8 model; None without `evaluate`.
        metric_float: The value of `evaluate` for the float model.
        latency: Latencies and speed-ups of "original" and "original int8" (if the original was passed), "float" and
            "int8" (for dynamic quantization "int8 dynamic").
        bytes: Size of the INT8 model in bytes.
        bytes_float: Size of the float model in bytes.
        metric_name: Name of the metric, with its unit in brackets.
    """

    path: Path
    parity: float
    agreement: float | None
    metric: float | None
    metric_float: float | None
    latency: LatencyTable
    bytes: int
    bytes_float: int
    metric_name: str = UNNAMED

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types for `json.dumps`."""
        return {**asdict(self), "path": str(self.path)}

    def summary(self) -> str:
        """A sentence with parity, agreement, metrics and size."""
        agreement = "" if self.agreement is None else f"; the class is the same for {self.agreement:.1%} of the samples"
        metric = ""
        if self.metric is not None and self.metric_float is not None:
            metric = f"; {told(self.metric_name, self.metric)} (float {written(self.metric_name, self.metric_float)})"
        return (
            f"Outputs differ by {self.parity:.2g} of the largest{agreement}{metric}. {self.path}: "
            f"{self.bytes / 1e6:.1f} MB (float {self.bytes_float / 1e6:.1f} MB)."
        )


_AUTO = "auto"
_NODES = Check(
    "names of ONNX nodes in a list, or 'auto'",
    lambda value: (
        (isinstance(value, str) and value == _AUTO)
        or (
            isinstance(value, Collection)
            and not isinstance(value, (str, bytes, Mapping))
            and all(isinstance(item, str) for item in value)
        )
    ),
)


@checked(
    model=ONNX_MODEL, data=DATA, path=PATH, original=EITHER_MODEL, evaluate=EVALUATE,
    calibration=choice(*CALIBRATIONS), per_channel=FLAG, limit=LIMIT, exclude=_NODES, threads=THREADS, seconds=SECONDS,
    dynamic=FLAG,
)  # fmt: skip
def quantize_onnx(
    model: OnnxSource,
    data: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    original: nn.Module | OnnxSource | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: str = "minmax",
    per_channel: bool = True,
    limit: int = 16,
    exclude: Iterable[str] | str = (),
    threads: int = 1,
    seconds: float = 20.0,
    dynamic: bool = False,
) -> Quantized:
    """Quantize the weights and activations of an ONNX model to 8 bits, in QDQ format, and compare and time the result.

    Dynamic quantization applies to matrix products only, and computes the ranges of activations again in every run. It
    suits models made of linear layers, such as transformers, whose ranges differ from input to input.

    Args:
        model: The float model: a path, bytes or an `onnx.ModelProto`. Its shapes may be fixed, batch size included.
        data: Batches, as for `cpd.compress`, from which the ranges of activations are taken.
        path: The file for the INT8 model. It is written completely or not at all.
        original: The unpruned model, for the latency table. It is quantized as well, so that the table compares pruning
            alone, quantization alone, and both.
        evaluate: `evaluate(model) -> float`, as for `cpd.compress`. It is called with modules that run the ONNX models.
        calibration: How ranges are chosen: "minmax" (the smallest and largest value), or the method "entropy" or
            "percentile" of ONNX Runtime.
        per_channel: Whether each output channel of a weight has its own scale.
        limit: Largest number of batches of `data` to use.
        exclude: Names of ONNX nodes that stay in float, or "auto" for those to which rounding adds most noise, by a
            closed form (`cpd.deploy.noise`), in each model separately.
        threads: Threads that ONNX Runtime uses for the timing.
        seconds: Longest time that the timing takes.
        dynamic: Whether ranges are computed while the model runs. `data` is then only used to compare the models, and
            `calibration` has no effect. The rows in the table are named "int8 dynamic".

    Returns:
        A `Quantized` with the file, the comparison with the float model and the latencies.

    Raises:
        InputError: If `path` cannot be written, or the data does not fit the model.
        TrainingError: If there is no batch.
        ExportError: If ONNX Runtime cannot quantize the model, or cannot run the result.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 10))
        >>> images = torch.randn(8, 3, 8, 8)
        >>> onnx_model = cpd.export_onnx(model, images)
        >>> quantized = cpd.quantize_onnx(onnx_model, [images], "int8.onnx", seconds=1)
        >>> quantized.bytes < quantized.bytes_float / 2
        True
        >>> quantized.parity < 0.1
        True
    """
    target = writable(path)
    content = as_bytes(model)
    session = open_session(content)
    samples = samples_of(session, (batch.call for batch in batches(data, limit)))
    kind = "int8 dynamic" if dynamic else "int8"

    def quantized(source: bytes, fed: Sequence[Arrays]) -> bytes:
        left = noisy_nodes(source, fed) if isinstance(exclude, str) else exclude
        if dynamic:
            return dynamic_onnx(source, per_channel, left)
        return quantized_onnx(source, fed, calibration, per_channel, left)

    with part("quantize"):
        int8 = quantized(content, samples)
    parity, agreement = _compared(session, int8, samples)
    models: dict[str, Any] = {"float": content, kind: int8}
    call = Call((), {name: torch.from_numpy(array) for name, array in samples[0].items()})
    if original is not None:
        first = _positional(session, samples[0])
        whole = export_bytes(original, first) if isinstance(original, nn.Module) else as_bytes(original)
        other = open_session(whole)
        renamed = [feed(other, _positional(session, sample)) for sample in samples]
        with part("quantize the original"):
            models = {"original": whole, f"original {kind}": quantized(whole, renamed), **models}
        call = first
    latency = measure_latency(models, call, threads=threads, seconds=seconds)
    with part("evaluate"):
        metric, metric_float = (
            evaluated(evaluate, OnnxModule(source), f"of the {name} ONNX model")
            for name, source in (("INT8", int8), ("float", content))
        )
    draft = target.with_name(f".{target.name}.part")
    try:
        draft.write_bytes(int8)
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error}.") from error
    sizes = len(int8), len(content)
    return Quantized(target, parity, agreement, metric, metric_float, latency, *sizes, metric_name(evaluate))


class OnnxModule(nn.Module):
    """An ONNX model as a PyTorch module, for `evaluate`. It takes batches of any size and splits them as needed.

    Args:
        model: A path, bytes or an `onnx.ModelProto`.
        threads: Threads that ONNX Runtime uses. Default: one for each core.
    """

    @checked(model=ONNX_MODEL, threads=THREADS)
    def __init__(self, model: OnnxSource, threads: int | None = None) -> None:
        super().__init__()
        self._session = open_session(model, threads or cores())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch and return its outputs: one tensor, or a tuple of tensors."""
        call = Call(args, kwargs)
        found = [run_session(self._session, feed(self._session, part)) for part in parts(self._session, call)]
        outputs = tuple(torch.from_numpy(np.concatenate(arrays)[: call.samples]) for arrays in zip(*found, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs


def _compared(session: Any, int8: bytes, samples: list[Arrays]) -> tuple[float, float | None]:
    """The largest relative difference of the outputs, and the share of samples of the same class."""
    other = open_session(int8)
    worst = largest = 0.0
    same: list[np.ndarray[Any, Any]] = []
    for sample in samples:
        expected, found = run_session(session, sample), run_session(other, sample)
        worst = max(worst, *(float(np.abs(a - b).max(initial=0)) for a, b in zip(expected, found, strict=True)))
        largest = max(largest, *(float(np.abs(a).max(initial=0)) for a in expected))
        if expected[0].ndim > 1:
            same.append((expected[0].argmax(1) == found[0].argmax(1)).reshape(-1))
    parity = worst / largest if largest else float("inf")
    if not np.isfinite(parity):
        raise ExportError(
            "The outputs of the INT8 model are not finite. Try calibration='percentile', or exclude nodes."
        )
    return parity, float(np.concatenate(same).mean()) if same else None


def _positional(session: Any, sample: Arrays) -> Call:
    """The inputs in their order, as a model takes them."""
    return Call(tuple(torch.from_numpy(sample[item.name]) for item in session.get_inputs()), {})
