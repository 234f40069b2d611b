"""Shrink: apply a `Plan` to a model, in place, on the user's own modules.

Everything is checked before anything changes. Parameters keep their identity (`optimizer`, hooks and ties
between parameters still refer to them), dtype, device, layout and `requires_grad`; only their extent changes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import ShrinkError
from cpd.model.inputs import check_model
from cpd.plan import Attribute, Plan


def shrink(model: nn.Module, plan: Plan) -> nn.Module:
    """Shrink `model` in place to what `plan` keeps, and return it.

    Args:
        model: a model of the architecture that the plan was made for, unpruned.
        plan: what is kept.

    Raises:
        ShrinkError: if the plan does not fit; the model is then left as it was.
    """
    check_model(model)
    tensors = named_tensors(model)
    _check(model, tensors, plan)
    names = dict.fromkeys([*plan.kept, *(item.tensor for item in plan.rescales)])
    changed = {name: _narrow(name, tensors[name], plan) for name in names}
    gradients = {
        name: sliced(tensor.grad, plan.kept.get(name, {}))
        for name in changed
        if (tensor := tensors[name]).is_leaf and tensor.grad is not None
    }
    before = {name: (tensors[name].data, tensors[name].grad) for name in changed}
    try:
        for name, value in changed.items():
            _assign(tensors[name], value, gradients.get(name))
        set_attributes(model, plan.attributes)
        refresh(model, changed)
        lint(model)
    except Exception:
        for name, (value, gradient) in before.items():
            _assign(tensors[name], value, gradient)
        set_attributes(model, [Attribute(item.module, item.name, item.new, item.old) for item in plan.attributes])
        refresh(model, changed)
        raise
    return model


def _assign(tensor: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor another extent while it stays the same object.

    Where an earlier loss is still held, so is the node of its graph that adds up this tensor's gradient, and it knows
    the old shape. Autograd makes a new one only where the type changes.
    """
    tensor.grad = None
    tensor.data = value.new_empty(0, dtype=torch.float64 if value.dtype != torch.float64 else torch.float32)
    tensor.data = value
    tensor.grad = gradient


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write back what `state_of` kept."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])


def _check(model: nn.Module, tensors: Mapping[str, Tensor], plan: Plan) -> None:
    for name, shape in plan.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise ShrinkError(
                f"The plan was made for {name} of shape {list(shape)}; this model has "
                f"{'no such tensor' if found is None else list(found)}. Apply it to a model of the original "
                "architecture and size, not to one already shrunk."
            )
    for rescale in plan.rescales:
        rows = tensors[rescale.tensor].shape[rescale.dim] if rescale.tensor in tensors else 0
        if max(rescale.positions, default=-1) >= rows:
            raise ShrinkError(f"The plan rescales rows of {rescale.tensor} that this model does not have.")
    for item in plan.attributes:
        try:
            value = getattr(model.get_submodule(item.module), item.name)
        except AttributeError as error:
            raise ShrinkError(f"The plan changes {item.module}.{item.name}, which this model lacks.") from error
        if (list(value) if isinstance(value, (tuple, list)) else value) != item.old:
            raise ShrinkError(f"{item.module}.{item.name} is {value}; the plan was made for {item.old}.")


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor along each dimension named."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def _narrow(name: str, tensor: Tensor, plan: Plan) -> Tensor:
    """The kept part of a tensor, its rows rescaled where the plan says so."""
    value = tensor.detach()
    scales = [item for item in plan.rescales if item.tensor == name]
    if scales:
        value = value.clone()
    for item in scales:
        index = torch.tensor(item.positions, dtype=torch.long, device=value.device)
        value.index_copy_(item.dim, index, value.index_select(item.dim, index) * item.factor)
    value = sliced(value, plan.kept.get(name, {}))
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last and tensor.is_contiguous(memory_format=torch.channels_last) else None
    return value.contiguous(memory_format=layout or torch.contiguous_format)


def set_attributes(model: nn.Module, attributes: Iterable[Attribute]) -> None:
    """Set module attributes to their new values, a tuple staying a tuple."""
    for item in attributes:
        module = model.get_submodule(item.module)
        kind = type(getattr(module, item.name))
        setattr(module, item.name, kind(item.new) if isinstance(item.new, list) else item.new)


