"""What is frozen is visible: the reasons with their cost, and the picture of the grouped graph."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.coupling.cost import Cost, FrozenShare, split_reason
from cpd.errors import InputError
from cpd.picture.drawing import MARK, draw, render
from cpd.picture.graph import contract
from cpd.picture.layout import layout, rows_of
from cpd.picture.scene import GREY, colours
from cpd.rules.contraction import KERNEL

SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    """A residual block with a projection, as in a ResNet."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, out, 3, padding=1)
        self.short = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.conv1(x)))) + self.short(x)


class ConvNet(nn.Module):
    """Two residual blocks, a concatenation, and a table that the forward reads by index."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(8, 16), Block(16, 16))
        self.left, self.right = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 10, 1)
        self.head = nn.Linear(16, 5)
        self.spare = nn.Parameter(torch.zeros(40))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm block over tokens, with a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 8
        self.embed = nn.Linear(6, 12)
        self.position = nn.Parameter(torch.randn(1, 7, 12))
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 48)
        self.proj = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm(x)).reshape(1, 7, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


class Frozen(nn.Module):
    """Every width is held by something, by two things, or is of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.last = nn.Conv2d(8, 2, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first(x).sort(1).values, self.second(x).sort(1).values], 1)
        return self.last(x) * self.scale


@pytest.fixture(scope="module")
def convnet() -> Comb:
    return cpd.comb(ConvNet().eval(), torch.randn(1, 3, 12, 12))


@pytest.fixture(scope="module")
def attention() -> Comb:
    return cpd.comb(Attention().eval(), torch.randn(1, 7, 6))


@pytest.fixture(scope="module")
def frozen() -> Comb:
    return cpd.comb(Frozen().eval(), torch.randn(1, 3, 4, 4))


def nodes(svg: str, role: str = "layer") -> dict[str, ET.Element]:
    """The nodes of one role by name; each name once."""
    found = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("class") == f"node {role}"]
    named = {group.get("data-name", ""): group for group in found}
    assert len(named) == len(found)
    return named


def body(node: ET.Element) -> ET.Element:
    return next(rect for rect in node.iter(f"{SVG}rect") if rect.get("class") == "body")


def text(node: ET.Element) -> str:
    return " ".join("".join(item.itertext()) for item in node.iter(f"{SVG}text"))


# ------------------------------------------------------------------------------------------ reasons


@pytest.mark.parametrize("name", ["convnet", "attention", "frozen"])
def test_open_and_frozen_shares_add_up(name: str, request: pytest.FixtureRequest) -> None:
    combed: Comb = request.getfixturevalue(name)
    rows = combed.frozen_share
    assert combed.open_share["parameters"] + sum(row.parameters for row in rows) == pytest.approx(1, abs=1e-12)
    assert combed.open_share["macs"] + sum(row.macs for row in rows) == pytest.approx(1, abs=1e-12)
    costs = [max(row.parameters, row.macs) for row in rows]
    assert costs == sorted(costs, reverse=True)
    assert len({row.reason for row in rows}) == len(rows)


def test_reasons_of_an_open_model_are_few(convnet: Comb) -> None:
    rows = {row.reason: row for row in convnet.frozen_share}
    total = sum(parameter.numel() for name, parameter in convnet.model.named_parameters() if name != "spare")
    assert set(rows) == {"the model's output"}
    assert rows["the model's output"].parameters == pytest.approx(5 / total)  # the bias; its weight has open inputs
    assert convnet.unused == {"spare": 40}
    assert convnet.cost({}).parameters == total + 40


def held(size: int, reason: str) -> Axis:
    axis = Axis(size)
    axis.frozen = reason
    return axis


