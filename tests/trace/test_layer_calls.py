"""Calls of layers, seen while a model runs, as products of matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.trace.layer_calls import LayerCalls, from_matrix, matrix, seen


class Layers(nn.Module):
    """Every way in which a weight meets its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2)
        self.same, self.back = nn.Conv1d(6, 8, 5, padding="same"), nn.ConvTranspose1d(8, 6, 3, 2, groups=2)
        self.linear, self.bare = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 7))
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.deep = nn.Conv3d(1, 2, (1, 3, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.same(self.conv(x).flatten(2)))
        x = F.linear(x.transpose(1, 2), weight=self.linear.weight, bias=self.linear.bias) @ self.bare
        return self.deep(self.attention(x, x, x)[0][:, None, None])


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layer_calls_are_matrix_products(share):
    model, seen_calls = Layers().double().eval(), []
    weights = dict(model.named_parameters())

    def after(layer):
        count = max(1, math.ceil(share * layer.positions))
        index = None if share == 1 else torch.randperm(layer.positions)[:count]
        weight = weights[layer.weight]
        products = layer.features(index) @ matrix(layer.kind, weight, layer.groups).transpose(1, 2)
        if layer.kind != "transposed" and layer.given.get("bias") is not None:
            products = products + layer.given["bias"].view(layer.groups, 1, -1)
        assert torch.allclose(products, layer.responses(index)), layer.weight
        assert torch.equal(from_matrix(layer.kind, matrix(layer.kind, weight, layer.groups), weight), weight)
        seen_calls.append(layer.weight)

    x = torch.randn(3, 4, 9, 11, dtype=torch.double)
    with torch.no_grad(), seen(LayerCalls(model, after=after)):
        found = model(x)
    with torch.no_grad():
        assert torch.allclose(found, model(x))
    assert seen_calls == [
        "conv.weight", "same.weight", "back.weight", "linear.weight", "bare", "attention.in_proj_weight",
        "attention.out_proj.weight", "deep.weight",
    ]  # fmt: skip
