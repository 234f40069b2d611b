"""A task: what a model is for, as far as compressing it asks.

`Task` itself is that of models which take what a loader gives and return logits: classification, label maps. A task of
another kind says what differs (see its methods), and is passed as `cpd.compress(model, task=MyTask())`. Tasks of
libraries are known by the modules that their models' classes come from, in `KNOWN`; a library is imported when one of
its models is there, or is asked for by name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from cpd.errors import InputError, ShrinkError, first_line
from cpd.model import sources
from cpd.model.inputs import Batch, Call, as_batch, evaluating
from cpd.model.outputs import Outputs
from cpd.model.samples import as_batches
from cpd.options import instance
from cpd.tasks.metric import each_of, metric_name, named

#: Where tasks of libraries lie, by what the module of a model's class begins with.
KNOWN = {
    "ultralytics.": "cpd.tasks.yolo:Yolo",
    "transformers.": "cpd.tasks.hugging_face:HuggingFace",
    "torchvision.models.detection.": "cpd.tasks.detection:Detection",
}

DataName: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Loaded:
    """The data that a task has loaded by its name.

    Attributes:
        training: Batches to train on, with or without augmentation. They can be iterated many times.
        plain: Batches of the same samples without augmentation. Default: `training`.
        evaluate: `evaluate(model) -> float`, where higher is better; None if there is no data to evaluate on.
    """

    training: Iterable[Any]
    plain: Iterable[Any] | None = None
    evaluate: Callable[[nn.Module], float] | None = None


class Task:
    """Describes a kind of model: how its batches are read, its loss, what a student imitates, and its data by name.

    The methods of this class describe models that return logits, with loaders that give (input, target). Override those
    that differ and call `cpd.compress(model, task=MyTask(), ...)`. In your own training loop, pass
    `task.batches(model, loader)` as data to `cpd.Pruner`, `cpd.score` and `cpd.distill`.

    Examples:
        A model that returns several heads, in a dict, and is trained on all of them:

        >>> import torch.nn.functional as F
        >>> class TwoHeads(cpd.Task):
        ...     def read(self, model, item):  # an item of the loader -> (arguments of the model, target)
        ...         return (item["image"],), (item["kind"], item["age"])
        ...     def learn(self, model, call, target):  # the output, and the loss
        ...         output = call.on(model)
        ...         return output, F.cross_entropy(output["kind"], target[0]) + F.mse_loss(output["age"], target[1])
        ...     def outputs(self, model):  # the parts of the output that are kept and distilled
        ...         return ("kind", "age")
    """

    #: The task's name in messages.
    name: ClassVar[str] = "logits"

    def read(self, model: nn.Module, item: Any) -> Any:
        """Turn one item of a loader into (arguments, target); arguments have the form of `example_inputs`."""
        return item

    def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        """Run the model on a batch, without changing its mode, and return its output and its loss.

        The loss is a scalar, or None to infer it. The output must have the form of that of `mimicked`, so that
        `outputs` applies to both.
        """
        return call.on(model), None

    def mimicked(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute what is compared between two models. By default, this is the output of the model.

        Override this for models whose outputs cannot be compared, such as the boxes that a detector has selected, and
        compute something else from the model's submodules. That is then traced, refitted, distilled and timed; `learn`
        and metrics use the model itself.
        """
        return model(*args, **kwargs)

    def outputs(self, model: nn.Module) -> Outputs | None:
        """The parts of the output that matter, as for `cpd.comb(outputs=...)`; None for all parts."""
        return None

    def chosen(self, model: nn.Module, outputs: Outputs) -> Outputs:
        """The parts that a user says matter, laid out as a loss takes them: of classes, those in dimension 1."""
        return outputs

    def training(self, model: nn.Module) -> Mapping[str, Any]:
        """Options of `cpd.DistillConfig` that suit the model. They replace the defaults, not what the user sets."""
        return {}

    def example_inputs(self, model: nn.Module) -> Any:
        """An input of the model, in the form of `example_inputs`; None if none is known."""
        return sources.default_inputs(model)

    def load(self, model: nn.Module, data: DataName) -> Loaded:
        """Load data that is given by its name.

        Raises:
            InputError: If the task cannot load data by name, or there is no data of that name.
        """
        raise InputError(
            f"data={os.fspath(data)!r} is a name, but cpd cannot load data by name for models of this kind "
            f"({type(model).__name__}): pass batches, in a DataLoader or a list, or a task that loads them."
        )

    # ------------------------------------------------------------------------------ what cpd makes of it

    def batch(self, model: nn.Module, item: Any) -> Batch:
        """Turn one item of a loader into a batch as cpd uses it, by `read`, with the task's own `learn`."""
        found = as_batch(self.read(model, item))
        return found._replace(learn=self.learn) if self._has_own("learn") else found

    def batches(self, model: nn.Module, data: Iterable[Any]) -> Iterable[Any]:
        """The batches of a loader, read by this task; `data` itself if the task does not override how they are read.

        Samples in arrays or in a data set are put into batches (`cpd.model.samples`).
        """
        data = as_batches(data)
        own = any(map(self._has_own, ("read", "learn", "batch")))
        return data if not own or isinstance(data, TaskBatches) else TaskBatches(self, model, data)

    @contextmanager
    def viewed(self, *models: nn.Module | None) -> Iterator[None]:
        """A `with` block in which calling these models, and copies of them, returns what `mimicked` computes.

        In the block, their class is replaced by one derived from it, of the same name.
        """
        found = {id(model): (model, type(model)) for model in models if model is not None}.values()
        if self._has_own("mimicked"):
            for model, kind in found:
                model.__class__ = self._view(kind)
        try:
            yield
        finally:
            for model, kind in found:
                model.__class__ = kind

    def _view(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A class derived from `kind` whose forward is `mimicked`."""

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.mimicked(model, *args, **kwargs)

        names = {"forward": forward, _VIEW: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return type(kind.__name__, (kind,), names)

    def _has_own(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Task, method)


_VIEW = "_cpd_view_of"


@contextmanager
def as_itself(model: nn.Module) -> Iterator[nn.Module]:
    """A model that is viewed by a task (`Task.viewed`), as it is, within a block."""
    view = type(model)
    model.__class__ = getattr(view, _VIEW, view)
    try:
        yield model
    finally:
        model.__class__ = view


def itself(model: nn.Module) -> nn.Module:
    """A copy of a model that was viewed by a task, as it is from now on."""
    model.__class__ = getattr(type(model), _VIEW, type(model))
    return model


def check_whole(original: nn.Module, student: nn.Module, call: Call) -> None:
    """See that a student runs as it is, where the original does, and not only in what its task mimics.

    A layer that `mimicked` leaves out is not traced, and keeps its width where what it reads has become narrower.

    Raises:
        ShrinkError: if it does not.
    """
    if not hasattr(type(student), _VIEW):
        return
    for model in (original, student):
        try:
            with as_itself(model), evaluating(model), torch.no_grad():
                call.on(model)
        except Exception as error:  # of any forward
            if model is original:  # it takes something else than what is mimicked does
                return
            raise ShrinkError(
                f"What the task mimics of {type(student).__name__} runs when it is pruned, the model itself does not: "
                f"{first_line(error)}. Its forward calls a layer that mimicked() leaves out, which was left as wide as "
                "it was: let mimicked() give what that layer gives, too."
            ) from error


def on_itself(evaluate: Callable[[nn.Module], float] | None) -> Callable[[nn.Module], float] | None:
    """A metric of models as they are, for models that are viewed by a task."""
    if evaluate is None:
        return None

    @named(metric_name(evaluate))
    @wraps(evaluate)
    def evaluated(model: nn.Module) -> float:
        with as_itself(model):
            return evaluate(model)

    if (each := each_of(evaluate)) is not None:

        def of_each(model: nn.Module) -> Any:
            with as_itself(model):
                return each(model)

        evaluated.each = of_each  # type: ignore[attr-defined]
    return evaluated


class TaskBatches:
    """The batches of a loader, each read by a task.

    Attributes:
        task: reads them.
        model: what they are read for.
        data: the loader; what is seeded, and asked for its length.
    """

    def __init__(self, task: Task, model: nn.Module, data: Iterable[Any]) -> None:
        self.task, self.model, self.data = task, model, data

    def __iter__(self) -> Iterator[Batch]:
        """Every batch."""
        return (self.task.batch(self.model, item) for item in self.data)

    def over(self, data: Iterable[Any]) -> TaskBatches:
        """The batches of another loader, read alike."""
        return TaskBatches(self.task, self.model, data)

    def __len__(self) -> int:
        """How many there are; raises `TypeError` where the loader does not tell."""
        return len(self.data)  # type: ignore[arg-type]


TASK = instance(Task, "an object of a class derived from cpd.Task")


def task_of(model: nn.Module) -> Task:
    """The task of a model by its library; `Task` itself where none is known.

    A class of the user's that is derived from one of a library counts as that.
    """
    for kind in type(model).__mro__:
        for prefix, place in KNOWN.items():
            if f"{kind.__module__}.".startswith(prefix):
                module, _, name = place.partition(":")
                found = getattr(importlib.import_module(module), name)()
                assert isinstance(found, Task)
                return found
    return Task()