def test_reasons_are_shared_merged_and_told_apart() -> None:
    space = f"{KERNEL} [conv2d in a, net.py:1]"
    dims: dict[str, tuple[Any, ...]] = {
        "open.weight": (Axis(5), held(4, "x [add in a, net.py:1]")),
        "two.weight": (held(6, "needs 6 [view in a, net.py:1]"), held(5, "the output [add in b, net.py:2]")),
        "one.weight": (held(10, "needs 10 [view in c, net.py:3]"), held(1, "a single channel"), held(3, space)),
        "single": (held(1, "a single channel"),),
        "kernel": (held(2, space), held(2, space)),
        "scalar": (),
    }
    tensors = {name: nn.Parameter(torch.zeros([dim.size for dim in shape])) for name, shape in dims.items()}
    tensors["unread"] = nn.Parameter(torch.zeros(14))
    context: Any = SimpleNamespace(graph=SimpleNamespace(operations=[], parts=()))
    cost = Cost(context, dims, tensors)
    total = 20 + 30 + 30 + 1 + 4 + 1
    assert cost({}).parameters == total + 14
    assert cost.unused == {"unread": 14}
    assert cost.open_share() == {"parameters": 20 / total, "macs": 0}
    assert cost.frozen_share() == (
        FrozenShare("needs N", 45 / total, 0, 2, ("view in a, net.py:1", "view in c, net.py:3")),
        FrozenShare("the output", 15 / total, 0, 1, ("add in b, net.py:2",)),
        FrozenShare("no removable dimension", 5 / total, 0, 2, ("kernel", "scalar")),
        FrozenShare("a single channel", 1 / total, 0, 1, ("single",)),
    )


def test_split_reason() -> None:
    assert split_reason("fixed [conv2d in a.b, net.py:3]") == ("fixed", "conv2d in a.b, net.py:3")
    assert split_reason("is [1, 2] [add in the model, x.py:1]") == ("is [1, 2]", "add in the model, x.py:1")
    assert split_reason("is [1, 2]") == ("is [1, 2]", "")
    assert split_reason("a single channel") == ("a single channel", "")


# ------------------------------------------------------------------------------------------ picture


def test_every_layer_is_drawn_once(convnet: Comb) -> None:
    drawn = nodes(render(convnet, html=False))
    layers = {name for name, module in convnet.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    layers |= {name for name, module in convnet.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(drawn) == layers
    assert "conv 3×3 3 → 8" in text(drawn["stem"]).replace("stem", "")
    assert text(drawn["blocks.0.conv2"]).startswith("conv2")  # inside the box of its block
    assert "12 → 16" in text(drawn["blocks.0.conv2"])


def test_joining_ops_and_ends_are_drawn(convnet: Comb, attention: Comb) -> None:
    svg = render(convnet, html=False)
    found = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "node op"]
    assert [text(op).split() for op in found] == [["add", "16"], ["add", "16"], ["cat", "16"]]
    assert set(nodes(svg, "end")) == {"input x", "output"}
    frames = [rect for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("class") == "frame"]
    assert len(frames) == 2
    assert set(nodes(render(attention, html=False))) == {"embed", "position", "norm", "qkv", "proj", "head"}
    joins = [g for g in ET.fromstring(render(attention, html=False)).iter(f"{SVG}g") if g.get("class") == "node op"]
    assert [text(op).split() for op in joins] == [["attention", "2", "×", "8"], ["add", "12"]]


def test_colours_tell_groups(convnet: Comb) -> None:
    drawn = nodes(render(convnet, html=False))
    fill = {name: body(node).get("fill") for name, node in drawn.items()}
    assert fill["blocks.0.conv1"] == fill["blocks.0.norm"]
    assert fill["blocks.0.conv2"] == fill["blocks.0.short"] == fill["blocks.1.conv2"]
    apart = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "left", "right"]
    assert len({fill[name] for name in apart}) == len(apart)
    assert fill["head"] == GREY
    assert GREY not in {fill[name] for name in apart}


