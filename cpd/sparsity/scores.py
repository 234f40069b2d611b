"""Scores of single weights: how much each would be missed. Patterns compare the means over their units.

magnitude      |w|^p, p the norm (Han et al. 2015, arXiv 1506.02626)
taylor         (w * dL/dw)^2, the mean over batches (Molchanov et al. 2019, arXiv 1906.10771, eq. 8, of a weight)
obs            w^2 / inverse(S)_jj * G_ii: the change of the logits once the rest of the row is refitted (Hassibi and
               Stork 1993, eq. 5), S and G as in `cpd.criteria.obs`
random         for comparison
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpd.criteria.context import require_grad
from cpd.criteria.obs import Moments, inverse_of
from cpd.errors import InputError, TrainingError, of_the_user
from cpd.model.inputs import batches, device_of, evaluating, logits
from cpd.sparsity.patterns import Layer, Pattern
from cpd.tasks.loss import LossFunction, task_loss
from cpd.trace.layer_calls import LayerCall, LayerCalls, from_matrix, matrix, seen

#: A criterion of one's own: the setting -> {parameter name: scores of its shape}.
WeightCriterion = Callable[["WeightSetting"], Mapping[str, Tensor]]
#: Sums a tensor over processes.
Total = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class WeightSetting:
    """What a criterion of weights works on.

    Attributes:
        model: left as it was.
        layers: whose weights are scored, by the name of the parameter.
        data: batches, or None.
        loss: `loss(output, target) -> scalar`; None infers one.
        limit: at most this many batches are read.
        norm: p of magnitudes.
        seed: of what is random.
        total: sums a tensor over several processes, each of which has a part of every batch.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    data: Iterable[Any] | None = None
    loss: LossFunction | None = None
    limit: int = 16
    norm: int = 1
    seed: int = 0
    total: Total = alone

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over processes: of a gradient, that of the batch whose parts they have."""
        return self.total(tensor) / self.total(torch.ones(()))


def magnitude(setting: WeightSetting) -> dict[str, Tensor]:
    """|w|^p."""
    return {name: layer.weight.detach().double().abs() ** setting.norm for name, layer in setting.layers.items()}


def random(setting: WeightSetting) -> dict[str, Tensor]:
    """Uniform."""
    generator = torch.Generator().manual_seed(setting.seed)
    return {name: torch.rand(layer.weight.shape, generator=generator) for name, layer in setting.layers.items()}


def taylor(setting: WeightSetting) -> dict[str, Tensor]:
    """The mean over batches of (w * dL/dw)^2."""
    sums = {name: torch.zeros_like(layer.weight, dtype=torch.double) for name, layer in setting.layers.items()}
    with evaluating(setting.model), require_grad(setting.model, setting.layers), torch.enable_grad():
        for batch in batches(setting.data or (), setting.limit, finite=True):
            batch = batch.to(device_of(setting.model))
            value = task_loss(batch.on(setting.model), batch.target, setting.loss, place=batch.place)
            if value is None:
                raise TrainingError("The batches have no target, so there is no loss to score with: pass loss=….")
            weights = [layer.weight for layer in setting.layers.values()]
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
            for name, weight, gradient in zip(sums, weights, gradients, strict=True):
                if gradient is not None:
                    sums[name] += (weight.detach() * setting.mean(gradient)).double().square()
    return sums


def obs(setting: WeightSetting) -> dict[str, Tensor]:
    """w^2 / inverse(S)_jj * G_ii; |w|^2 of layers that no forward calls, or that are too wide."""
    moments, count = dict[str, Moments](), 0
    generator = torch.Generator().manual_seed(setting.seed)

    def after(layer: LayerCall) -> None:
        if layer.weight in setting.layers:
            moments.setdefault(layer.weight, Moments(layer)).add(layer, samples, 0, generator)

    with evaluating(setting.model), require_grad(setting.model, setting.layers), torch.enable_grad():
        for batch in batches(setting.data or (), setting.limit, finite=True):
            batch = batch.to(device_of(setting.model))
            samples = batch.call.samples
            with seen(LayerCalls(setting.model, after=after)):
                output = logits(batch.on(setting.model))
            value = (output * torch.randn(output.shape, generator=generator).to(output)).sum()
            _backward(value, [layer.weight for layer in setting.layers.values()])
            count += samples
    found = magnitude(WeightSetting(setting.model, setting.layers, norm=2))
    count = int(setting.total(torch.tensor(count)))
    for name, moment in moments.items():
        moment.pool(setting.total)
        if moment.usable and not moment.folded:
            weight = setting.layers[name].weight.detach()
            errors = 1 / inverse_of(moment.covariance()).diagonal(dim1=1, dim2=2)
            outputs = moment.gradient.double().diagonal(dim1=1, dim2=2) / count
            scored = matrix(moment.kind, weight, moment.groups).double().square()
            found[name] = from_matrix(moment.kind, scored * errors[:, None, :] * outputs[:, :, None], weight)
    return found


def _backward(value: Tensor, weights: list[Tensor]) -> None:
    """Run the backward pass for the hooks on its way; the gradients of the weights stay as they were."""
    before = [weight.grad for weight in weights]
    try:
        value.backward()
    finally:
        for weight, gradient in zip(weights, before, strict=True):
            weight.grad = gradient


CRITERIA: dict[str, WeightCriterion] = {"magnitude": magnitude, "taylor": taylor, "obs": obs, "random": random}
#: Criteria that need data.
NEED_DATA = frozenset({"taylor", "obs"})


def unit_scores(
    setting: WeightSetting, pattern: Pattern, criterion: str | WeightCriterion, name: str
) -> dict[str, Tensor]:
    """The scores that a pattern compares: of each unit the mean over its weights; of N:M those of the weights.

    Args:
        setting: the model and its layers.
        pattern: the pattern.
        criterion: a name in `CRITERIA`, or a function.
        name: of the criterion, for messages.

    Raises:
        InputError: scores that are missing or of another shape; a criterion that needs data, and there is none.
        TrainingError: scores that are not finite.
    """
    if criterion in NEED_DATA and setting.data is None:
        raise InputError(f"criterion={criterion!r} needs data: pass data=loader, or use criterion='magnitude'.")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    with of_the_user(f"The criterion {name}"):
        scores = function(setting)
    found = dict[str, Tensor]()
    for layer in setting.layers.values():
        score = scores.get(layer.name) if isinstance(scores, Mapping) else None
        if not isinstance(score, Tensor) or score.shape != layer.weight.shape:
            given = list(score.shape) if isinstance(score, Tensor) else "no score"
            raise InputError(
                f"The criterion returned {given} for {layer.name}; it must return a tensor of shape "
                f"{list(layer.weight.shape)}, and a tensor for every weight in setting.layers."
            )
        if not bool(torch.isfinite(score).all()):
            raise TrainingError(f"The scores of {layer.name} are not finite: check its weights, the data and the loss.")
        score = score.detach().cpu()
        units = pattern.units(layer)
        found[layer.name] = score if pattern.runs is not None else units.sums(score) / units.sizes
    return found
