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
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import jinja2

from cpd.files.reading import conform
from cpd.model.sources import BY_NAME
from cpd.report.charts import (
    Chart,
    costly_nodes,
    is_number,
    line_chart,
    operator_rows,
    points_of,
    stage_bar,
    width_bars,
)
from cpd.report.metrics import Metric, Step, trail
from cpd.report.records import (
    OBJECTS,
    BranchRow,
    Figures,
    GroupRow,
    LatencyRow,
    LayerRow,
    NodeRow,
    SearchRow,
    ShrinkRow,
    SparseRow,
    TriedRow,
    plain_fields,
    runtime_title,
)
from cpd.tasks.metric import UNNAMED

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
    search: tuple[SearchRow, ...]


class FigureRow(NamedTuple):
    """One line of the before/after table, ready to print."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of every stage of one compression.

    Attributes:
        call: The arguments of `cpd.compress` as passed (target, seed, threads, ...), by name. Of data, functions and
            other objects only the names are kept.
        model_class: Qualified name of the model's class.
        source: The name from which a fresh model can be built (`timm:resnet18`); None if it is not known.
        criterion: The criterion that scored channels.
        criterion_reason: Why this criterion was used.
        normalization: What scores were divided by (`memory`, `macs`, `parameters`, `latency`, `none`).
        original: Figures of the original model.
        result: Figures of the compressed model.
        latency: `LatencyComparison.to_dict()`; None if nothing was timed. If the target was measured, `elsewhere` lists
            the same result in other installed runtimes.
        groups: One row for each coupling group.
        branches: One row for each branch, if branches could be removed.
        layers: One row for each layer with weights, in the order of the model's modules.
        nodes: One dict for each node that the runtime runs (name, op, before_ms, after_ms; None for a model without
            that node).
        shrinks: One dict for each pruning step (epoch, step, share, macs, parameters, plan_hash).
        checks: {name of a check: the largest relative error found}.
        history: One dict for each training epoch (epoch, loss, task_loss, kd_loss, lr, steps_per_second, metric, kept).
            The one of epoch 0 holds the figures from before the training (metric and, if known, before, pruned,
            recovery).
        search: One dict for each measured candidate (scope, macs_ratio, predicted, speedup, attained, verdict).
        seconds: Wall-clock seconds of each stage, without the stages inside it.
        environment: Versions and hardware.
        notes: Sentences that explain what was done.
        metric_name: Name of the metric, with its unit in brackets.
        job: The function that was called: "compress" or "sparsify".
        sparsity: One row for each layer whose weights can be zero, if the model was made sparse.
        stored: {form in which the weights are stored: bytes}, if the model was made sparse.
        tried: One dict for each speed-up that was tried for `max_drop` (`cpd.report.records.TriedRow`).
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
        """The figures before and after compression."""
        figures = (f"{row.label} {row.before} -> {row.after}" for row in self.figure_rows)
        return f"{type(self).__name__}({self.model_class}: {', '.join(figures)})"

    @property
    def speedup(self) -> float | None:
        """Measured latency of the original divided by that of the result; None if nothing was timed."""
        if self.latency is not None and self.latency.get("speedup") is not None:
            return float(self.latency["speedup"])
        before, after = self.original.latency_ms, self.result.latency_ms
        return before / after if before is not None and after else None

    @property
    def metric_drop(self) -> float | None:
        """Metric of the original minus that of the result: positive if the result is worse."""
        before, after = self.original.metric, self.result.metric
        return before - after if before is not None and after is not None else None

    @property
    def trail(self) -> tuple[Step, ...]:
        """The metric after each stage: before, after pruning, compensated, trained. Empty if there is no metric."""
        runtime = str((self.latency or {}).get("runtime", ""))
        return trail(_metric(self), self.history, self.original.metric, self.result.metric, runtime)

    @property
    def asked(self) -> str:
        """The target and what was reached, in a sentence."""
        return _asked(self)

    @property
    def zeros(self) -> float | None:
        """The share of zeros among all weights that can be sparse; None if the model was not made sparse."""
        elements = sum(row.elements for row in self.sparsity)
        return sum(row.after for row in self.sparsity) / elements if elements else None

    @property
    def zeros_before(self) -> float:
        """The share of zeros among the same weights of the original."""
        return sum(row.before for row in self.sparsity) / max(1, sum(row.elements for row in self.sparsity))

    @property
    def figure_rows(self) -> tuple[FigureRow, ...]:
        """The table of figures before and after, without rows for what was not measured."""
        return tuple(_figure_rows(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types. NaN and infinity become None; objects that JSON cannot hold become text."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Rebuild a report from the dict that `to_dict` returned.

        Raises:
            ArtifactError: If a field is missing or has another form than `to_dict` writes.
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
            search=[{key: row.get(key) for key in SearchRow.__annotations__} for row in self.search],
            stages=stage_bar(self.seconds),
            scale=_metric(self).scale,
            latency=_timing(self.latency or {}),
            environment=_surroundings(self),
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
            scale=_metric(self).scale,
            factory=_factory(self.source),
        )


def sweep_page(original: Figures | None, points: Sequence[SweepPoint], metric_name: str) -> str:
    """A sweep as one self-contained HTML page.

    Args:
        original: figures of the unpruned model; None where no speed-up was reached.
        points: one a speed-up.
        metric_name: of what was evaluated.
    """
    reached = [(f"{point.asked:g}×", point.figures) for point in points if point.figures is not None]
    every = [*([] if original is None else [("original", original)]), *reached]
    metric = Metric.of(metric_name, None if original is None else original.metric)
    by_metric = bool(every) and all(figures.metric is not None for _, figures in every)
    full = max(every[0][1].macs, 1) if every else 1
    found = sorted(
        (f.latency_ms or 0.0, metric.shown(f.metric or 0.0) if by_metric else 100 * f.macs / full, text)
        for text, f in every
    )
    chart = line_chart(
        f"{metric.axis if by_metric else 'MACs left [%]'} against measured latency",
        "measured latency [ms]",
        {"models": [(x, y) for x, y, _ in found]},
        texts=[text for _, _, text in found],
        reference=metric.shown(original.metric) if by_metric and original and original.metric is not None else None,
    )
    return _template("sweep.html.j2").render(
        original=original, points=points, charts=[] if chart is None else [chart], by_metric=by_metric,
        metric=metric,
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
        metric = _metric(report)
        lost = "not known" if report.metric_drop is None else f"{metric.shown(report.metric_drop):.3g}"
        fast = "" if report.speedup is None else f", {report.speedup:.2f} times as fast"
        most = f"{metric.shown(value):g}"
        return f"Asked for the fastest that loses at most {most} of {metric.title}; found {lost}{fast}."
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
        metric = _metric(report)
        first, last = metric.written(before.metric), metric.written(after.metric)
        yield FigureRow(metric.headed, first, last, metric.change(before.metric, after.metric))
    if before.latency_ms is not None and after.latency_ms is not None:
        word = "" if report.zeros is not None else " faster"
        faster = "" if report.speedup is None else f"{report.speedup:.2f}×{word}"
        yield FigureRow(
            f"{runtime_title(report.latency)} latency", _ms(before.latency_ms), _ms(after.latency_ms), faster
        )
    if report.zeros is not None:
        yield FigureRow(
            "Weights that are zero", f"{100 * report.zeros_before:.1f} %", f"{100 * report.zeros:.1f} %", ""
        )
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


def _metric(report: Report) -> Metric:
    return Metric.of(report.metric_name, report.original.metric)


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else ""


def _timing(latency: Mapping[str, Any]) -> dict[str, str]:
    """What the page lists of a latency comparison, ready to print; where it was timed is the environment's."""
    found = {}
    for words, key in (("original", "original"), ("compressed", "candidate")):
        if is_number(ms := latency.get(f"{key}_ms")):
            p90 = latency.get(f"{key}_p90_ms")
            found[words] = _ms(ms) + (f" (nine of ten runs below {_ms(p90)})" if is_number(p90) else "")
    if is_number(speedup := latency.get("speedup")):
        low, high = latency.get("speedup_low"), latency.get("speedup_high")
        known = is_number(low) and is_number(high)
        found["speed-up"] = f"{speedup:.2f}×" + (f" (95 % interval {low:.2f} to {high:.2f})" if known else "")
    if latency:
        found["runtime"] = runtime_title(latency)
    for words, key in (("threads", "threads"), ("pairs of runs timed in turn", "runs")):
        if is_number(value := latency.get(key)):
            found[words] = f"{value:,}"
    if is_number(difference := latency.get("difference")):
        found["outputs against PyTorch, largest relative error"] = f"{difference:.1e}"
    return found


