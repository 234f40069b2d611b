"""Scores against their definitions: brute force, exact derivatives, sample by sample."""

from __future__ import annotations

import copy
import gc
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.criteria import CRITERIA, DATA_FREE, Setting
from cpd.criteria.gates import Gates
from cpd.criteria.hessian import epsilon
from cpd.criteria.magnitude import magnitude
from cpd.trace.layer_calls import LayerCalls, seen
from helpers.tiny import INPUT, Tiny, loader
from helpers.zoo import comb, dense, randomize


class Net(nn.Module):
    """Two convolutions and a linear layer, smooth, so that second derivatives exist."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head, self.act = nn.Linear(8, 5), act or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv2(self.act(self.norm(self.conv1(x))))).mean((2, 3)))


X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.double)
Y = torch.randint(5, (12,), generator=torch.Generator().manual_seed(4))
BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return dense(Net())


@pytest.fixture(scope="module")
def combed(net: nn.Module) -> cpd.Comb:
    return comb(net, X[:1])


def gated(net: nn.Module, gates: Tensor, x: Tensor) -> Tensor:
    """The output with a gate on each channel that conv2 reads."""
    hidden = net.act(net.norm(net.conv1(x))) * gates[:, None, None]
    return net.head(net.act(net.conv2(hidden)).mean((2, 3)))


def gate_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gates = torch.ones(6, dtype=torch.double, requires_grad=True)
    return torch.autograd.grad(F.cross_entropy(gated(net, gates, x), y), gates)[0]


def test_taylor_snip_and_fisher_are_gradients_of_gates(net, combed):
    batches = torch.stack([gate_gradient(net, x, y) for x, y in BATCHES])
    samples = torch.stack([gate_gradient(net, X[i : i + 1], Y[i : i + 1]) for i in range(12)])
    expected = {
        "taylor": batches.square().mean(0),
        "snip": batches.mean(0).abs(),
        "fisher": samples.square().mean(0),
    }
    for name, value in expected.items():
        found = cpd.score(net, combed, BATCHES, criterion=name)["conv1"]
        assert torch.allclose(found, value, rtol=1e-5), name


class Attention(nn.Module):
    """One head with widths of its own for queries and keys, which no layer reads, and for values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k = self.q(tokens), self.k(tokens)
        weights = torch.softmax(q.relu_() @ k.transpose(1, 2) * 0.4, -1)
        return self.head((weights @ self.v(tokens)).mean(1))


def test_fisher_gates_what_layers_give_where_none_reads_a_group():
    model = dense(Attention())
    combed = comb(model, X[:1])
    scores = cpd.score(model, combed, BATCHES, criterion="fisher")
    (name,) = [group.name for group in combed.open if group.size == 6]
    gates = torch.ones(6, dtype=torch.double, requires_grad=True)
    handles = [layer.register_forward_hook(lambda _, args, output: output * gates) for layer in (model.q, model.k)]
    losses = F.cross_entropy(model(X), Y, reduction="none")
    expected = torch.stack([torch.autograd.grad(loss, gates, retain_graph=True)[0] for loss in losses])
    for handle in handles:
        handle.remove()
    assert torch.allclose(scores[name], expected.square().mean(0).to(scores[name]), rtol=1e-4)


class Late(nn.Module):
    """A parameter used bare after a layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Conv2d(3, 6, 3), nn.Parameter(torch.ones(8, 5))
        self.second, self.head = nn.Conv2d(6, 8, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(torch.einsum("bchw,cd->bdhw", x, self.table).mean((2, 3)))


def test_fisher_sees_the_gates_before_a_parameter_that_is_used_bare():
    model = dense(Late())
    model.table.grad = kept = torch.ones_like(model.table)
    scores = cpd.score(model, comb(model, X[:1]), BATCHES, criterion="fisher")
    assert all((score > 0).any() for score in scores.values())
    assert model.table.grad is kept

    def loss(gates: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x = model.second(model.first(x).relu() * gates[:, None, None]).relu()
        return F.cross_entropy(model.head(torch.einsum("bchw,cd->bdhw", x, model.table).mean((2, 3))), y)

    gates = torch.ones(6, dtype=torch.double, requires_grad=True)
    each = [torch.autograd.grad(loss(gates, X[i : i + 1], Y[i : i + 1]), gates)[0] for i in range(12)]
    assert torch.allclose(scores["first"], torch.stack(each).square().mean(0).to(scores["first"]), rtol=1e-4)


def test_hessian_is_the_second_derivative_in_the_gates(net, combed):
    gates = torch.ones(6, dtype=torch.double)
    exact = torch.stack(
        [
            torch.autograd.functional.hessian(lambda g, x=x, y=y: F.cross_entropy(gated(net, g, x), y), gates)
            for x, y in BATCHES
        ]
    ).mean(0)
    found = cpd.score(net, combed, BATCHES, criterion="hessian-trace", probes=400)["conv1"]
    assert torch.allclose(found, exact.diagonal().abs(), rtol=0.35, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("rows", [64, 128])
def test_obs_keeps_what_matters_where_rows_are_fewer_than_features(rows):
    """256 features of which 32 matter, some a little: nothing stands in for them, though 64 rows make it look so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 20))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(256))
        model[1].weight[:, :32] *= torch.logspace(0, -1, 32)
        model[1].weight[:, 32:] *= 0.03
    x = torch.randn(rows, 256)
    scores = cpd.score(model, comb(model, x[:1]), [x], criterion="obs")["0"]
    assert set(scores.topk(32).indices.tolist()) == set(range(32))