def test_many_groups_have_as_many_colours(convnet: Comb) -> None:
    group = convnet.open[0]
    palette = colours([group] * 60 + [dataclasses.replace(group, frozen="why")])
    assert len(set(palette[:60])) == 60
    assert palette[60] == GREY not in palette[:60]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in palette)


def test_inexact_is_dashed_and_product_striped(attention: Comb) -> None:
    drawn = nodes(render(attention, html=False))
    assert not next(group for group in attention.groups if group.name == "embed").exact
    assert body(drawn["embed"]).get("stroke-dasharray")
    assert not body(drawn["qkv"]).get("stroke-dasharray")
    stripes = [r.get("fill") for r in drawn["qkv"].iter(f"{SVG}rect") if r.get("class") == "stripe"]
    assert len(stripes) == 3  # the three projections (frozen), heads, head_dim
    assert stripes.count(GREY) == 1


def test_tooltips_and_legend_give_reasons(convnet: Comb) -> None:
    svg = render(convnet, html=False)
    title = nodes(svg)["head"].find(f"{SVG}title")
    assert title is not None
    assert "frozen: the model's output [linear in head," in (title.text or "")
    legend = next(g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "legend")
    listed = {reference for g in legend for reference in g.get("data-groups", "").split()}
    assert listed == {f"g{index}" for index in range(len(convnet.groups))}
    details = [text(g) for g in legend if g.get("data-groups")]
    assert "stem 8 channels, 4 members, exact in 18.2% of the MACs" in details
    assert any(detail.startswith("the model's input channels stem#2: 3 channels, 1 member, ") for detail in details)
    assert "position" not in svg


def test_each_group_tells_its_share_of_macs_and_its_time(convnet: Comb) -> None:
    shares = convnet.cost.macs_share()
    by_name = {group.name: shares.get(group.axis, 0.0) for group in convnet.groups}
    whole = convnet.cost({}).macs
    macs = {name: of * whole for name, of in by_name.items()}
    assert round(macs["blocks.0.conv1"]) == 12 * (8 + 16) * 9 * 10 * 10  # in the layers that give and that read it
    page = render(convnet, html=True, milliseconds={"stem": 1.234, "left": 0.5})
    assert f"<span>in {by_name['stem']:.1%} of the MACs, 1.23 ms</span>" in page
    assert f"<span>in {by_name['right']:.1%} of the MACs</span>" in page
    with pytest.raises(InputError, match="milliseconds"):
        draw(convnet, "a.svg", milliseconds={"stem": "long"})  # type: ignore[dict-item]


def test_only_what_is_frozen_in_any_model_is_folded(convnet: Comb, frozen: Comb) -> None:
    before, folded = render(convnet, html=True).split("<details>")
    folded = folded.partition("</details>")[0]
    assert "Frozen in any model: the model&#39;s input channels, head" in folded
    assert folded.count("<li ") == 2
    assert before.count("<li ") == len(convnet.open)
    own, folded = render(frozen, html=True).split("<details>")
    assert "first and 1 more</code>" in own  # single channels are picked: a reason of this model's own
    assert "last#2</code>" in own  # contracted with something fixed that is not the model's input
    assert "first#2, second#2: " in folded
    assert render(convnet, html=True).count('type="search"') == 1


def test_no_text_of_a_legend_leaves_the_picture() -> None:
    model = nn.Sequential()
    model.add_module("a_name_of_a_module_" + "that_is_far_too_long_" * 4, nn.Linear(4, 6))
    model.add_module("head", nn.Linear(6, 2))
    svg = ET.fromstring(render(cpd.comb(model, torch.randn(1, 4)), html=False))
    legend = next(g for g in svg.iter(f"{SVG}g") if g.get("class") == "legend")
    wide = {"name": 7.3, "kind": 6.3, "soft": 6.9}  # pixels a character, of the widest of the fonts, at 12, 11 and 12
    ends = [
        float(item.get("x", 0)) + wide[item.get("class", "")] * len(item.text or "")
        for item in legend.iter(f"{SVG}text")
        if item.get("class") in wide
    ]
    assert len(ends) > 5
    assert max(ends) <= float(svg.get("width", 0))
    named = "".join(item.text or "" for item in legend.iter(f"{SVG}text") if item.get("class") == "name")
    assert named.count("that_is_far_too_long_") == 4  # whole, in several lines
    bottoms = [float(item.get("y", 0)) for item in legend.iter(f"{SVG}text")]
    assert sorted(bottoms) == bottoms
    assert max(bottoms) < float(svg.get("height", 0))


