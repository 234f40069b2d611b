"""What recovery asks of the unpruned model and of the data, found once and used for every plan that is tried.

The samples are cut into parts that fit into memory. One in four is held out: it is fitted on only when all that can be
chosen has been chosen.

Samples of more than some hundred megabytes are kept in files that are mapped into memory, so that no more of them need
be there than are used at a time.

Several processes share the samples out, four at a time, the last of which is held out, and add up what they find. Each
holds its own alone; a process whose samples end before those of the others passes one again, and adds nothing.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from cpd import processes
from cpd.errors import TrainingError, of_the_user
from cpd.model.inputs import Call, batches, device_of, evaluating, joined, logits
from cpd.model.memory_format import channels_last, takes_channels_last
from cpd.model.outputs import whole
from cpd.model.randomness import random_states_kept, seeded
from cpd.trace.layer_calls import LayerCall, LayerCalls, Step, matrix, seen
from cpd.trace.streams import Stream, streams

#: GiB of activations that may be alive at a time, about.
MEMORY_GB = 4.0
#: Inputs of more than this share of it are kept in a file that is mapped into memory.
IN_MEMORY = 1 / 8
#: As many tensors of the size of a layer's input and output are alive at a time, about.
ALIVE = 2
#: Layers with more features than this keep their weights: the solution would take too long.
MOST_FEATURES = 8192
#: Rows that a layer is fitted on: so many a feature, and so many more.
ROWS, MORE = 64, 2048
#: But no more than their products take so many multiply-accumulates, or they themselves so many numbers; and at least
#: so many a feature.
WORK, NUMBERS, LEAST = 3e10, 2**27, 4
#: Bytes of a layer's input and output where nothing more is asked of samples: they stay in the processor's cache, and
#: memory that was freed is used again, where larger tensors are each given new pages by the system (from 32 MiB on).
SMALL = 2**25
#: One sample of so many is held out.
HELD_OUT = 4


@dataclass(frozen=True)
class Layer:
    """A layer that a forward calls once.

    Attributes:
        shape: of its weight.
        groups: of a convolution.
        along: the dimension of its input that the samples lie along; None where the input is the same for all.
        rows: how many it is fitted on of each sample.
        normed: whether a BatchNorm follows.
        stream: how its output gets to a sum, where it does.
    """

    shape: torch.Size
    groups: int
    along: int | None
    rows: int
    normed: bool
    stream: Stream | None


@dataclass
class Part:
    """Samples that run at once.

    Attributes:
        call: of the samples.
        held: which of them are held out, [samples].
        idle: whether nothing of it counts: other processes have samples left, and this one has none.
        shared: the layers whose input is the same for all samples.
        outputs: weight -> what the unpruned layer gave in the rows that are looked at, [rows, outputs].
        others: weight -> what its output is added to, in the same rows.
        sums: weight -> the sum of both.
    """

    call: Call
    held: Tensor
    idle: bool = False
    shared: frozenset[str] = frozenset()
    outputs: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def first(self, samples: int) -> Part:
        """The first samples alone."""
        whole = len(self.held)

        def cut(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: value if name in self.shared else value[: len(value) * samples // whole]
                for name, value in rows.items()
            }

        rows = (cut(found) for found in (self.outputs, self.others, self.sums))
        return Part(self.call.part(samples), self.held[:samples], self.idle, self.shared, *rows)


class Calibration:
    """Samples, and what the unpruned model makes of them.

    Attributes:
        step: adds up what the processes find.
        samples: of all processes.
        few: samples that run at once where nothing more is asked of them.
        tried: digest of a plan -> what compensation with BatchNorm chose for its layers on some samples, and how near
            it came, as `judge` tells it.

    Args:
        original: the unpruned model; left as it was.
        data: batches as `cpd.model.inputs.as_batch` takes them; targets are not used.
        limit: at most this many are read, of each process; all if None.
        together: whether all processes do this, each on its own samples of the data; else this one has all of them.
        seed: of the places where layers are looked at.
        memory_gb: GiB of activations that may be alive at a time.
        layers: whether layers will be refitted, so that what they give has to be noted.
        read: gives the part of an output that matters.

    Raises:
        TrainingError: if there is no data, or it holds values that are not finite.
        InputError: if the model does not run on it.
    """

    @torch.no_grad()
    def __init__(
        self,
        original: nn.Module,
        data: Iterable[Any],
        *,
        limit: int | None = None,
        seed: int = 0,
        memory_gb: float = MEMORY_GB,
        layers: bool = True,
        read: Callable[[Any], Any] = whole,
        together: bool = False,
    ) -> None:
        self.seed, self.read = seed, read
        self.device, self.step = device_of(original), processes.InStep(alone=not together)
        self.tried: dict[str, tuple[Mapping[str, Any], tuple[float, float]]] = {}
        with self.step.together():
            with self._drawn(data) if together else nullcontext():
                calls = _alike(self._calls(data, limit), int(memory_gb * 2**30 * IN_MEMORY))
            self._begin(original, calls, memory_gb, layers)

    @contextmanager
    def _drawn(self, data: Iterable[Any]) -> Iterator[None]:
        """The data in an order that is the same in all processes, whatever each has drawn before."""
        with random_states_kept(), seeded(data, self.seed):
            yield

    def _calls(self, data: Iterable[Any], limit: int | None) -> Iterator[Call]:
        """What this process reads."""
        if self.step.count == 1:
            yield from (batch.call for batch in batches(data, limit, finite=True))
            return
        dealt = processes.Dealt(data, limit, HELD_OUT)
        for batch in batches(dealt, finite=True):
            mine = dealt.own(batch.call.samples)
            if mine.any():
                yield batch.call.chosen(mine)

    def _begin(self, original: nn.Module, calls: list[Call], memory_gb: float, layers: bool) -> None:
        """Look at what the unpruned model makes of the samples."""
        own, read = sum(call.samples for call in calls), self.read
        if self.step.most(int(not own)):
            raise TrainingError(
                f"There are too few samples for {self.step.count} processes, each of which takes {HELD_OUT} in turn: "
                "give more, or start fewer processes."
            )
        self.samples = int(self.step.totals("samples", [torch.tensor(own)])[0])
        with evaluating(original), of_the_user("original", "on data"):
            if takes_channels_last(original, calls[0].to(self.device), read):
                calls = [_kept(channels_last(call), int(memory_gb * 2**30 * IN_MEMORY)) for call in calls]
            probe = _Probe(original, calls[0].to(self.device))
            self.layers = probe.layers(self.samples) if layers else {}
            self.streams = {name: layer.stream for name, layer in self.layers.items() if layer.stream is not None}
            at_once = max(1, int(memory_gb * 2**30 / (ALIVE * probe.most_bytes)))
            self.few = -self.step.most(-min(at_once, max(1, SMALL // probe.most_bytes)))
            self.parts = list(_parts(calls, at_once))
            self.expected = [logits(read(call.on(original))) for call in self.held()]
            one = logits(read(calls[0].part(1).to(self.device).on(original)))[:0]
            held = torch.tensor(sum(map(len, self.expected)))
            self.judged = int(self.step.totals("held out", [held])[0])
            self.spread = _spread(self.expected or [one], self.step)
            for part in self.parts if layers else []:
                self._look(original, part)

    def first(self, samples: int | None) -> Iterator[Part]:
        """The parts, up to so many samples of all processes; all if None."""
        left = self.samples if samples is None else self.step.own(samples, HELD_OUT)
        found = list[Part]()
        for part in self.parts:
            if left > 0:
                found.append(part if left >= len(part.held) else part.first(left))
            left -= len(part.held)
        rounds = self.step.most(len(found))
        idle = replace(self.parts[0].first(1), idle=True)
        yield from found + [idle] * (rounds - len(found))

    def held(self) -> Iterator[Call]:
        """The samples that are held out, a few at a time; all where there are too few to hold any out."""
        return self._chosen(lambda part: part.held, self.few)

    def fitted(self, at_once: int) -> Iterator[Call]:
        """The samples that are not held out, so many at a time."""
        return self._chosen(lambda part: ~part.held, at_once)

    def all(self, at_once: int) -> Iterator[Call]:
        """All samples, so many at a time."""
        return self._chosen(lambda part: torch.ones_like(part.held), at_once)

    def _chosen(self, which: Callable[[Part], Tensor], at_once: int) -> Iterator[Call]:
        found = [part for part in self.parts if which(part).any()]
        every = self.parts if not found and self.step.count == 1 else []
        for part in found or every:
            call = part.call.chosen(which(part)) if found else part.call
            for low, high in _pieces(call.samples, at_once):
                yield call.slice(low, high).to(self.device)

    def index(self, layer: LayerCall, samples: int) -> Tensor | None:
        """Which rows of a layer are looked at, as `LayerCall.features` takes them: in every model the same."""
        known = self.layers[layer.weight]
        samples = 1 if known.along is None else samples
        return layer.spread(known.rows * samples, samples, known.along or 0, torch.Generator().manual_seed(self.seed))

    def _look(self, original: nn.Module, part: Part) -> None:
        """Note what every layer of the unpruned model gives."""
        outputs, added, sums = (dict[str, list[Tensor]]() for _ in range(3))
        part.shared = frozenset(name for name, layer in self.layers.items() if layer.along is None)
        for low, high in _pieces(part.call.samples, self.few):
            call, others = part.call.slice(low, high).to(self.device), Others(self.streams)
            at_sum: dict[int, LayerCall] = {}

            def after(
                layer: LayerCall, samples: int = call.samples, others: Others = others,
                at_sum: dict[int, LayerCall] = at_sum,
            ) -> None:  # fmt: skip
                if layer.weight in self.layers:
                    index = self.index(layer, samples)
                    outputs.setdefault(layer.weight, []).append(flat(layer.responses(index)))
                    other = others.of(layer)
                    if other is not None:
                        added.setdefault(layer.weight, []).append(flat(layer.outputs(index, other)))
                    if layer.weight in self.streams:
                        at_sum[self.streams[layer.weight].sum] = layer

            def step(
                step: Step, samples: int = call.samples, others: Others = others,
                at_sum: dict[int, LayerCall] = at_sum,
            ) -> None:  # fmt: skip
                others.keep(step)
                layer = at_sum.pop(step.number, None)
                if layer is not None:
                    value = self.streams[layer.weight].laid_out(step.output, layer.output.shape)
                    if value is not None:
                        rows = layer.outputs(self.index(layer, samples), value)
                        sums.setdefault(layer.weight, []).append(flat(rows))

            with seen(LayerCalls(original, after=after, step=step)):
                call.on(original)
        part.outputs, part.others, part.sums = (
            {name: rows[0] if name in part.shared else torch.cat(rows) for name, rows in found.items()}
            for found in (outputs, added, sums)
        )

    @torch.no_grad()
    def judge(self, model: nn.Module, samples: int | None = None) -> tuple[float, float]:
        """How near a model's outputs come to the unpruned one's, on the samples that are held out.

        Args:
            model: the narrower model.
            samples: about how many of them; None: all.

        Returns:
            The mean squared error of the logits, relative to their variance, infinite where they are not finite; and
            the share of equal classes.
        """
        sums = torch.zeros(4, dtype=torch.double)  # squared error, equal classes, classes, samples
        left = self._own_judged(samples)
        with self.step.together():
            with evaluating(model), of_the_user("The narrower model", "on data"):
                for call, expected in zip(self.held(), self.expected, strict=True):
                    if left <= 0:
                        break
                    if len(expected) > left:
                        call, expected = call.part(left), expected[:left]
                    found, left = logits(self.read(call.on(model))), left - len(expected)
                    sums[0] += float((found - expected).double().square().sum())
                    if expected.dim() > 1:
                        agree = found.argmax(1) == expected.argmax(1)
                        sums[1] += float(agree.sum())
                        sums[2] += agree.numel()
                    sums[3] += len(expected)
            error, same, count, seen = self.step.totals("judged", [sums])[0].tolist()
        relative = error / max(self.spread * seen / self.judged, 1e-30)
        return relative if math.isfinite(relative) else math.inf, same / max(count, 1)

    def _own_judged(self, samples: int | None) -> int:
        """How many of the samples held out this process judges by, where about so many of all are wanted."""
        wanted = self.judged if samples is None else min(samples, self.judged)
        up_to = next(high for _, high in _pieces(self.judged, self.few) if high >= wanted)
        return up_to if self.step.count == 1 else self.step.own(up_to, 1)


class Others:
    """The other operands of the sums that layers lead to, kept until the layer has been called.

    Args:
        streams: how the output of each layer, by its weight, gets to a sum, where it does.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = streams
        self.left = Counter(stream.other for stream in streams.values() if stream.other is not None)
        self.values: dict[int, Any] = {}

    def keep(self, step: Step) -> None:
        """Keep what a call gave, where it is wanted."""
        if self.left.get(step.number):
            self.values[step.number] = step.output

    def of(self, layer: LayerCall) -> Tensor | None:
        """What the output of a layer will be added to, laid out as that output is; None where there is none."""
        stream = self.streams.get(layer.weight)
        if stream is None or stream.other is None:
            return None
        value = self.values.get(stream.other)
        self.left[stream.other] -= 1
        if not self.left[stream.other]:
            self.values.pop(stream.other, None)
        return stream.laid_out(value, layer.output.shape)


