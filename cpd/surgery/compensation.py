"""Closed-form compensation: what the removed channels carried is taken over by those that stay.

After surgery each layer's input lacks channels, and what is left of it has changed, since the layers before have
changed too. Layer by layer, in the order of the forward pass, the weights are refitted by least squares so that the
layer gives on the narrower model's input what it gave in the unpruned model (He et al. 2017, arXiv 1707.06168,
eq. 5 and section 3.2). With X the narrower model's inputs, W its weights and E what its output lacks, both over the
calibration data and less their means where a bias can take those up,

    W <- W + E^T X (X^T X + damping I)^-1

A layer whose output is added to a value that was there before it (the last of a residual branch) is asked for more:
the unpruned *sum* less that value as it is in the narrower model, so that each branch makes up for what those before
it have lost. Between layer and sum there may be a BatchNorm or a scale, whose factor is divided out.

No gradient step is taken. A first pass fits three samples in four and chooses for every layer, on the others, how
much to damp and whether to refit it at all; no layer has seen those others by then, nor have the layers before it. A
second pass fits all samples with what was chosen. Where memory does not hold all samples at once, a pass takes them
part by part, and each layer's sums go on from one part to the next. Several processes pass each its own samples, and
add up the sums of a layer before it is solved: each solves the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import InputError, of_the_user
from cpd.model.allocator import memory_reused
from cpd.model.architecture import check_architecture
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import check_model, evaluating
from cpd.model.tensors import named_tensors, restore, state_of
from cpd.options import LIMIT, SEED, checked, number
from cpd.plan import PLAN, Plan, removes
from cpd.processes import InStep
from cpd.surgery.calibration import HELD_OUT, MEMORY_GB, Calibration, Layer, Others, Part, flat
from cpd.surgery.least_squares import NormalEquations, Sums, best_damping
from cpd.trace.layer_calls import LayerCall, LayerCalls, from_matrix, matrix, seen
from cpd.trace.streams import Stream, streams

#: A channel that is multiplied by less than this share of the median on its way to a sum keeps its own target.
LEAST_SCALE = 1e-3
#: The statistics of a BatchNorm are taken in at least so many places of a sample, where there are as many.
PLACES = 512


@dataclass(frozen=True)
class Refit:
    """How compensation changed one layer.

    Attributes:
        weight: Name of the parameter.
        before: Mean squared error of the layer's output before the refit, relative to the variance of the unpruned
            model's output, on held-out samples.
        after: The same error after the refit; equal to `before` if the weights were not changed.
        damping: Damping of the least squares, relative to the mean square of a feature; None if the weights were not
            changed.
    """

    weight: str
    before: float
    after: float
    damping: float | None = None


@checked(
    model=MODEL, original=MODEL, plan=PLAN, data=DATA, limit=LIMIT, seed=SEED,
    memory_gb=number("above 0", lambda value: value > 0),
)  # fmt: skip
@memory_reused()
@torch.no_grad()
def compensate(
    model: nn.Module,
    original: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    limit: int = 16,
    seed: int = 0,
    memory_gb: float = MEMORY_GB,
) -> tuple[Refit, ...]:
    """Refit the layers of a narrower model, in closed form, so that they reproduce their outputs in the unpruned model.

    A layer is any use of a parameter by `linear`, `matmul`, a convolution or a transposed convolution, whatever module
    calls it. Weights that are used more than once, or that are computed from others, are not refitted. If a layer
    without a bias is followed by a BatchNorm, the running mean of that takes the role of the bias.

    Args:
        model: The narrower model, from `cpd.shrink`. It is changed in place.
        original: The unpruned model, on the same device. It is not changed.
        plan: The plan by which `model` was shrunk.
        data: Batches of inputs, of (input, target), or mappings. Targets are not used.
        limit: Largest number of batches to read. All their samples are used.
        seed: Seed for the positions of feature maps on which layers are fitted, where there are many.
        memory_gb: Approximate limit, in GiB, of the activations held in memory. Samples are processed in parts that
            fit.

    Returns:
        One `Refit` for each layer.

    Raises:
        InputError: If the models do not match the plan, or do not run in the same way on the data. `model` is then
            unchanged.
        TrainingError: If there is no data, or it holds values that are not finite.

    Examples:
        >>> from copy import deepcopy
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        >>> images = torch.randn(32, 3, 8, 8)
        >>> plan = cpd.comb(model, images).plan({"0": range(8)})
        >>> narrow = cpd.shrink(deepcopy(model), plan)
        >>> refit = cpd.compensate(narrow, model, plan, [images])[-1]
        >>> refit.weight  # of the layer that reads the channels that are left
        '2.weight'
        >>> refit.after < refit.before
        True
    """
    model, original = check_model(model), check_model(original)
    remedy = "Pass the model that the plan was made for as original, and a copy of it after cpd.shrink as model."
    check_architecture(original, plan.architecture, InputError, "The plan was made for", remedy)
    narrower = plan.architecture and plan.architecture.narrowed(plan)
    check_architecture(model, narrower, InputError, "Applying the plan to original gives", remedy)
    calibration = Calibration(original, data, limit=limit, seed=seed, memory_gb=memory_gb)
    before = state_of(model)
    chosen = refit(model, calibration, plan)
    restore(model, before)
    return tuple(refit(model, calibration, plan, chosen).values())


@torch.no_grad()
def refit(
    model: nn.Module,
    calibration: Calibration,
    plan: Plan,
    chosen: Mapping[str, Refit] | None = None,
    *,
    norms: bool = False,
    samples: int | None = None,
    alone: bool = False,
    support: Mapping[str, Tensor] | None = None,
) -> dict[str, Refit]:
    """One pass over the samples that refits the layers of a narrower model.

    Args:
        model: changed in place; as it was, if anything fails.
        calibration: the samples, and what the unpruned model makes of them.
        plan: what `model` keeps of it.
        chosen: what another pass has chosen, as it returned it: all samples are fitted. None: three in four are, and
            the others choose.
        norms: whether each BatchNorm takes the statistics of what reaches it in this pass, but those between a layer
            and a sum that it is fitted to.
        samples: at most so many are used, about; None: all.
        alone: whether only those layers are refitted that take over what a branch gave, or that have read it.
        support: weight -> which of its entries may differ from zero, bool of its shape; the others stay as they are.

    Returns:
        {weight: what was done}, in the order of the forward.

    Raises:
        InputError: if the model does not run as the unpruned one does.
    """
    before = state_of(model)
    try:
        with calibration.step.together(), evaluating(model), of_the_user("The narrower model", "on data"):
            found = _Pass(model, calibration, plan, chosen, norms, alone, support or {})
            for part in calibration.first(samples):
                found.over(part)
    except BaseException:
        restore(model, before)
        raise
    return found.refits


class _Fit:
    """A layer's weights before the pass, and its sums so far: of the samples that are fitted, and of the others."""

    def __init__(self, layer: LayerCall) -> None:
        bias = layer.given.get("bias")
        self.weight = layer.given["weight"].clone()
        self.bias = None if bias is None else bias.clone()
        self.fitted: Sums | None = None
        self.held: Sums | None = None

    def lacking(self, layer: LayerCall, x: Tensor, wanted: Tensor) -> Tensor:
        """What the layer with those weights lacks of an output [rows, outputs], [groups, rows, outputs]."""
        given = x @ matrix(layer.kind, self.weight, layer.groups).transpose(1, 2).float()
        if self.bias is not None and layer.kind != "transposed":
            given = given + self.bias.float().reshape(layer.groups, 1, -1)
        return _grouped(wanted, layer.groups) - given

    def add(self, fitted: Sums, others: Sums | None) -> tuple[Sums, Sums | None]:
        """Add sums of rows, of those that are fitted and of the others; returns what there is by now."""
        self.fitted = fitted if self.fitted is None else self.fitted + fitted
        self.held = others if self.held is None or others is None else self.held + others
        return self.fitted, self.held


