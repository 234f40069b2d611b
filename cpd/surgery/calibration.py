"""What recovery asks of the unpruned model and of the data, found once and used for every plan that is tried.

The data is cut into parts that fit into memory. A quarter of the samples is held out: they are fitted on only when all
that can be chosen has been chosen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.errors import of_the_user
from cpd.model.inputs import Call, batches, device_of, evaluating, joined, logits
from cpd.model.outputs import whole
from cpd.trace.layer_calls import LayerCall, LayerCalls, Step, matrix, seen
from cpd.trace.streams import Stream, streams

#: Bytes of activations that may be alive at a time, about.
MEMORY = 2**32
#: Tensors as large as a layer's input and output that are alive at a time, about.
ALIVE = 2.0
#: Rows a layer is fitted on: so many a feature, and so many more; fewer where their products take more than `WORK`
#: multiply-accumulates, but no fewer than `LEAST` a feature.
ROWS, MORE, WORK, LEAST = 64, 8192, 3e10, 4
ELEMENTS = 2**27
#: One sample of so many is held out.
HELD_OUT = 4


@dataclass
class Layer:
    """A layer that a forward calls once.

    Attributes:
        weight: name of its parameter.
        along: the dimension of its input that the samples lie along.
        features: of its matrix.
        normed: whether a BatchNorm follows.
        stream: how its output gets to a sum, where it does.
    """

    weight: str
    along: int
    features: int
    normed: bool = False
    stream: Stream | None = None


@dataclass
class Part:
    """Samples that run at once.

    Attributes:
        call: of the samples, on the model's device.
        held: which of them are held out, [samples].
        targets: weight -> what the unpruned layer gave in the rows that are looked at, [rows, outputs].
        others: weight -> what its output is added to, in the same rows.
    """

    call: Call
    held: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


class Calibration:
    """Samples, and what the unpruned model makes of them.

    Args:
        original: the unpruned model; left as it was.
        data: batches as `cpd.model.inputs.as_batch` takes them; targets are not used.
        limit: at most this many are read; all if None.
        seed: of the places where layers are looked at.
        memory: bytes of activations that may be alive at a time.
        read: gives the part of an output that matters.
    """

    @torch.no_grad()
    def __init__(
        self,
        original: nn.Module,
        data: Iterable[Any],
        *,
        limit: int | None = None,
        seed: int = 0,
        memory: float = MEMORY,
        read: Callable[[Any], Any] = whole,
    ) -> None:
        self.original, self.seed, self.read = original, seed, read
        self.device = device_of(original)
        self.shapes: dict[str, torch.Size] = {}
        self.groups: dict[str, int] = {}
        calls = _alike([batch.call for batch in batches(data, limit, finite=True)])
        self.samples = sum(call.samples for call in calls)
        with evaluating(original):
            self.layers, largest = _layers(original, calls[0].to(self.device))
            self.at_once = max(1, int(memory // (ALIVE * 4 * largest)))
            self.parts = self._parts(calls)
            self._targets_found = False
            self.expected = [logits(read(call.on(original))).double() for call in self.held_calls()]

    def _parts(self, calls: list[Call]) -> list[Part]:
        parts, start = [], 0
        for call in calls:
            count = math.ceil(call.samples / self.at_once)
            edges = [round(call.samples * i / count) for i in range(count + 1)]
            for low, high in zip(edges, edges[1:], strict=False):
                held = torch.arange(start + low, start + high) % HELD_OUT == HELD_OUT - 1
                parts.append(Part(call.slice(low, high), held))
            start += call.samples
        return parts

    def held_calls(self) -> list[Call]:
        """The samples that are held out; all where there are too few to hold any out."""
        return self._chosen(lambda part: part.held)

    def fitted_calls(self) -> list[Call]:
        """The others."""
        return self._chosen(lambda part: ~part.held)

    def _chosen(self, which: Callable[[Part], Tensor]) -> list[Call]:
        found = [_picked(part.call, which(part)) for part in self.parts]
        found = [call for call in found if call.samples]
        return [call.to(self.device) for call in found or [part.call for part in self.parts]]

    def index(self, layer: LayerCall, samples: int) -> Tensor | None:
        """Which rows (linear layers) or positions of each sample (convolutions) a layer is fitted on; None for all."""
        known = self.layers[layer.weight]
        wanted = min(ROWS * known.features + MORE, WORK / known.features**2, ELEMENTS / known.features / layer.groups)
        wanted = max(LEAST * known.features, wanted)
        rows = math.ceil(wanted * samples / self.samples)
        return layer.spread(rows, samples, known.along, torch.Generator().manual_seed(self.seed))

    @torch.no_grad()
    def find_targets(self) -> None:
        """Look at every layer of the unpruned model on all samples, once."""
        if self._targets_found:
            return
        with evaluating(self.original):
            for part in self.parts:
                self._look(part)
        self._targets_found = True

    def _look(self, part: Part) -> None:
        wanted = Others(self.layers)

        def after(layer: LayerCall) -> None:
            if layer.weight in self.layers:
                index = self.index(layer, part.call.samples)
                self.shapes[layer.weight] = layer.given["weight"].shape
                self.groups[layer.weight] = layer.groups
                part.targets[layer.weight] = flat(layer.responses(index))
                other = wanted.of(layer)
                if other is not None:
                    part.others[layer.weight] = flat(layer.outputs(index, other))

        with seen(LayerCalls(self.original, after=after, step=wanted.keep)):
            part.call.to(self.device).on(self.original)

    @torch.no_grad()
    def judge(self, model: nn.Module) -> tuple[float, ...]:
        """On the samples that are held out: error of the logits, share of equal classes, KL, cosine."""
        mean = torch.cat(self.expected).mean(0, keepdim=True)
        out = [[], [], [], [], []]
        with evaluating(model):
            for call, expected in zip(self.held_calls(), self.expected, strict=True):
                found = logits(self.read(call.on(model))).double()
                out[0].append((found - expected).square().sum(1)); out[1].append((expected - mean).square().sum(1))
                out[2].append((found.argmax(1) == expected.argmax(1)).double())
                p = expected.softmax(1)
                out[3].append((p * (expected.log_softmax(1) - found.log_softmax(1))).sum(1))
                out[4].append(-found.log_softmax(1).gather(1, expected.argmax(1)[:, None])[:, 0])
        o = [torch.cat(x) for x in out]
        return float(o[0].sum() / o[1].sum()), float(o[2].mean()), float(o[3].mean()), float(o[4].mean())


class Others:
    """The other operands of the sums that layers lead to, kept until the layer has been called."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.streams = {name: layer.stream for name, layer in layers.items() if layer.stream is not None}
        self.left = Counter(stream.other for stream in self.streams.values())
        self.values: dict[int, Tensor] = {}

    def keep(self, step: Step) -> None:
        """Keep what a call gave, where it is wanted."""
        if step.number in self.left:
            self.values[step.number] = step.output

    def of(self, layer: LayerCall) -> Tensor | None:
        """What the output of a layer will be added to, laid out as that output is."""
        stream = self.streams.get(layer.weight)
        if stream is None:
            return None
        value = self.values.get(stream.other)
        self.left[stream.other] -= 1
        if not self.left[stream.other]:
            self.values.pop(stream.other, None)
        if not isinstance(value, Tensor):
            return None
        value = stream.at_output(value, layer.output.shape)
        return value if value.shape == layer.output.shape else None


