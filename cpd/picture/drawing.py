"""A picture of the coupling groups: the model's layers from top to bottom, each in the colour of its group.

    the traced operations -> layers and the ops that join them -> rows and columns (`cpd.picture.layout`) -> SVG or HTML

Nodes are the layers that own parameters and the ops that join several activations; all else is passed through.
The file is self-contained.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import os
import re
import tempfile
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import networkx as nx
from torch import nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.coupling.comb import Comb, Group
from cpd.coupling.cost import split_reason
from cpd.errors import ArtifactError, InputError
from cpd.picture.layout import Box, Layout, Point, layout, rows_of
from cpd.rules import arguments
from cpd.trace.graph import op_name, owner, shape_of

SUFFIXES = (".svg", ".html")
MARK = "cpd: a picture of coupling groups"
"""Every picture names itself so, which is how a later one knows that it may take its place."""

GREY, PLAIN = "#8a9399", "#6b757b"
FIRST = (
    "#1f77b4", "#e8710a", "#2a9d4a", "#c2378a", "#7a52c7", "#b58900", "#0b9aa5", "#d64545", "#5b8c1a", "#8c5a3c",
    "#4c63d2", "#a83fc0",
)  # fmt: skip

_CONVS = {f"conv{rank}d": rank for rank in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{rank}d": rank for rank in (1, 2, 3)}
_CHANNEL_1 = {"batch_norm", "group_norm", "instance_norm"}
_LAST = {"linear", "layer_norm", "rms_norm"}
_WEIGHTED = {*_CONVS, *_TRANSPOSED, *_CHANNEL_1, *_LAST, "embedding"}
_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "mm", "einsum", "baddbmm"}
_KINDS = {"scaled_dot_product_attention": "attention", "bmm": "matmul", "mm": "matmul", "baddbmm": "matmul"}

ROW = 26.0
MONO, SANS = 7.3, 6.3
"""Pixels that a character of a name, and of the other texts, takes at most (on average, for the latter)."""
LONGEST_NAME, LONGEST_KIND = 26, 18
LEGEND_WIDTH, LEGEND_CHARACTERS = 440.0, 64
#: Colours shown of a folded block.
CHIPS = 12
#: Layers and operations from which on a page begins with its blocks folded.
MANY = 120


def check_path(path: str | os.PathLike[str]) -> Path:
    """Make sure that a picture can be written to `path`, before any work is done.

    Raises:
        InputError: if it ends in neither `.svg` nor `.html`, is a folder, lies in a folder that is not there or cannot
            be written to, or is a file that is not an earlier picture.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"A picture is an .svg or .html file; got {target}.")
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file for the picture.")
    if not target.parent.is_dir():
        raise InputError(f"The folder {target.parent} of the picture {target.name} does not exist; create it first.")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        head = target.read_bytes()[:400] if target.exists() else b""
    except OSError as error:
        raise InputError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    if head and MARK.encode() not in head:
        raise InputError(f"{target} exists and is not a picture that cpd drew; remove it or give another name.")
    return target


def draw(comb: Comb, path: str | os.PathLike[str]) -> Path:
    """Draw the grouped graph of a model to a self-contained `.svg` or `.html` file.

    Args:
        comb: what `cpd.comb` found.
        path: the file; an earlier picture there is replaced.

    Returns:
        The path written.

    Raises:
        InputError: if `check_path` refuses the path.
        ArtifactError: if the file cannot be written.
    """
    target = check_path(path)
    text = render(comb, html=target.suffix.lower() == ".html")
    try:
        target.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ArtifactError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    return target


def render(comb: Comb, *, html: bool) -> str:
    """The picture as the text of an HTML page or of an SVG file."""
    graph = contract(comb)
    shares = comb.open_share
    palette = colours(comb.groups)
    scene = _scene(graph, comb)
    entries = _legend(comb.groups, palette)
    name = type(comb.model).__name__
    summary = (
        f"{len(comb.open)} of {len(comb.groups)} groups are open: they hold {shares['parameters']:.1%} of the "
        f"parameters and {shares['macs']:.1%} of the MACs."
    )
    lines = _placed(entries)
    values = {
        "mark": MARK,
        "title": name,
        "summary": summary,
        "scene": scene,
        "entries": entries,
        "lines": lines,
        "html": html,
        "folded": len(graph) > MANY,
        "width": scene.width if html else scene.width + LEGEND_WIDTH,
        "height": scene.height if html else max(scene.height, lines[-1].y + 24 if lines else 0, 120),
        "legend_x": scene.width + 16,
    }
    return _environment().get_template("picture.html.j2" if html else "picture.svg.j2").render(**values)


