"""What a compression did, in numbers: one immutable `Report`, as a dict, as a page, as a model card.

`compress` fills it stage by stage; `to_html()` is `report.html` and `model_card()` the `README.md` of a saved
result. The page is one file: its style and its figures are inline, it asks for nothing over the network and
runs no script.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import jinja2

from cpd.files.reading import conform
from cpd.model.sources import BY_NAME
from cpd.report.charts import Chart, costly_nodes, is_number, line_chart, operator_rows, points_of, width_bars
from cpd.report.records import (
    OBJECTS,
    BranchRow,
    Figures,
    GroupRow,
    LatencyRow,
    LayerRow,
    NodeRow,
    ShrinkRow,
    SparseRow,
    TriedRow,
    plain_fields,
    runtime_title,
)
from cpd.tasks.metric import UNNAMED, title, written

if TYPE_CHECKING:
    from cpd.report.records import SweepPoint


#: Targets that are computed: the figure, and what it is called.
_COSTS = {
    "target_macs": ("macs", "MACs"),
    "target_params": ("parameters", "parameters"),
    "target_memory": ("activations", "elements of intermediate tensors"),
}
#: Arguments that are records of settings, of which a call holds those that are not usual.
_RECORDS = {"training": "cpd.DistillConfig", "schedule": "cpd.Schedule"}
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class _Rows(TypedDict, total=False):
    """Parts of a report that are plain dicts, as far as the page counts on them."""

    latency: LatencyRow | None
    nodes: tuple[NodeRow, ...]
    tried: tuple[TriedRow, ...]
    shrinks: tuple[ShrinkRow, ...]


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
        latency: `LatencyComparison.to_dict()`, None where nothing was timed; `elsewhere` lists the same result in other
            runtimes that are installed, where a target was measured.
        groups: one row a coupling group.
        branches: one row a branch, where branches could be removed.
        layers: one row a layer with weights, in the order of the model's modules.
        nodes: one dict a node, as the runtime runs it (name, op, before_ms, after_ms: None where one lacks it).
        shrinks: one dict a shrink (epoch, step, share, macs, parameters, plan_hash).
        checks: name of a check to the largest relative error found.
        history: one dict a training epoch (epoch, loss, task_loss, kd_loss, lr, steps_per_second, metric, kept).
        search: one dict a measured candidate (macs_ratio, speedup).
        seconds: wall-clock seconds of each stage.
        environment: versions and hardware.
        notes: what the user was told on the way.
        metric_name: what `evaluate` gives, with its unit in brackets.
        job: the function that was called: "compress" or "sparsify".
        sparsity: one row a layer whose weights can be zero, where masks were asked for.
        stored: what the weights take in a file -> its bytes, where masks were asked for.
        tried: one dict a speed-up that was tried, where `max_drop` was asked for (`cpd.report.records.TriedRow`).
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
    branches: tuple[BranchRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    nodes: tuple[dict[str, Any], ...] = ()
    shrinks: tuple[dict[str, Any], ...] = ()
    checks: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    search: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    metric_name: str = UNNAMED
    job: str = "compress"
    sparsity: tuple[SparseRow, ...] = ()
    stored: dict[str, int] = dataclasses.field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()

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
    def zeros(self) -> float | None:
        """The share of zeros among all weights that can be zero; None where no masks were asked for."""
        elements = sum(row.elements for row in self.sparsity)
        return sum(row.after for row in self.sparsity) / elements if elements else None

    @property
    def zeros_before(self) -> float:
        """The share of zeros among those weights of the original."""
        return sum(row.before for row in self.sparsity) / max(1, sum(row.elements for row in self.sparsity))

    @property
    def figure_rows(self) -> tuple[FigureRow, ...]:
        """The before/after table; what was not measured has no row."""
        return tuple(_figure_rows(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; what JSON cannot hold becomes its `str`, NaN and infinity None."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote.

        Raises:
            ArtifactError: if a field is missing or is not what `to_dict` writes.
        """
        conform(data, _Rows, "a report")
        return conform(data, cls, "a report")

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        open_groups = [row for row in self.groups if row.frozen is None]
        return _template("report.html.j2").render(
            report=self,
            runtime=runtime_title(self.latency),
            elsewhere=[{**row, "title": runtime_title(row)} for row in (self.latency or {}).get("elsewhere", ())],
            call=call_text(self.call, self.job),
            widths=width_bars(self.layers),
            operators=operator_rows(self.nodes),
            costly=costly_nodes(self.nodes),
            groups=open_groups,
            inexact=any(not row.exact for row in open_groups),
            frozen=[row for row in self.groups if row.frozen is not None],
            removed=[row for row in self.branches if row.removed],
            charts=_charts(self),
            latency=_flat(self.latency or {}),
        )

    def model_card(self) -> str:
        """The report as the `README.md` of a saved result."""
        return _template("README.md.j2").render(
            report=self,
            runtime=runtime_title(self.latency),
            elsewhere=[{**row, "title": runtime_title(row)} for row in (self.latency or {}).get("elsewhere", ())],
            call=call_text(self.call, self.job),
            by_name=self.source is not None and self.source.startswith(BY_NAME),
            removed=[row for row in self.branches if row.removed],
            factory=_factory(self.source),
        )


