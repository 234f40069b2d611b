"""Branches: found from the graph, removed by replacing modules, with what masking gives."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.coupling.comb import Comb
from cpd.model.architecture import architecture_of
from cpd.model.removed import Nothing, Removed
from cpd.plan import Plan
from cpd.surgery.masked import masked_error, shape_mismatch
from cpd.surgery.optimizer_state import drop_parameters
from helpers.zoo import comb, conv, dense

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Basic(nn.Module):
    """A block of a ResNet: the sum goes through an activation, and may have a projection beside it."""

    def __init__(self, inputs: int, outputs: int, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=inplace)
        self.shortcut = None if inputs == outputs else nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.act(out)


class Blocks(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8, last: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Transformer(nn.Module):
    """A block of a transformer, with scales of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        found, _ = self.attn(y, y, y)
        x = x + found
        return x + self.gamma * self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Patches, blocks of a transformer, a head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(*(Transformer() for _ in range(depth)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Windows(nn.Module):
    """A branch whose forward asks for the shape of what its attention gave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(8), conv(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.norm(x))
        n, c, h, w = y.shape
        y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 2, 2)
        y = y.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
        return x + torch.roll(y, (1, 1), (2, 3))


class Gated(nn.Module):
    """A branch that ends in a gate, computed from its own middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = conv(8, 8, 3), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))) * y + x


class Parallel(nn.Module):
    """Two branches that read one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.BatchNorm2d(8), conv(8, 8, 3), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.left(y) + self.right(y)


class Nested(nn.Module):
    """A branch with a residual block inside."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = conv(8, 8), Basic(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.inner(self.before(x)), x)


class Functional(nn.Module):
    """A branch that no module gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = conv(3, 8), nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (x + torch.conv2d(x, self.weight)).relu()


class Paths(nn.Module):
    """Two paths from each value to the next, so more in all than can be walked one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        for _ in range(40):
            y = 0.5 * y + torch.tanh(y)
        return self.head((x + y).mean((2, 3)))


class Trunk(nn.Module):
    """Two branches that read one trunk, which writes to what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.trunk, self.one, self.two = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.trunk(x).relu_()
        return self.head(torch.cat([x + self.one(y), self.two(y)], 1).mean((2, 3)))


class Rope(nn.Module):
    """Attention that is given a table by name, whose result is scaled by the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.BatchNorm2d(8), Tabled()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.attn(self.norm(x), table=torch.ones(3))


class Tabled(nn.Module):
    """A layer with a table, after a dropout that does nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.inner, self.last = nn.Dropout(0.5), conv(8, 16, 3), conv(8, 8)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        left, right = self.inner(self.drop(x)).split(8, 1)
        return self.last(left * right + table.sum())


class FromZero(nn.Module):
    """Paths that are added up one by one, from 0 on."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([conv(8, 8), conv(8, 8, 3), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for path in self.paths:
            total = total + path(x)
        return torch.relu(total)


class Writing(nn.Module):
    """The sum is written to, while what was added to is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.inner(x)
        y.mul_(2.0)
        return y * x


class Fire(nn.Module):
    """Two arms of other widths, through activations, concatenated; then back to the width of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.act, self.last = conv(8, 4), conv(8, 5, 3), nn.ReLU(), conv(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.act(self.left(x)), torch.tanh(self.right(x))], 1))


class Dense(nn.Module):
    """Layers that read all that was there before, joined anew for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Sequential(nn.BatchNorm2d(8 + 3 * i), nn.ReLU(), conv(8 + 3 * i, 3, 3)) for i in range(3)
        ])  # fmt: skip
        self.last = conv(17, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, dim=1)))
        return self.last(torch.cat(tensors=found, dim=1))


class Squeezed(nn.Module):
    """Squeeze and excitation before a layer, of a module that gates and of one that gives the gate."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.before, self.after = conv(8, 8), conv(8, 8)
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 4), nn.ReLU(), conv(4, 8), nn.Sigmoid())
        self.se = Times(gate) if module else gate
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return self.after(self.se(y) if self.module else y * self.se(y))