# ---------------------------------------------------------------------------------- layers and joining ops


@dataclass
class Item:
    """A node of the picture: a layer, an op that joins activations, the input or the output.

    Attributes:
        path: the layer's path, or the path of the module that the op belongs to.
        name: how it is called in the picture; "" for an op.
        role: "layer", "op" or "end".
        nodes: the operations it stands for, in order.
        parameters: names of the parameters it reads.
    """

    path: str
    name: str
    role: str
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, None] = field(default_factory=dict)
    kind: str = ""
    before: str = ""
    after: str = ""
    groups: tuple[int, ...] = ()

    @property
    def main(self) -> Node:
        """The operation that names the kind and the widths."""
        return next((node for node in self.nodes if _base(node) in _WEIGHTED), self.nodes[-1])

    @property
    def widths(self) -> str:
        """`in → out`, or the one width where both are the same or only one is known."""
        return f"{self.before} → {self.after}" if self.before not in ("", self.after) else self.after


def contract(comb: Comb) -> nx.DiGraph:
    """The graph of the picture: nodes are numbers with an `item`, edges the flow of activations."""
    graph = nx.DiGraph()
    leaves = {
        path
        for path, module in comb.model.named_modules(remove_duplicate=False)
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    }
    parameters = {name for name, _ in comb.model.named_parameters(remove_duplicate=False)}
    stands: dict[Node, int] = {}
    reads: dict[Node, dict[str, None]] = {}
    calls: dict[str, int] = {}

    def add(item: Item) -> int:
        graph.add_node(len(graph), item=item)
        return len(graph) - 1

    for node in comb.operations.nodes:
        sources = list(dict.fromkeys(source for source in node.all_input_nodes if source in stands))
        if node.op == "placeholder":
            if node.name in comb.operations.inputs and node.users:
                shape = " × ".join(map(str, shape_of(node)))
                stands[node] = add(Item(node.name, f"input {node.name}", "end", [node], after=shape))
            elif comb.operations.tensors.get(node.name) in parameters:
                reads[node] = {comb.operations.tensors[node.name]: None}
            continue
        if node.op == "output":
            shape = " × ".join(map(str, shape_of(sources[0]))) if len(sources) == 1 else f"{len(sources)} tensors"
            index = add(Item("output", "output", "end", [node], after=shape))
            graph.add_edges_from((stands[source], index) for source in sources)
            continue
        own = {name: None for source in node.all_input_nodes if source not in stands for name in reads.get(source, ())}
        if not sources:
            reads[node] = own
            continue
        call = next(reversed(node.meta.get("nn_module_stack") or {"": None})) if owner(node) in leaves else None
        reached = dict.fromkeys(stands[source] for source in sources)
        joins = len(reached) > 1 or (_base(node) in _PRODUCTS and len(sources) > 1)
        known = calls.get(call) if call is not None else None
        if known is not None and not any(nx.has_path(graph, known, other) for other in reached if other != known):
            index = known
        elif call is not None:
            index = calls[call] = add(Item(owner(node), owner(node) or type(comb.model).__name__, "layer"))
        elif own:
            name = _layer_name(node, own, leaves)
            index = add(Item(name, name, "layer"))
        elif joins:
            index = add(Item(owner(node), "", "op"))
        else:
            stands[node] = next(iter(reached))
            continue
        item: Item = graph.nodes[index]["item"]
        item.nodes.append(node)
        item.parameters.update(own)
        graph.add_edges_from((other, index) for other in reached if other != index)
        stands[node] = index
    _drop_unused(graph)
    _describe(graph, comb)
    return graph


def _drop_unused(graph: nx.DiGraph) -> None:
    """Remove ops that lead nowhere, such as a mean of attention weights that nobody reads; layers stay."""
    for index in sorted(graph, reverse=True):
        if graph.nodes[index]["item"].role == "op" and not graph.succ[index]:
            graph.remove_node(index)


