"""Gates on activations: where a group is read, or given, by a call of a layer.

A gate on a position multiplies what a layer reads; on activations it has a gradient for every sample. A group that no
layer reads (the inner width of an attention's q and k) is gated where layers give it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cpd.criteria.context import Setting, require_grad
from cpd.criteria.gates import Gates, Site, parameters_of, slices
from cpd.errors import InputError, of_the_user
from cpd.model.inputs import Batch, Call, batches, evaluating
from cpd.trace.layer_calls import LayerCall, LayerCalls, seen


@dataclass
class CallSites:
    """The sites of all open groups at layer calls.

    Attributes:
        read: weight -> sites along the input of the layer.
        given: weight -> sites along its output, of groups that no layer reads.
        bare: sites along parameters that are used in another way than by a layer's call.
        samples_along: (weight, number of the call) -> the dimensions of its input and output that the samples of
            a batch lie along, samples outermost.
    """

    read: dict[str, list[Site]] = field(default_factory=dict)
    given: dict[str, list[Site]] = field(default_factory=dict)
    bare: list[Site] = field(default_factory=list)
    samples_along: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(setting: Setting) -> CallSites:
        """Sort the sites by what a forward pass does with their parameters; one and two samples are run."""
        call = next(batches(setting.data or (), 1)).call.to(setting.device)
        one, two = (_shapes(setting, call.part(samples)) for samples in (1, 2))
        kinds = {weight: kind for (weight, _), (kind, *_) in one.items()}
        found, placed = CallSites(), set()
        gates = Gates(setting.comb)
        for site in gates.sites:
            kind = kinds.get(site.tensor)
            if kind is not None and site.dim < 2:
                reads = site.dim == (0 if kind in ("matmul", "transposed") else 1)
                if reads == site.consumer:
                    (found.read if reads else found.given).setdefault(site.tensor, []).append(site)
                    placed.add(site)
        held = {site.group for site in placed}
        found.bare = [s for s in gates.sites if s not in placed and (s.consumer or s.group not in held)]
        for key in one.keys() & two.keys():
            found.samples_along[key] = (_grown(one[key][1], two[key][1]), _grown(one[key][2], two[key][2]))
        return found

    def within(self, groups: Collection[str]) -> CallSites:
        """Those of some groups; a layer that reads others stays, without a site."""
        read, given = (
            {weight: [site for site in found if site.group in groups] for weight, found in along.items()}
            for along in (self.read, self.given)
        )
        return CallSites(read, given, [site for site in self.bare if site.group in groups], self.samples_along)

    def labels(self, site: Site, layer: LayerCall) -> Tensor:
        """For each channel of the layer's input (or output) the position of the group; -1 where there is none."""
        inner = (site.consumer and layer.kind == "conv") or (not site.consumer and layer.kind == "transposed")
        return site.labels.repeat(layer.groups if inner else 1).to(layer.input.device)


def _shapes(setting: Setting, call: Call) -> dict[tuple[str, int], tuple[str, torch.Size, torch.Size]]:
    """(weight, number of the call) -> its kind and the shapes of its input and output."""
    times: Counter[str] = Counter()
    found: dict[tuple[str, int], tuple[str, torch.Size, torch.Size]] = {}

    def after(layer: LayerCall) -> None:
        found[layer.weight, times[layer.weight]] = (layer.kind, layer.input.shape, layer.output.shape)
        times[layer.weight] += 1

    told = of_the_user("The model", "on the first batch of data")
    with torch.no_grad(), evaluating(setting.model), seen(LayerCalls(setting.model, after=after)), told:
        call.on(setting.model)
    return found


def _grown(one: Iterable[int], two: Iterable[int]) -> int:
    """The dimension that grows with the number of samples; the first, if none does."""
    return next((dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if b == 2 * a), 0)


