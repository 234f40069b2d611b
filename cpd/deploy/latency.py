"""How much faster one model is than another on this machine: measured, with its uncertainty.

Models are timed in turn (A B, B A, A B, ...), so that whatever slows the machine slows all; a speed-up is the median
of the ratios within the rounds. All times are in ms.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from cpd.deploy.backends import BACKENDS, Backend, Model, OnnxRuntime, Run, exported
from cpd.deploy.export import EITHER_MODEL, TOLERANCE, OnnxSource, feed, open_session
from cpd.deploy.profiling import NodeTime, profile_nodes
from cpd.errors import of_the_user
from cpd.model.arguments import INPUTS
from cpd.model.inputs import as_call
from cpd.model.progress import Part, part
from cpd.options import SECONDS, THREADS, Check, checked, choice, integer, number, several

Times = np.ndarray[Any, np.dtype[np.float64]]

MIN_PAIRS = 6
"""Fewer pairs give no 95 % confidence interval of a median."""

_BLOCK_MS = 20.0  # a sample of a faster model is the mean over a block of runs that lasts about so long
_LEAD_MS = 20.0  # before the sample of a faster model it runs untimed for so long: others have taken its caches
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
            faster than 20 ms it is the mean over a block of runs.
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


_PRECISION = number("above 0 (0.02 is +-2 %)", lambda value: value > 0)
_TIMING = {"threads": THREADS, "seconds": SECONDS, "min_runs": integer(MIN_PAIRS), "precision": _PRECISION}


@checked(original=EITHER_MODEL, candidate=EITHER_MODEL, example_inputs=INPUTS, tolerance=TOLERANCE, **_TIMING)
def compare_latency(
    original: Model,
    candidate: Model,
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

    Examples:
        >>> from torch import nn
        >>> wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> narrow = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3))
        >>> latency = cpd.compare_latency(wide, narrow, torch.randn(1, 3, 32, 32), seconds=1)
        >>> latency.speedup_low > 1  # the lower end of the 95 % confidence interval
        True
    """
    probe = LatencyProbe(original, example_inputs, threads=threads, tolerance=tolerance)
    return probe.compare(candidate, seconds=seconds, min_runs=min_runs, precision=precision)