def _layer_name(node: Node, own: Mapping[str, None], leaves: set[str]) -> str:
    """The module that owns the parameters; a parameter that a larger module uses directly is named itself."""
    modules = {name.rpartition(".")[0] for name in own}
    if len(modules) == 1 and modules <= leaves and "" not in modules:
        return modules.pop()
    return owner(node) if owner(node) and _base(node) in _WEIGHTED else next(iter(own))


def _base(node: Node) -> str:
    return op_name(node).rstrip("_")


def _describe(graph: nx.DiGraph, comb: Comb) -> None:
    """Kind, widths and groups of every item."""
    number = {group.axis: index for index, group in enumerate(comb.groups)}
    modules = dict(comb.model.named_modules(remove_duplicate=False))
    repeats: dict[str, int] = {}
    for index in graph:
        item: Item = graph.nodes[index]["item"]
        if item.role == "end":
            continue
        main, last = item.main, item.nodes[-1]
        item.kind = _kind(item, modules.get(item.path))
        dims = _channels(comb, last, _base(main) if main is last else "", number)
        item.after = _sizes(dims)
        item.groups = tuple(dict.fromkeys(number[axis] for dim in dims for axis in axes.leaves(dim) if axis in number))
        if item.role == "layer":
            source = next((source for source in main.all_input_nodes if source in comb.context.values), None)
            if source is not None:
                item.before = _sizes(_channels(comb, source, _base(main), number))
            repeats[item.name] = repeats.get(item.name, 0) + 1
            if repeats[item.name] > 1:
                item.name += f" ({repeats[item.name]})"


def _channels(comb: Comb, node: Node, op: str, number: Mapping[axes.Axis, int]) -> list[Dim]:
    """The dimensions of a node's tensor that hold its channels."""
    value: Any = comb.context.values.get(node, ())
    if isinstance(value, list):
        value = value[0] if value else ()
    dims = [axes.resolve(dim) for dim in value]
    if op == "scaled_dot_product_attention" and len(dims) == 4:
        return [dims[1], dims[3]]
    space = _CONVS.get(op) or _TRANSPOSED.get(op)
    place = -1 - space if space else 1 if op in _CHANNEL_1 else -1 if op in _LAST else None
    if place is not None and len(dims) >= (place + 1 if place > 0 else -place):
        return [dims[place]]
    grouped = [dim for dim in dims if any(axis in number for axis in axes.leaves(dim))]
    free = [dim for dim in grouped if any(axis in number and axis.frozen is None for axis in axes.leaves(dim))]
    return list(dict.fromkeys(free)) or sorted(grouped, key=lambda dim: -dim.size)[:1]


def _sizes(dims: Sequence[Dim]) -> str:
    return " × ".join(str(dim.size) for dim in dims)


def _kind(item: Item, module: nn.Module | None) -> str:
    """What a layer or op does, in one or two words."""
    op = _base(item.main)
    if op in _CONVS or op in _TRANSPOSED:
        bound = arguments(item.main)
        shape = shape_of(bound["weight"])
        word = "deconv" if op in _TRANSPOSED else "conv"
        if bound.get("groups", 1) > 1:
            word = f"depthwise {word}" if shape[1] == 1 else f"grouped {word}"
        return f"{word} {'×'.join(map(str, shape[2:]))}"
    if item.role == "layer" and op not in _WEIGHTED and len(item.nodes) > 1 and module is not None:
        return type(module).__name__
    return _KINDS.get(op, op.replace("_", " ").strip())


# ---------------------------------------------------------------------------------- what is drawn where


@dataclass(frozen=True)
class Shape:
    """A node as drawn."""

    box: Box
    role: str
    path: str
    name: str
    kind: str
    widths: str
    groups: str
    colour: str
    stripes: tuple[tuple[float, float, str], ...]
    dashed: bool
    title: str


@dataclass(frozen=True)
class Line:
    """An edge as drawn: its path and its arrow head."""

    path: str
    head: str
    colour: str
    groups: str