def sample_gradients(
    setting: Setting,
    sites: CallSites,
    batch: Batch,
    value: Callable[[], Tensor],
    after: Callable[[LayerCall], None] | None = None,
    groups: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The derivative of `value()` in every gate, for each sample of a batch, from one backward pass.

    The gates of a group at all layers that read it move as one. No weight has a gradient computed but those that
    are used bare, whose gates have one for the whole batch: each sample is given an equal share of it.

    Args:
        setting: the model and its mode.
        sites: where its groups lie.
        batch: the batch.
        value: runs the model on it and gives a scalar, a sum over the samples.
        after: told of each layer's call; where a group is read, its output requires a gradient.
        groups: whose gates are looked at; None: all.

    Returns:
        {group name: Tensor[samples, size]}.
    """
    samples, times = batch.call.samples, Counter[str]()
    wanted = [group for group in setting.comb.open if groups is None or group.name in groups]
    sums = {group.name: torch.zeros(samples, group.size, device=setting.device) for group in wanted}
    sites = sites.within(sums)

    def collector(found: list[Site], layer: LayerCall, along: int) -> Callable[[Tensor, Tensor], None]:
        labels = [sites.labels(site, layer) for site in found]
        channel = layer.channel  # the call itself is not held: with its input it would hold the graph in a cycle

        def collect(value: Tensor, gradient: Tensor) -> None:
            each = per_sample(value * gradient, along, channel, samples)
            for site, position in zip(found, labels, strict=True):
                sums[site.group].index_add_(1, position[position >= 0], each[:, position >= 0])

        return collect

    def dims(layer: LayerCall) -> tuple[int, int]:
        return sites.samples_along.get((layer.weight, times[layer.weight]), (0, 0))

    def read(layer: LayerCall) -> Tensor:
        x, found = layer.input, sites.read.get(layer.weight)
        if found is None:
            return x
        x = x if x.requires_grad else x.detach().requires_grad_()
        return _Watch.apply(x, collector(found, layer, dims(layer)[0])) if found else x

    def gave(layer: LayerCall) -> Tensor:
        output, found = layer.output, sites.given.get(layer.weight, [])
        if found:
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()  # what follows may write to it
            # computed once more rather than kept: it may be the largest tensor of its block, and be written to
            again, collect = _again(replace(layer, output=None)), collector(found, layer, dims(layer)[1])
            output.register_hook(lambda gradient: collect(again(), gradient))
        times[layer.weight] += 1
        if after is not None:
            after(replace(layer, output=output))
        return output  # type: ignore[no-any-return]

    bare = list(dict.fromkeys(site.tensor for site in sites.bare))
    named, weights = dict(setting.model.named_parameters()), parameters_of(setting.model)
    with require_grad(setting.model, bare), torch.enable_grad():
        with seen(LayerCalls(setting.model, before=read, after=gave)):
            total = value()
        leaves: list[Tensor] = [named[name] for name in bare]
        gradients = _backward(total, leaves)
    for site in sites.bare:
        gradient = gradients[bare.index(site.tensor)]
        if gradient is not None:
            sums[site.group] += slices(site, weights[site.tensor] * gradient) / samples
    return sums


def _backward(total: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Run the whole backward pass; the gradients of these leaves, whose own stay as they are.

    (`torch.autograd.grad` runs no more of it than leads to them, so that no gate before the first would be seen.)
    """
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        total.backward()
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


class _Watch(torch.autograd.Function):
    """The identity, which shows its input beside the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, collect: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Keep the input; a view of it is returned."""
        ctx.save_for_backward(x)
        ctx.collect = collect
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """Show both, pass the gradient on."""
        (x,), (gradient,) = ctx.saved_tensors, gradients
        ctx.collect(x, gradient)
        return gradient, None


def _again(layer: LayerCall) -> Callable[[], Tensor]:
    """A function that computes the output of a layer once more."""
    version = layer.input._version

    def compute() -> Tensor:
        if layer.input._version != version:
            raise InputError(
                f"The forward changes the input of {layer.weight} in place after it was read, so that no gradient can "
                "be found (training fails on it too). Make a copy of it first."
            )
        with torch.no_grad():
            return layer.again()

    return compute


def per_sample(values: Tensor, along: int, channel: int, samples: int) -> Tensor:
    """The sum of values of a layer over all but the samples and the channels, [samples, channels]."""
    values = values.movedim((along, channel), (0, -1))
    if values.shape[0] % samples:
        values = values.sum(0, keepdim=True).expand(samples, *values.shape[1:]) / samples
    return values.reshape(samples, -1, values.shape[-1]).sum(1).float()
