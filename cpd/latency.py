"""How much faster one model is than another in ONNX Runtime on this CPU: measured, with its uncertainty.

The two are timed in turn (A B, B A, A B, ...), so that whatever slows the machine slows both; the speed-up is
the median of the ratios within the pairs. All times are in ms.
"""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from cpd.errors import InputError
from cpd.inputs import Call, as_call, check_model
from cpd.onnx import OnnxSource, check_parity, export_bytes, feed, open_session, run_session

MIN_PAIRS = 6
"""Fewer pairs give no 95 % confidence interval of a median."""

_BLOCK_MS = 5.0  # a sample of a faster model is the mean over a block of runs that lasts about so long
_LEAD_MS = 20.0  # before the sample of a faster model one run is not timed: it fills the caches the other model took
_WARM_UP_RUNS = 3
_WARM_UP_MS = 50.0


@dataclass(frozen=True)
class LatencyComparison:
    """The latency of a candidate beside the original's; times in ms a run, on the example inputs.

    Attributes:
        speedup: the median over the pairs of original time / candidate time; above 1 the candidate is faster.
        original_ms: the original's median.
        candidate_ms: the candidate's median.
        speedup_low: lower end of the 95 % confidence interval of the median ratio, read off the sorted
            ratios (order statistics; the ranks are exact binomial quantiles), with no assumption on their
            distribution but that the pairs are independent.
        speedup_high: its upper end.
        original_p90_ms: 90th percentile of the original's samples. A sample is one run; of models
            faster than 5 ms it is the mean over a block of runs.
        candidate_p90_ms: 90th percentile of the candidate's samples.
        runs: the number of pairs.
        threads: ONNX Runtime's intra-op threads.
        environment: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`.
    """

    speedup: float
    original_ms: float
    candidate_ms: float
    speedup_low: float
    speedup_high: float
    original_p90_ms: float
    candidate_p90_ms: float
    runs: int
    threads: int
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)


def compare_latency(
    original: nn.Module | OnnxSource,
    candidate: nn.Module | OnnxSource,
    example_inputs: Any,
    *,
    threads: int = 1,
    seconds: float = 20.0,
    min_runs: int = 20,
    precision: float = 0.02,
    tolerance: float = 1e-3,
) -> LatencyComparison:
    """Time two models in turn in ONNX Runtime on the CPU.

    Modules are exported in eval mode, left as found, and each is checked against PyTorch.

    Args:
        original: an `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        candidate: likewise; it takes the same inputs.
        example_inputs: a tensor, a tuple, or (tuple, dict): the batch that is timed.
        threads: intra-op threads.
        seconds: the timing ends after this time (export and warm-up not counted), once `min_runs` pairs
            are in.
        min_runs: the least number of pairs, at least 6.
        precision: the timing ends sooner where the 95 % confidence interval of the speed-up lies
            within +-precision of it, as a fraction.
        tolerance: the largest relative difference between a module's outputs in ONNX Runtime and in PyTorch.

    Raises:
        InputError: if an argument is unusable, or an ONNX model does not open or take these inputs.
        ExportError: if a module cannot be exported, or its outputs differ from PyTorch's.
    """
    _check_timing(seconds, min_runs, precision)
    probe = LatencyProbe(original, example_inputs, threads=threads, tolerance=tolerance)
    return probe.compare(candidate, seconds=seconds, min_runs=min_runs, precision=precision)


class LatencyProbe:
    """Compares several candidates with one original, which is exported and opened once.

        probe = LatencyProbe(model, example_inputs)
        probe.compare(pruned, seconds=5).speedup

    Args:
        original: an `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        example_inputs: a tensor, a tuple, or (tuple, dict): the batch that is timed.
        threads: intra-op threads.
        tolerance: the largest relative difference between a module's outputs in ONNX Runtime and in PyTorch.

    Raises:
        InputError: if an argument is unusable, or the ONNX model does not open or take these inputs.
        ExportError: if the module cannot be exported, or its outputs differ from PyTorch's.
    """

    def __init__(
        self,
        original: nn.Module | OnnxSource,
        example_inputs: Any,
        *,
        threads: int = 1,
        tolerance: float = 1e-3,
    ) -> None:
        if threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}.")
        self._call = as_call(example_inputs)
        self._threads = threads
        self._tolerance = tolerance
        self._original = self._open(original)

    def compare(
        self,
        candidate: nn.Module | OnnxSource,
        *,
        seconds: float = 20.0,
        min_runs: int = 20,
        precision: float = 0.02,
    ) -> LatencyComparison:
        """Time `candidate` beside the original; arguments and errors are those of `compare_latency`."""
        _check_timing(seconds, min_runs, precision)
        runner = self._open(candidate)
        self._original.warm_up()
        runner.warm_up()
        times = _time_pairs(self._original, runner, seconds, min_runs, precision)
        return _summarise(times, self._threads)

    def _open(self, model: nn.Module | OnnxSource) -> _Runner:
        """A runner of `model` on the example inputs; a module is exported and checked first."""
        source = _source(model, self._call)
        if isinstance(model, nn.Module):
            check_parity(model, source, self._call, self._tolerance)
        return _Runner(source, self._call, self._threads)