@dataclass(frozen=True)
class Frame:
    """The box around a block of the model, or around a run of blocks of one parent; a page can fold it.

    Attributes:
        level: 1 of a block, 2 of a run of blocks.
        y: its top.
        width: of the box.
        height: of the box.
        label: the module's path.
        layers: how many layers are inside.
        colours: of the open groups inside, the widest first.
    """

    level: int
    y: float
    width: float
    height: float
    label: str
    layers: int
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """All that is drawn of the graph."""

    shapes: tuple[Shape, ...]
    lines: tuple[Line, ...]
    frames: tuple[Frame, ...]
    width: float
    height: float


def _scene(graph: nx.DiGraph, comb: Comb) -> Scene:
    items: dict[int, Item] = {index: graph.nodes[index]["item"] for index in graph}
    palette = colours(comb.groups)
    rows = rows_of(graph)
    blocks = _blocks(items, rows, comb.model)
    inside = {index: prefix for prefix, members in blocks.items() for index in members}
    names = {index: _short(item, inside.get(index)) for index, item in items.items()}
    widths = {index: _width(item, names[index]) for index, item in items.items()}
    widest = max((widths[index] for index, item in items.items() if item.role == "layer"), default=120)
    widths = {index: widest if items[index].role == "layer" else width for index, width in widths.items()}
    bands = [(min(rows[i] for i in members), max(rows[i] for i in members)) for members in blocks.values()]
    laid = layout(graph, rows, widths, ROW, bands)
    gutter = max((_text(prefix, 24, MONO) + 14 for prefix in blocks), default=0)
    width = laid.width + gutter
    shapes = tuple(_shape(items[i], names[i], laid.boxes[i], comb.groups, palette) for i in graph)

    def frame(level: int, label: str, members: Sequence[int], top: float, bottom: float) -> Frame:
        found = {number for index in members for number in items[index].groups if comb.groups[number].frozen is None}
        widest = sorted(found, key=lambda number: (-comb.groups[number].size, number))
        layers = sum(items[index].role == "layer" for index in members)
        chips = tuple(palette[number] for number in widest[:CHIPS])
        return Frame(level, _round(top), _round(width - 16), _round(bottom - top), _cut(label, 24), layers, chips)

    spans = dict(zip(blocks, laid.bands, strict=True))
    frames = [frame(1, prefix, members, *spans[prefix]) for prefix, members in blocks.items()]
    for parent, run in _runs(list(blocks)):
        members = [index for prefix in run for index in blocks[prefix]]
        frames.append(frame(2, parent, members, spans[run[0]][0], spans[run[-1]][1]))
    lines = tuple(_lines(items, laid, comb.groups, palette))
    return Scene(shapes, lines, tuple(frames), _round(width), _round(laid.height))


