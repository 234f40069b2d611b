"""Charts: the numbers of a report as positions in small drawings, for inline SVG."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from cpd.report.records import LayerRow

#: Stages that have a colour of their own.
HUES = 6
#: Parts that a stage is divided into at most.
MOST_PARTS = 8
#: Nodes that the page lists.
COSTLY = 25
#: The share of the time below which a stage is one of the others.
LITTLE = 0.01


@dataclass(frozen=True)
class Bar:
    """A layer's width before and after, in pixels of the chart; the colour of its stage."""

    row: LayerRow
    x: float
    width: float
    before: float
    after: float
    hue: int

    @property
    def change(self) -> str:
        """How much narrower the layer is, in per cent; nothing where it is as it was."""
        if self.row.before == self.row.after or not self.row.before:
            return ""
        return f"{100 * (self.row.after / self.row.before - 1):+.0f} %".replace("-", "−")


@dataclass(frozen=True)
class Widths:
    """The widths of all layers as one chart."""

    bars: tuple[Bar, ...]
    stages: tuple[tuple[str, int], ...]
    widest: int


@dataclass(frozen=True)
class Operator:
    """What the nodes of one operator take, and in per cent of the most costly."""

    op: str
    nodes: int
    before_ms: float
    after_ms: float
    before: float
    after: float


@dataclass(frozen=True)
class Part:
    """A stage's share of a stacked bar, in pixels of it; the others together have no colour of their own.

    Attributes:
        name: of the stage.
        seconds: it took.
        share: of all, in per cent.
        x: where it begins.
        width: of it.
        hue: its colour; 0: grey.
    """

    name: str
    seconds: float
    share: float
    x: float
    width: float
    hue: int


@dataclass(frozen=True)
class Line:
    """One curve of a chart, in pixels of its view box; its points may have texts beside them."""

    label: str
    points: tuple[tuple[float, float], ...]
    texts: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The corners as `points` of an SVG polyline."""
        return " ".join(f"{x},{y}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A small chart: curves, and the round numbers of both axes."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    reference: float | None = None
    reference_text: str = ""
    marks: tuple[float, ...] = ()


Points = Sequence[tuple[float, float]]


LEFT, RIGHT, TOP, BOTTOM = 46.0, 344.0, 10.0, 150.0
"""The plotting area inside a view box of 360 x 196."""
#: Steps between the numbers of an axis that are round, and those of a count.
_ROUND, _WHOLE = (1.0, 2.0, 2.5, 5.0, 10.0), (1.0, 2.0, 5.0, 10.0)
#: Parts that an axis is divided into, about.
_PARTS = 4


def width_bars(rows: Sequence[LayerRow]) -> Widths:
    """Bars side by side in a box of 720 x 160; heights are square roots, so that narrow layers are seen."""
    widest = max((row.before for row in rows), default=0) or 1
    names = _stages([row.name for row in rows])
    hues = {stage: index % HUES + 1 for index, stage in enumerate(dict.fromkeys(names))}
    slot = 720 / max(len(rows), 1)

    def height(width: int) -> float:
        return round(160 * math.sqrt(width / widest), 2)

    bars = tuple(
        Bar(row, round(index * slot, 2), round(0.8 * slot, 2), height(row.before), height(row.after), hues[stage])
        for index, (row, stage) in enumerate(zip(rows, names, strict=True))
    )
    return Widths(bars, tuple(hues.items()), widest)


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


def operator_rows(nodes: Sequence[Mapping[str, Any]]) -> list[Operator]:
    """Time by operator, the most costly first."""
    found: dict[str, list[float]] = {}
    for node in nodes:
        entry = found.setdefault(node["op"], [0, 0.0, 0.0])
        entry[:] = entry[0] + 1, entry[1] + (node["before_ms"] or 0.0), entry[2] + (node["after_ms"] or 0.0)
    most = max((max(entry[1:]) for entry in found.values()), default=0.0) or 1.0
    rows = [
        Operator(op, int(count), before, after, round(100 * before / most, 2), round(100 * after / most, 2))
        for op, (count, before, after) in found.items()
    ]
    return sorted(rows, key=lambda row: -row.before_ms)


def costly_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The nodes that take the most time, before or after."""
    return sorted(nodes, key=lambda node: -max(node["before_ms"] or 0.0, node["after_ms"] or 0.0))[:COSTLY]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def points_of(records: Iterable[Mapping[str, Any]], x: str, y: str) -> Points:
    """The points of the records that hold both finite numbers."""
    return [(float(r[x]), float(r[y])) for r in records if is_number(r.get(x)) and is_number(r.get(y))]