def sweep_page(original: Figures | None, points: Sequence[SweepPoint], metric_name: str) -> str:
    """A sweep as one self-contained HTML page.

    Args:
        original: figures of the unpruned model; None where no speed-up was reached.
        points: one a speed-up.
        metric_name: of what was evaluated.
    """
    reached = [point for point in points if point.figures is not None]
    every = [figures for figures in (original, *(point.figures for point in reached)) if figures is not None]
    metrics = [figures.metric for figures in every if figures.metric is not None]
    by_metric = bool(every) and len(metrics) == len(every)
    heights = metrics if by_metric else [float(figures.macs) for figures in every]
    series = sorted(zip((figures.latency_ms or 0.0 for figures in every), heights, strict=True))
    chart = line_chart(
        f"{_headed(metric_name)} against measured latency" if by_metric else "MACs against measured latency",
        "measured latency [ms]",
        {"models": series},
        reference=original.metric if by_metric and original is not None else None,
        reference_text="unpruned",
    )
    return _template("sweep.html.j2").render(
        original=original, points=points, charts=[] if chart is None else [chart], by_metric=by_metric,
        metric_name=title(metric_name), shown=partial(written, metric_name),
    )  # fmt: skip


def human(number: float) -> str:
    """A count in at most four digits and a unit: 11689512 is `11.69 M`."""
    for scale, unit in _UNITS:
        if abs(number) >= scale:
            places = 2 if abs(number) < 100 * scale else 1
            return f"{number / scale:.{places}f} {unit}"
    return f"{number:,.0f}"


def call_text(call: Mapping[str, Any], job: str = "compress") -> str:
    """The call as Python: `cpd.compress(model, target_speedup=2, ...)`; what is None is left out."""
    given = [f"{key}={_argument(key, value)}" for key, value in call.items() if key != "model" and value is not None]
    one_line = f"cpd.{job}({', '.join(['model', *given])})"
    if len(one_line) <= 100:
        return one_line
    return "\n".join([f"cpd.{job}(", "    model,", *(f"    {item}," for item in given), ")"])


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


# ---------------------------------------------------------------------------------- the before/after table


def _asked(report: Report) -> str:
    call, latency = report.call, report.latency or {}
    if report.zeros is not None:
        return (
            f"{report.zeros:.1%} of the weights that can be zero are zero. No runtime here is faster for it: what is "
            "saved is the size of the file."
        )
    if is_number(value := call.get("max_drop")):
        lost = "not known" if report.metric_drop is None else f"{report.metric_drop:.3g}"
        fast = "" if report.speedup is None else f", {report.speedup:.2f} times as fast"
        return f"Asked for the fastest that loses at most {value:g} of {title(report.metric_name)}; found {lost}{fast}."
    if is_number(value := call.get("target_speedup")):
        low, high = latency.get("speedup_low"), latency.get("speedup_high")
        interval = f" (95 % interval {low:.2f} to {high:.2f})" if low and high else ""
        found = "not measured" if report.speedup is None else f"{report.speedup:.2f} times as fast{interval}"
        return f"Asked for a speed-up of {value:g}; found {found}."
    if is_number(value := call.get("target_latency_ms")):
        found = "not measured" if report.result.latency_ms is None else f"{report.result.latency_ms:.3g} ms"
        return f"Asked for {value:g} ms; found {found}."
    for name, (figure, words) in _COSTS.items():
        if is_number(value := call.get(name)):
            before, after = getattr(report.original, figure), getattr(report.result, figure)
            if value <= 1:
                return f"Asked for {value:.1%} of the {words}; found {after / max(before, 1):.1%}."
            return f"Asked for {value:,.0f} {words}; found {after:,}."
    return ""