class _Probe:
    """One and two samples' way through the unpruned model.

    Attributes:
        most_bytes: of the largest input and output of a layer, of one sample.
    """

    def __init__(self, original: nn.Module, call: Call) -> None:
        self.original, self.call, self.most_bytes = original, call.part(1), 1
        self.times: Counter[str] = Counter()
        self.normed: set[str] = set()
        self.calls: dict[str, LayerCall] = {}
        self.places: dict[str, int] = {}
        twice: dict[str, torch.Size] = {}
        latest: dict[int, tuple[Tensor, str]] = {}

        def first(layer: LayerCall) -> None:
            twice[layer.weight] = layer.input.shape

        def second(layer: LayerCall) -> None:
            latest[id(layer.output)] = (layer.output, layer.weight)
            if isinstance(layer.given["weight"], nn.Parameter):  # what is computed is so again at the next call
                self.times[layer.weight] += 1
            self.calls[layer.weight] = layer.without_data()
            self.places[layer.weight] = layer.rows
            self.inputs[layer.weight] = (layer.input.shape, twice.get(layer.weight, layer.input.shape))
            size = (layer.input.numel() + layer.output.numel()) * layer.input.element_size()
            self.most_bytes = max(self.most_bytes, size)

        def norm(given: dict[str, Any]) -> None:
            if id(given["input"]) in latest:
                self.normed.add(latest[id(given["input"])][1])

        self.inputs: dict[str, tuple[torch.Size, torch.Size]] = {}
        with seen(LayerCalls(original, after=first)):
            call.resized(2).on(original)
        with seen(LayerCalls(original, after=second, norm=norm)):
            self.call.on(original)

    def layers(self, samples: int) -> dict[str, Layer]:
        """Those that are called once and can be refitted, by their weight.

        Args:
            samples: of all the data, over which the rows are spread.
        """
        sums, found = streams(self.original, self.call), dict[str, Layer]()
        for name, layer in self.calls.items():
            shape, groups = layer.given["weight"].shape, layer.groups
            features = matrix(layer.kind, layer.given["weight"], groups).shape[-1]
            one, two = self.inputs[name]
            along = next((dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if b == 2 * a), None)
            if self.times[name] != 1 or features > MOST_FEATURES or (along is None and one != two):
                continue
            rows = min(ROWS * features + MORE, WORK / features**2 / groups, NUMBERS / features / groups)
            each = min(math.ceil(max(LEAST * features, rows) / samples), self.places[name])
            stream = None if layer.kind == "transposed" else sums.get(name)
            found[name] = Layer(shape, groups, along, each, name in self.normed, stream)
        return self._together(found)

    def _together(self, layers: dict[str, Layer]) -> dict[str, Layer]:
        """Layers whose sums follow one another are looked at in the same rows: one sum may stand for another."""
        rows = Counter[int]()
        for name, layer in layers.items():
            if layer.stream is not None:
                rows[self.places[name]] = max(rows[self.places[name]], layer.rows)
        return {
            name: layer if layer.stream is None else replace(layer, rows=rows[self.places[name]])
            for name, layer in layers.items()
        }


