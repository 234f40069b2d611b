"""Mask: which weights of a model are to be zero. `cpd.mask` chooses, `cpd.get_sparsity` counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpd.coupling.comb import COMB, Comb, comb
from cpd.criteria.choice import criterion_name
from cpd.criteria.score import score
from cpd.errors import InputError
from cpd.model.arguments import DATA, INPUTS, MODEL
from cpd.model.inputs import check_model
from cpd.options import FLAG, LOSS, Check, checked, checks_of, takes_options
from cpd.plan import Plan
from cpd.sparsity.channels import masks_of, plan_of
from cpd.sparsity.config import SPARSE, SparseConfig
from cpd.sparsity.masks import Masks
from cpd.sparsity.patterns import CHANNEL, Layer, prunable
from cpd.sparsity.ratios import select
from cpd.sparsity.scores import Total, WeightSetting, alone, unit_scores
from cpd.tasks.loss import LossFunction

#: Options that choosing masks once has no use for.
NOT_OF_MASKS = (
    "compensation", "memory_gb", "schedule", "prune_from", "prune_until", "interval", "regrow", "outputs", "threads",
)  # fmt: skip
#: Of the criteria of weights, what they are called for channels.
OF_CHANNELS = {"magnitude": "magnitude", "taylor": "taylor", "obs": "obs", "random": "random"}
_MODEL_OR_TENSOR = Check(
    "a torch.nn.Module or a tensor", lambda value: isinstance(value, (nn.Module, Tensor))
)  # fmt: skip


@takes_options(SparseConfig, leave_out=NOT_OF_MASKS)
@checked(
    model=MODEL, **checks_of(SparseConfig, "sparsity"), data=DATA, loss=LOSS, comb=COMB, example_inputs=INPUTS,
    config=SPARSE,
)  # fmt: skip
def mask(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    data: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    comb: Comb | None = None,
    example_inputs: Any = None,
    config: SparseConfig | None = None,
    **options: Any,
) -> Masks:
    """Choose which weights of a model to set to zero.

    These can be the weights of all convolutions and linear layers, and the projections of attention. The share of zeros
    is that of all these weights together; if single weights are chosen (pattern "unstructured"), it is met exactly.

    Args:
        model: The model. It is not changed.
        sparsity: The first of the options below.
        data: Batches, for the criteria "taylor" and "obs".
        loss: `loss(output, target) -> scalar`, for "taylor". Default: cross-entropy if the targets are classes.
        comb: The comb of the model, for the pattern "channel".
        example_inputs: Inputs to make that comb from, if it is not passed.
        config: Options held together. Options given by name replace those in it.
        options: The options of `cpd.SparseConfig`, by name:

    Returns:
        The masks. `masks.apply(model)` sets the weights to zero.

    Raises:
        InputError: An argument cannot be used, the share cannot be reached, or the pattern fits no layer.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> {name: round(share, 2) for name, share in cpd.mask(model, 0.9, scope="layer").by_layer.items()}
        {'0.weight': 0.9, '3.weight': 0.9}
        >>> cpd.mask(model, pattern="2:4")
        Masks(2:4: 3,168 of 6,336 weights in 2 layers are zero, 50.0%)
    """
    named = options if sparsity is None else {"sparsity": sparsity, **options}
    settings = SparseConfig.of(config, named, "cpd.mask")
    _ = settings.share
    if settings.pattern == CHANNEL:
        plan = channel_plan(check_model(model), settings, settings.share, data, loss, comb, example_inputs)
        return Masks(masks_of(plan, dict(model.named_parameters())), CHANNEL)
    return choose(check_model(model), settings, settings.share, data, loss)


def choose(
    model: nn.Module,
    settings: SparseConfig,
    share: float,
    data: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    total: Total = alone,
) -> Masks:
    """The masks of a share of zeros, of any pattern but whole channels.

    `total` sums a tensor over processes, each of which has a share of the batches.
    """
    layers = fitting(model, settings)
    setting = WeightSetting(model, layers, data, loss, settings.score_batches, settings.norm, settings.seed, total)
    scores = unit_scores(setting, settings.layout, settings.criterion, criterion_name(settings.criterion))  # type: ignore[arg-type]
    kept = select(
        layers, scores, settings.layout, share, scope=settings.scope, ratios=settings.ratios, most=settings.max_ratio
    )
    return Masks(kept, settings.pattern)


def fitting(model: nn.Module, settings: SparseConfig) -> dict[str, Layer]:
    """The layers of a model that the pattern fits.

    Raises:
        InputError: if there is none.
    """
    every = prunable(model)
    found = {name: layer for name, layer in every.items() if settings.layout.fits(layer)}
    if not found:
        raise InputError(
            f"pattern={settings.pattern!r} fits no layer of {type(model).__name__}: "
            + (
                "it has no convolution and no linear layer."
                if not every
                else "no layer has a number of channels that can be divided so."
            )
        )
    return found


def channel_plan(
    model: nn.Module,
    settings: SparseConfig,
    share: float,
    data: Iterable[Any] | None,
    loss: LossFunction | None,
    combed: Comb | None,
    example_inputs: Any,
    total: Total = alone,
) -> Plan:
    """The plan of the pattern "channel"; `total` as for `choose`."""
    if combed is None:
        if example_inputs is None:
            raise InputError("pattern='channel' needs the groups of a comb: pass example_inputs=, or comb=.")
        combed = comb(model, example_inputs, outputs=settings.outputs)
    criterion: Any = settings.criterion
    if criterion == "magnitude" and settings.norm == 1:
        criterion = "magnitude-l1"
    found = score(
        model, combed, data, loss, criterion=criterion, limit=settings.score_batches, seed=settings.seed, total=total
    )
    return plan_of(combed, found.drawn(), share, settings.scope, min(settings.max_ratio, 0.999))


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one parameter.

    Attributes:
        name: Name of the parameter.
        zeros: Number of weights that are zero.
        elements: Number of all weights.
    """

    name: str
    zeros: int
    elements: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / max(1, self.elements)


@checked(model=_MODEL_OR_TENSOR, details=FLAG)
def get_sparsity(model: nn.Module | Tensor, details: bool = False) -> Any:
    """The share of zeros in a tensor, or in all weights of a model that can be sparse.

    Args:
        model: A model or a tensor. In a model, the weights of convolutions, linear layers and attention projections are
            counted, each once; biases and normalization layers are not.
        details: Whether to return the figures of each layer.

    Returns:
        zeros / elements; with `details`, a tuple with one `LayerSparsity` (name, zeros, elements, sparsity) for each
        layer.

    Examples:
        >>> cpd.get_sparsity(torch.tensor([0.0, 1.0, 0.0, 0.0]))
        0.75
    """
    rows = zeros_of({"": model} if isinstance(model, Tensor) else weights_of(model))
    return rows if details else sum(row.zeros for row in rows) / max(1, sum(row.elements for row in rows))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What the layers of a model that can be sparse multiply by: under a mask of torch, the product with it."""
    found = dict[str, Tensor]()
    for name, layer in prunable(model).items():
        path, _, own = name.rpartition(".")
        mask = model.get_submodule(path)._buffers.get(f"{own.removesuffix('_orig')}_mask")
        found[name] = layer.weight if mask is None else layer.weight * mask
    return found


def zeros_of(weights: Mapping[str, Tensor]) -> tuple[LayerSparsity, ...]:
    """How many entries of some tensors are zero."""
    return tuple(
        LayerSparsity(name, weight.numel() - int(torch.count_nonzero(weight.detach())), weight.numel())
        for name, weight in weights.items()
    )
