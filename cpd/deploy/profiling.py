"""What ONNX Runtime's own profiler says of a model: the time and the shapes of every node that it runs.

The nodes are those of the optimised graph: batch norms folded, activations and additions fused, layouts changed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpd.deploy.export import OnnxSource, open_session, run_session
from cpd.errors import InputError
from cpd.model.progress import part

Shape = tuple[int, ...]

_WARM_UP_RUNS = 2
#: Runs of a profile at most: medians are known by then, and a longer profile takes longer to read than to make.
MOST_RUNS = 300
_KERNEL = "_kernel_time"  # the event of a node is called so


@dataclass(frozen=True)
class NodeTime:
    """One node of the optimised graph.

    Attributes:
        name: its name in that graph.
        op: its operator, such as `Conv` or `MatMul`.
        inputs: the shapes of its inputs; weights that were packed beforehand are left out.
        outputs: the shapes of its outputs.
        ms: the median time of its kernel, in ms.
    """

    name: str
    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    ms: float


def profile_nodes(
    model: OnnxSource, feeds: Mapping[str, Any], *, threads: int = 1, seconds: float = 1.0, min_runs: int = 5
) -> list[NodeTime]:
    """Time every node of a model, in the order in which they run.

    Args:
        model: a path, bytes or an `onnx.ModelProto`.
        feeds: {name of an input: array}.
        threads: intra-op threads.
        seconds: the runs end after this time, once `min_runs` are in, or sooner, after `MOST_RUNS`.
        min_runs: the least number of runs.

    Raises:
        InputError: if ONNX Runtime cannot open the model, refuses the inputs, or has no folder to write its profile to.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="cpd-profile-")
    except OSError as error:
        raise InputError(f"ONNX Runtime's profile needs a temporary folder: {error}.") from error
    with folder as name, part("profile", undisturbed=True):
        session = open_session(model, threads, profile=Path(name, "profile"))
        runs, start = 0, 0.0
        while runs < _WARM_UP_RUNS + min_runs or (runs < MOST_RUNS and time.perf_counter() - start < seconds):
            if runs == _WARM_UP_RUNS:
                start = time.perf_counter()
            run_session(session, dict(feeds))
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _nodes(events)


def paired(before: Sequence[NodeTime], after: Sequence[NodeTime]) -> list[dict[str, Any]]:
    """The nodes of two models side by side, by name: name, op, before_ms, after_ms (None where one lacks it)."""
    rows = {node.name: {"name": node.name, "op": node.op, "before_ms": node.ms, "after_ms": None} for node in before}
    for node in after:
        row = rows.setdefault(node.name, {"name": node.name, "op": node.op, "before_ms": None})
        row["after_ms"] = node.ms
    return list(rows.values())


def channels_second(nodes: Sequence[NodeTime]) -> list[NodeTime]:
    """A profile of 8-bit operators as one in float: shapes `[N, C, *]`, and of a convolution its image alone.

    ONNX Runtime moves channels innermost before its 8-bit convolutions. A node does not say so; the number of its
    scales, one an output channel, does, unless the image is as high or wide as there are channels: so all are asked.
    """
    votes = [_innermost(node) for node in nodes if "Conv" in node.op and len(node.inputs) > 3]
    if sum(vote for vote in votes if vote is not None) <= 0:
        return [replace(node, inputs=node.inputs[:1]) if "Conv" in node.op else node for node in nodes]
    return [
        replace(node, inputs=(_moved(node.inputs[0]),), outputs=tuple(map(_moved, node.outputs)))
        if "Conv" in node.op else node
        for node in nodes
    ]  # fmt: skip


def _innermost(node: NodeTime) -> int | None:
    """1 where the channels of a convolution's result lie innermost, -1 where they lie second; None: not to be told."""
    scales = max((shape[0] for shape in node.inputs[1:] if len(shape) == 1), default=0)
    second, last = node.outputs[0][1], node.outputs[0][-1]
    return None if (second == scales) == (last == scales) else 1 if last == scales else -1


def _moved(shape: Shape) -> Shape:
    return (shape[0], shape[-1], *shape[1:-1]) if len(shape) > 2 else shape


def _nodes(events: Sequence[Mapping[str, Any]]) -> list[NodeTime]:
    """One entry a node, of the events of all runs."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            found.setdefault((event["name"], event["args"].get("node_index", "")), []).append(event)
    return [
        NodeTime(
            name.removesuffix(_KERNEL),
            every[0]["args"]["op_name"],
            _shapes(every[0]["args"].get("input_type_shape", ())),
            _shapes(every[0]["args"].get("output_type_shape", ())),
            statistics.median(event["dur"] for event in every[_WARM_UP_RUNS:]) / 1e3,
        )
        for (name, _), every in found.items()
    ]


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Shape, ...]:
    """Of entries such as {"float": [1, 64, 56, 56]}."""
    return tuple(tuple(shape) for entry in entries for shape in entry.values())
