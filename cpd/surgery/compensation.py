"""Closed-form compensation: what the removed channels carried is taken over by those that stay.

After surgery each layer's input lacks channels, and what is left of it has changed, since the layers before have
changed too. Layer by layer, in the order of the forward pass, the weights are refitted by least squares so that the
layer gives on the narrower model's input what it gave in the unpruned model (He et al. 2017, arXiv 1707.06168,
eq. 5 and section 3.2). With X the narrower model's inputs, W its weights and E what its output lacks, both over the
calibration data and less their means where a bias can take those up,

    W <- W + E^T X (X^T X + damping I)^-1

No gradient step is taken. A single forward pass does all layers: the unpruned model runs beside the narrower one,
one layer ahead of it, on the same batch.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import InputError, of_the_user
from cpd.model.architecture import check_architecture
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import Call, batches, check_model, device_of, evaluating, joined
from cpd.model.tensors import restore, state_of
from cpd.options import LIMIT, SEED, checked
from cpd.plan import PLAN, Plan
from cpd.trace.layer_calls import LayerCall, LayerCalls, from_matrix, matrix, seen

#: Bytes that the largest input or output of a layer may take, by which the samples are limited.
MEMORY = 2**30
#: Multiply-accumulates that the second moments of one layer's input may take; at least `LEAST` rows a feature.
WORK, LEAST, MOST_ROWS = 8e9, 4, 2**15
#: Layers with more features than this keep their weights: the solution would take too long.
MOST_FEATURES = 8192
#: Dampings tried, relative to the mean square of a feature; the rows held out decide, also against changing nothing.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Share of the rows held out.
HELD_OUT = 0.25
#: A layer that lacks less than this share of its output's variance is not refitted.
NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Refit:
    """What compensation did to one layer.

    Attributes:
        weight: name of the parameter.
        before: mean square of what its output lacked, relative to that of the unpruned output, on rows held out.
        after: the same with the new weights; as before where they were left as they were.
    """

    weight: str
    before: float
    after: float


@checked(model=MODEL, original=MODEL, plan=PLAN, data=DATA, limit=LIMIT, seed=SEED)
@torch.no_grad()
def compensate(
    model: nn.Module, original: nn.Module, plan: Plan, data: Iterable[Any], *, limit: int = 16, seed: int = 0
) -> tuple[Refit, ...]:
    """Refit the layers of a narrower model, in closed form, to what they gave in the unpruned one.

    Layers are the applications of a parameter by `linear`, `matmul`, convolutions and transposed ones, wherever
    they are called from; those whose weight is used more than once, or is computed, keep it. Where a layer has no
    bias and a BatchNorm follows, its running mean takes the place of one.

    Args:
        model: the narrower model, as `cpd.shrink` leaves it; changed in place.
        original: the unpruned model on the same device; left as it was.
        plan: what `model` keeps of it.
        data: batches as `cpd.model.inputs.as_batch` takes them, all of one shape; targets are not used.
        limit: at most this many batches are read; of their samples as many are used as memory allows.
        seed: of the positions that layers with many are fitted on.

    Returns:
        What was done, layer by layer.

    Raises:
        InputError: if the models are not those of the plan, or do not run alike on the data; `model` is then as it was
            before.
        TrainingError: if there is no data, or it holds values that are not finite.

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
    remedy = "Give the model that the plan was made for as original, and what cpd.shrink made of a copy of it as model."
    check_architecture(original, plan.architecture, InputError, "The plan is", remedy)
    narrower = plan.architecture and plan.architecture.narrowed(plan)
    check_architecture(model, narrower, InputError, "What the plan makes is", remedy)
    calls = [batch.call for batch in batches(data, limit, finite=True)]
    device = device_of(model)
    before = state_of(model)
    with evaluating(model), evaluating(original):
        probe = _Probe(original, calls[0].part(1).to(device))
        call = joined(calls).part(probe.samples).to(device)
        try:
            with of_the_user("A model", "while both ran beside one another on data"):
                return _Lockstep(model, original, plan, probe, seed).run(call)
        except BaseException:
            restore(model, before)
            raise