def stage_bar(seconds: Mapping[str, float]) -> list[Part]:
    """The stages one after another in a bar of 720 pixels; those that took little are told together, at the end."""
    taken = {name: value for name, value in seconds.items() if is_number(value) and value > 0}
    whole = sum(taken.values())
    if not math.isfinite(whole):
        return []
    largest = sorted(taken, key=lambda name: -taken[name])[:HUES]
    own = {name: taken[name] for name in taken if name in largest and taken[name] >= LITTLE * whole}
    parts = [(name, value, index) for index, (name, value) in enumerate(own.items(), 1)]
    if rest := [value for name, value in taken.items() if name not in own]:
        parts.append(("others", sum(rest), 0))
    found, x = list[Part](), 0.0
    for name, value, hue in parts:
        width = 720 * value / whole
        found.append(Part(name, value, 100 * value / whole, round(x, 2), round(width, 2), hue))
        x += width
    return found


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Points],
    *,
    texts: Sequence[str] = (),
    reference: float | None = None,
    reference_text: str = "",
    marks: Sequence[float] = (),
    counts: bool = False,
) -> Chart | None:
    """Scale the series to the plotting area; None if none has a point.

    Args:
        title: above it.
        x_label: below it.
        series: points by their name in the legend.
        texts: beside the points of a series.
        reference: where a line goes across.
        reference_text: what that line is.
        marks: where lines go up.
        counts: whether the numbers of the x axis are whole, as epochs are.
    """
    drawn = {label: points for label, points in series.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points] + list(marks)
    ys = [y for points in drawn.values() for _, y in points] + ([] if reference is None else [reference])
    to_x, x_ticks = _scale(xs, LEFT, RIGHT, _WHOLE if counts else _ROUND, 1.0 if counts else 0.0)
    to_y, y_ticks = _scale(ys, BOTTOM, TOP, _ROUND)
    lines = tuple(
        Line(label, tuple((to_x(x), to_y(y)) for x, y in points), tuple(texts)) for label, points in drawn.items()
    )
    at = None if reference is None else to_y(reference)
    return Chart(title, x_label, lines, x_ticks, y_ticks, at, reference_text, tuple(map(to_x, marks)))


def _scale(
    values: Sequence[float], start: float, end: float, multiples: Sequence[float], least: float = 0.0
) -> tuple[Callable[[float], float], tuple[tuple[float, str], ...]]:
    """A map of the values' range, widened to round numbers, onto [start, end], and a tick at each of those."""
    low, high = min(values), max(values)
    power = 10.0 ** math.floor(math.log10(rough)) if (rough := (high - low) / _PARTS) and rough < math.inf else 0.0
    if not power or high - low < 1e-9 * max(abs(low), abs(high)):  # one value, as good as; or beyond all bounds
        middle = round((start + end) / 2, 1)
        return lambda value: middle, ((middle, f"{low:.4g}"),)
    step = max(next(power * multiple for multiple in multiples if power * multiple >= rough * (1 - 1e-9)), least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)

    def place(value: float) -> float:
        return round(start + (value / step - first) / (last - first) * (end - start), 1)

    return place, tuple((place(k * step), _number(k * step, step)) for k in range(first, last + 1))


def _number(value: float, step: float) -> str:
    """A multiple of a step, to the places that tell it from the next."""
    places = next((places for places in range(7) if math.isclose(step, round(step, places), rel_tol=1e-6)), None)
    if places is None or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.{places}f}".replace("-", "−")