@pytest.mark.parametrize("name", ["convnet", "attention", "frozen"])
def test_edges_pass_no_node_and_no_nodes_meet(name: str, request: pytest.FixtureRequest) -> None:
    graph = contract(request.getfixturevalue(name))
    assert nx.is_directed_acyclic_graph(graph)
    assert_clear(graph)


def assert_clear(graph: nx.DiGraph) -> None:
    laid = layout(graph, rows_of(graph), dict.fromkeys(graph, 80.0), 20.0)
    boxes = list(laid.boxes.items())
    for index, (_, one) in enumerate(boxes):
        assert one.x >= 0
        assert one.x + one.width <= laid.width
        assert one.y + one.height <= laid.height
        for _, two in boxes[index + 1 :]:
            assert one.x + one.width <= two.x or two.x + two.width <= one.x or one.y != two.y
    for edge in graph.edges:
        assert laid.boxes[edge[0]].y < laid.boxes[edge[1]].y
        for (ax, ay), (bx, by) in pairwise(laid.routes[edge]):
            assert ax == bx or ay == by
            for _, box in boxes:
                inside_x = max(min(ax, bx), box.x) < min(max(ax, bx), box.x + box.width) or (
                    ax == bx and box.x < ax < box.x + box.width
                )
                inside_y = max(min(ay, by), box.y) < min(max(ay, by), box.y + box.height) or (
                    ay == by and box.y < ay < box.y + box.height
                )
                assert not (inside_x and inside_y), (edge, box)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_are_laid_out_clear(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(25))
    for node in range(1, 25):
        for _ in range(1 + int(torch.randint(3, (), generator=random))):
            graph.add_edge(int(torch.randint(max(node - 8, 0), node, (), generator=random)), node)
    assert_clear(graph)


def test_parallel_branches_share_the_box_of_their_block() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(Unit(), Unit())
            self.two = nn.Sequential(Unit())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], 1)

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model = nn.Sequential()
    model.add_module("first", Unit())
    model.add_module("mixed", Mixed())
    svg = render(cpd.comb(model.eval(), torch.randn(1, 4, 5, 5)), html=False)
    labels = [label.text for label in ET.fromstring(svg).iter(f"{SVG}text") if label.get("class") == "block name"]
    assert labels == ["first", "mixed"]
    assert [text(node).split()[0] for node in nodes(svg).values()][:3] == ["conv", "norm", "one.0.conv"]
    heads = re.findall(r"l-6 -3.5v7z|l-3.5 -6h7z", svg)
    assert heads == ["l-3.5 -6h7z"] * len(heads)
    assert len(heads) == 11


def test_runs_of_different_edges_do_not_coincide() -> None:
    graph = nx.DiGraph([(i, i + 1) for i in range(8)] + [(0, 4), (1, 3), (2, 7), (4, 8)])
    laid = layout(graph, rows_of(graph), dict.fromkeys(graph, 50.0), 20.0)
    lanes = {edge: laid.routes[edge][1][0] for edge in ((0, 4), (1, 3), (2, 7))}
    assert len(set(lanes.values())) == 3
    assert all(x < laid.boxes[0].x for x in lanes.values())
    assert {box.x for box in laid.boxes.values()} == {laid.boxes[0].x}