def _runs(blocks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Blocks that follow one another and have one parent: (its path, theirs); at least two, and not all there are."""
    runs = [(parent, list(run)) for parent, run in itertools.groupby(blocks, lambda path: path.rpartition(".")[0])]
    return [(parent, run) for parent, run in runs if parent and 1 < len(run) < len(blocks)]


def _blocks(items: Mapping[int, Item], rows: Mapping[int, int], model: nn.Module) -> dict[str, list[int]]:
    """Blocks of the model whose rows nothing else stands in: {path: its nodes}.

    A block is a module of its own class in a list or sequence (a residual block, say), else a top-level module;
    where the rows of several overlap, the next larger one is tried.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    choices = {index: _enclosing(item.path, item.role, modules) for index, item in items.items()}
    while True:
        blocks: dict[str, list[int]] = {}
        for index, paths in choices.items():
            if paths:
                blocks.setdefault(paths[0], []).append(index)
        spans = {
            path: (min(rows[i] for i in members), max(rows[i] for i in members)) for path, members in blocks.items()
        }
        mixed = {
            path
            for path, (low, high) in spans.items()
            if any(low <= rows[index] <= high and paths[:1] != [path] for index, paths in choices.items())
        }
        if not mixed:
            kept = {path: members for path, members in blocks.items() if len(members) > 1}
            return dict(sorted(kept.items(), key=lambda block: spans[block[0]]))
        deepest = max(path.count(".") for path in mixed)  # a smaller one may be all that stands in a larger one's way
        gone = {path for path in mixed if path.count(".") == deepest}
        larger = {paths[1] for paths in choices.values() if paths and paths[0] in gone and len(paths) > 1}
        for index, paths in choices.items():
            rest = paths[1:] if paths and paths[0] in gone else paths
            shared = next((place for place, path in enumerate(rest) if path in larger), 0)
            choices[index] = rest[shared:]


def _enclosing(path: str, role: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The blocks around a layer, the innermost first."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    parts = path.split(".") if path and role != "end" else []
    found = []
    for count in range(len(parts) - (role == "layer"), 0, -1):
        prefix, parent = ".".join(parts[:count]), ".".join(parts[: count - 1])
        module = modules.get(prefix)
        if module is None or isinstance(module, lists):
            continue
        if count == 1 or isinstance(modules.get(parent), lists):
            found.append(prefix)
    return found


def _short(item: Item, block: str | None) -> str:
    """The name inside its block's box."""
    name = item.name.removeprefix(f"{block}.") if block is not None else item.name
    return _cut(name, LONGEST_NAME)


def _cut(text: str, most: int) -> str:
    """The end of a text that is too long: the end tells two paths apart."""
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


def _text(text: str, most: int, pixels: float) -> float:
    return min(len(text), most) * pixels


def _width(item: Item, name: str) -> float:
    """Pixels that the texts of a node take, with room between them; even, so that its middle is exact."""
    kind, widths = _text(item.kind, LONGEST_KIND, SANS), _text(item.widths, 24, SANS)
    room = 22 + (12 if name and kind else 0) + (14 if widths else 0)
    return 2.0 * math.ceil((room + len(name) * MONO + kind + widths) / 2)


def _shape(item: Item, name: str, box: Box, groups: Sequence[Group], palette: Sequence[str]) -> Shape:
    own = [groups[index] for index in item.groups]
    free = [index for index in item.groups if groups[index].frozen is None]
    stripe = (box.height - 6) / max(len(item.groups), 1)
    return Shape(
        box=Box(_round(box.x), _round(box.y), _round(box.width), box.height),
        role=item.role,
        path=item.name or item.path,
        name=name,
        kind=_cut(item.kind, LONGEST_KIND),
        widths=_cut(item.widths, 24),
        groups=_refs(item.groups),
        colour=_colour(item.groups, groups, palette),
        stripes=tuple(
            (_round(box.y + 3 + number * stripe), _round(stripe), palette[index])
            for number, index in enumerate(item.groups)
        ),
        dashed=any(not groups[index].exact for index in free),
        title="\n".join([_heading(item), *map(_sentence, own)]),
    )


def _heading(item: Item) -> str:
    words = [item.name or item.path or "the model", item.kind]
    if item.role == "layer":
        words.append(f"{item.before} → {item.after}" if item.before else item.after)
    else:
        words.append(item.after)
    return " · ".join(word for word in words if word)


def _sentence(group: Group) -> str:
    state = f"frozen: {group.frozen}" if group.frozen is not None else _exactness(group)
    tied = "".join(f"; {tie}" for tie in _tied(group.ties))
    return f"group {group.name}: {group.size} positions, {_count(group.members, 'member')}, {state}{tied}"


def _exactness(group: Group) -> str:
    return "exact" if group.exact else f"inexact: {group.inexact}"


def _colour(own: Sequence[int], groups: Sequence[Group], palette: Sequence[str]) -> str:
    """That of the widest open group; grey where all are frozen, plain where there is none."""
    free = [index for index in own if groups[index].frozen is None]
    if free:
        return palette[max(free, key=lambda index: groups[index].size)]
    return GREY if own else PLAIN


def _lines(items: Mapping[int, Item], laid: Layout, groups: Sequence[Group], palette: Sequence[str]) -> Iterable[Line]:
    for (start, _), points in sorted(laid.routes.items()):
        own = items[start].groups
        (x, y), (before, _) = points[-1], points[-2]
        head = f"M{_round(x)} {_round(y)}" + ("l-3.5 -6h7z" if _round(before) == _round(x) else "l-6 -3.5v7z")
        yield Line(_rounded(points), head, _colour(own, groups, palette), _refs(own))


def _rounded(points: Sequence[Point]) -> str:
    """A path through the corners, each rounded."""
    path = f"M{_round(points[0][0])} {_round(points[0][1])}"
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:], strict=False):
        first, second = abs(bx - ax) + abs(by - ay), abs(cx - bx) + abs(cy - by)
        radius = min(8.0, first / 2, second / 2)
        if not radius:
            continue
        ux, uy, vx, vy = (bx - ax) / first, (by - ay) / first, (cx - bx) / second, (cy - by) / second
        path += f"L{_round(bx - ux * radius)} {_round(by - uy * radius)}"
        path += f"Q{_round(bx)} {_round(by)} {_round(bx + vx * radius)} {_round(by + vy * radius)}"
    return path + f"L{_round(points[-1][0])} {_round(points[-1][1])}"