def _figure_rows(report: Report) -> Iterable[FigureRow]:
    before, after = report.original, report.result
    if before.metric is not None and after.metric is not None:
        first, last = (written(report.metric_name, value) for value in (before.metric, after.metric))
        places = len(first.split()[0].partition(".")[2])
        change = f"{after.metric - before.metric:+.{places}f}".replace("-", "−")
        yield FigureRow(_headed(report.metric_name), first, last, change)
    if before.latency_ms is not None and after.latency_ms is not None:
        word = "" if report.zeros is not None else " faster"
        faster = "" if report.speedup is None else f"{report.speedup:.2f}×{word}"
        yield FigureRow(
            f"{runtime_title(report.latency)} latency", _ms(before.latency_ms), _ms(after.latency_ms), faster
        )
    if report.zeros is not None:
        yield FigureRow("Weights that are zero", f"{report.zeros_before:.1%}", f"{report.zeros:.1%}", "")
    for name, size in report.stored.items():
        plain = report.stored.get("plain", size)
        if name != "plain":
            yield FigureRow(f"Bytes of the weights, {name}", human(plain), human(size), _percent(plain, size))
    for label, first_mb, last_mb in (
        ("File", before.file_mb, after.file_mb),
        ("Peak memory", before.memory_mb, after.memory_mb),
    ):
        if first_mb is not None and last_mb is not None:
            yield FigureRow(label, f"{first_mb:.3g} MB", f"{last_mb:.3g} MB", _percent(first_mb, last_mb))
    for label, was, now in (
        ("Parameters", before.parameters, after.parameters),
        ("MACs", before.macs, after.macs),
        ("Activations", before.activations, after.activations),
    ):
        if report.zeros is None or was or now:
            yield FigureRow(label, human(was), human(now), _percent(was, now))


def _headed(metric_name: str) -> str:
    """The name of a metric at the beginning of a line."""
    name = title(metric_name)
    return name[:1].upper() + name[1:]


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else ""


def _flat(latency: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a latency comparison that the page lists; the environment's own are joined in."""
    environment = latency.get("environment")
    flat = {
        key: value for key, value in latency.items() if key not in ("environment", "elsewhere") and value is not None
    }
    return {**flat, **(environment if isinstance(environment, Mapping) else {})}


# ---------------------------------------------------------------------------------- figures, as inline SVG


def _charts(report: Report) -> list[Chart]:
    """Loss, metric and search, each only if there is something to show."""
    losses = {"loss": "loss", "task_loss": "task", "kd_loss": "distillation"}
    target = report.call.get("target_speedup")
    candidates = [
        line_chart("Loss", "epoch", {label: points_of(report.history, "epoch", key) for key, label in losses.items()}),
        line_chart(
            _headed(report.metric_name) + (" (dotted: shrinks)" if report.shrinks else ""),
            "epoch",
            {title(report.metric_name): points_of(report.history, "epoch", "metric")},
            reference=report.original.metric,
            reference_text="unpruned",
            marks=[float(row["epoch"]) for row in report.shrinks],
        ),
        line_chart(
            "Search: measured speed-up",
            "share of MACs kept",
            {"candidate": points_of(report.search, "macs_ratio", "speedup")},
            joined=False,
            reference=float(target) if is_number(target) else None,
            reference_text="target",
        ),
    ]
    return [chart for chart in candidates if chart is not None]


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