def skeleton(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, meta: bool = False) -> nn.Module:
    """A copy of `model` with some tensors of another shape, for tracing only: those hold no values.

    Nothing is read or written in the new tensors, so they take no memory; all other tensors are shared.

    Args:
        model: the model.
        shapes: the new shape of each tensor that changes.
        meta: put every tensor on the meta device.
    """
    memo: dict[int, Any] = {}
    resized = {id(tensor): shapes[name] for name, tensor in named_tensors(model).items() if name in shapes}
    for tensor in named_tensors(model).values():
        shape = resized.get(id(tensor), tuple(tensor.shape))
        if meta or id(tensor) in resized:
            value = torch.empty(shape, dtype=tensor.dtype, device="meta" if meta else tensor.device)
        else:
            value = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    for module in model.modules():  # a module has a dozen empty dictionaries of hooks, most of the time of a copy
        memo.update((id(d), OrderedDict()) for d in vars(module).values() if type(d) is OrderedDict and not d)
    narrow = copy.deepcopy(model, memo)
    refresh(narrow, shapes)
    return narrow


# ---------------------------------------------------------------- attributes of torch.nn's own modules


def _conv(module: Any) -> None:
    outer, inner = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = outer, inner * module.groups
    else:
        module.out_channels, module.in_channels = outer, inner * module.groups


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(module: Any) -> None:
    found = module.weight if module.weight is not None else module.running_mean
    if found is not None:
        module.num_features = found.shape[0]


def _group_norm(module: Any) -> None:
    if module.weight is not None:
        module.num_channels = module.weight.shape[0]


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: Any) -> None:
    module.num_parameters = module.weight.shape[0]


def _attention(module: Any) -> None:
    fused = module.in_proj_weight is not None
    module.embed_dim = (module.in_proj_weight if fused else module.q_proj_weight).shape[1]
    module.kdim, module.vdim = (
        module.embed_dim if fused else weight.shape[1] for weight in (module.k_proj_weight, module.v_proj_weight)
    )


def _recurrent(module: Any) -> None:
    module.hidden_size = module.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


#: Widths that torch.nn keeps beside its weights. What a forward reads (`groups`, `normalized_shape`,
#: `num_groups`) is found by the comb like any other attribute and set from the plan before.
BOOKKEEPING: tuple[tuple[type[nn.Module], Callable[[Any], None]], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
)


def refresh(model: nn.Module, changed: Iterable[str]) -> None:
    """Bring the widths that torch.nn's modules keep in line with their weights."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        for module in (model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])):
            for kind, update in BOOKKEEPING:
                if isinstance(module, kind):
                    update(module)


def lint(model: nn.Module) -> None:
    """Check what must hold after every surgery.

    - The widths that torch.nn modules keep agree with their weights (groups times inner width, normalized shape).
    - A bias has as many entries as its weight has outputs.
    - No tensor is empty.

    Raises:
        ShrinkError: naming the module.
    """
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if 0 in tensor.shape:
                raise ShrinkError(f"{path}.{name} is empty after shrinking: {list(tensor.shape)}.")
        if isinstance(module, nn.modules.conv._ConvNd) and module.out_channels % module.groups:
            raise ShrinkError(f"{path}: {module.out_channels} output channels in {module.groups} groups.")
        weight = getattr(module, "weight", None)
        shape = getattr(module, "normalized_shape", None)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None and tuple(weight.shape) != shape:
            raise ShrinkError(f"{path}: weight {list(weight.shape)}, normalized {shape}.")
        if isinstance(module, nn.GroupNorm) and module.num_channels % module.num_groups:
            raise ShrinkError(f"{path}: {module.num_channels} channels in {module.num_groups} groups.")
        bias = module.bias if isinstance(module, (nn.Linear, nn.modules.batchnorm._NormBase)) else None
        if bias is not None and weight is not None and bias.shape[0] != weight.shape[0]:
            raise ShrinkError(f"{path}: weight {list(weight.shape)}, bias {list(bias.shape)}.")
