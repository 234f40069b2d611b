"""Distillation: what a student is to learn from a teacher's outputs, features, and relations between pixels.

The formulas are in `losses`; here is what they are applied to: hooks on named modules, projections where widths
differ, and CIRKD's memory of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd import processes
from cpd.distillation.losses import channel_wise, cross_image, feature_error, kl_divergence, to_memory
from cpd.errors import InputError, of_the_user
from cpd.model.inputs import Call, evaluating, logits
from cpd.model.outputs import whole
from cpd.trace.streams import stages

if TYPE_CHECKING:
    from cpd.distillation.config import DistillConfig


#: Positions of an image whose relations are compared at most; larger maps are averaged down.
POSITIONS = 256
#: CIRKD's memory: embeddings kept and drawn of pixels, and of regions (the mean over an image's pixels of a class).
PIXELS, REGIONS = (20_000, 4096), (2_000, 1024)
#: Pixels of each class that a batch adds to the memory.
PIXELS_ADDED = 10
#: The weight of the memory's two losses beside the one within a batch.
MEMORY_WEIGHT = 0.1
#: Rows that a projection is first fitted on.
ROWS = 4096


class Distillation(nn.Module):
    """The distillation loss of one training.

    Args:
        config: names the loss and what it is taken of.
        student: the model that learns.
        teacher: the model that it learns from.
        call: one sample, which shows the last layer of each; None where a state will be loaded.
        read: gives the part of an output that is compared.

    Raises:
        InputError: if a module named in `config.features` does not exist.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        teacher: nn.Module,
        call: Call | None = None,
        read: Callable[[Any], Any] = whole,
    ) -> None:
        super().__init__()
        self.read = read
        self.kind, self.temperature = config.kd, config.kd_temperature
        self.pairs = pairs = config.feature_pairs
        self.inputs = not pairs and self.kind in ("cirkd", "mse")  # of what the last layer reads
        if self.inputs and call is not None:
            found = _streams(student, teacher, call) if self.kind == "mse" else {}
            self.inputs = not found
            self.pairs = pairs = found or {last_layer(student, call): last_layer(teacher, call)}
        for model, names, whose in ((student, pairs, "student"), (teacher, pairs.values(), "teacher")):
            modules = dict(model.named_modules())
            unknown = [name for name in names if name not in modules]
            if unknown:
                raise InputError(f"The {whose} has no module {unknown[0]!r}; features= takes names of named_modules().")
        self.models = (student, teacher)  # in a tuple, so that they are no submodules
        self.found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.projections = nn.ParameterDict()
        #: (pixels or regions, class) -> embeddings of unit length, newest last.
        self.memory: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the features of both models that run within a block."""
        handles = []
        for side, (model, names) in enumerate(zip(self.models, (self.pairs, self.pairs.values()), strict=True)):
            modules = dict(model.named_modules())
            for key, name in zip(self.pairs, names, strict=True):
                note = self._note(self.found[side], key)
                add = modules[name].register_forward_pre_hook if self.inputs else modules[name].register_forward_hook
                handles.append(add(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, found: dict[str, Tensor], key: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any = None) -> None:
            found[key] = logits(args if self.inputs else output)

        return note

    def forward(self, student: Any, teacher: Any, target: Any = None) -> Tensor:
        """The loss, a scalar, of outputs that were made while `watching`.

        Of several parts that matter, the first is compared by the loss that was chosen, the others by their mean
        squared difference, relative to the teacher's: boxes, masks and embeddings are no classes.

        Args:
            student: the student's output, of which `cpd.model.inputs.logits` are taken.
            teacher: the teacher's.
            target: for CIRKD's memory, class maps `[N, ...]`; without them only the batch counts.
        """
        if self.pairs:
            each = [self._of_features(key, target) for key in self.pairs]
            return torch.stack(each).mean()
        function = channel_wise if self.kind == "cwd" else kl_divergence
        found, wanted = self.read(student), self.read(teacher)
        loss = function(logits(found), logits(wanted), self.temperature)
        beside = [feature_error(*pair) for pair in self._beside(found, wanted)]
        return loss + torch.stack(beside).mean() if beside else loss

    def _beside(self, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
        """What matters of two outputs after the first part of each, where several parts were chosen."""
        if self.read is whole or not isinstance(student, tuple) or not isinstance(teacher, tuple):
            return []
        pairs = [(a, b) for a, b in zip(student[1:], teacher[1:], strict=False) if isinstance(a, Tensor)]
        return [(a, b) for a, b in pairs if isinstance(b, Tensor) and a.shape == b.shape and a.is_floating_point()]

    def _of_features(self, key: str, target: Any) -> Tensor:
        student, teacher = self.found[0].pop(key), self.found[1].pop(key)
        channel = _channel_dim(student, teacher, key)
        found, wanted = student.movedim(channel, -1), teacher.detach().movedim(channel, -1)
        if self.kind == "cirkd":
            return self._relational(key, found, wanted, target)
        found = self._projected(key, found, wanted)
        if self.kind == "mse":
            return feature_error(found, wanted)
        function = channel_wise if self.kind == "cwd" else kl_divergence
        return function(found.movedim(-1, 1), wanted.movedim(-1, 1), self.temperature)

    # ------------------------------------------------------------------------------ projections

    def _projected(self, key: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's features in the teacher's space: as they are where the widths agree."""
        narrow, wide = student.shape[-1], teacher.shape[-1]
        name = key.replace(".", "/")  # a ParameterDict allows no dots
        if narrow == wide:
            if name in self.projections:
                del self.projections[name]
            return student
        if name not in self.projections or self.projections[name].shape != (wide, narrow):
            kind = torch.promote_types(student.dtype, torch.float32)  # which it is trained in, whatever autocast does
            self.projections[name] = nn.Parameter(self._fitted(student.detach(), teacher).to(kind))
        return F.linear(student.to(self.projections[name].dtype), self.projections[name])

    @staticmethod
    def _fitted(student: Tensor, teacher: Tensor) -> Tensor:
        """The map that comes nearest by least squares, with which training starts, [wide, narrow]."""
        rows, wanted = student.flatten(0, -2).double()[:ROWS], teacher.flatten(0, -2).double()[:ROWS]
        gram, cross = processes.total(rows.T @ rows), processes.total(rows.T @ wanted)
        gram = gram + 1e-4 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        found: Tensor = torch.linalg.solve(gram, cross)
        return found.T

    # ------------------------------------------------------------------------------ relations

    def _relational(self, key: str, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """CIRKD: relations within the batch, and to the memory."""
        shape = teacher.shape[1:-1]
        found, wanted = _pooled(student), _pooled(teacher)
        loss = cross_image(F.normalize(found, dim=-1), F.normalize(wanted, dim=-1), self.temperature)
        if isinstance(target, Tensor) and not target.is_floating_point():
            classes = _labels_at(target, shape)
            if classes is not None:
                self._remember(F.normalize(_flat(teacher).float(), dim=-1), classes)
        if self.memory:
            anchors = F.normalize(self._projected(key, found, wanted), dim=-1).flatten(0, 1)
            there = F.normalize(wanted, dim=-1).flatten(0, 1)
            for kind, (_, drawn) in (("pixels", PIXELS), ("regions", REGIONS)):
                memory = self._draw(kind, drawn).to(anchors)
                loss = loss + MEMORY_WEIGHT * to_memory(anchors, there, memory, self.temperature)
        return loss

    def _remember(self, embeddings: Tensor, classes: Tensor) -> None:
        """Add pixels and regions of every class in a batch, `[N, P, C]` with labels `[N, P]`."""
        for label in classes.unique().tolist():
            if label < 0:
                continue
            chosen = classes == label
            pixels = embeddings[chosen]
            order = torch.randperm(len(pixels), device="cpu")[:PIXELS_ADDED].to(pixels.device)
            means = [image[mask].mean(0) for image, mask in zip(embeddings, chosen, strict=True) if mask.any()]
            for kind, found, (kept, _) in (
                ("pixels", pixels[order], PIXELS),
                ("regions", F.normalize(torch.stack(means), dim=-1), REGIONS),
            ):
                name = f"{kind}.{label}"
                before = self.memory.get(name, found[:0])
                self.memory[name] = torch.cat([before.to(found), found])[-kept:]

    def _draw(self, kind: str, count: int) -> Tensor:
        """Embeddings of all classes alike, drawn from the memory."""
        queues = [queue for name, queue in self.memory.items() if name.startswith(kind)]
        each = max(1, count // len(queues))
        return torch.cat([q[torch.randperm(len(q), device="cpu")[:each].to(q.device)] for q in queues])

    # ------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """What `load` takes up."""
        projections = {name: value.detach() for name, value in self.projections.items()}
        return {"pairs": self.pairs, "inputs": self.inputs, "memory": self.memory, "projections": projections}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.pairs, self.memory = state["pairs"], state["memory"]
        self.inputs = state.get("inputs", self.inputs)
        for name, value in state["projections"].items():
            self.projections[name] = nn.Parameter(value)


def _streams(student: nn.Module, teacher: nn.Module, call: Call) -> dict[str, str]:
    """{the student's module: the teacher's} that give the streams of both at the end of each stage.

    The student's are those of the teacher's names, or, where it has others, its own; nothing where the two do not agree
    in all but channels.
    """
    with evaluating(student), evaluating(teacher), of_the_user("The forward", "on the first batch of data"):
        theirs = stages(teacher, call)
        alike = set(theirs) <= dict(student.named_modules()).keys()
        ours = _shapes(student, theirs, call) if alike else stages(student, call)
    pairs = list(zip(ours.items(), theirs.items(), strict=False)) if len(ours) == len(theirs) else []
    agree = all(len(a) == len(b) and (a[1:] == b[1:] or a[:-1] == b[:-1]) for (_, a), (_, b) in pairs)
    return {a: b for (a, _), (b, _) in pairs} if agree else {}


@torch.no_grad()
def _shapes(model: nn.Module, names: Iterable[str], call: Call) -> dict[str, tuple[int, ...]]:
    """The shape of what each of some modules gives, without the samples; of those that give a tensor."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = tuple(output.shape[1:])

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _, args, output, name=name: note(name, output)) for name in names
    ]
    try:
        call.on(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in names if name in found}


def last_layer(model: nn.Module, call: Call) -> str:
    """The path of the last module with a weight matrix that a forward pass calls.

    Raises:
        InputError: if there is none.
    """
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1
    ]
    try:
        with torch.no_grad(), evaluating(model), of_the_user(type(model).__name__, "on the first batch of data"):
            call.on(model)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise InputError("There is no layer whose input can serve as embeddings: name modules, features=….")
    return order[-1]


def _channel_dim(student: Tensor, teacher: Tensor, key: str) -> int:
    """The dimension that channels lie along: 1 of maps, the last of tokens, which is where others must agree."""
    for dim in (1, student.dim() - 1) if student.dim() > 3 else (student.dim() - 1,):
        others = [[size for index, size in enumerate(tensor.shape) if index != dim] for tensor in (student, teacher)]
        if student.dim() == teacher.dim() and others[0] == others[1]:
            return dim
    raise InputError(
        f"The features of {key!r} have shape {list(student.shape)} in the student and {list(teacher.shape)} in the "
        "teacher, but they may only differ in channels. Name other modules, features=…."
    )


def _pooled(features: Tensor) -> Tensor:
    """`[N, ..., C]` as `[N, P, C]`, averaged down to `POSITIONS` positions at most."""
    if features.dim() == 4 and features.shape[1] * features.shape[2] > POSITIONS:
        factor = (features.shape[1] * features.shape[2] / POSITIONS) ** 0.5
        height, width = (max(1, int(side / factor)) for side in features.shape[1:3])
        features = F.adaptive_avg_pool2d(features.movedim(-1, 1), (height, width)).movedim(1, -1)
    return _flat(features).float()


def _flat(features: Tensor) -> Tensor:
    """`[N, ..., C]` as `[N, P, C]`; vectors `[N, C]` as the positions of one image, so that images are compared."""
    return features.flatten(1, -2) if features.dim() > 2 else features[None]


def _labels_at(target: Tensor, shape: torch.Size) -> Tensor | None:
    """Classes of what `_flat` gives, `[N, P]`, -1 where ignored; None where the target has another shape."""
    if target.dim() != 1 + len(shape):
        return None
    if len(shape) == 2:
        target = F.interpolate(target[:, None].float(), size=shape, mode="nearest")[:, 0].long()
    return target.clamp_min(-1).flatten(1) if len(shape) else target.clamp_min(-1)[None]