def test_precision_hardly_changes_a_product_with_the_hessian(net, combed):
    exact = cpd.score(net, combed, BATCHES, criterion="hessian")
    single = cpd.score(copy.deepcopy(net).float(), combed, [(x.float(), y) for x, y in BATCHES], criterion="hessian")
    for name, score in exact.items():
        assert float((single[name] - score).abs().max() / score.max()) < 0.01
    assert epsilon(torch.float64) == epsilon(torch.float32) < epsilon(torch.float16) <= 0.1


def test_obs_tries_no_covariance_after_the_best():
    tried = []

    def of(share):
        tried.append(share)
        return (share - 2.2) ** 2

    assert sys.modules["cpd.criteria.obs"]._least((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), of) == 2.0
    assert tried == [0.0, 1.0, 2.0, 3.0]


def test_obs_is_what_least_squares_leaves(net, combed, monkeypatch):
    """One reader, all positions: the score of the first to go is the error that a refit leaves, weighted by G."""
    monkeypatch.setattr(sys.modules["cpd.criteria.obs"], "SHRINKAGES", (0.0,))
    found = cpd.score(net, combed, [(X, None)], criterion="obs")["conv1"]
    captured: dict[str, Tensor] = {}

    def after(layer):
        if layer.weight == "conv2.weight":
            captured["x"], captured["y"] = layer.features()[0].detach(), layer.outputs()[0].detach()
            layer.output.register_hook(lambda g: captured.update(g=layer.outputs(None, g)[0]))

    with seen(LayerCalls(net, after=after)):
        output = net(X)
    generator = torch.Generator().manual_seed(0)
    (output * torch.randn(output.shape, generator=generator).to(output)).sum().backward()
    net.zero_grad()
    x = captured["x"] - captured["x"].mean(0)
    y = captured["y"] - captured["y"].mean(0)
    weight = captured["g"].T @ captured["g"] / 12
    damping = 1e-3 * x.square().mean() * len(x)
    errors = []
    for channel in range(6):
        kept = torch.arange(54).view(6, 9)[torch.arange(6) != channel].flatten()
        part = x[:, kept]
        solved = torch.linalg.solve(part.T @ part + damping * torch.eye(45), part.T @ y)
        left = y - part @ solved
        errors.append(float((left @ weight * left).sum() / len(x)))
    cheapest = int(torch.tensor(errors).argmin())
    assert int(found.argmin()) == cheapest
    assert float(found[cheapest]) == pytest.approx(errors[cheapest], rel=0.15)


def test_of_two_channels_that_are_alike_one_is_free():
    net = dense(Net(nn.ReLU()))
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.conv1.bias, *net.norm.state_dict().values()):
            if tensor.dim():
                tensor[4] = tensor[1]
    scores = cpd.score(net, comb(net, X[:1]), [(X, None)], criterion="obs")["conv1"]
    low, high = sorted((float(scores[1]), float(scores[4])))
    assert low < 0.05 * high
    assert int(scores.argmin()) in (1, 4)


def test_a_constant_channel_never_fires_and_apoz_knows(combed):
    net = dense(Net(nn.ReLU()))
    with torch.no_grad():
        net.norm.weight[2], net.norm.bias[2] = 0.0, -1.0
    scores = cpd.score(net, comb(net, X[:1]), BATCHES, criterion="apoz")["conv1"]
    assert float(scores[2]) == 0
    assert int(scores.argmin()) == 2
    active = F.relu(net.norm(net.conv1(X))) > 0
    assert torch.allclose(scores, active.double().mean((0, 2, 3)), atol=1e-6)


