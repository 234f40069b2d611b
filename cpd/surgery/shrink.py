"""Shrink: apply a `Plan` to a model, in place, on the user's own modules.

Everything is checked before anything changes. Parameters keep their identity (`optimizer`, hooks and ties
between parameters still refer to them), dtype, device, layout and `requires_grad`; only their extent changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpd.errors import ShrinkError
from cpd.model import kept
from cpd.model.architecture import check_architecture
from cpd.model.arguments import MODEL
from cpd.model.inputs import check_model, evaluating
from cpd.model.removed import put_in_place, replacement
from cpd.model.skeleton import refresh, set_attributes
from cpd.model.state import forget
from cpd.model.tensors import derived, every_tensor, sliced
from cpd.options import checked
from cpd.plan import PLAN, Attribute, Plan


@checked(model=MODEL, plan=PLAN)
def shrink(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a model physically narrower, in place: only what the plan keeps is left.

    Args:
        model: An unpruned model of the architecture that the plan was made for, with the same modules, shapes and
            settings. Its weights, their dtype and their device may differ.
        plan: What to keep, from `comb.plan(...)`.

    Returns:
        The same model.

    Raises:
        ShrinkError: If the plan does not fit the model. The model is then unchanged.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
        >>> cpd.shrink(model, comb.plan({"0": range(8)}))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): BatchNorm2d(8, ...)
          (2): ReLU()
          (3): Flatten(start_dim=1, end_dim=-1)
          (4): Linear(in_features=288, out_features=10, bias=True)
        )
    """
    whole, model = model, check_model(model)
    tensors = every_tensor(model)
    _check(model, tensors, plan)
    names = dict.fromkeys([*plan.kept, *(item.tensor for item in plan.rescales)])
    changed = {name: _narrow(name, tensors[name], plan) for name in names}
    gradients = {
        name: sliced(tensor.grad, plan.kept.get(name, {}))
        for name in changed
        if (tensor := tensors[name]).is_leaf and tensor.grad is not None
    }
    before = {name: (tensors[name].data, tensors[name].grad) for name in changed}
    replaced: dict[str, nn.Module] = {}
    try:
        replaced = put_in_place(model, {item.module: replacement(item) for item in plan.replacements})
        for name, value in changed.items():
            _assign(tensors[name], value, gradients.get(name))
        set_attributes(model, plan.attributes)
        refresh(model, changed)
        _derive(model)
        lint(model)
    except Exception:
        put_in_place(model, replaced)
        for name, (value, gradient) in before.items():
            _assign(tensors[name], value, gradient)
        set_attributes(model, [Attribute(item.module, item.name, item.new, item.old) for item in plan.attributes])
        refresh(model, changed)
        _derive(model)
        raise
    forget(model, plan.caches)
    return whole


def _derive(model: nn.Module) -> None:
    """Compute anew what hooks of `torch.nn.utils` derive from parameters: masked weights, `weight_norm`."""
    with torch.no_grad(), evaluating(model):
        for module in model.modules():
            for hook in derived(module).values():
                hook(module, ())


def _assign(tensor: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor another extent while it stays the same object.

    Where an earlier loss is still held, so is the node of its graph that adds up this tensor's gradient, and it knows
    the old shape. Autograd makes a new one only where the type changes.
    """
    tensor.grad = None
    tensor.data = value.new_empty(0, dtype=torch.float64 if value.dtype != torch.float64 else torch.float32)
    tensor.data = value
    tensor.grad = gradient


def _check(model: nn.Module, tensors: Mapping[str, Tensor], plan: Plan) -> None:
    for name, shape in plan.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise ShrinkError(
                f"The plan was made for a model whose {name} has shape {list(shape)}; in this model "
                f"{'there is no such tensor' if found is None else f'its shape is {list(found)}'}. Apply the plan to a "
                "model of the original architecture and size, not to one already shrunk."
            )
    paths = dict(model.named_modules(remove_duplicate=False))
    absent = next((item.module for item in plan.replacements if item.module not in paths), None)
    if absent is not None:
        raise ShrinkError(f"The plan removes {absent}, which this model lacks.")
    for rescale in plan.rescales:
        shape = tensors[rescale.tensor].shape if rescale.tensor in tensors else ()
        rows = shape[rescale.dim] if rescale.dim < len(shape) else 0
        if max(rescale.positions, default=-1) >= rows:
            raise ShrinkError(f"The plan rescales rows of {rescale.tensor} that this model does not have.")
    for item in plan.attributes:
        try:
            value = kept.get(model.get_submodule(item.module), item.name)
        except AttributeError as error:
            raise ShrinkError(f"The plan changes {item.module}.{item.name}, which this model does not have.") from error
        kept_now = list(value) if isinstance(value, (tuple, list)) else value
        if not isinstance(kept_now, (int, list)) or kept_now != item.old:
            raise ShrinkError(f"{item.module}.{item.name} is {value}, but the plan was made for {item.old}.")
    check_architecture(
        model,
        plan.architecture,
        ShrinkError,
        "The plan was made for",
        "Call cpd.comb on this model and make a plan with that comb.",
    )


def slice_of(name: str, value: Tensor, plan: Plan) -> Tensor:
    """What a plan keeps of a tensor, its rows rescaled where the plan says so; on the graph of `value`.

    Args:
        name: of the tensor in the model that the plan is of.
        value: of its shape there.
        plan: what is kept.
    """
    for item in plan.rescales:
        if item.tensor == name:
            factor = torch.ones(value.shape[item.dim], dtype=value.dtype, device=value.device)
            factor[list(item.positions)] = item.factor
            value = value * factor.view([-1 if dim == item.dim else 1 for dim in range(value.dim())])
    return sliced(value, plan.kept.get(name, {}))


def _narrow(name: str, tensor: Tensor, plan: Plan) -> Tensor:
    """The kept part of a tensor, its rows rescaled where the plan says so."""
    value = slice_of(name, tensor.detach(), plan)
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last and tensor.is_contiguous(memory_format=torch.channels_last) else None
    return value.contiguous(memory_format=layout or torch.contiguous_format)


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
            raise ShrinkError(
                f"{path} would have {module.out_channels} output channels, not a multiple of {module.groups} groups."
            )
        weight = getattr(module, "weight", None)
        shape = getattr(module, "normalized_shape", None)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None and tuple(weight.shape) != shape:
            raise ShrinkError(f"{path} would have a weight of shape {list(weight.shape)}, but normalizes {shape}.")
        if isinstance(module, nn.GroupNorm) and module.num_channels % module.num_groups:
            raise ShrinkError(
                f"{path} would have {module.num_channels} channels, not a multiple of {module.num_groups} groups."
            )
        bias = module.bias if isinstance(module, (nn.Linear, nn.modules.batchnorm._NormBase)) else None
        if bias is not None and weight is not None and bias.shape[0] != weight.shape[0]:
            raise ShrinkError(
                f"{path} would have a weight of shape {list(weight.shape)} and a bias of {list(bias.shape)}."
            )
