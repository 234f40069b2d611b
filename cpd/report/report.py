"""What a compression did, in numbers: one immutable `Report`, as a dict, as a page, as a model card.

`compress` fills it stage by stage; `to_html()` is `report.html` and `model_card()` the `README.md` of a saved
result. The page is one file: its style and its figures are inline, it asks for nothing over the network and
runs no script.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jinja2

from cpd.errors import ArtifactError

if TYPE_CHECKING:
    from cpd.jobs.sweep import SweepPoint

BY_NAME = ("timm:", "torchvision:")
"""Sources that `cpd.load` rebuilds by itself; any other source has to be handed in as a fresh model."""

#: Targets that are computed: the figure, and what it is called.
_COSTS = {
    "target_macs": ("macs", "MACs"),
    "target_params": ("parameters", "parameters"),
    "target_memory": ("activations", "elements of intermediate tensors"),
}
#: Arguments that are records of settings, of which a call holds those that are not usual.
_RECORDS = {"training": "cpd.DistillConfig", "schedule": "cpd.Schedule"}
#: Arguments that are objects, which a call holds by their names.
OBJECTS = ("data", "example_inputs", "loss", "evaluate", "teacher", "latency_inputs")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Figures:
    """What one model costs and how well it does.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates of one forward pass on the example inputs.
        activations: elements of all intermediate tensors of that pass.
        latency_ms: median time of that pass in ONNX Runtime, None where it was not measured.
        metric: what `evaluate` returned, None where none was given.
    """

    parameters: int
    macs: int
    activations: int
    latency_ms: float | None = None
    metric: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return _fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figures:
        """The figures that `to_dict` wrote; raises `ArtifactError` if a field is missing."""
        return cls(**_known(cls, data))


@dataclass(frozen=True)
class GroupRow:
    """One coupling group: how wide it was, how wide it is.

    Attributes:
        name: the group's name in `comb.groups`.
        size: positions before.
        kept: positions after.
        exact: whether removing a position equals zeroing it.
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
        return _fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupRow:
        """The row that `to_dict` wrote; raises `ArtifactError` if a field is missing."""
        known = _known(cls, data)
        return cls(**{**known, "members": tuple(known.get("members", ()))})


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
        return _fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRow:
        """The row that `to_dict` wrote; raises `ArtifactError` if a field is missing."""
        return cls(**_known(cls, data))