def _layers(original: nn.Module, call: Call) -> tuple[dict[str, Layer], int]:
    """The layers that are called once, by their weight; and the numbers in the largest input and output of one."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    times: Counter[str] = Counter()
    normed, features, largest = set[str](), dict[str, int](), 1
    for samples in (2, 1):
        times.clear()
        latest: dict[int, tuple[Tensor, str]] = {}
        found: dict[str, tuple[int, ...]] = {}

        def after(layer: LayerCall, found: dict[str, Any] = found, latest: dict[int, Any] = latest) -> None:
            nonlocal largest
            if isinstance(layer.given["weight"], nn.Parameter):  # what is computed is so again at the next call
                times[layer.weight] += 1
            found[layer.weight] = layer.input.shape
            features[layer.weight] = matrix(layer.kind, layer.given["weight"], layer.groups).shape[-1]
            latest[id(layer.output)] = (layer.output, layer.weight)
            largest = max(largest, layer.input.numel() + layer.output.numel()) if len(shapes) else 1

        def norm(given: dict[str, Any], latest: dict[int, Any] = latest) -> None:
            if id(given["input"]) in latest:
                normed.add(latest[id(given["input"])][1])

        told = of_the_user("original", "on the first batch of data")
        with seen(LayerCalls(original, after=after, norm=norm)), told:
            call.resized(samples).on(original)
        shapes.append(found)
    sums = streams(original, call.part(1))
    two, one = shapes
    return {
        name: Layer(name, _grown(one[name], two.get(name, one[name])), features[name], name in normed, sums.get(name))
        for name, count in times.items()
        if count == 1 and name in one
    }, largest


def _grown(one: Iterable[int], two: Iterable[int]) -> int:
    """The dimension that grows with the number of samples; the first, if none does."""
    return next((dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if b == 2 * a), 0)


def _alike(calls: list[Call]) -> list[Call]:
    """Calls joined where their samples have the same shapes."""
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        key = tuple(tuple(leaf.shape[1:]) for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor))
        groups.setdefault(key, []).append(call)
    return [joined(group) for group in groups.values()]


def _picked(call: Call, which: Tensor) -> Call:
    """Some of the samples of a call."""
    from torch.utils._pytree import tree_map_only

    whole = call.samples

    def cut(leaf: Tensor) -> Tensor:
        return leaf[which.to(leaf.device)] if leaf.dim() and len(leaf) == whole else leaf

    return Call(*tree_map_only(Tensor, cut, tuple(call)))


def flat(value: Tensor) -> Tensor:
    """[groups, rows, outputs] -> [rows, groups * outputs]."""
    return value.transpose(0, 1).flatten(1)
