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
    """An INT8 model and how it compares with the float one.

    Attributes:
        path: the file.
        parity: the largest difference of the outputs on the calibration data, relative to the largest output.
        agreement: the share of calibration samples whose largest logit is the same class; None where the first output
            is no `[N, classes, …]`.
        metric: `evaluate` of the INT8 model, and of the float one; None without `evaluate`.
        metric_float: that of the float one.
        latency: medians and ratios of "original", "original int8" (where the original was given), "float" and "int8";
            dynamic quantization has "int8 dynamic" in its place.
        bytes: the size of the file, and of the float model.
        bytes_float: that of the float one.
        metric_name: what `evaluate` gives, with its unit in brackets.
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
        """All fields, ready for `json.dumps`."""
        return {**asdict(self), "path": str(self.path)}

    def summary(self) -> str:
        """Parity, agreement, metrics and size in a sentence."""
        agreement = "" if self.agreement is None else f", the same class in {self.agreement:.1%} of the samples"
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
    """Quantize weights and activations of an ONNX model to 8 bits, in QDQ format.

    Dynamic quantization is of matrix products alone, and takes the ranges of activations anew in every run: for models
    of linear layers, such as transformers, whose ranges differ from input to input.

    Args:
        model: the float model: a path, bytes or an `onnx.ModelProto`; its shapes may be fixed, batch size included.
        data: batches as `cpd.compress` takes them; what the ranges of activations are taken over.
        path: where the INT8 model is written; the file appears whole or not at all.
        original: the unpruned model, for the latency table: it is quantized too, so that pruning alone, quantization
            alone and both stand beside each other.
        evaluate: `evaluate(model) -> float`, as `cpd.compress` takes it; called with modules that run the ONNX models.
        calibration: how ranges are taken: the least and largest value, or ONNX Runtime's entropy or percentile method.
        per_channel: one scale for each output channel of a weight rather than one for all.
        limit: batches of `data` that are used at most.
        exclude: names of ONNX nodes that stay in float; "auto": those in which rounding adds most noise, by a closed
            form (`cpd.deploy.noise`), of each model its own.
        threads: ONNX Runtime's threads when timing.
        seconds: the timing ends after this time.
        dynamic: whether ranges are taken while the model runs; `data` is then what the models are compared on, and
            `calibration` does not matter. In the table the rows are called "int8 dynamic".

    Raises:
        InputError: if `path` cannot be written, or the data does not fit the model.
        TrainingError: if there is no batch.
        ExportError: if ONNX Runtime cannot quantize the model, or cannot run what it made.

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
    """An ONNX model as a module, for `evaluate`: it takes batches of any size and runs them in parts of its own.

    Args:
        model: a path, bytes or an `onnx.ModelProto`.
        threads: ONNX Runtime's threads; None: one a core.
    """

    @checked(model=ONNX_MODEL, threads=THREADS)
    def __init__(self, model: OnnxSource, threads: int | None = None) -> None:
        super().__init__()
        self._session = open_session(model, threads or os.cpu_count() or 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs on a batch: one tensor, or a tuple of them."""
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
        raise ExportError("The INT8 model's outputs are not finite. Try calibration='percentile', or exclude nodes.")
    return parity, float(np.concatenate(same).mean()) if same else None


def _positional(session: Any, sample: Arrays) -> Call:
    """The inputs in their order, as a model takes them."""
    return Call(tuple(torch.from_numpy(sample[item.name]) for item in session.get_inputs()), {})