class FigureRow(NamedTuple):
    """One line of the before/after table, ready to print."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, repr=False)
class Report:
    """Every stage of one compression in numbers.

    Attributes:
        call: the arguments of `cpd.compress` as given (target, seed, threads, ...), under their own names; of
            data, functions and other objects the names alone.
        model_class: qualified name of the model's class.
        source: how a fresh model is built (`timm:resnet18`), None where that is not known.
        criterion: the importance score used.
        criterion_reason: why this one.
        normalization: what a score was divided by (`memory`, `macs`, `latency`, `none`).
        original: figures of the model given.
        result: figures of the compressed model.
        latency: `LatencyComparison.to_dict()`, None where nothing was timed.
        groups: one row a coupling group.
        layers: one row a layer with weights, in the order of the model's modules.
        nodes: one dict an ONNX node, as ONNX Runtime runs it (name, op, before_ms, after_ms: None where one lacks it).
        shrinks: one dict a shrink (epoch, step, share, macs, parameters, plan_hash).
        checks: name of a check to the largest relative error found.
        history: one dict a training epoch (epoch, loss, task_loss, kd_loss, lr, steps_per_second, metric).
        search: one dict a measured candidate (macs_ratio, speedup).
        seconds: wall-clock seconds of each stage.
        environment: versions and hardware.
        notes: what the user was told on the way.
    """

    call: dict[str, Any]
    model_class: str
    source: str | None
    criterion: str
    criterion_reason: str
    normalization: str
    original: Figures
    result: Figures
    latency: dict[str, Any] | None = None
    groups: tuple[GroupRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    nodes: tuple[dict[str, Any], ...] = ()
    shrinks: tuple[dict[str, Any], ...] = ()
    checks: dict[str, float] = dataclasses.field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    search: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The figures before and after."""
        figures = (f"{row.label} {row.before} -> {row.after}" for row in self.figure_rows)
        return f"{type(self).__name__}({self.model_class}: {', '.join(figures)})"

    @property
    def speedup(self) -> float | None:
        """Measured latency of the original over that of the result; None where nothing was timed."""
        if self.latency is not None and self.latency.get("speedup") is not None:
            return float(self.latency["speedup"])
        before, after = self.original.latency_ms, self.result.latency_ms
        return before / after if before is not None and after else None

    @property
    def metric_drop(self) -> float | None:
        """Metric of the original less that of the result (positive: it got worse, if higher is better)."""
        before, after = self.original.metric, self.result.metric
        return before - after if before is not None and after is not None else None

    @property
    def asked(self) -> str:
        """The target, and what came of it, in a sentence."""
        return _asked(self)

    @property
    def figure_rows(self) -> tuple[FigureRow, ...]:
        """The before/after table; what was not measured has no row."""
        return tuple(_figure_rows(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; what JSON cannot hold becomes its `str`, NaN and infinity None."""
        return _fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote.

        Raises:
            ArtifactError: if a field is missing or is not what `to_dict` writes.
        """
        known = _known(cls, data)
        try:
            nested = {
                "original": Figures.from_dict(known["original"]),
                "result": Figures.from_dict(known["result"]),
                "groups": tuple(GroupRow.from_dict(row) for row in known.get("groups", ())),
                "layers": tuple(LayerRow.from_dict(row) for row in known.get("layers", ())),
            }
            names = ("history", "search", "notes", "nodes", "shrinks")
            plain = {name: tuple(known.get(name, ())) for name in names}
        except TypeError as error:
            raise ArtifactError(f"This is not a report that cpd wrote: {error}.") from error
        return cls(**{**known, **nested, **plain})

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        open_groups = [row for row in self.groups if row.frozen is None]
        return _template("report.html.j2").render(
            report=self,
            call=call_text(self.call),
            widths=_widths(self.layers),
            operators=_operators(self.nodes),
            costly=_costly(self.nodes),
            groups=open_groups,
            inexact=any(not row.exact for row in open_groups),
            frozen=[row for row in self.groups if row.frozen is not None],
            charts=_charts(self),
            latency=_flat(self.latency or {}),
        )

    def model_card(self) -> str:
        """The report as the `README.md` of a saved result."""
        return _template("README.md.j2").render(
            report=self,
            call=call_text(self.call),
            by_name=self.source is not None and self.source.startswith(BY_NAME),
            factory=_factory(self.source),
        )


def sweep_page(original: Figures | None, points: Sequence[SweepPoint]) -> str:
    """A sweep as one self-contained HTML page.

    Args:
        original: figures of the unpruned model; None where no speed-up was reached.
        points: one a speed-up.
    """
    reached = [point for point in points if point.figures is not None]
    every = [figures for figures in (original, *(point.figures for point in reached)) if figures is not None]
    metrics = [figures.metric for figures in every if figures.metric is not None]
    by_metric = bool(every) and len(metrics) == len(every)
    heights = metrics if by_metric else [float(figures.macs) for figures in every]
    series = sorted(zip((figures.latency_ms or 0.0 for figures in every), heights, strict=True))
    chart = _chart(
        "Metric against measured latency" if by_metric else "MACs against measured latency",
        "ms in ONNX Runtime",
        {"models": series},
        reference=original.metric if by_metric and original is not None else None,
        reference_text="unpruned",
    )
    return _template("sweep.html.j2").render(
        original=original, points=points, charts=[] if chart is None else [chart], by_metric=by_metric
    )


def human(number: float) -> str:
    """A count in at most four digits and a unit: 11689512 is `11.69 M`."""
    for scale, unit in _UNITS:
        if abs(number) >= scale:
            places = 2 if abs(number) < 100 * scale else 1
            return f"{number / scale:.{places}f} {unit}"
    return f"{number:,.0f}"


def call_text(call: Mapping[str, Any]) -> str:
    """The call as Python: `cpd.compress(model, target_speedup=2, ...)`; what is None is left out."""
    given = [f"{key}={_argument(key, value)}" for key, value in call.items() if key != "model" and value is not None]
    one_line = f"cpd.compress({', '.join(['model', *given])})"
    if len(one_line) <= 100:
        return one_line
    return "\n".join(["cpd.compress(", "    model,", *(f"    {item}," for item in given), ")"])


def _argument(name: str, value: Any) -> str:
    if name in _RECORDS and isinstance(value, Mapping):
        return f"{_RECORDS[name]}({', '.join(f'{key}={item!r}' for key, item in value.items())})"
    return value if name in OBJECTS and isinstance(value, str) else repr(value)


def _factory(source: str | None) -> tuple[str, str, str] | None:
    """Of a `package.module:factory` source: the module, the name to import from it, and what to call."""
    if source is None or source.startswith(BY_NAME) or ":" not in source:
        return None
    module, _, name = source.partition(",")[0].partition(":")
    return module, name.partition(".")[0], name


# ---------------------------------------------------------------------------------- plain JSON types


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    """`value` as JSON types: any library's numbers to int or float, records to dicts, the rest to `str`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (Figures, GroupRow, LayerRow)):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def _known(cls: type[Any], data: Any) -> dict[str, Any]:
    """The entries of `data` that are fields of `cls`; a missing one without default is an error."""
    if not isinstance(data, Mapping):
        raise ArtifactError(f"Expected the dict of a {cls.__name__}, got {type(data).__name__}.")
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise ArtifactError(f"The {cls.__name__} lacks {', '.join(missing)}: the file is truncated or foreign.")
    return {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}


# ---------------------------------------------------------------------------------- the before/after table


def _asked(report: Report) -> str:
    call, latency = report.call, report.latency or {}
    if _is_number(value := call.get("target_speedup")):
        low, high = latency.get("speedup_low"), latency.get("speedup_high")
        interval = f" (95 % interval {low:.2f} to {high:.2f})" if low and high else ""
        found = "not measured" if report.speedup is None else f"{report.speedup:.2f} times as fast{interval}"
        return f"Asked for a speed-up of {value:g}; found {found}."
    if _is_number(value := call.get("target_latency_ms")):
        found = "not measured" if report.result.latency_ms is None else f"{report.result.latency_ms:.3g} ms"
        return f"Asked for {value:g} ms; found {found}."
    for name, (figure, words) in _COSTS.items():
        if _is_number(value := call.get(name)):
            before, after = getattr(report.original, figure), getattr(report.result, figure)
            if value <= 1:
                return f"Asked for {value:.1%} of the {words}; found {after / max(before, 1):.1%}."
            return f"Asked for {value:,.0f} {words}; found {after:,}."
    return ""


def _figure_rows(report: Report) -> Iterable[FigureRow]:
    before, after = report.original, report.result
    if before.metric is not None and after.metric is not None:
        places = 4 if max(abs(before.metric), abs(after.metric)) <= 1.5 else 2  # a share, or per cent
        change = f"{after.metric - before.metric:+.{places}f}".replace("-", "−")
        yield FigureRow("Metric", f"{before.metric:.{places}f}", f"{after.metric:.{places}f}", change)
    if before.latency_ms is not None and after.latency_ms is not None:
        faster = "" if report.speedup is None else f"{report.speedup:.2f}× faster"
        yield FigureRow("ONNX Runtime latency", _ms(before.latency_ms), _ms(after.latency_ms), faster)
    for label, was, now in (
        ("Parameters", before.parameters, after.parameters),
        ("MACs", before.macs, after.macs),
        ("Activations", before.activations, after.activations),
    ):
        yield FigureRow(label, human(was), human(now), _percent(was, now))


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else ""


def _flat(latency: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a latency comparison that the page lists; the environment's own are joined in."""
    environment = latency.get("environment")
    flat = {key: value for key, value in latency.items() if key != "environment" and value is not None}
    return {**flat, **(environment if isinstance(environment, Mapping) else {})}


# ---------------------------------------------------------------------------------- figures, as inline SVG


#: Stages that have a colour of their own.
HUES = 6
#: Parts that a stage is divided into at most.
MOST_PARTS = 8
#: Nodes that the page lists.
COSTLY = 25


@dataclass(frozen=True)
class _Bar:
    """A layer's width before and after, in pixels of the chart; the colour of its stage."""

    row: LayerRow
    x: float
    width: float
    before: float
    after: float
    hue: int


@dataclass(frozen=True)
class _Widths:
    """The widths of all layers as one chart."""

    bars: tuple[_Bar, ...]
    stages: tuple[tuple[str, int], ...]
    widest: int


@dataclass(frozen=True)
class _Operator:
    """What the nodes of one operator take, and in per cent of the most costly."""

    op: str
    nodes: int
    before_ms: float
    after_ms: float
    before: float
    after: float


@dataclass(frozen=True)
class _Line:
    """One curve of a chart, in pixels of its view box."""

    label: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True

    @property
    def path(self) -> str:
        return " ".join(f"{x},{y}" for x, y in self.points)


@dataclass(frozen=True)
class _Chart:
    """A small chart: curves, and the labelled ends of both axes."""

    title: str
    x_label: str
    lines: tuple[_Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    reference: float | None = None
    reference_text: str = ""
    marks: tuple[float, ...] = ()


Points = Sequence[tuple[float, float]]

LEFT, RIGHT, TOP, BOTTOM = 46.0, 344.0, 10.0, 150.0
"""The plotting area inside a view box of 360 x 180."""


def _widths(rows: Sequence[LayerRow]) -> _Widths:
    """Bars side by side in a box of 720 x 160; heights are square roots, so that narrow layers are seen."""
    widest = max((row.before for row in rows), default=0) or 1
    names = _stages([row.name for row in rows])
    hues = {stage: index % HUES + 1 for index, stage in enumerate(dict.fromkeys(names))}
    slot = 720 / max(len(rows), 1)

    def height(width: int) -> float:
        return round(160 * math.sqrt(width / widest), 2)

    bars = tuple(
        _Bar(row, round(index * slot, 2), round(0.8 * slot, 2), height(row.before), height(row.after), hues[stage])
        for index, (row, stage) in enumerate(zip(rows, names, strict=True))
    )
    return _Widths(bars, tuple(hues.items()), widest)


def _stages(names: Sequence[str]) -> list[str]:
    """What stage each module belongs to: the first name of its path; more of it where one would hold most layers."""
    found = [name.split(".")[0] for name in names]
    while found:
        largest, count = Counter(found).most_common(1)[0]
        if 2 * count <= len(found):
            break
        depth = largest.count(".") + 2
        pairs = zip((name.split(".") for name in names), found, strict=True)  # a stage is no layer: the last name stays
        finer = [".".join(path[: max(1, min(depth, len(path) - 1))]) if at == largest else at for path, at in pairs]
        if finer == found or len(set(finer)) - len(set(found)) >= MOST_PARTS:
            break
        found = finer
    return found


def _operators(nodes: Sequence[Mapping[str, Any]]) -> list[_Operator]:
    """Time by operator, the most costly first."""
    found: dict[str, list[float]] = {}
    for node in nodes:
        entry = found.setdefault(node["op"], [0, 0.0, 0.0])
        entry[:] = entry[0] + 1, entry[1] + (node["before_ms"] or 0.0), entry[2] + (node["after_ms"] or 0.0)
    most = max((max(entry[1:]) for entry in found.values()), default=0.0) or 1.0
    rows = [
        _Operator(op, int(count), before, after, round(100 * before / most, 2), round(100 * after / most, 2))
        for op, (count, before, after) in found.items()
    ]
    return sorted(rows, key=lambda row: -row.before_ms)


def _costly(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The nodes that take the most time, before or after."""
    return sorted(nodes, key=lambda node: -max(node["before_ms"] or 0.0, node["after_ms"] or 0.0))[:COSTLY]


def _charts(report: Report) -> list[_Chart]:
    """Loss, metric and search, each only if there is something to show."""
    losses = {"loss": "loss", "task_loss": "task", "kd_loss": "distillation"}
    target = report.call.get("target_speedup")
    candidates = [
        _chart("Loss", "epoch", {label: _series(report.history, "epoch", key) for key, label in losses.items()}),
        _chart(
            "Metric" + (" (dotted: shrinks)" if report.shrinks else ""),
            "epoch",
            {"metric": _series(report.history, "epoch", "metric")},
            reference=report.original.metric,
            reference_text="unpruned",
            marks=[float(row["epoch"]) for row in report.shrinks],
        ),
        _chart(
            "Search: measured speed-up",
            "share of MACs kept",
            {"candidate": _series(report.search, "macs_ratio", "speedup")},
            joined=False,
            reference=float(target) if _is_number(target) else None,
            reference_text="target",
        ),
    ]
    return [chart for chart in candidates if chart is not None]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _series(records: Iterable[Mapping[str, Any]], x: str, y: str) -> Points:
    """The points of the records that hold both finite numbers."""
    return [(float(r[x]), float(r[y])) for r in records if _is_number(r.get(x)) and _is_number(r.get(y))]


def _chart(
    title: str,
    x_label: str,
    series: Mapping[str, Points],
    *,
    joined: bool = True,
    reference: float | None = None,
    reference_text: str = "",
    marks: Sequence[float] = (),
) -> _Chart | None:
    """Scale the series to the plotting area; None if none has a point.

    Args:
        title: above it.
        x_label: below it.
        series: points by their name in the legend.
        joined: whether a line goes through the points.
        reference: where a line goes across.
        reference_text: what that line is.
        marks: where lines go up.
    """
    drawn = {label: points for label, points in series.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points] + list(marks)
    ys = [y for points in drawn.values() for _, y in points] + ([] if reference is None else [reference])
    to_x, x_ticks = _scale(xs, LEFT, RIGHT)
    to_y, y_ticks = _scale(ys, BOTTOM, TOP)
    lines = tuple(_Line(label, tuple((to_x(x), to_y(y)) for x, y in points), joined) for label, points in drawn.items())
    at = None if reference is None else to_y(reference)
    return _Chart(title, x_label, lines, x_ticks, y_ticks, at, reference_text, tuple(map(to_x, marks)))


def _scale(
    values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], tuple[tuple[float, str], ...]]:
    """A map of the values' range onto [start, end], and a tick at each end of it."""
    low, high = min(values), max(values)
    if low == high:
        middle = round((start + end) / 2, 1)
        return lambda value: middle, ((middle, f"{low:.4g}"),)

    def place(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 1)

    return place, ((start, f"{low:.4g}"), (end, f"{high:.4g}"))


# ---------------------------------------------------------------------------------- templates


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, show=_show, deviation=_deviation, human=human, ms=_ms, base=os.path.basename)
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def _cell(text: object) -> str:
    """`text` made safe inside a line or a table of Markdown."""
    safe = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
    return " ".join(safe.split())


def _deviation(value: float | None) -> str:
    """A relative error for reading."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1e}"


def _show(value: Any) -> str:
    """A value of a report's dict for reading: floats to four digits, sequences joined."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_show, value))
    return str(value)
