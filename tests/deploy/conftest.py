"""A small convolutional network, and its ONNX export."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cpd.deploy.export import export_onnx
from helpers.exports import conv_net


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return conv_net(16)


@pytest.fixture(scope="module")
def exported(net: nn.Module, image: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(net, image, tmp_path_factory.mktemp("onnx") / "net.onnx")
