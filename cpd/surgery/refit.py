"""One pass that refits the layers of a narrower model, in the order of the forward (prototype)."""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any
import torch
from torch import Tensor, nn
from cpd.errors import InputError
from cpd.model.inputs import device_of, evaluating
from cpd.model.tensors import named_tensors
from cpd.plan import Plan
from cpd.surgery.calibration import Calibration, Others, Part, flat
from cpd.surgery.least_squares import Sums, best_damping, total
from cpd.trace.layer_calls import LayerCall, LayerCalls, from_matrix, matrix, seen

MOST_FEATURES = 8192

@dataclass(frozen=True)
class Refit:
    weight: str
    before: float
    after: float
    damping: float | None = None

@dataclass
class _State:
    """A layer's sums, and its weights before the first pass."""
    weight: Tensor
    bias: Tensor | None
    fit: list[Sums] = field(default_factory=list)
    held: list[Sums] = field(default_factory=list)


class Refitting:
    def __init__(self, model: nn.Module, calibration: Calibration, plan: Plan, *, decided: dict[str, Refit] | None = None, norms: bool = False, use_streams: bool = True) -> None:
        calibration.find_targets()
        self.model, self.calibration, self.plan, self.decided, self.norms = model, calibration, plan, decided, norms
        self.use_streams = use_streams
        self.tensors = named_tensors(model)
        self.states: dict[str, _State] = {}
        self.means: dict[int, Tensor] = {}
        self.refits: dict[str, Refit] = {}
        self.shift: tuple[Tensor, Tensor] | None = None
        self.fixed: Tensor | None = None
        self.normstate: dict[int, Any] = {}

    @torch.no_grad()
    def run(self) -> dict[str, Refit]:
        with evaluating(self.model):
            for part in self.calibration.parts:
                self.part(part)
        return self.refits

    def part(self, part: Part) -> None:
        others = Others(self.calibration.layers if self.use_streams else {})
        self.current, self.others = part, others
        with seen(LayerCalls(self.model, after=self._refit, norm=self._norm, step=others.keep)):
            part.call.to(self.calibration.device).on(self.model)

    def _sliced(self, layer: LayerCall, found: Tensor) -> Tensor:
        """Of the unpruned outputs [rows, outputs] those that the narrower layer has."""
        kept = self.plan.kept.get(layer.weight, {})
        shape = self.calibration.shapes[layer.weight]
        groups = self.calibration.groups[layer.weight]
        found = found.unflatten(1, (groups, -1)).transpose(0, 1)
        if layer.kind in ("linear", "conv"):
            g, outputs = None, kept.get(0)
            found = flat(found).unsqueeze(0)
        else:
            g, outputs = kept.get(0), kept.get(1)
        if g is not None:
            found = found[torch.unique(g // (shape[0] // groups)).to(found.device)]
        if outputs is not None:
            inner = found.shape[2] // shape[0 if layer.kind in ("linear", "conv") else 1]
            found = found[:, :, (outputs[:, None] * inner + torch.arange(inner)).reshape(-1).to(found.device)]
        return flat(found)

    def _refit(self, layer: LayerCall) -> Tensor | None:
        calibration, name = self.calibration, layer.weight
        known = calibration.layers.get(name)
        if known is None:
            return None
        part = self.current
        if name not in part.targets:
            raise InputError("models do not run alike")
        other = self.others.of(layer)
        features = matrix(layer.kind, layer.given["weight"], layer.groups).shape[-1]
        if features > MOST_FEATURES:
            return None
        bias = layer.given.get("bias")
        takes_mean = layer.kind != "transposed" and (bias is not None or known.normed)
        index = calibration.index(layer, part.call.samples)
        own = self._sliced(layer, part.targets[name]).float()
        wanted = own
        if other is not None and name in part.others and layer.kind != "transposed":
            scale = known.stream.scale(self.tensors, own.shape[1]).to(own.device)
            difference = self._sliced(layer, part.others[name]) - flat(layer.outputs(index, other))
            usable = scale.abs() > 1e-3 * scale.abs().median()
            wanted = own + torch.where(usable, difference / torch.where(usable, scale, 1.0), 0.0).float()
            self.fixed = layer.output
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = _State(layer.given["weight"].clone(), None if bias is None else bias.clone())
        x = layer.features(index).float()
        responses = x @ matrix(layer.kind, state.weight, layer.groups).transpose(1, 2).float()
        lacking = wanted.reshape(len(wanted), layer.groups, -1).transpose(0, 1) - responses
        if layer.kind != "transposed" and state.bias is not None:
            lacking = lacking - state.bias.reshape(layer.groups, 1, -1)
        rows = x.shape[1]
        samples = part.call.samples if rows % part.call.samples == 0 else 1
        held = part.held.repeat_interleave(rows // samples) if samples > 1 else torch.arange(rows) % 4 == 3
        own_rows = own.reshape(rows, layer.groups, -1).transpose(0, 1)
        if self.decided is None:
            state.fit.append(Sums.of(x[:, ~held], lacking[:, ~held], own[~held]))
            state.held.append(Sums.of(x[:, held], lacking[:, held], own[held]))
            fit = total(state.fit)
            damping, before, after = best_damping(fit, total(state.held), takes_mean)
            state.fit = [fit]; state.held = [total(state.held)]
        else:
            state.fit.append(Sums.of(x, lacking, own))
            fit = total(state.fit); state.fit = [fit]
            damping, before, after = self.decided[name].damping, self.decided[name].before, self.decided[name].after
        self.refits[name] = Refit(name, before, after, damping)
        change = fit.none() if damping is None else fit.solve(damping, takes_mean)
        shift = fit.shift(change, takes_mean).flatten()
        weight = layer.given["weight"]
        weight.copy_(state.weight + from_matrix(layer.kind, change.to(weight.dtype), weight))
        if bias is not None and takes_mean:
            bias.copy_(state.bias + shift.to(bias.dtype))
        output = layer.again()
        if bias is None and takes_mean:
            self.shift = output, shift
        if self.fixed is layer.output:
            self.fixed = output
        return output

    def _norm(self, given: dict[str, Any]) -> None:
        mean = given["running_mean"]
        key = id(mean)
        if self.norms and given["input"] is not self.fixed:
            x = given["input"]
            if self.decided is None:
                held = self.current.held
                if len(x) == len(held):
                    x = x[~held]
            dims = [d for d in range(x.dim()) if d != 1]
            count = x.numel() // x.shape[1]
            s = self.normstate.setdefault(key, [0, 0.0, 0.0])
            s[0] += count; s[1] = s[1] + x.sum(dims).double(); s[2] = s[2] + x.double().square().sum(dims) if False else s[2] + x.square().sum(dims).double()
            m = s[1] / s[0]; v = s[2] / s[0] - m * m
            given["running_mean"].copy_(m); given["running_var"].copy_(v.clamp_min(0))
        elif self.shift is not None and given["input"] is self.shift[0]:
            start = self.means.setdefault(key, mean.clone())
            mean.copy_(start - self.shift[1].to(mean.dtype))
        self.shift = None
