"""Narrower copies without values, and the widths that modules keep beside their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from cpd.model import kept
from cpd.model.tensors import copy_of, every_tensor, loose_tensors
from cpd.plan import Attribute


def set_attributes(model: nn.Module, attributes: Iterable[Attribute]) -> None:
    """Set module attributes to their new values, a tuple staying a tuple; what modules share is copied before."""
    for item in attributes:
        module = model.get_submodule(item.module)
        if isinstance(item.new, int):
            kept.put(module, item.name, item.new)
        else:
            setattr(module, item.name, type(getattr(module, item.name))(item.new))


def skeleton(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, meta: bool = False) -> nn.Module:
    """A copy of `model` with some tensors of another shape, for tracing only: those hold no values.

    Nothing is read or written in the new tensors, so they take no memory; all other tensors are shared.

    Args:
        model: the model.
        shapes: the new shape of each tensor that changes.
        meta: put every tensor on the meta device.
    """
    memo: dict[int, Any] = {}
    tensors = every_tensor(model)
    resized = {id(tensor): shapes[name] for name, tensor in tensors.items() if name in shapes}
    for tensor in (*tensors.values(), *loose_tensors(model)):
        shape = resized.get(id(tensor), tuple(tensor.shape))
        if meta or id(tensor) in resized:
            value = torch.empty(shape, dtype=tensor.dtype, device="meta" if meta else tensor.device)
        else:
            value = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    narrow = copy_of(model, memo)
    refresh(narrow, shapes)
    return narrow


def _weight(module: Any) -> Any:
    """The weight of a layer; where a hook computes it before each forward, the parameter of its shape."""
    own = (module._parameters.get(name) for name in ("weight", "weight_orig", "weight_v"))
    return next((found for found in own if found is not None), module.weight)


def _conv(module: Any) -> None:
    outer, inner = _weight(module).shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = outer, inner * module.groups
    else:
        module.out_channels, module.in_channels = outer, inner * module.groups


def _linear(module: Any) -> None:
    module.out_features, module.in_features = _weight(module).shape


def _bilinear(module: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _norm(module: Any) -> None:
    found = _weight(module) if _weight(module) is not None else module.running_mean
    if found is not None:
        module.num_features = found.shape[0]


def _group_norm(module: Any) -> None:
    if _weight(module) is not None:
        module.num_channels = _weight(module).shape[0]


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = _weight(module).shape


def _prelu(module: Any) -> None:
    module.num_parameters = _weight(module).shape[0]


def _attention(module: Any) -> None:
    fused = module.in_proj_weight is not None
    module.embed_dim = (module.in_proj_weight if fused else module.q_proj_weight).shape[1]
    module.kdim, module.vdim = (
        module.embed_dim if fused else weight.shape[1] for weight in (module.k_proj_weight, module.v_proj_weight)
    )
    module.head_dim = module.embed_dim // module.num_heads


def _recurrent(module: Any) -> None:
    module.hidden_size = module.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


def _recurrent_cell(module: Any) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


#: Widths that torch.nn keeps beside its weights. What a forward reads (`groups`, `normalized_shape`,
#: `num_groups`) is found by the comb like any other attribute and set from the plan before.
BOOKKEEPING: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], None]], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
)


#: The names of those widths.
WIDTHS = frozenset({
    "in_channels", "out_channels", "in_features", "out_features", "in1_features", "in2_features", "num_features",
    "num_channels", "num_embeddings", "embedding_dim", "num_parameters", "embed_dim", "kdim", "vdim", "head_dim",
    "hidden_size", "input_size", "proj_size",
})  # fmt: skip


def refresh(model: nn.Module, changed: Iterable[str]) -> None:
    """Bring the widths that torch.nn's modules keep in line with their weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    around = (["", *accumulate(name.split(".")[:-1], "{}.{}".format)] for name in changed)
    for path in dict.fromkeys(path for paths in around for path in paths):
        for kind, update in BOOKKEEPING:
            if isinstance(modules[path], kind):
                update(modules[path])