@dataclass(frozen=True)
class Timing:
    """The latency of one of several models that were timed in one run; times in ms a run.

    Attributes:
        name: the model's.
        backend: what ran it.
        median_ms: the median of its samples.
        p90_ms: their 90th percentile.
        speedup: the median over the rounds of the first model's time / this one's.
        speedup_low: lower end of the 95 % confidence interval of that median.
        speedup_high: its upper end.
    """

    name: str
    backend: str
    median_ms: float
    p90_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of several models, timed in turn in one run.

    Attributes:
        rows: one a model and backend; speed-ups are against the first.
        runs: the number of rounds.
        threads: intra-op threads.
        samples: the batch size.
        environment: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`.
    """

    rows: tuple[Timing, ...]
    runs: int
    threads: int
    samples: int
    environment: dict[str, str]

    def __getitem__(self, name: str) -> Timing:
        """The first row of a model.

        Raises:
            InputError: if there is none.
        """
        choice(*dict.fromkeys(row.name for row in self.rows)).demand("name", name)
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)


_MODELS = Check(
    "{name: model} of at least one model",
    lambda value: isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value),
)


def _runs_models(value: object) -> bool:
    """Whether a value is a backend, by name or as an object."""
    if isinstance(value, str):
        return value in BACKENDS
    return not isinstance(value, type) and callable(getattr(value, "open", None)) and hasattr(value, "name")


_BACKENDS = several(
    _runs_models, f"a list of names ({', '.join(BACKENDS)}), or of objects with a name and open(model, call)"
)  # fmt: skip


@checked(models=_MODELS, example_inputs=INPUTS, backends=_BACKENDS, batch_size=integer(1, 2**20), **_TIMING)
def measure_latency(
    models: Mapping[str, Model],
    example_inputs: Any,
    *,
    backends: Sequence[str | Backend] = ("onnxruntime",),
    threads: int = 1,
    batch_size: int | None = None,
    seconds: float = 20.0,
    min_runs: int = 20,
    precision: float = 0.02,
) -> LatencyTable:
    """Time any number of models in turn, in one run, so that whatever slows the machine slows all.

    Modules are exported where a backend needs it, in eval mode, and each export is checked against PyTorch.

    Args:
        models: {name: an `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`}. All take the same
            inputs; speed-ups are against the first.
        example_inputs: a tensor, a tuple, or (tuple, dict): the batch that is timed.
        backends: what runs them: names in `cpd.deploy.backends.BACKENDS` ("onnxruntime", "cuda", "torch",
            "torch.compile", "openvino"), or objects with `name` and `open(model, call)`.
        threads: intra-op threads, of the backends given by name.
        batch_size: the samples of `example_inputs` are repeated, or cut, to so many.
        seconds: the timing ends after this time (export and warm-up not counted), once `min_runs` rounds are in.
        min_runs: the least number of rounds, at least 6.
        precision: the timing ends sooner where the 95 % confidence interval of every speed-up lies within
            +-precision of it, as a fraction.

    Raises:
        InputError: if an argument is unusable, or a backend cannot open or run a model.
        ExportError: if a module cannot be exported, or its outputs differ from PyTorch's.

    Examples:
        >>> from torch import nn
        >>> wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> narrow = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3))
        >>> table = cpd.measure_latency({"wide": wide, "narrow": narrow}, torch.randn(1, 3, 32, 32), seconds=1)
        >>> [row.name for row in table.rows]
        ['wide', 'narrow']
        >>> table["narrow"].speedup > 1
        True
    """
    if any(isinstance(backend, str) for backend in backends):
        for name, model in models.items():
            EITHER_MODEL.demand(f"models[{name!r}]", model)
    call = as_call(example_inputs)
    if batch_size is not None:
        call = call.resized(batch_size)
    names, runners = [], []
    for backend in map(partial(_backend, threads=threads), backends):
        for name, model in models.items():
            names.append((name, backend.name))
            with part(f"export {name}"), of_the_user(f"The backend {backend.name}", f"when it opened {name}"):
                runners.append(_Runner(backend.open(model, call)))
    with of_the_user("A backend", "while it ran a model"):
        times = _time_rounds(runners, seconds, min_runs, precision)
    rows = tuple(Timing(*name, **vars(_column(times, index))) for index, name in enumerate(names))
    return LatencyTable(rows, len(times), threads, call.samples, environment())


def _backend(given: str | Backend, threads: int) -> Backend:
    return BACKENDS[given](threads) if isinstance(given, str) else given


_BATCHES = Check(
    "a list of example inputs",
    lambda value: isinstance(value, (list, tuple)) and all(map(INPUTS.accepts, value)),
)


class LatencyProbe:
    """Compares several candidates with one original in ONNX Runtime, which is exported and opened once.

        probe = LatencyProbe(model, example_inputs)
        probe.compare(pruned, seconds=5).speedup

    Args:
        original: an `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        example_inputs: a tensor, a tuple, or (tuple, dict): the batch that is timed.
        threads: intra-op threads.
        tolerance: the largest relative difference between a module's outputs in ONNX Runtime and in PyTorch.
        others: further batches, of other batch or input sizes; modules are exported anew for each.

    Raises:
        InputError: if an argument is unusable, or the ONNX model does not open or take these inputs.
        ExportError: if the module cannot be exported, or its outputs differ from PyTorch's.
    """

    @checked(
        original=EITHER_MODEL, example_inputs=INPUTS, threads=THREADS, tolerance=TOLERANCE, others=_BATCHES
    )  # fmt: skip
    def __init__(
        self,
        original: Model,
        example_inputs: Any,
        *,
        threads: int = 1,
        tolerance: float = 1e-3,
        others: Sequence[Any] = (),
    ) -> None:
        self.calls = [as_call(example_inputs), *map(as_call, others)]
        self._backend = OnnxRuntime(threads, tolerance=tolerance)
        self._sources = [exported(original, call, tolerance) for call in self.calls]
        self._originals = [
            _Runner(self._backend.open(source, call)) for source, call in zip(self._sources, self.calls, strict=True)
        ]

    def original_ms(self, seconds: float = 1.0) -> float:
        """The original's latency alone, in ms; of several batches the longest."""
        return max(
            float(np.median(_time_rounds([runner], seconds / len(self.calls), MIN_PAIRS, 0.01)))
            for runner in self._originals
        )

    @checked(candidate=EITHER_MODEL, seconds=SECONDS, min_runs=integer(MIN_PAIRS), precision=_PRECISION)
    def compare(
        self,
        candidate: Model,
        *,
        seconds: float = 20.0,
        min_runs: int = 20,
        precision: float = 0.02,
        slowest: Callable[[LatencyComparison], float] = lambda found: found.speedup,
    ) -> LatencyComparison:
        """Time `candidate` beside the original; arguments and errors are those of `compare_latency`.

        Of several batches the comparison is given for which `slowest` is least.
        """
        return min(
            (
                self._compared(original, _Runner(self._backend.open(candidate, call)), seconds, min_runs, precision)
                for original, call in zip(self._originals, self.calls, strict=True)
            ),
            key=slowest,
        )

    def _compared(
        self, first: _Runner, second: _Runner, seconds: float, min_runs: int, precision: float
    ) -> LatencyComparison:
        times = _time_rounds([first, second], seconds / len(self.calls), min_runs, precision)
        original, other = _column(times, 0), _column(times, 1)
        return LatencyComparison(
            speedup=other.speedup,
            original_ms=original.median_ms,
            candidate_ms=other.median_ms,
            speedup_low=other.speedup_low,
            speedup_high=other.speedup_high,
            original_p90_ms=original.p90_ms,
            candidate_p90_ms=other.p90_ms,
            runs=len(times),
            threads=self._backend.threads,
            environment=environment(),
        )

    def profile(self, candidate: OnnxSource | None = None, seconds: float = 1.0) -> list[NodeTime]:
        """The time of every node of an ONNX model, or of the original, on the first batch."""
        source = self._sources[0] if candidate is None else candidate
        arrays = feed(open_session(source), self.calls[0])
        return profile_nodes(source, arrays, threads=self._backend.threads, seconds=seconds)


