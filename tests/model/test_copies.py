"""`copy_of` gives what `copy.deepcopy` gives: the same attributes of the same types, sharing what is shared."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cpd.model.tensors import copy_of


class Counting(nn.Linear):
    """Copies in its own way."""

    copies = 0

    def __deepcopy__(self, memo):
        type(self).copies += 1
        new = Counting(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        return new


class Restored(nn.Module):
    """Makes what it does not pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.handle = nn.Conv2d(3, 3, 1), (line for line in "no generator can be copied")

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "handle"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.handle = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Sharing(nn.Module):
    """Shares a module, a parameter, a list and an object; has a hook and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.b.weight = self.a, self.a.weight
        self.first = self.second = []
        self.cfg = self.a.cfg = SimpleNamespace(width=4, owner=self)
        self.none, self.table = nn.ModuleList(), {"b": self.b}
        self.register_buffer("grid", torch.arange(4.0), persistent=False)
        self.register_parameter("absent", None)
        self.a.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table["b"](self.again(x)) * self.grid * self.cfg.width


MODELS = {
    "sharing": lambda: (Sharing(), torch.randn(2, 4)),
    "copies by itself": lambda: (nn.Sequential(nn.ReLU(), Counting(4, 4)), torch.randn(2, 4)),
    "pickles by itself": lambda: (Restored(), torch.randn(1, 3, 4, 4)),
    "recurrent": lambda: (nn.LSTM(4, 4, 2), torch.randn(2, 1, 4)),
    "parametrized": lambda: (parametrizations.spectral_norm(nn.Linear(4, 4)), torch.randn(2, 4)),
    "attention": lambda: (nn.TransformerEncoderLayer(8, 2, 16), torch.randn(2, 1, 8)),
    "timm": lambda: (timm.create_model("test_convnext"), torch.randn(1, 3, 64, 64)),
}


def shape_of(value: object, seen: dict[int, int]) -> object:
    """An object as types, plain values, and numbers that tell which objects are the same one."""
    if value is None or isinstance(value, (bool, int, float, str, type)):
        return value
    if id(value) in seen:
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return type(value), value.tolist(), value.requires_grad
    if isinstance(value, dict):
        return type(value), [(key, shape_of(item, seen)) for key, item in value.items() if key != "_flat_weight_refs"]
    if isinstance(value, (list, tuple)):
        return type(value), [shape_of(item, seen) for item in value]
    return type(value), shape_of(vars(value), seen) if hasattr(value, "__dict__") else None


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_what_deepcopy_gives(name):
    model, x = MODELS[name]()
    model.eval()
    narrow = copy_of(model)
    if name != "pickles by itself":  # what it leaves out is no module's
        assert shape_of(narrow, {}) == shape_of(copy.deepcopy(model), {})
    first, *_ = torch.utils._pytree.tree_leaves(model(x))
    second, *_ = torch.utils._pytree.tree_leaves(narrow(x))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    mine = {id(item) for item in [*model.modules(), *model.parameters(), *model.buffers()]}
    assert mine.isdisjoint(id(item) for item in [*narrow.modules(), *narrow.parameters(), *narrow.buffers()])


def test_what_copies_in_its_own_way_does_so_once():
    Counting.copies = 0
    copy_of(nn.Sequential(nn.ReLU(), Counting(4, 4)))
    assert Counting.copies == 1
    narrow = copy_of(Restored())
    assert narrow.handle is None