class _Moments:
    """A BatchNorm's running mean before the pass, and the moments of what has reached it."""

    def __init__(self, mean: Tensor) -> None:
        self.before, self.count = mean.clone(), 0
        self.mean, self.variance = torch.zeros_like(mean), torch.zeros_like(mean)

    def add(self, x: Tensor, step: InStep) -> None:
        """Add an input, [samples, channels, ...], in some of its places where there are many."""
        if x.dim() > 2:
            x = x.movedim(1, -1).flatten(1, -2)
            x = x[:, :: max(1, x.shape[1] // PLACES)].flatten(0, 1)
        if step.count == 1:
            variance, mean = torch.var_mean(x, 0, correction=0)
            count = len(x)
        else:
            total, rows = step.totals("mean of a norm", [x.double().sum(0), torch.tensor(len(x))])
            count = int(rows)
            squares = step.totals("variance of a norm", [(x - total / count).square().sum(0)])[0]
            variance, mean = (squares / count).to(x.dtype), (total / count).to(x.dtype)
        share, apart = count / (self.count + count), mean - self.mean
        self.variance = self.variance * (1 - share) + variance * share + apart.square() * share * (1 - share)
        self.mean, self.count = self.mean + apart * share, self.count + count


class _Pass:
    """A pass over the samples, part by part."""

    def __init__(
        self, model: nn.Module, calibration: Calibration, plan: Plan, chosen: Mapping[str, Refit] | None,
        norms: bool, alone: bool, support: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.plan, self.support = model, calibration, plan, support
        self.chosen, self.norms = chosen, norms
        self.tensors = named_tensors(model)
        self.streams = calibration.streams
        if plan.replacements:
            left = streams(model, calibration.parts[0].call.part(1).to(calibration.device))
            self.streams = {name: stream for name, stream in left.items() if name in calibration.layers}
        self.stands_for = _stands_for(calibration.streams, plan)
        affected = {*self.stands_for, *plan.kept, *_readers(calibration.layers, plan, self.stands_for)}
        self.layers = {name: layer for name, layer in calibration.layers.items() if not alone or name in affected}
        self.fits: dict[str, _Fit] = {}
        self.moments: dict[int, _Moments] = {}
        self.refits: dict[str, Refit] = {}
        self.shifted: tuple[Tensor, Tensor] | None = None
        self.to_sum: Tensor | None = None

    def over(self, part: Part) -> None:
        """Refit every layer on these samples and all before them."""
        self.part, self.others = part, Others(self.streams)
        call = part.call.to(self.calibration.device)
        with seen(LayerCalls(self.model, instead=self._refit, norm=self._norm, step=self.others.keep)):
            call.on(self.model)

    def _refit(self, layer: LayerCall) -> Tensor | None:
        """Refit the layer that is being called; returns its new output."""
        known = self.layers.get(layer.weight)
        if known is None:
            return None
        index = self.calibration.index(layer, self.part.call.samples)
        x, bias = layer.features(index).float(), layer.given.get("bias")
        output = self._unpruned(layer, known, x.shape[1], self.part.outputs.get(layer.weight)).float()
        wanted = self._for_the_sum(layer, known, index, output)
        # what one input position of a transposed convolution adds to the output is no row of it
        takes_mean = layer.kind != "transposed" and (bias is not None or known.normed)
        if layer.weight not in self.fits:
            self.fits[layer.weight] = _Fit(layer)
        fit = self.fits[layer.weight]
        lacking = fit.lacking(layer, x, output if wanted is None else wanted)
        fitted, held = fit.add(*self._sums(layer.weight, x, lacking, output, shared=known.along is None))
        support = self.support.get(layer.weight)
        if support is not None:
            support = matrix(layer.kind, support.to(x.device), layer.groups)
        equations = NormalEquations(fitted, takes_mean, support)
        if self.chosen is None:
            assert held is not None, "those that choose"
            damping, change, before, after = best_damping(equations, held)
            self.refits[layer.weight] = Refit(layer.weight, before, after, damping)
        else:
            self.refits[layer.weight] = self.chosen[layer.weight]
            change = equations.solve(self.refits[layer.weight].damping)
        shift, weight = fitted.shift(change, takes_mean).flatten(), layer.given["weight"]
        weight.copy_(fit.weight + from_matrix(layer.kind, change, weight).to(weight.dtype))
        if bias is not None and fit.bias is not None and takes_mean:
            bias.copy_(fit.bias + shift.to(bias.dtype))
        found = layer.again()
        if bias is None and takes_mean:
            self.shifted = found, shift
        self.to_sum = None if wanted is None else found
        return found

    def _sums(
        self, weight: str, x: Tensor, lacking: Tensor, output: Tensor, *, shared: bool
    ) -> tuple[Sums, Sums | None]:
        """Of the rows that are fitted, and of the others where they choose, of all processes."""
        held = self._held(x.shape[1], shared).to(x.device)
        found = [
            Sums.of(x[:, which], lacking[:, which], output[which])
            for which in (~held & (not self.part.idle), held & (not self.part.idle))[: 1 + (self.chosen is None)]
        ]
        step, each = self.calibration.step, len(fields(Sums))
        if step.count > 1:
            totals = step.totals(f"{weight} {self.chosen is None}", [part for item in found for part in item.parts()])
            found = [Sums.of_parts(totals[start : start + each]) for start in range(0, len(totals), each)]
        return found[0], found[1] if len(found) > 1 else None

    def _held(self, rows: int, shared: bool = False) -> Tensor:
        """Which rows are not fitted in this pass, of samples that lie one after the other, or of what all share."""
        if self.chosen is not None:
            return torch.zeros(rows, dtype=torch.bool)
        held = self.part.held
        if shared or rows % len(held) or not (held.any() or self.calibration.step.count > 1):
            return torch.arange(rows) % HELD_OUT == HELD_OUT - 1
        return held.repeat_interleave(rows // len(held))

    def _unpruned(self, layer: LayerCall, known: Layer, rows: int, found: Tensor | None) -> Tensor:
        """What the unpruned layer gave, [rows, outputs], at the outputs that the narrower one has."""
        if found is not None and len(found) == rows:
            kept, found = self.plan.kept.get(layer.weight, {}), _grouped(found, known.groups)
            if layer.kind in ("linear", "conv"):  # whose first dimension goes over the outputs of all groups
                groups, outputs, found = None, kept.get(0), flat(found).unsqueeze(0)
            else:
                groups, outputs = kept.get(0), kept.get(1)
            if groups is not None:
                found = found[torch.unique(groups // (known.shape[0] // known.groups)).to(found.device)]
            if outputs is not None:
                inner = found.shape[2] // known.shape[0 if layer.kind in ("linear", "conv") else 1]
                found = found[:, :, (outputs[:, None] * inner + torch.arange(inner)).reshape(-1).to(found.device)]
            found = flat(found)
            if found.shape[1] == matrix(layer.kind, layer.given["weight"], layer.groups).shape[:2].numel():
                return found
        raise InputError(
            f"The narrower model does not do at {layer.weight} what the unpruned one does: their forward passes "
            "depend on the data in another way. Compensation needs models that run alike."
        )

    def _for_the_sum(self, layer: LayerCall, known: Layer, index: Tensor | None, output: Tensor) -> Tensor | None:
        """What the layer should give so that the sum that its output goes into is the unpruned one; None without.

        Where branches that followed are gone, the sum is what it was after the last of them.
        """
        other, stream = self.others.of(layer), self.streams.get(layer.weight)
        if known.stream is None or (stream is None and not self.plan.removed):
            return None
        scale = known.stream.scale(self.tensors, output.shape[1])
        usable = scale.abs() > LEAST_SCALE * scale.abs().median()
        factor = torch.where(usable, 1 / torch.where(usable, scale, 1.0), 0.0).to(output)

        def unpruned(value: Tensor) -> Tensor:
            return self._unpruned(layer, known, len(output), value).float()

        found, before = output, self.part.others.get(layer.weight)
        own, after = (self.part.sums.get(name) for name in (layer.weight, self.stands_for.get(layer.weight, "")))
        if stream is None:  # nothing is added to it any more: it gives the sum itself, up to a constant
            if own is None:
                return None
            found = unpruned(own) * factor
        elif other is not None and before is not None:
            found = found + (unpruned(before) - flat(layer.outputs(index, other))) * factor
        if own is not None and after is not None and own.shape == after.shape:
            found = found + unpruned(after - own) * factor
        return None if found is output else found

    def _norm(self, given: dict[str, Any]) -> None:
        """Set the statistics of a BatchNorm to what reaches it, or its mean to what the layer before it lacks."""
        x, mean, variance = (given[name] for name in ("input", "running_mean", "running_var"))
        if id(mean) not in self.moments:
            self.moments[id(mean)] = _Moments(mean)
        moments = self.moments[id(mean)]
        if self.norms and x is not self.to_sum:
            held = self._held(len(x))
            rows = x[~held.to(x.device)] if held.any() and len(x) == len(held) else x
            moments.add(rows[:0] if self.part.idle else rows, self.calibration.step)
            mean.copy_(moments.mean)
            variance.copy_(moments.variance)
        elif self.shifted is not None and x is self.shifted[0]:
            mean.copy_(moments.before - self.shifted[1].to(mean.dtype))
        self.shifted = None


def _stands_for(streams: Mapping[str, Stream], plan: Plan) -> dict[str, str]:
    """Layers after whose sum branches have gone -> the last layer of those branches."""
    found: dict[str, str] = {}
    for weight, stream in streams.items():  # in the order of the sums
        before = stream.follows
        while before is not None and removes(plan.replacements, before):
            before = streams[before].follows if before in streams else None
        if before is not None and removes(plan.replacements, weight):
            found[before] = weight
    return found


def _readers(layers: Iterable[str], plan: Plan, stands_for: Mapping[str, str]) -> set[str]:
    """The layers next to those of removed branches that no layer stands for: what reads a product with its gate gone.

    Args:
        layers: all layers, by their weights, in the order of the forward.
        plan: what goes.
        stands_for: as `_stands_for` found it.
    """
    found, before = set[str](), list[str]()
    for weight in layers:
        if removes(plan.replacements, weight):
            before.append(weight)
            continue
        if before and not set(before) & set(stands_for.values()):
            found.add(weight)
        before = []
    return found


def _grouped(value: Tensor, groups: int) -> Tensor:
    """The inverse of `flat`."""
    return value.reshape(len(value), groups, -1).transpose(0, 1)
