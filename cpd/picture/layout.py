"""Layered layout: where the nodes of a directed acyclic graph stand, and how its edges run past them.

Rows follow the longest path from the top. The longest chain of nodes stands in column 0, every further chain in the
first column to its right that is free. An edge runs straight down a free column, through the gaps between the rows,
or in a lane to the left of its column; never through a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import networkx as nx

Point: TypeAlias = tuple[float, float]
#: A vertical run: the column it passes on the left, the node it comes from, and how it leaves that.
LaneKey: TypeAlias = tuple[int, Any, str]
#: A horizontal run: the row it passes above, whether it arrives (1) or leaves (0), and the node it does that at.
TrackKey: TypeAlias = tuple[int, int, Any]

MARGIN = 16.0
GAP = 16.0
TRACK = 7.0
LANE = 9.0
BAND_TOP, BAND_BOTTOM = 9.0, 9.0
PORT = 6.0
"""How far above or below the middle of a node's side an edge arrives or leaves."""


@dataclass(frozen=True)
class Box:
    """Where a node stands."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """The horizontal centre."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Layout:
    """A laid-out graph.

    Attributes:
        boxes: of each node.
        routes: of each edge, the corners of its line from the first node to the second.
        bands: top and bottom of each band, in the order given.
        width: of the whole.
        height: of the whole.
    """

    boxes: dict[Any, Box]
    routes: dict[tuple[Any, Any], tuple[Point, ...]]
    bands: tuple[tuple[float, float], ...]
    width: float
    height: float


def rows_of(graph: nx.DiGraph) -> dict[Any, int]:
    """The row of each node: below all that it follows from; what follows from nothing, just above its first use."""
    rows: dict[Any, int] = {}
    for node in nx.lexicographical_topological_sort(graph, key=_order(graph)):
        rows[node] = max((rows[source] + 1 for source in graph.predecessors(node)), default=0)
    for node in graph:
        if not graph.pred[node] and graph.succ[node]:
            rows[node] = min(rows[target] for target in graph.successors(node)) - 1
    return rows


def layout(
    graph: nx.DiGraph,
    rows: Mapping[Any, int],
    widths: Mapping[Any, float],
    height: float,
    bands: Sequence[tuple[int, int]] = (),
) -> Layout:
    """Lay `graph` out.

    Args:
        graph: an acyclic graph; the order of its nodes breaks ties.
        rows: the row of each node, from `rows_of`.
        widths: of each node.
        height: of every node.
        bands: first and last row of each band, which get room for a frame; they must not overlap.
    """
    columns = _columns(graph, rows)
    taken = {(columns[node], rows[node]) for node in graph}
    runs = _Runs(rows, columns, taken)
    for edge in graph.edges:
        runs.add(*edge)
    lanes = runs.lanes()
    count = max(columns.values(), default=-1) + 1
    x, left, wide = MARGIN, [], []
    for column in range(count):
        used = max((lane + 1 for key, lane in lanes.items() if key[0] == column), default=0)
        x += 8 + LANE * used if used or column else 0
        left.append(x)
        wide.append(max(widths[node] for node in graph if columns[node] == column))
        x += wide[-1] + 10

    def middle(node: Any) -> float:
        return left[columns[node]] + wide[columns[node]] / 2

    def lane_x(key: LaneKey) -> float:
        return left[key[0]] - 10 - LANE * lanes[key]

    tracks = runs.tracks(middle, lane_x)
    tops, gaps, y = [], [], MARGIN
    starts, ends = {first for first, _ in bands}, {last for _, last in bands}
    for row in range(max(rows.values(), default=-1) + 1):
        y += BAND_BOTTOM if row - 1 in ends else 0
        used = max((track + 1 for (gap, _, _), track in tracks.items() if gap == row), default=0)
        room = max(GAP, 8 + TRACK * used) if row else 0
        gaps.append((y, room / (used + 1)))
        y += room + (BAND_TOP if row in starts else 0)
        tops.append(y)
        y += height
    boxes = {
        node: Box(middle(node) - widths[node] / 2, tops[row], widths[node], height)
        for node, row in rows.items()
        if node in columns
    }

    def track_y(key: TrackKey) -> float:
        return gaps[key[0]][0] + gaps[key[0]][1] * (tracks[key] + 1)

    routes = {edge: runs.route(edge, boxes, lane_x, track_y) for edge in graph.edges}
    frames = tuple((tops[first] - BAND_TOP, tops[last] + height + BAND_BOTTOM) for first, last in bands)
    last = BAND_BOTTOM if len(tops) - 1 in ends else 0
    return Layout(boxes, routes, frames, x - 10 + MARGIN, y + last + MARGIN)


def _order(graph: nx.DiGraph) -> Callable[[Any], int]:
    place = {node: index for index, node in enumerate(graph)}
    return place.__getitem__


def _columns(graph: nx.DiGraph, rows: Mapping[Any, int]) -> dict[Any, int]:
    """The longest chain in column 0, the longest of the rest in the first column that is free, and so on."""
    place = _order(graph)
    order = list(nx.lexicographical_topological_sort(graph, key=place))
    columns: dict[Any, int] = {}
    occupied: dict[int, list[tuple[int, int]]] = {}
    while len(columns) < len(order):
        chain = _longest(graph, [node for node in order if node not in columns], place)
        column = 0
        if columns:
            above = [rows[source] + 1 for source in graph.predecessors(chain[0])]
            below = [rows[target] - 1 for target in graph.successors(chain[-1])]
            span = (min([rows[chain[0]], *above]), max([rows[chain[-1]], *below]))
            column = 1
            while any(low <= span[1] and span[0] <= high for low, high in occupied.get(column, ())):
                column += 1
            occupied.setdefault(column, []).append(span)
        columns.update(dict.fromkeys(chain, column))
    return columns


