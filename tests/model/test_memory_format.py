"""Images with their channels innermost: taken where a model gives the same for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpd.model.inputs import Call
from cpd.model.memory_format import channels_last, takes_channels_last


class Viewed(nn.Module):
    """Whose forward needs the layout that its convolution gives for plain images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


class Strided(Viewed):
    """Whose forward reads memory as it lies."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.as_strided((len(y), 4 * 36), (4 * 36, 1)))


class Joined(Viewed):
    """Whose forward joins samples and channels: of one sample any layout would do."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).view(4 * len(x), 6, 6)
        return self.head(y.reshape(len(x), -1))


class Backward(Viewed):
    """Whose gradient alone needs that layout."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.flatten(1)) + 0 * Reads.apply(y).sum()


class Reads(torch.autograd.Function):
    """The identity, with a backward that calls `view`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.ones_like(x).view(len(x), -1).view_as(gradient)


def images(*shape: int) -> Call:
    return Call((torch.randn(shape, generator=torch.Generator().manual_seed(0)),), {})


@pytest.mark.parametrize("model", [Viewed, Strided, Joined])
def test_a_model_that_reads_memory_as_it_lies_is_given_plain_images(model):
    torch.manual_seed(0)
    found = model().eval()
    with torch.no_grad():
        assert not takes_channels_last(found, images(1, 3, 8, 8))


@pytest.mark.parametrize("backward", [False, True])
def test_a_convnet_takes_them_and_nothing_is_left_behind(backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    call = images(1, 3, 8, 8)
    assert takes_channels_last(model, call, backward=backward)
    assert not call.args[0].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_backward_that_calls_view_is_told():
    torch.manual_seed(0)
    model, call = Backward().eval(), images(1, 3, 8, 8)
    assert takes_channels_last(model, call)
    assert not takes_channels_last(model, call, backward=True)


def test_what_is_no_image_stays_as_it_is():
    rows = images(2, 7)
    assert channels_last(rows).args[0] is rows.args[0]
    with torch.no_grad():
        assert not takes_channels_last(nn.Linear(7, 2), rows)
    volume = channels_last(images(2, 3, 4, 4, 4)).args[0]
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
