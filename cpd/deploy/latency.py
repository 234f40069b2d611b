"""How much faster one model is than another on this machine: measured, with its uncertainty.

Models are timed in turn (A B, B A, A B, ...), so that whatever slows the machine slows all; a speed-up is the median
of the ratios within the rounds. All times are in ms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cpd.deploy.apart import timed_apart
from cpd.deploy.export import EITHER_MODEL, TOLERANCE, OnnxSource, as_bytes
from cpd.deploy.machine import environment
from cpd.deploy.profiling import NodeTime
from cpd.deploy.rounds import MIN_PAIRS, column, time_rounds
from cpd.deploy.runtimes.base import CALIBRATION_IMAGES, Artifact, Model, ProfilingRuntime, Runtime, Session, profiles
from cpd.deploy.runtimes.catalogue import DEFAULT, RUNTIME, runtimes_of
from cpd.deploy.runtimes.onnx_runtime import OnnxRuntime
from cpd.errors import of_the_user
from cpd.model.arguments import DATA, INPUTS
from cpd.model.inputs import Call, as_call, batches
from cpd.model.progress import part
from cpd.options import SECONDS, THREADS, Check, checked, choice, instance, integer, number


@dataclass(frozen=True)
class LatencyComparison:
    """The latency of a candidate compared with that of an original. Times are in milliseconds per run.

    Attributes:
        speedup: Median of (original time / candidate time) over all pairs of runs. Above 1, the candidate is faster.
        original_ms: Median time of the original.
        candidate_ms: Median time of the candidate.
        speedup_low: Lower end of the 95 % confidence interval of that median ratio. It comes from the sorted ratios
            (order statistics, whose ranks are exact binomial quantiles) and assumes only that pairs are independent.
        speedup_high: Upper end of that interval.
        original_p90_ms: 90th percentile of the original's samples. A sample is one run or, for models faster than
            20 ms, the mean over a block of runs.
        candidate_p90_ms: 90th percentile of the candidate's samples.
        runs: Number of pairs.
        threads: Threads that the runtime used.
        environment: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`; for another runtime also its version.
        runtime: Name of the runtime that ran both models.
        difference: Largest difference of the candidate's outputs in the runtime from those of PyTorch, relative to the
            largest output. None if the candidate was given as an ONNX model, or if its outputs are not visible.
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
    runtime: str = DEFAULT
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types for `json.dumps`."""
        return asdict(self)


COMPARISON = instance(LatencyComparison, "a cpd.LatencyComparison")
_PRECISION = number("above 0 (0.02 means +-2 %)", lambda value: value > 0)
_TIMING = {"threads": THREADS, "seconds": SECONDS, "min_runs": integer(MIN_PAIRS), "precision": _PRECISION}


@checked(
    original=EITHER_MODEL, candidate=EITHER_MODEL, example_inputs=INPUTS, tolerance=TOLERANCE, runtime=RUNTIME,
    calibration=DATA, **_TIMING,
)  # fmt: skip
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
    runtime: Any = DEFAULT,
    calibration: Iterable[Any] | None = None,
) -> LatencyComparison:
    """Measure how much faster a candidate is than an original, in ONNX Runtime on the CPU or in another runtime.

    The two are timed alternately, so that whatever slows the machine slows both. Modules are exported in eval mode, and
    their outputs in the runtime are checked against PyTorch. They are not changed.

    Args:
        original: An `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        candidate: Another one, which takes the same inputs.
        example_inputs: A tensor, a tuple, or (tuple, dict): the batch that is timed.
        threads: Threads that the runtime uses within one operator.
        seconds: Longest time that the timing takes, provided that `min_runs` pairs are done. Export and warm-up are not
            included.
        min_runs: Smallest number of pairs, at least 6.
        precision: The timing ends early once the 95 % confidence interval of the speed-up lies within +-precision of
            it, as a fraction.
        tolerance: Largest relative difference between a module's outputs in the runtime and in PyTorch. Runtimes of
            lower precision than float32 are allowed more.
        runtime: Where both models run: a name in `cpd.deploy.runtimes.catalogue.RUNTIMES`, such as "onnxruntime:int8"
            or "openvino", or a function for a device of your own (docs/runtimes.md). Of several runtimes, the slowest
            decides.
        calibration: Batches of the task, from which the ranges for 8-bit integers are taken. Default: the example
            inputs.

    Returns:
        A `LatencyComparison` with `speedup` and its confidence interval.

    Raises:
        InputError: If an argument cannot be used, a package is missing, or an ONNX model cannot be opened or does not
            take these inputs.
        ExportError: If a module cannot be exported, or its outputs differ from those of PyTorch.

    Examples:
        >>> from torch import nn
        >>> wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> narrow = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3))
        >>> latency = cpd.compare_latency(wide, narrow, torch.randn(1, 3, 32, 32), seconds=1)
        >>> latency.speedup_low > 1  # the lower end of the 95 % confidence interval
        True
    """
    probe = LatencyProbe(
        original, example_inputs, threads=threads, tolerance=tolerance, runtime=runtime, calibration=calibration
    )  # fmt: skip
    return probe.compare(candidate, seconds=seconds, min_runs=min_runs, precision=precision)


@dataclass(frozen=True)
class Timing:
    """The latency of one model in one runtime. Times are in milliseconds per run.

    Attributes:
        name: Name of the model.
        runtime: Name of the runtime.
        median_ms: Median of the samples.
        p90_ms: 90th percentile of the samples.
        speedup: Median of (time of the first model / time of this one) over all rounds.
        speedup_low: Lower end of the 95 % confidence interval of that median.
        speedup_high: Upper end of that interval.
    """

    name: str
    runtime: str
    median_ms: float
    p90_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True)
class LatencyTable:
    """The latencies of several models that were timed alternately.

    Attributes:
        rows: One `Timing` for each model and runtime. Speed-ups are relative to the first.
        runs: Number of rounds.
        threads: Threads that a runtime used within one operator.
        samples: Batch size.
        environment: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`.
    """

    rows: tuple[Timing, ...]
    runs: int
    threads: int
    samples: int
    environment: dict[str, str]

    def __getitem__(self, name: str) -> Timing:
        """The first row of a model, by its name.

        Raises:
            InputError: If there is no model of that name.
        """
        choice(*dict.fromkeys(row.name for row in self.rows)).demand("name", name)
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types for `json.dumps`."""
        return asdict(self)


_MODELS = Check(
    "a mapping {name: model} with at least one model",
    lambda value: isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value),
)


@checked(
    models=_MODELS, example_inputs=INPUTS, runtime=RUNTIME, batch_size=integer(1, 2**20), calibration=DATA, **_TIMING
)  # fmt: skip
def measure_latency(
    models: Mapping[str, Model],
    example_inputs: Any,
    *,
    runtime: Any = DEFAULT,
    threads: int = 1,
    batch_size: int | None = None,
    seconds: float = 20.0,
    min_runs: int = 20,
    precision: float = 0.02,
    calibration: Iterable[Any] | None = None,
) -> LatencyTable:
    """Measure the latency of any number of models, in one or several runtimes.

    The models are timed alternately, so that whatever slows the machine slows all of them. Modules are exported in eval
    mode if a runtime needs it, and their outputs in the runtime are checked against PyTorch.

    Args:
        models: {name: model}, where a model is an `nn.Module`, or an ONNX model: a path, bytes or an
            `onnx.ModelProto`. All must take the same inputs. Speed-ups are relative to the first.
        example_inputs: A tensor, a tuple, or (tuple, dict): the batch that is timed.
        runtime: Where the models run; one runtime or a list. Each is a name in
            `cpd.deploy.runtimes.catalogue.RUNTIMES` ("onnxruntime", "onnxruntime:int8", "openvino", "torch", …), a
            function `measure(paths) -> [ms]` for a device of your own, or an object that implements
            `cpd.deploy.runtimes.base.Runtime`.
        threads: Threads that each runtime given by name uses.
        batch_size: Number of samples to time; those of `example_inputs` are repeated or cut to it. Default: all of
            them, once.
        seconds: Longest time that the timing takes, provided that `min_runs` rounds are done. Export and warm-up are
            not included.
        min_runs: Smallest number of rounds, at least 6.
        precision: The timing ends early once the 95 % confidence interval of every speed-up lies within +-precision of
            it, as a fraction.
        calibration: Batches of the task, from which the ranges for 8-bit integers are taken. Default: the example
            inputs.

    Returns:
        A `LatencyTable` with one row for each model and runtime.

    Raises:
        InputError: If an argument cannot be used, a package is missing, or a runtime cannot open or run a model.
        ExportError: If a module cannot be exported, or its outputs differ from those of PyTorch.

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
    for name, model in models.items():
        EITHER_MODEL.demand(f"models[{name!r}]", model)
    call = as_call(example_inputs)
    if batch_size is not None:
        call = call.resized(batch_size)
    names, sessions = list[tuple[str, str]](), list[Session]()
    chosen = runtimes_of(runtime, threads)
    taken = _calls(calibration) if any(each.precision == "int8" for each in chosen) else None
    artifacts = {name: Artifact(model, call, taken) for name, model in models.items()}
    for each in chosen:
        for name, artifact in artifacts.items():
            names.append((name, each.name))
            with part(f"export {name}"), of_the_user(f"The runtime {each.name}", f"when it opened {name}"):
                sessions.append(each.prepare(artifact))
    with of_the_user("A runtime", "while it ran a model"):
        times = time_rounds(sessions, seconds, min_runs, precision)
    rows = tuple(Timing(*name, **vars(column(times, index))) for index, name in enumerate(names))
    return LatencyTable(rows, len(times), threads, call.samples, _environment(chosen))


#: Batches of a loader that are looked into for calibration at most.
_CALIBRATION_BATCHES = 64


def _calls(calibration: Iterable[Any] | None) -> list[Call] | None:
    """The inputs of some batches, as many as calibration takes."""
    if calibration is None:
        return None
    found, samples = list[Call](), 0
    for batch in batches(calibration, _CALIBRATION_BATCHES):
        found.append(batch.call.to("cpu"))
        samples += batch.call.samples
        if samples >= CALIBRATION_IMAGES:
            break
    return found


def _environment(runtimes: Sequence[Runtime]) -> dict[str, str]:
    """The machine, and the runtimes that are not named there."""
    others = {item.name: item.version for item in runtimes if item.version and item.name != DEFAULT}
    return {**environment(), **others}


_BATCHES = Check(
    "a list of example inputs",
    lambda value: isinstance(value, (list, tuple)) and all(map(INPUTS.accepts, value)),
)


_CANDIDATE = Check(
    EITHER_MODEL.wanted, lambda value: isinstance(value, Artifact) or EITHER_MODEL.accepts(value)
)  # fmt: skip


class LatencyProbe:
    """Compares several candidates with one original, which is exported and opened once a runtime.

        probe = LatencyProbe(model, example_inputs)
        probe.compare(pruned, seconds=5).speedup

    Args:
        original: an `nn.Module`, or an ONNX model: a path, bytes or an `onnx.ModelProto`.
        example_inputs: a tensor, a tuple, or (tuple, dict): the batch that is timed.
        threads: of the runtimes given by name.
        tolerance: the largest relative difference between a module's outputs in a runtime and in PyTorch.
        others: further batches, of other batch or input sizes; modules are exported anew for each.
        runtime: one or several, as for `compare_latency`.
        calibration: batches of the task, as for `compare_latency`.

    Attributes:
        calls: the batches.
        runtimes: what models are timed in.

    Raises:
        InputError: if an argument is unusable, or the ONNX model does not open or take these inputs.
        ExportError: if the module cannot be exported, or its outputs differ from PyTorch's.
    """

    @checked(
        original=EITHER_MODEL, example_inputs=INPUTS, threads=THREADS, tolerance=TOLERANCE, others=_BATCHES,
        runtime=RUNTIME, calibration=DATA,
    )  # fmt: skip
    def __init__(
        self,
        original: Model,
        example_inputs: Any,
        *,
        threads: int = 1,
        tolerance: float = 1e-3,
        others: Sequence[Any] = (),
        runtime: Any = DEFAULT,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        self.calls = [as_call(example_inputs), *map(as_call, others)]
        self.runtimes = runtimes_of(runtime, threads)
        self._tolerance = tolerance
        self._calibration = _calls(calibration) if self.is_quantized else None
        self._artifacts = [self.artifact(original, call) for call in self.calls]
        self._originals = [
            (each, artifact, _opened(each, artifact)) for each in self.runtimes for artifact in self._artifacts
        ]
        self._known = dict[tuple[int, str], LatencyComparison]()

    def artifact(self, model: Model, call: Call | None = None) -> Artifact:
        """A model in the forms that runtimes take, on the first batch or another one."""
        return Artifact(model, call or self.calls[0], self._calibration, self._tolerance)

    @property
    def profiler(self) -> ProfilingRuntime:
        """What nodes and kernels are timed in: the first runtime, or ONNX Runtime where that has no profile."""
        return self.profilers[0]

    @property
    def profilers(self) -> list[ProfilingRuntime]:
        """What predictions for each of the runtimes are made of: itself, or ONNX Runtime where it has no profile."""
        return [each if profiles(each) else OnnxRuntime(each.threads) for each in self.runtimes]

    @property
    def is_profiled(self) -> bool:
        """Whether all predictions are made of the runtime's own kernels."""
        return all(map(profiles, self.runtimes))

    def original_ms(self, seconds: float = 1.0) -> float:
        """The original's latency alone, in ms; of several batches and runtimes the longest."""
        return max(
            float(np.median(time_rounds([session], seconds / len(self._originals), MIN_PAIRS, 0.01)))
            for _, _, session in self._originals
        )

    def spread(self) -> float | None:
        """By how much a device disagrees with itself on one model, as a fraction; None where no device was given."""
        found = None
        for _, _, session in self._originals:
            if session.together is not None:
                same = column(time_rounds([session, session], 0.0, MIN_PAIRS, 0.01), 1)
                found = max(found or 0.0, abs(same.speedup - 1), (same.speedup_high - same.speedup_low) / 4)
        return found

    @checked(candidate=_CANDIDATE, seconds=SECONDS, min_runs=integer(MIN_PAIRS), precision=_PRECISION)
    def compare(
        self,
        candidate: Model | Artifact,
        *,
        seconds: float = 20.0,
        min_runs: int = 20,
        precision: float = 0.02,
        slowest: Callable[[LatencyComparison], float] = lambda found: found.speedup,
        apart: bool = False,
    ) -> LatencyComparison:
        """Time `candidate` beside the original; arguments and errors are those of `compare_latency`.

        With `apart` the two are timed in a process of their own, where the runtime allows it. An artifact is taken for
        the batch that it was made for, and its model is exported for the others. Of several batches or runtimes the
        comparison is given for which `slowest` is least.
        """
        given, model = (candidate, candidate.model) if isinstance(candidate, Artifact) else (None, candidate)
        artifacts = {
            id(own): given if given is not None and given.call is own.call else self.artifact(model, own.call)
            for own in self._artifacts
        }
        return min(
            (
                self._compared(index, artifacts[id(self._originals[index][1])], seconds, min_runs, precision, apart)
                for index in range(len(self._originals))
            ),
            key=slowest,
        )

    def _compared(
        self, index: int, artifact: Artifact, seconds: float, min_runs: int, precision: float, apart: bool
    ) -> LatencyComparison:
        """A candidate beside the original, of one batch in one runtime; a device is asked once about a file."""
        runtime, original_artifact, first = self._originals[index]
        second = _opened(runtime, artifact)
        digest = None if second.file is None else hashlib.sha256(second.file.read_bytes()).hexdigest()
        if digest is not None and (index, digest) in self._known:
            return self._known[index, digest]
        with of_the_user(f"The runtime {runtime.name}", "while it ran a model"):
            budget = seconds / len(self._originals), min_runs, precision
            times = timed_apart(runtime, [original_artifact, artifact], *budget) if apart else None
            if times is None:
                times = time_rounds([first, second], *budget)
        original, other = column(times, 0), column(times, 1)
        found = LatencyComparison(
            speedup=other.speedup,
            original_ms=original.median_ms,
            candidate_ms=other.median_ms,
            speedup_low=other.speedup_low,
            speedup_high=other.speedup_high,
            original_p90_ms=original.p90_ms,
            candidate_p90_ms=other.p90_ms,
            runs=len(times),
            threads=runtime.threads,
            environment=_environment([runtime]),
            runtime=runtime.name,
            difference=second.difference,
        )
        if digest is not None:
            self._known[index, digest] = found
        return found

    @property
    def is_quantized(self) -> bool:
        """Whether a runtime computes in 8-bit integers."""
        return any(each.precision == "int8" for each in self.runtimes)

    @property
    def original(self) -> Artifact:
        """The original, in the forms that runtimes took of it for the first batch."""
        return self._artifacts[0]

    def bytes_of(self, artifact: Artifact) -> int:
        """The size of the largest file that a runtime is given of a model."""
        return max(len(as_bytes(artifact.of(precision))) for precision in {each.precision for each in self.runtimes})

    def profile(self, candidate: OnnxSource | Artifact | None = None, seconds: float = 1.0) -> list[NodeTime]:
        """The time of every node of an ONNX model, or of the original, on the first batch."""
        artifact = candidate if isinstance(candidate, Artifact) else None
        if artifact is None:
            artifact = self.original if candidate is None else self.artifact(candidate)
        return self.profiler.profile(artifact, seconds)


def _opened(runtime: Runtime, artifact: Artifact) -> Session:
    with of_the_user(f"The runtime {runtime.name}", "when it opened a model"):
        return runtime.prepare(artifact)