def _longest(graph: nx.DiGraph, nodes: Sequence[Any], place: Callable[[Any], int]) -> list[Any]:
    """The longest path among `nodes` (in topological order); of equal ones, that of the earliest nodes."""
    length: dict[Any, int] = {}
    before: dict[Any, Any] = {}
    among = set(nodes)
    for node in nodes:
        sources = sorted((source for source in graph.predecessors(node) if source in among), key=place)
        best = max(sources, key=lambda source: length[source], default=None)
        length[node] = 1 + (length[best] if best is not None else 0)
        before[node] = best
    node = max(nodes, key=lambda node: length[node])
    chain = []
    while node is not None:
        chain.append(node)
        node = before[node]
    return chain[::-1]


@dataclass
class _Runs:
    """How each edge runs: straight, by way of gaps, or in a lane; and which lanes and tracks that takes."""

    rows: Mapping[Any, int]
    columns: Mapping[Any, int]
    taken: set[tuple[int, int]]
    kinds: dict[tuple[Any, Any], str] = field(default_factory=dict)
    spans: dict[LaneKey, tuple[float, float]] = field(default_factory=dict)

    def add(self, start: Any, end: Any) -> None:
        """Choose how one edge runs."""
        a, b, first, last = self.columns[start], self.columns[end], self.rows[start], self.rows[end]

        def free(column: int) -> bool:
            return not any((column, row) in self.taken for row in range(first + 1, last))

        if a == b and free(a):
            self.kinds[start, end] = "straight"
        elif a < b and free(b):
            self.kinds[start, end] = "fork"
        elif a > b and free(a):
            self.kinds[start, end] = "join"
        else:
            kind = "side" if a == b else "lane"
            reach = (first + 0.1, last - 0.1) if a == b else (first + 0.5, last - 0.5)
            self.kinds[start, end] = kind
            key = (max(a, b), start, kind)
            known = self.spans.get(key, reach)
            self.spans[key] = (known[0], max(known[1], reach[1]))

    def lanes(self) -> dict[LaneKey, int]:
        """A lane for each vertical run, short ones nearest to the column; runs of one source share theirs."""
        lanes: dict[LaneKey, int] = {}
        ordered = sorted(self.spans.items(), key=lambda item: item[1][1] - item[1][0])
        for key, (low, high) in ordered:
            others = [
                lanes[other]
                for other in lanes
                if other[0] == key[0] and self.spans[other][0] < high and low < self.spans[other][1]
            ]
            lanes[key] = next(lane for lane in range(len(others) + 1) if lane not in others)
        return lanes

    def _key(self, edge: tuple[Any, Any]) -> LaneKey:
        return (max(self.columns[edge[0]], self.columns[edge[1]]), edge[0], self.kinds[edge])

    def tracks(self, middle: Callable[[Any], float], lane_x: Callable[[LaneKey], float]) -> dict[TrackKey, int]:
        """For each gap above a row, a height for each horizontal run in it: those that leave a node on top."""
        reach: dict[TrackKey, list[float]] = {}
        for edge, kind in self.kinds.items():
            start, end = edge
            leave, arrive = (self.rows[start] + 1, 0, start), (self.rows[end], 1, end)
            if kind == "fork":
                reach.setdefault(leave, []).extend((middle(start), middle(end)))
            elif kind == "join":
                reach.setdefault(arrive, []).extend((middle(start), middle(end)))
            elif kind == "lane":
                reach.setdefault(leave, []).extend((middle(start), lane_x(self._key(edge))))
                reach.setdefault(arrive, []).extend((middle(end), lane_x(self._key(edge))))
        tracks: dict[TrackKey, int] = {}
        for key, xs in sorted(reach.items(), key=lambda item: item[0][:2]):
            others = [
                tracks[other]
                for other in tracks
                if other[0] == key[0] and min(reach[other]) < max(xs) and min(xs) < max(reach[other])
            ]
            tracks[key] = max(others, default=-1) + 1
        return tracks

    def route(
        self,
        edge: tuple[Any, Any],
        boxes: Mapping[Any, Box],
        lane_x: Callable[[LaneKey], float],
        track_y: Callable[[TrackKey], float],
    ) -> tuple[Point, ...]:
        """The corners of an edge's line."""
        start, end = edge
        one, two, kind = boxes[start], boxes[end], self.kinds[edge]
        down, up = (one.middle, one.y + one.height), (two.middle, two.y)
        leave, arrive = (self.rows[start] + 1, 0, start), (self.rows[end], 1, end)
        if kind == "straight":
            return (down, up)
        if kind in ("fork", "join"):
            y = track_y(leave if kind == "fork" else arrive)
            return (down, (down[0], y), (up[0], y), up)
        x = lane_x(self._key(edge))
        if kind == "side":
            first, last = one.y + one.height / 2 + PORT, two.y + two.height / 2 - PORT
            return ((one.x, first), (x, first), (x, last), (two.x, last))
        first, last = track_y(leave), track_y(arrive)
        return (down, (down[0], first), (x, first), (x, last), (up[0], last), up)