class _Probe:
    """One sample's way through the unpruned model: which layers are called once, and which a BatchNorm follows."""

    def __init__(self, original: nn.Module, call: Call) -> None:
        times: Counter[str] = Counter()
        self.normed: set[str] = set()
        latest: dict[int, tuple[Tensor, str]] = {}
        self.largest = 1

        def after(layer: LayerCall) -> None:
            if isinstance(layer.given["weight"], nn.Parameter):  # what is computed is so again at the next call
                times[layer.weight] += 1
            latest[id(layer.output)] = (layer.output, layer.weight)
            self.largest = max(self.largest, layer.input.numel(), layer.output.numel())

        def norm(given: dict[str, Any]) -> None:
            if id(given["input"]) in latest:
                self.normed.add(latest[id(given["input"])][1])

        with seen(LayerCalls(original, after=after, norm=norm)), of_the_user("original", "on the first batch of data"):
            call.on(original)
        self.once = {name for name, count in times.items() if count == 1}

    @property
    def samples(self) -> int:
        """How many samples memory allows."""
        return max(1, MEMORY // (4 * self.largest))


@dataclass(frozen=True)
class _Target:
    """What an unpruned layer gives at the outputs that the narrower one keeps, [rows, outputs], and in which rows."""

    weight: str
    positions: int
    index: Tensor | None
    responses: Tensor


@dataclass
class _Lockstep:
    """Both models on one batch, the unpruned one a layer ahead."""

    model: nn.Module
    original: nn.Module
    plan: Plan
    probe: _Probe
    seed: int
    refits: list[Refit] = field(default_factory=list)
    shift: tuple[Tensor, Tensor] | None = None

    def run(self, call: Call) -> tuple[Refit, ...]:
        targets: queue.Queue[Any] = queue.Queue(maxsize=1)
        stop = threading.Event()

        def ahead() -> None:
            def after(layer: LayerCall) -> None:
                if layer.weight in self.probe.once:
                    _put(targets, self._target(layer), stop)

            try:
                with torch.no_grad(), seen(LayerCalls(self.original, after=after)):
                    call.on(self.original)
                _put(targets, None, stop)
            except _StoppedError:
                return
            except Exception as error:  # handed over to the other thread
                with contextlib.suppress(_StoppedError):
                    _put(targets, error, stop)

        thread = threading.Thread(target=ahead, daemon=True)
        thread.start()
        try:
            with seen(LayerCalls(self.model, after=lambda layer: self._refit(layer, targets), norm=self._shift)):
                call.on(self.model)
        finally:
            stop.set()
            thread.join()
        return tuple(self.refits)

    def _target(self, layer: LayerCall) -> _Target:
        index = _sampled(layer, self.seed)
        found = layer.responses(index)
        kept, shape = self.plan.kept.get(layer.weight, {}), layer.given["weight"].shape
        if layer.kind in ("linear", "conv"):  # whose first dimension goes over the outputs of all groups
            groups, outputs = None, kept.get(0)
            found = _flat(found).unsqueeze(0)
        else:
            groups, outputs = kept.get(0), kept.get(1)
        if groups is not None:
            found = found[torch.unique(groups // (shape[0] // layer.groups)).to(found.device)]
        if outputs is not None:
            inner = found.shape[2] // shape[0 if layer.kind in ("linear", "conv") else 1]
            found = found[:, :, (outputs[:, None] * inner + torch.arange(inner)).reshape(-1).to(found.device)]
        return _Target(layer.weight, layer.positions, index, _flat(found))

    def _refit(self, layer: LayerCall, targets: queue.Queue[Any]) -> Tensor | None:
        """Refit the layer that is being called; returns its new output."""
        if layer.weight not in self.probe.once:
            return None
        target = targets.get()
        if isinstance(target, BaseException):
            raise target
        if target is None or target.weight != layer.weight or target.positions != layer.positions:
            raise InputError(
                f"The narrower model does not do at {layer.weight} what the unpruned one does: their forward passes "
                "depend on the data in another way. Compensation needs models that run alike."
            )
        features = matrix(layer.kind, layer.given["weight"], layer.groups).shape[-1]
        if features > MOST_FEATURES:
            return None
        bias = layer.given.get("bias")
        # what one input position of a transposed convolution adds to the output is no row of it
        takes_mean = layer.kind != "transposed" and (bias is not None or layer.weight in self.probe.normed)
        lacking = target.responses.float() - _flat(layer.responses(target.index)).float()
        change, shift, before, after = _solve(
            layer.features(target.index).float(), _grouped(lacking, layer.groups), target.responses.float(), takes_mean
        )
        self.refits.append(Refit(layer.weight, before, after))
        weight = layer.given["weight"]
        weight.add_(from_matrix(layer.kind, change, weight).to(weight.dtype))
        if bias is not None and takes_mean:
            bias.add_(shift.to(bias.dtype))
        output = layer.again()
        if bias is None and takes_mean:
            self.shift = output, shift
        return output

    def _shift(self, given: dict[str, Any]) -> None:
        """Lower the running mean of a BatchNorm by what the output that it takes is lacking."""
        if self.shift is not None and given["input"] is self.shift[0]:
            given["running_mean"].sub_(self.shift[1].to(given["running_mean"].dtype))
        self.shift = None


def _sampled(layer: LayerCall, seed: int) -> Tensor | None:
    """The rows, or positions of every sample, that a layer is fitted on; None for all."""
    features = matrix(layer.kind, layer.given["weight"], layer.groups).shape[-1]
    wanted = max(LEAST * features, min(MOST_ROWS, int(WORK / features**2)))
    return layer.sample(wanted, torch.Generator().manual_seed(seed))


def _solve(x: Tensor, lacking: Tensor, full: Tensor, takes_mean: bool) -> tuple[Tensor, Tensor, float, float]:
    """The change of a layer's matrices that gives most of what its output lacks, by damped least squares.

    Args:
        x: inputs [groups, rows, features].
        lacking: what the output lacks [groups, rows, outputs].
        full: the unpruned output, for scale.
        takes_mean: whether a mean error can go into a bias.

    Returns:
        The change [groups, outputs, features], zero if no damping does better on rows held out; the change of the
        bias [groups * outputs]; the mean square of what is lacking before and after, relative to the variance of the
        unpruned output, on those rows.
    """
    fit = x.shape[1] - math.ceil(x.shape[1] * HELD_OUT)
    scale = float((full - full.mean(0)).square().sum()) / x.shape[1] + 1e-30
    train, held = (_Sums.of(x[:, part], lacking[:, part]) for part in (slice(None, fit), slice(fit, None)))
    none = x.new_zeros(x.shape[0], lacking.shape[2], x.shape[2], dtype=torch.double)
    before = held.error(none, train.shift(none, takes_mean)) / scale
    best, after = none, before
    if before > NEGLIGIBLE and fit:
        chosen = None
        for damping in DAMPINGS:
            change = train.solve(damping, takes_mean)
            error = held.error(change, train.shift(change, takes_mean)) / scale
            if error < after:
                chosen, after = damping, error
        best = none if chosen is None else (train + held).solve(chosen, takes_mean)
    return best.float(), (train + held).shift(best, takes_mean).flatten().float(), before, after


@dataclass(frozen=True)
class _Sums:
    """Sums over rows of a layer's inputs x, of what its output lacks, and of their products, in float64."""

    rows: int
    x: Tensor
    lacking: Tensor
    xx: Tensor
    lacking_x: Tensor
    squares: float

    @staticmethod
    def of(x: Tensor, lacking: Tensor) -> _Sums:
        return _Sums(
            x.shape[1],
            x.sum(1).double(),
            lacking.sum(1).double(),
            (x.transpose(1, 2) @ x).double(),
            (lacking.transpose(1, 2) @ x).double(),
            float(lacking.square().sum()),
        )

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def solve(self, damping: float, takes_mean: bool) -> Tensor:
        """The change that makes most of what is lacking small, [groups, outputs, features]."""
        mean = self.x / self.rows * float(takes_mean)
        xx = self.xx / self.rows - mean[:, :, None] * mean[:, None, :]
        cross = self.lacking_x / self.rows - (self.lacking / self.rows)[:, :, None] * mean[:, None, :]
        size = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
        damped = xx + damping * size * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
        found: Tensor = torch.linalg.solve(damped, cross.transpose(1, 2))
        return found.transpose(1, 2)

    def shift(self, change: Tensor, takes_mean: bool) -> Tensor:
        """The change of the bias that goes with it, [groups, outputs]."""
        left = (self.lacking - (change @ self.x[:, :, None]).squeeze(-1)) / max(self.rows, 1)
        return left * float(takes_mean)

    def error(self, change: Tensor, shift: Tensor) -> float:
        """The mean over rows of the squared length of what is lacking after both."""
        linear = (change * self.lacking_x).sum() + (shift * self.lacking).sum()
        mixed = (shift * (change @ self.x[:, :, None]).squeeze(-1)).sum()
        square = ((change @ self.xx) * change).sum() + 2 * mixed + self.rows * shift.square().sum()
        return max(0.0, float(self.squares - 2 * linear + square)) / max(self.rows, 1)


def _flat(value: Tensor) -> Tensor:
    """[groups, rows, outputs] -> [rows, groups * outputs]."""
    return value.transpose(0, 1).flatten(1)


def _grouped(value: Tensor, groups: int) -> Tensor:
    """The inverse of `_flat`."""
    return value.reshape(len(value), groups, -1).transpose(0, 1)


def _put(targets: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Hand over an item; give up once the other side has stopped."""
    while True:
        try:
            return targets.put(item, timeout=0.1)
        except queue.Full:
            if stop.is_set():
                raise _StoppedError from None


class _StoppedError(Exception):
    """The narrower model's pass has ended."""