class Times(nn.Module):
    """What it is given, times its gate."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


#: Blocks of width 8 -> the names of their branches that can go.
BLOCKS = {
    "post-activation": (lambda: [Basic(8, 8), Basic(8, 8)], ["blocks.0", "blocks.1"]),
    "projection": (lambda: [Basic(8, 8), Basic(8, 8)], ["blocks.0", "blocks.1"]),
    "windows": (lambda: [Windows()], ["blocks.0"]),
    "gated": (lambda: [Gated()], ["blocks.0"]),
    "parallel": (lambda: [Parallel()], ["blocks.0.left", "blocks.0.right"]),
    "nested": (lambda: [Nested()], ["blocks.0.inner", "blocks.0"]),
    "table": (lambda: [Rope()], ["blocks.0"]),
    "from zero": (lambda: [FromZero()], ["blocks.0.paths.0", "blocks.0.paths.1", "blocks.0.paths", "blocks.0.paths.2"]),
    "writing": (lambda: [Writing()], ["blocks.0.inner"]),
    "arms": (lambda: [Fire()], ["blocks.0.left", "blocks.0.right"]),
    "dense": (lambda: [Dense()], ["blocks.0.layers.0", "blocks.0.layers.1", "blocks.0.layers.2"]),
    "gate": (lambda: [Squeezed(True)], ["blocks.0.se.gate"]),
    "gate alone": (lambda: [Squeezed(False)], ["blocks.0.se"]),
}


def blocks(kind: str) -> nn.Module:
    return dense(Blocks(*BLOCKS[kind][0]()))


def projected() -> nn.Module:
    return dense(Blocks(Basic(8, 8), Basic(8, 12), Basic(12, 12), last=12))


def assert_removed(model: nn.Module, combed: Comb, plan: Plan) -> nn.Module:
    """Removed is masked, the graph is the predicted one, costs and architecture too; trains, and is itself again."""
    small = cpd.shrink(copy.deepcopy(model), Plan.from_dict(plan.to_dict()))
    assert masked_error(model, small, combed, plan) <= 1e-9
    again = comb(small, IMAGE)
    assert shape_mismatch(combed, plan, again.operations) is None
    assert combed.architecture.narrowed(plan).difference(architecture_of(small)) is None
    widths = {group.axis: len(plan.groups[group.name]) for group in combed.groups}
    cost = combed.without(plan.removed).cost(widths)
    assert (cost.macs, cost.parameters) == (again.cost({}).macs, sum(p.numel() for p in small.parameters()))
    copy.deepcopy(small).train()(torch.cat([IMAGE, IMAGE])).sum().backward()
    return small


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_branch_of_a_block_can_go(kind: str) -> None:
    model = blocks(kind)
    combed = comb(model, IMAGE)
    assert [branch.name for branch in combed.branches if branch.frozen is None] == BLOCKS[kind][1]
    for branch in combed.branches:
        small = assert_removed(model, combed, combed.plan({}, remove=[branch.name]))
        gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert branch.parameters == gone > 0
        keep = {group.name: range(1, group.size) for group in combed.open}
        assert_removed(model, combed, combed.plan(keep, remove=[branch.name]))


def test_a_block_that_gives_its_input_becomes_an_identity() -> None:
    model = blocks("post-activation")
    combed = comb(model, IMAGE)
    small = assert_removed(model, combed, combed.plan({}, remove=["blocks.0", "blocks.1"]))
    assert all(type(block) is nn.Identity for block in small.blocks)
    assert type(small) is Blocks
    assert not any(name.startswith("blocks") for name in small.state_dict())


def test_a_block_whose_input_its_activation_would_change_keeps_it() -> None:
    model = dense(nn.Sequential(conv(3, 8), Basic(8, 8), nn.Flatten(), nn.Linear(512, 5)))
    combed = comb(model, IMAGE)
    small = assert_removed(model, combed, combed.plan({}, remove=["1"]))
    assert type(small[1]) is Basic
    assert isinstance(small[1].bn2, Removed)


def test_of_two_operands_one_can_go() -> None:
    model = projected()
    combed = comb(model, IMAGE)
    assert [branch.name for branch in combed.branches] == ["blocks.0", "blocks.1", "blocks.1.shortcut", "blocks.2"]
    for name in ("blocks.1", "blocks.1.shortcut"):
        assert_removed(model, combed, combed.plan({}, remove=[name, "blocks.2"]))
    with pytest.raises(cpd.PlanError, match=r"one of them must stay"):
        combed.plan({}, remove=["blocks.1", "blocks.1.shortcut"])


def test_one_arm_of_a_concatenation_stays() -> None:
    model = blocks("arms")
    combed = comb(model, IMAGE)
    plan = combed.plan({}, remove=["blocks.0.left"])
    assert plan.groups["blocks.0.left"] == ()
    small = assert_removed(model, combed, plan)
    assert small.blocks[0].last.in_channels == 5
    with pytest.raises(cpd.PlanError, match=r"blocks\.0\.left, blocks\.0\.right are all that one sum or concatenation"):
        combed.plan({}, remove=["blocks.0.left", "blocks.0.right"])


def test_dense_layers_go_together_and_leave_nothing_in_onnx() -> None:
    model = blocks("dense")
    combed = comb(model, IMAGE)
    plan = combed.plan({"blocks.0.layers.2.2": [1]}, remove=["blocks.0.layers.0", "blocks.0.layers.1"])
    small = assert_removed(model, combed, plan).float()
    assert small.blocks[0].layers[2][0].num_features == 8
    assert small.blocks[0].last.in_channels == 9
    graph = onnx.load_from_string(cpd.export_onnx(small, IMAGE.float())).graph
    assert [node.op_type for node in graph.node].count("Conv") == 3


def test_a_gate_goes_where_a_layer_can_take_it_up() -> None:
    for module in (True, False):
        model = dense(Blocks(Squeezed(module)))
        combed = comb(model, IMAGE)
        (branch,) = combed.branches
        small = assert_removed(model, combed, combed.plan({}, remove=[branch.name])).float()
        graph = onnx.load_from_string(cpd.export_onnx(small, IMAGE.float())).graph
        assert not {"Mul", "Sigmoid"} & {node.op_type for node in graph.node}
    assert type(dense(Blocks(Squeezed(True))).blocks[0].se) is Times
    model = dense(Blocks(Times(Squeezed(True).se.gate)))  # what reads it is a mean
    assert comb(model, IMAGE).branches == ()


def test_attention_and_mlp_of_a_transformer_go_apart_and_together() -> None:
    model = dense(Tokens())
    combed = comb(model, IMAGE)
    names = [branch.name for branch in combed.branches]
    assert names == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    for remove in (names[:1], names[1:2], names[1:3], names):
        plan = combed.plan({group.name: range(group.size // 2) for group in combed.open}, remove=remove)
        small = assert_removed(model, combed, plan)
    assert not any("attn" in name or "mlp" in name for name in small.state_dict())


def test_groups_and_cost_of_a_branch() -> None:
    model = blocks("post-activation")
    combed = comb(model, IMAGE)
    (branch, _) = combed.branches
    assert branch.groups == ("blocks.0.conv1",)
    assert branch.macs == 2 * 2 * 64 * 8 * 8 * 9  # two images, two convolutions
    plan = combed.plan({}, remove=[branch.name])
    assert plan.groups["blocks.0.conv1"] == ()
    assert plan.removed == ("blocks.0",)
    assert "1 branch removed" in repr(plan)
    assert combed.without(plan.removed).cost({}).macs == combed.cost({}).macs - branch.macs


def test_nothing_of_a_branch_is_left_in_onnx() -> None:
    model = projected().float()
    combed = comb(model, IMAGE.float())
    names = [branch.name for branch in combed.branches if not branch.name.endswith("shortcut")]
    small = cpd.shrink(copy.deepcopy(model), combed.plan({}, remove=names))
    graph = onnx.load_from_string(cpd.export_onnx(small, IMAGE.float())).graph
    assert [node.op_type for node in graph.node].count("Conv") == 2  # stem and projection
    assert not {"Add", "Identity", "Expand"} & {node.op_type for node in graph.node}


def test_what_no_module_gives_stays_and_says_why() -> None:
    combed = comb(dense(Functional()), IMAGE)
    (branch,) = combed.branches
    assert branch.frozen.startswith("no module gives this operand and nothing else [conv2d in the model")
    with pytest.raises(cpd.PlanError, match=r"cannot be removed: no module"):
        combed.plan({}, remove=[branch.name])
    with pytest.raises(cpd.PlanError, match=r"Unknown branches \['layer9'\]; comb\.branches lists"):
        combed.plan({}, remove=["layer9"])


def test_operations_with_many_paths_between_them() -> None:
    model = dense(Paths())
    combed = comb(model, torch.randn(2, 3, 8, 8).double())
    assert [branch.name for branch in combed.branches if branch.frozen is None] == ["conv"]
    assert_removed(model, combed, combed.plan({}, remove=["conv"]))


def test_a_trunk_goes_with_the_last_branch_that_reads_it() -> None:
    model = dense(Trunk())
    combed = comb(model, IMAGE)
    for gone in (["one"], ["two"], ["one", "two"]):
        small = assert_removed(model, combed, combed.plan({}, remove=gone))
        assert isinstance(small.trunk, Removed | Nothing) == (len(gone) == 2)


def test_a_sum_that_is_written_to_is_a_copy() -> None:
    model = blocks("writing")
    combed = comb(model, IMAGE)
    small = assert_removed(model, combed, combed.plan({}, remove=["blocks.0.inner"]))
    assert small.blocks[0].inner.copied


def test_a_plan_since_another_removes_what_is_new() -> None:
    model = blocks("post-activation")
    combed = comb(model, IMAGE)
    first = combed.plan({"stem.0": range(6), "blocks.0.conv1": range(5)}, remove=["blocks.1"])
    last = combed.plan({"stem.0": range(4)}, remove=["blocks.0", "blocks.1"])
    small = cpd.shrink(cpd.shrink(copy.deepcopy(model), first), last.since(first))
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGE), cpd.shrink(copy.deepcopy(model), last)(IMAGE))
    assert last.since(first).removed == ("blocks.0",)
    with pytest.raises(cpd.PlanError, match=r"keeps blocks\.0, which the earlier one removes"):
        first.since(last)


def test_a_comb_of_a_shrunk_model_has_no_branches_to_offer() -> None:
    model = blocks("post-activation")
    combed = comb(model, IMAGE)
    cpd.shrink(model, combed.plan({"stem.0": range(6)}))
    with pytest.raises(cpd.PlanError, match=r"Read comb\.branches before the model is shrunk"):
        _ = combed.branches


def test_a_plan_does_not_fit_a_model_without_the_module() -> None:
    combed = comb(blocks("post-activation"), IMAGE)
    plan = combed.plan({}, remove=["blocks.1"])
    with pytest.raises(cpd.ShrinkError, match=r"The plan removes blocks\.1, which this model lacks"):
        cpd.shrink(dense(Blocks(Basic(8, 8))), plan)


def test_parameters_that_went_leave_the_optimizer() -> None:
    model = blocks("post-activation")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGE).sum().backward()
    optimizer.step()
    before = {id(parameter) for parameter in model.parameters()}
    combed = comb(copy.deepcopy(model), IMAGE)
    cpd.shrink(model, combed.plan({}, remove=["blocks.0"]))
    left = {id(parameter) for parameter in model.parameters()}
    drop_parameters(optimizer, before - left)
    assert {id(item) for item in optimizer.param_groups[0]["params"]} == left == set(map(id, optimizer.state))


def test_nothing_is_zero_of_any_shape() -> None:
    x, nothing = torch.randn(2, 3), Nothing()
    for found in (x + nothing, nothing + x, torch.add(x, nothing), torch.relu(nothing).view(-1) * 3 + x, x - nothing):
        assert found is x
    torch.testing.assert_close(nothing - x, -x)
    torch.testing.assert_close(torch.add(nothing, x, alpha=2), 2 * x)
    y = x.clone()
    y += nothing
    nothing += x
    assert nothing is x
    copied = Nothing(copied=True) + x
    assert copied is not x
    assert torch.equal(copied, x)
    shaped = Nothing(like=x).transpose(0, 1)
    assert shaped.shape == (3, 2)
    assert shaped.size(0) == 3
    with pytest.raises(AttributeError, match="A branch was removed here, and what it gave has no shape"):
        _ = Nothing().shape
    with pytest.raises(TypeError, match="has no size"):
        Nothing().size()


def test_empty_is_left_out_of_a_concatenation_and_one_of_a_product() -> None:
    x, empty, one = torch.randn(2, 3), Nothing("empty"), Nothing("one")
    assert torch.equal(torch.cat([x, torch.relu(empty), x], 1), torch.cat([x, x], 1))
    assert torch.equal(torch.cat(tensors=[empty, x], dim=1), x)
    assert isinstance(torch.cat([empty, empty], 1), Nothing)
    assert isinstance(torch.cat([empty, Nothing()], 1), Nothing)
    for found in (x * one, torch.sigmoid(one) * x, torch.mul(x, one.view(-1)), x / one, x.mul_(one)):
        assert found is x
    assert torch.equal(x + one * Nothing(), x)
    copied = x * Nothing("one", copied=True)
    assert copied is not x
    assert torch.equal(copied, x)