def test_criteria_of_the_weights(net, combed):
    weight = torch.cat([net.conv1.weight.flatten(1), net.conv2.weight.transpose(0, 1).flatten(1)], 1)
    rest = torch.stack([net.conv1.bias, net.norm.weight, net.norm.bias], 1)
    everything = torch.cat([weight, rest], 1).detach()
    for p in (1, 2):
        expected = everything.abs().pow(p).sum(1)
        found = cpd.score(net, combed, criterion=partial(magnitude, p=p))["conv1"]
        assert torch.allclose(found, (expected / expected.mean()), rtol=1e-5)
    squares = everything.square().sum(1)
    lamp = cpd.score(net, combed, criterion="lamp")["conv1"]
    assert torch.allclose(lamp, torch.stack([s / squares[squares >= s].sum() for s in squares]), rtol=1e-5)
    gamma = net.norm.weight.detach().abs()
    assert torch.allclose(cpd.score(net, combed, criterion="bn_scale")["conv1"], gamma / gamma.mean(), rtol=1e-5)
    filters = net.conv1.weight.detach().flatten(1)
    distances = torch.cdist(filters, filters).sum(1)
    assert torch.allclose(cpd.score(net, combed, criterion="fpgm")["conv1"], distances / distances.mean(), rtol=1e-5)


class Mapped(nn.Module):
    """Takes keywords and gives a mapping, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(pixels)}


@pytest.fixture(scope="module")
def attention() -> tuple[nn.Module, cpd.Comb, list[dict[str, Tensor]]]:
    model = randomize(Mapped().eval(), 0)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    y = torch.arange(6) % 5
    return model, cpd.comb(model, ((), {"pixels": x[:1]})), [{"pixels": x, "labels": y}]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_heads_and_head_dims(attention, criterion):
    model, combed, data = attention
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = cpd.score(model, combed, data, criterion=criterion)
    assert scores.keys() == {group.name for group in combed.open}
    sizes = {group.size for group in combed.open}
    assert {4, 16} & sizes or len(sizes) > 2
    assert all((score >= 0).all() and score.max() > 0 for score in scores.values())
    again = cpd.score(model, combed, data, criterion=criterion)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_of_the_graph_outlives_its_scores(net, combed, criterion):
    cpd.score(net, combed, BATCHES, criterion=criterion)
    gc.collect()
    before = {id(item) for item in gc.get_objects()}
    cpd.score(net, combed, BATCHES, criterion=criterion)
    gc.collect()
    left = [item for item in gc.get_objects() if type(item) is Tensor and id(item) not in before]
    assert [tuple(item.shape) for item in left if item.grad_fn is not None] == []


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - DATA_FREE))
def test_train_mode_and_mixed_precision(criterion):
    net = randomize(Net(), 0).train()
    data = [(x.float(), y) for x, y in BATCHES]
    combed = comb(net, X[:1].float())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = cpd.score(net, combed, data, criterion=criterion)["conv1"]
    mixed = cpd.score(net, combed, data, criterion=criterion, precision="bf16")["conv1"]
    train = cpd.score(net, combed, data, criterion=criterion, training=True)["conv1"]
    assert float(torch.corrcoef(torch.stack([plain, mixed]))[0, 1]) > 0.5
    assert not torch.equal(plain, train)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_order_of_batches_changes_no_score(net, combed):
    for criterion in ("taylor", "fisher", "snip", "apoz"):
        one = cpd.score(net, combed, BATCHES, criterion=criterion)["conv1"]
        two = cpd.score(net, combed, BATCHES[::-1], criterion=criterion)["conv1"]
        assert torch.allclose(one, two, rtol=1e-9), criterion


def test_a_criterion_of_ones_own(net, combed):
    def smallest_output(setting: Setting) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.size) + 1.0 for group in setting.comb.open}

    assert cpd.score(net, combed, criterion=smallest_output)["conv1"].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(cpd.InputError, match=r"no score for conv1"):
        cpd.score(net, combed, criterion=lambda setting: {})
    with pytest.raises(cpd.InputError, match="precision"):
        cpd.score(net, combed, BATCHES, precision="int8")


def test_gates_multiply_what_is_read(net, combed):
    gates = Gates(combed)
    assert {(site.tensor, site.dim) for site in gates.sites} == {("conv2.weight", 1), ("head.weight", 1)}
    scaled = gates.multiply(dict(net.named_parameters()), [torch.full((site.size,), 2.0) for site in gates.sites])
    assert torch.equal(scaled["conv2.weight"], 2 * net.conv2.weight)


def test_scores_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    comb = cpd.comb(model, INPUT)
    for criterion in CRITERIA:
        scores = cpd.score(model, comb, loader(), criterion=criterion)
        assert {group.name: group.size for group in comb.open} == {name: len(s) for name, s in scores.items()}
        assert all((score >= 0).all() and score.max() > 0 for score in scores.values()), criterion
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_dead_channel_scores_lowest():
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.conv2.weight[:, 5] = 0
    comb = cpd.comb(model, INPUT)
    for criterion in ("obs", "hessian", "fisher", "taylor", "snip"):
        assert int(cpd.score(model, comb, loader(), criterion=criterion)["conv1"].argmin()) == 5
