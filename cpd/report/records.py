"""Records: the rows and figures of a report, as plain JSON types and back."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from cpd.files.reading import conform


class NodeRow(TypedDict):
    """One node of the ONNX models; None where one of them lacks it."""

    name: str
    op: str
    before_ms: float | None
    after_ms: float | None


class ShrinkRow(TypedDict):
    """One shrink, of which the page shows the time alone."""

    epoch: float


class SearchRow(TypedDict, total=False):
    """One candidate that was measured; what an older report lacks is not there."""

    scope: str | None
    macs_ratio: float | None
    predicted: float | None
    speedup: float | None
    attained: float | None
    verdict: str | None


class ElsewhereRow(TypedDict):
    """The same result in a runtime that was not asked for; None, and why, where it could not be timed."""

    runtime: str
    speedup: float | None
    original_ms: float | None
    candidate_ms: float | None
    error: str | None


class TriedRow(TypedDict):
    """One speed-up that was tried for `max_drop`; None where it was out of reach, or nothing is known of chance.

    `upper` is what the metric loses at most, with the confidence asked for; `confidence` that it loses no more than
    was allowed.
    """

    asked: float
    speedup: float | None
    macs_left: float | None
    trained: bool
    metric: float | None
    drop: float | None
    upper: float | None
    confidence: float | None
    holds: bool
    error: str | None


class LatencyRow(TypedDict, total=False):
    """What the page shows of a latency comparison by itself."""

    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    threads: int | None
    runs: int | None
    runtime: str
    original_ms: float | None
    candidate_ms: float | None
    original_p90_ms: float | None
    candidate_p90_ms: float | None
    difference: float | None
    elsewhere: tuple[ElsewhereRow, ...]


#: Runtimes whose name in prose is another one.
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "opencv": "OpenCV", "mnn": "MNN"}


def runtime_title(latency: Mapping[str, Any] | None) -> str:
    """What a runtime is called in prose, with its precision; that of a report of before there were several."""
    name, _, precision = str((latency or {}).get("runtime", "onnxruntime")).partition(":")
    return _TITLES.get(name, name) + (f" ({precision})" if precision else "")


#: Arguments that are objects, which a call holds by their names.
OBJECTS = ("data", "calibration", "example_inputs", "loss", "evaluate", "teacher", "latency_inputs")


@dataclass(frozen=True)
class Figures:
    """What one model costs and how well it does.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates of one forward pass on the example inputs.
        activations: elements of all intermediate tensors of that pass.
        latency_ms: median time of that pass in the runtime, None where it was not measured.
        metric: what `evaluate` returned, None where none was given.
        file_mb: MB of the file that is run; None where no bound was set.
        memory_mb: MB of weights and tensors that are alive at once in that pass, as computed; None likewise.
    """

    parameters: int
    macs: int
    activations: int
    latency_ms: float | None = None
    metric: float | None = None
    file_mb: float | None = None
    memory_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figures:
        """The figures that `to_dict` wrote; raises `ArtifactError` if it is another one."""
        return conform(data, cls, f"a {cls.__name__}")


@dataclass(frozen=True)
class GroupRow:
    """One coupling group: how wide it was, how wide it is.

    Attributes:
        name: the group's name in `comb.groups`.
        size: channels before.
        kept: channels after.
        exact: whether removing a channel equals zeroing it.
        frozen: why nothing could be removed, None if the group is open.
        members: the dims of parameters and buffers that shrink together.
    """

    name: str
    size: int
    kept: int
    exact: bool
    frozen: str | None = None
    members: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupRow:
        """The row that `to_dict` wrote; raises `ArtifactError` if it is another one."""
        return conform(data, cls, f"a {cls.__name__}")


@dataclass(frozen=True)
class SparseRow:
    """The weights of one layer: how many are zero.

    Attributes:
        name: of the parameter.
        elements: its weights.
        before: how many were zero.
        after: how many are.
    """

    name: str
    elements: int
    before: int
    after: int

    @property
    def share(self) -> float:
        """The share of zeros now."""
        return self.after / max(1, self.elements)


@dataclass(frozen=True)
class BranchRow:
    """One branch: operations that can be removed together.

    Attributes:
        name: the branch's name in `comb.branches`.
        parameters: that go with it, in the unpruned model.
        macs: that go with it.
        removed: whether it has gone.
        frozen: why it could not be removed, None if it could.
    """

    name: str
    parameters: int
    macs: int
    removed: bool
    frozen: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BranchRow:
        """The row that `to_dict` wrote; raises `ArtifactError` if it is another one."""
        return conform(data, cls, f"a {cls.__name__}")


@dataclass(frozen=True)
class LayerRow:
    """One layer with weights: how wide it was, how wide it is.

    Attributes:
        name: the module's name.
        kind: its class, such as `Conv2d`.
        before: channels or features that it gave.
        after: those that it gives now.
    """

    name: str
    kind: str
    before: int
    after: int

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRow:
        """The row that `to_dict` wrote; raises `ArtifactError` if it is another one."""
        return conform(data, cls, f"a {cls.__name__}")


def plain_fields(record: Any) -> dict[str, Any]:
    """The fields of a record as JSON types."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    """`value` as JSON types: any library's numbers to int or float, records to dicts, the rest to `str`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


@dataclass(frozen=True)
class SweepPoint:
    """One speed-up that was asked for.

    Attributes:
        asked: the speed-up asked for.
        speedup: the one measured; None where it could not be reached.
        figures: of the result; None likewise.
        folder: where it was written; None where nothing is.
        error: why it could not be reached, and what can.
    """

    asked: float
    speedup: float | None
    figures: Figures | None
    folder: str | None = None
    error: str | None = None