def test_output_is_deterministic(attention: Comb, tmp_path: Path) -> None:
    again = cpd.comb(attention.model, torch.randn(1, 7, 6))
    for name in ("a.svg", "a.html"):
        assert draw(attention, tmp_path / name) == tmp_path / name
        first = (tmp_path / name).read_bytes()
        draw(again, tmp_path / name)  # an earlier picture is replaced
        assert (tmp_path / name).read_bytes() == first


def test_html_asks_for_nothing(convnet: Comb, attention: Comb) -> None:
    for combed in (convnet, attention):
        page = render(combed, html=True)
        assert page.startswith("<!doctype html>")
        assert "://" not in page
        assert "@import" not in page
        assert "url(" not in page
        assert not re.search(r"\s(src|srcset|action)=", page)
        assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
        assert "default-src 'none'" in page
        assert "prefers-color-scheme: dark" in page
        drawing = page[page.index('<svg id="graph"') : page.index("</svg>\n</div>") + 6]
        assert len([g for g in ET.fromstring(drawing).iter("g") if g.get("class") == "node layer"]) >= 6


def test_shared_and_odd_layers_are_drawn() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>&\"'", nn.Linear(4, 6))
            self.twice = nn.Linear(6, 6)
            self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(getattr(self, "<b>&\"'")(x)).relu())
            return self.out(self.attend(x, x, x, need_weights=False)[0])

    combed = cpd.comb(Odd().eval(), torch.randn(1, 3, 4))
    svg, page = render(combed, html=False), render(combed, html=True)
    assert set(nodes(svg)) == {"<b>&\"'", "twice", "twice (2)", "attend", "attend.out_proj", "out"}
    for written in (svg, page):
        assert "<b>" not in written
        assert "&lt;b&gt;&amp;" in written


def test_smallest_models_are_drawn() -> None:
    single = render(cpd.comb(nn.Linear(3, 2), torch.randn(1, 3)), html=False)
    assert set(nodes(single)) == {"Linear"}
    for empty in (nn.Identity(), nn.ReLU()):
        assert nodes(render(cpd.comb(empty, torch.randn(1, 3)), html=False)) == {}


def test_bad_paths_are_refused(convnet: Comb, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("a.png", "must be an .svg or .html file"),
        ("a", "must be an .svg or .html file"),
        ("folder.svg", "is a folder"),
        ("no/such/a.svg", "does not exist"),
        ("file/a.svg", "does not exist"),
        ("mine.html", "is not a picture that cpd drew"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            draw(convnet, tmp_path / name)
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg", "mine.html"]


# ------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("name", ["a.png", "no/such/a.svg", "folder.html"])
def test_command_line_refuses_before_work(name: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def comb(*_: Any) -> Comb:
        raise AssertionError("combed in vain")

    monkeypatch.setattr(cpd, "comb", comb, raising=False)
    (tmp_path / "folder.html").mkdir()
    result = run("comb", "torch.nn:Identity", "--input-size", "8", "--plot", tmp_path / name)
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert result.stdout == ""


def test_command_line_plots_and_gives_reasons(
    convnet: Comb, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpd, "comb", lambda *_, **__: convnet, raising=False)
    arguments = ("comb", "torch.nn:Identity", "--input-size", "8", "--plot", tmp_path / "a.svg")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "The picture was written to" in result.stderr
    assert MARK in (tmp_path / "a.svg").read_text()
    sentence, table = result.stdout.index("groups can be pruned"), result.stdout.index("What no open group reaches")
    assert sentence < table
    assert "The forward never uses 40 parameters (spare)." in result.stdout[sentence:table]
    assert "the model's output" in result.stdout[table:]
    assert "1: linear in head, test_picture.py:" in result.stdout[table:]
    data = json.loads(run(*arguments, "--json").stdout)
    rows = data["frozen_share"]
    assert [row["reason"] for row in rows] == ["the model's output"]
    assert data["unused"] == {"spare": 40}
    assert data["open_share"]["parameters"] + sum(row["parameters"] for row in rows) == pytest.approx(1)