def _parts(calls: list[Call], at_once: int) -> Iterable[Part]:
    """Samples that run at once, and which of them are held out."""
    start = 0
    for call in calls:
        for low, high in _pieces(call.samples, at_once):
            held = torch.arange(start + low, start + high) % HELD_OUT == HELD_OUT - 1
            yield Part(call.slice(low, high), held)
        start += call.samples


def _spread(outputs: list[Tensor], step: processes.InStep) -> float:
    """The sum of squares of outputs, less their mean over the samples of all processes."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for output in outputs:
        alike.setdefault(output.shape[1:], []).append(output)
    found = 0.0
    for shape in sorted(alike):
        rows = torch.cat(alike[shape]).double()
        total, count = step.totals("mean of the outputs", [rows.sum(0), torch.tensor(len(rows))])
        found += float(step.totals("spread of the outputs", [(rows - total / count.clamp_min(1)).square().sum()])[0])
    return found


def _pieces(samples: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges of about equal length, none longer than `at_once`."""
    count = math.ceil(samples / at_once)
    return pairwise(samples * i // count for i in range(count + 1))


def _alike(calls: Iterable[Call], most: int) -> list[Call]:
    """Calls joined where their samples have the same shapes, up to so many bytes at a time."""
    groups, sizes, full = dict[Any, list[Call]](), Counter[Any](), list[Call]()
    for call in calls:
        key = tuple(tuple(leaf.shape[1:]) for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor))
        groups.setdefault(key, []).append(call)
        sizes[key] += _bytes(call)
        if sizes[key] > most:
            full.append(_kept(joined(groups.pop(key)), most))
            sizes[key] = 0
    return full + [joined(group) for group in groups.values()]


def _bytes(call: Call) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor))


def _kept(call: Call, most: int) -> Call:
    """A call whose tensors lie in files without names, if it has more than so many bytes.

    The system reads them when they are used, and takes their memory for something else when it needs it.
    """
    if _bytes(call) <= most or os.name == "nt":  # where a file that is open cannot be opened once more
        return call

    def mapped(leaf: Tensor) -> Tensor:
        if leaf.device.type != "cpu" or not leaf.numel() or leaf.layout is not torch.strided:
            return leaf
        dense = leaf if leaf.is_contiguous(memory_format=_format(leaf)) else leaf.contiguous()
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(dense.numel() * dense.element_size())
            found = torch.from_file(file.name, shared=True, size=dense.numel(), dtype=dense.dtype)
        return found.as_strided(dense.shape, dense.stride()).copy_(dense)

    return Call(*tree_map_only(Tensor, mapped, tuple(call)))


def _format(leaf: Tensor) -> torch.memory_format:
    innermost = leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else torch.contiguous_format


def flat(value: Tensor) -> Tensor:
    """[groups, rows, outputs] -> [rows, groups * outputs]."""
    return value.transpose(0, 1).flatten(1)