class _Runner:
    """What is timed, and how many runs make a sample."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._repeat = 1
        self._lead = 0

    def warm_up(self) -> None:
        """Run until memory, caches and clock have settled, and choose the block from the fastest run."""
        times: list[float] = []
        while len(times) < _WARM_UP_RUNS or sum(times) < _WARM_UP_MS:
            times.append(self._timed(1))
        self._repeat = max(1, math.ceil(_BLOCK_MS / min(times)))
        self._lead = math.ceil(_LEAD_MS / min(times)) if min(times) < _LEAD_MS else 0

    def sample(self) -> float:
        """One sample: ms a run, the mean over one block."""
        if self._lead:
            self._timed(self._lead)
        return self._timed(self._repeat)

    def _timed(self, repeat: int) -> float:
        run = self._run
        start = time.perf_counter_ns()
        for _ in range(repeat):
            run()
        return (time.perf_counter_ns() - start) / repeat / 1e6


def _time_rounds(runners: Sequence[_Runner], seconds: float, min_runs: int, precision: float) -> Times:
    """Times in ms `[rounds, models]`; each round begins with the next model, so that none is always first.

    The intervals are looked at ever more rarely (each 20 % more rounds), for a stop at the first lucky look
    would make them too narrow.
    """
    for runner in runners:
        runner.warm_up()
    with part("timing", seconds, undisturbed=True) as timing:
        return _rounds(runners, seconds, min_runs, precision, timing)


def _rounds(runners: Sequence[_Runner], seconds: float, min_runs: int, precision: float, timing: Part) -> Times:
    times: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    look = min_runs
    while True:
        row = [0.0] * len(runners)
        for offset in range(len(runners)):
            index = (len(times) + offset) % len(runners)
            row[index] = runners[index].sample()
        times.append(row)
        timing.advance(timing.seconds - timing.done)
        if len(times) < min_runs:
            continue
        if len(times) >= look:
            look = math.ceil(1.2 * look)
            if _settled(np.array(times), precision):
                break
        if time.perf_counter() >= deadline:
            break
    return np.array(times)


def _settled(times: Times, precision: float) -> bool:
    """Whether the confidence intervals of all median ratios lie within +-precision of them."""
    found = (_column(times, index) for index in range(1, times.shape[1]))
    return all(
        item.speedup_low >= item.speedup * (1 - precision) and item.speedup_high <= item.speedup * (1 + precision)
        for item in found
    )


@dataclass(frozen=True)
class _Column:
    median_ms: float
    p90_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


def _column(times: Times, index: int) -> _Column:
    """The figures of one model, against the first."""
    ratios = times[:, 0] / times[:, index]
    low, high = median_interval(ratios)
    own = times[:, index]
    return _Column(float(np.median(own)), float(np.percentile(own, 90)), float(np.median(ratios)), low, high)


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


def environment() -> dict[str, str]:
    """What a latency depends on beside the model: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`."""
    return dict(_environment())


@lru_cache(maxsize=1)
def _environment() -> tuple[tuple[str, str], ...]:
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