def _surroundings(report: Report) -> dict[str, Any]:
    """Versions and hardware, once: those of the run, and what the timing adds to them."""
    timed = (report.latency or {}).get("environment")
    return {**(timed if isinstance(timed, Mapping) else {}), **report.environment}


# ---------------------------------------------------------------------------------- figures, as inline SVG


def _charts(report: Report) -> list[Chart]:
    """Loss and metric, each only if there is something to show."""
    losses = {"loss": "loss", "task_loss": "task", "kd_loss": "distillation"}
    metric, original = _metric(report), report.original.metric
    values = [(x, metric.shown(y)) for x, y in points_of(report.history, "epoch", "metric")]
    candidates = [
        line_chart(
            "Loss", "epoch",
            {label: points_of(report.history, "epoch", key) for key, label in losses.items()}, counts=True,
        ),
        line_chart(
            metric.axis + (" (dotted: shrinks)" if report.shrinks else ""),
            "epoch",
            {metric.title: values},
            reference=None if original is None else metric.shown(original),
            reference_text="unpruned",
            marks=[float(row["epoch"]) for row in report.shrinks],
            counts=True,
        ),
    ]  # fmt: skip
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
    environment.filters.update(
        cell=_cell, show=_show, deviation=_deviation, human=human, ms=_ms, base=os.path.basename,
        times=_times, ranked=_ranked, percent=_percentage, seconds=_seconds,
    )  # fmt: skip
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


def _times(value: float | None) -> str:
    """A speed-up; nothing where it is not known."""
    return f"{value:.2f}×" if is_number(value) else ""


def _ranked(scope: str) -> str:
    """How channels were compared, in words."""
    return {"global": "over all groups", "group": "group by group"}.get(scope, scope)


def _percentage(value: float | None) -> str:
    """A share, in per cent; nothing where it is not known."""
    return f"{100 * value:.1f} %" if is_number(value) else ""


def _seconds(value: float) -> str:
    """Seconds to what matters: `3.2 s`, `14 s`, `1 h 02 min`."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _show(value: Any) -> str:
    """A value of a report's dict for reading: floats to four digits, sequences joined."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_show, value))
    return str(value)