def _round(value: float) -> float:
    return round(value, 1)


def _refs(groups: Iterable[int]) -> str:
    return " ".join(f"g{index}" for index in groups)


# ---------------------------------------------------------------------------------- colours and legend


def colours(groups: Sequence[Group]) -> list[str]:
    """A colour for each group: grey if it is frozen, else its own."""
    count = 0
    palette = []
    for group in groups:
        palette.append(GREY if group.frozen is not None else _own_colour(count))
        count += group.frozen is None
    return palette


def _own_colour(number: int) -> str:
    """The first few are chosen by hand; then hues a golden angle apart, in turn light, dark and dull."""
    if number < len(FIRST):
        return FIRST[number]
    hue = (number * 0.381966 + 0.2) % 1
    light, strong = ((0.46, 0.75), (0.6, 0.6), (0.4, 0.45))[number % 3]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, strong))


@dataclass(frozen=True)
class Entry:
    """A line of the legend: one open group, or the frozen ones of one reason."""

    name: str
    detail: str
    colour: str
    groups: str
    dashed: bool
    title: str


def _legend(groups: Sequence[Group], palette: Sequence[str]) -> list[Entry]:
    entries = []
    frozen: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group.frozen is not None:
            frozen.setdefault(re.sub(r"\d+", "N", split_reason(group.frozen)[0]), []).append(index)
            continue
        detail = "; ".join(
            [f"{group.size} positions, {_count(group.members, 'member')}, {_exactness(group)}", *_tied(group.ties)]
        )
        title = _members(group)
        entries.append(Entry(group.name, detail, palette[index], _refs([index]), not group.exact, title))
    for indices in frozen.values():
        first = groups[indices[0]]
        if len(indices) == 1:
            name, detail = first.name, f"{first.size} positions, frozen: {first.frozen}"
        else:
            name = f"{first.name} and {len(indices) - 1} more"
            detail = f"frozen: {first.frozen} and {len(indices) - 1} more places"
        title = "\n".join(_sentence(groups[index]) for index in indices)
        entries.append(Entry(name, detail, GREY, _refs(indices), False, title))
    return entries


def _tied(ties: Sequence[str]) -> list[str]:
    """Each reason of a tie once, with its number of places."""
    places: dict[str, dict[str, None]] = {}
    for tie in ties:
        why, place = split_reason(tie)
        places.setdefault(why, {})[place] = None
    return [
        f"tied: {why}" + (f" [{next(iter(at))}]" if len(at) == 1 and "" not in at else f" ({_count(at, 'place')})")
        for why, at in places.items()
    ]


def _count(things: Collection[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _members(group: Group) -> str:
    shown = [str(member) for member in group.members[:20]]
    more = len(group.members) - len(shown)
    return "\n".join([f"{group.name}:", *shown, *([f"and {more} more"] if more else [])])


@dataclass(frozen=True)
class Placed:
    """A legend entry of an SVG: its lines of text and where it stands."""

    entry: Entry
    y: float
    lines: tuple[str, ...]


def _placed(entries: Sequence[Entry]) -> list[Placed]:
    placed = []
    y = 128.0
    for entry in entries:
        lines = tuple(textwrap.wrap(entry.detail, LEGEND_CHARACTERS))
        placed.append(Placed(entry, y, lines))
        y += 17 + 15 * len(lines) + 7
    return placed


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    return environment


def _printable(value: object) -> object:
    """Text without the control characters that XML forbids."""
    return (
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", value)
        if type(value) is str
        else value
    )