class _Runner:
    """An open session with its inputs, and how many runs make a sample."""

    def __init__(self, source: OnnxSource, call: Call, threads: int) -> None:
        self._session = open_session(source, threads)
        self._feed = feed(self._session, call)
        self._repeat = 1
        self._lead = False
        run_session(self._session, self._feed)  # inputs that do not fit are reported here

    def warm_up(self) -> None:
        """Run until memory, caches and clock have settled, and choose the block from the fastest run."""
        times: list[float] = []
        while len(times) < _WARM_UP_RUNS or sum(times) < _WARM_UP_MS:
            times.append(self._timed(1))
        self._repeat = max(1, math.ceil(_BLOCK_MS / min(times)))
        self._lead = min(times) < _LEAD_MS

    def sample(self) -> float:
        """One sample: ms a run, the mean over one block."""
        if self._lead:
            self._timed(1)
        return self._timed(self._repeat)

    def _timed(self, repeat: int) -> float:
        run, arrays = self._session.run, self._feed
        start = time.perf_counter_ns()
        for _ in range(repeat):
            run(None, arrays)
        return (time.perf_counter_ns() - start) / repeat / 1e6


def _source(model: nn.Module | OnnxSource, call: Call) -> OnnxSource:
    """What ONNX Runtime can open of `model`: modules are exported."""
    if isinstance(model, (bytes, str, os.PathLike, onnx.ModelProto)):
        return model
    return export_bytes(check_model(model), call)


def _check_timing(seconds: float, min_runs: int, precision: float) -> None:
    if not seconds > 0:
        raise InputError(f"seconds must be above 0, got {seconds}.")
    if not precision > 0:
        raise InputError(f"precision must be above 0 (0.02 is +-2 %), got {precision}.")
    if min_runs < MIN_PAIRS:
        raise InputError(f"min_runs must be at least {MIN_PAIRS} for a 95 % interval, got {min_runs}.")


def _time_pairs(
    original: _Runner, candidate: _Runner, seconds: float, min_runs: int, precision: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Times in ms `[pairs, 2]`, original first; the order within the pairs alternates.

    The interval is looked at ever more rarely (each 20 % more pairs), for a stop at the first lucky look
    would make it too narrow.
    """
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    look = min_runs
    while True:
        if len(times) % 2:
            second, first = candidate.sample(), original.sample()
        else:
            first, second = original.sample(), candidate.sample()
        times.append((first, second))
        if len(times) < min_runs:
            continue
        if len(times) >= look:
            look = math.ceil(1.2 * look)
            if _settled(np.array(times), precision):
                break
        if time.perf_counter() >= deadline:
            break
    return np.array(times)


def _settled(times: np.ndarray[Any, np.dtype[np.float64]], precision: float) -> bool:
    """Whether the confidence interval of the median ratio lies within +-precision of it."""
    ratios = times[:, 0] / times[:, 1]
    median = float(np.median(ratios))
    low, high = median_interval(ratios)
    return low >= median * (1 - precision) and high <= median * (1 + precision)


def _summarise(times: np.ndarray[Any, np.dtype[np.float64]], threads: int) -> LatencyComparison:
    ratios = times[:, 0] / times[:, 1]
    low, high = median_interval(ratios)
    medians = np.median(times, axis=0)
    p90 = np.percentile(times, 90, axis=0)
    return LatencyComparison(
        speedup=float(np.median(ratios)),
        original_ms=float(medians[0]),
        candidate_ms=float(medians[1]),
        speedup_low=low,
        speedup_high=high,
        original_p90_ms=float(p90[0]),
        candidate_p90_ms=float(p90[1]),
        runs=len(times),
        threads=threads,
        environment=dict(_environment()),
    )


def median_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """The 95 % confidence interval of the median of `values` `[n]`, n >= 6, by order statistics.

    The k-th smallest and the k-th largest value, k the largest rank for which
    `P(Binomial(n, 1/2) < k) <= 2.5 %` (David and Nagaraja, Order Statistics, section 7.1).
    """
    ordered = np.sort(values)
    rank = _rank(len(ordered))
    return float(ordered[rank - 1]), float(ordered[-rank])


@lru_cache(maxsize=256)
def _rank(count: int) -> int:
    """The largest k with `P(Binomial(count, 1/2) < k) <= 1/40`, in exact integers; 0 if count < 6."""
    below, term, rank = 0, 1, 0  # sum of C(count, j) over j < rank; C(count, rank)
    while 40 * (below + term) <= 2**count:
        below += term
        term = term * (count - rank) // (rank + 1)
        rank += 1
    return rank


@lru_cache(maxsize=1)
def _environment() -> tuple[tuple[str, str], ...]:
    """What a latency depends on beside the model."""
    return (
        ("cpu", _cpu_model()),
        ("cores", str(_cores())),
        ("platform", platform.platform()),
        ("onnxruntime", str(onnxruntime.__version__)),
        ("torch", str(torch.__version__)),
    )


def _cpu_model() -> str:
    """The name of the processor, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """The number of logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
