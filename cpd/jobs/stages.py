"""The stages of a run: how long each took, which one is on, and what runs of every kind do in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from cpd.distillation.config import DistillConfig, EpochRecord
from cpd.distillation.distiller import ShrinksWhileTrained, distill
from cpd.files.checkpoint import Checkpoint
from cpd.files.reading import conform
from cpd.jobs.outcome import Before, kept_weights
from cpd.model.inputs import Call, evaluated
from cpd.model.outputs import Outputs
from cpd.model.progress import part
from cpd.model.recorded import why_not_by_name
from cpd.model.tensors import copy_of
from cpd.surgery.recovery import Recovery
from cpd.tasks.loss import LossFunction
from cpd.tasks.metric import metric_name, told
from cpd.tasks.task import check_whole

log = logging.getLogger("cpd")

Evaluate = Callable[[nn.Module], float]


class Stages:
    """Times the stages of a run, and shows which one is on, of how many.

    Args:
        planned: those that follow one another; others are parts of these, or stand between them.
    """

    def __init__(self, planned: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.planned, self._within, self._inner = planned, False, 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as a stage; the time of stages within it is theirs, so that all add up."""
        start, within = time.perf_counter(), self._within
        others, self._inner = self._inner, 0.0
        numbered = name in self.planned and not within
        log.log(logging.DEBUG if within else logging.INFO, "%s …", name.capitalize())
        self._within = True
        try:
            with part(f"stage {self.planned.index(name) + 1} of {len(self.planned)}: {name}" if numbered else name):
                yield
        finally:
            self._within = within
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = others + whole


class Prunes(ShrinksWhileTrained, Protocol):
    """What a run asks of what prunes its student: `cpd.Pruner` is one, `cpd.Sparsifier` another."""

    config: Any

    @property
    def recovery(self) -> Recovery | None:
        """What the last change was recovered from by, without training; None where nothing was tried."""

    @property
    def due(self) -> bool:
        """Whether a change is due after the steps taken so far."""

    def prune(self) -> object:
        """Make the next change now."""

    def note(self, text: str) -> None:
        """Say something to the user, now and in the report."""


@dataclass
class Run:
    """State of one run, handed from stage to stage.

    Attributes:
        model: as it was given.
        student: the copy of it that is pruned.
        call: the example inputs.
        pruner: prunes the student.
        training: how it is trained.
        stages: times what is done.
        checkpoint: that the training is written to; None: none.
        per_epoch: optimizer steps an epoch.
        history: one dict an epoch.
        metrics: of the model and of the student in the end; None without `evaluate`.
    """

    model: nn.Module
    student: nn.Module
    call: Call
    pruner: Prunes
    training: DistillConfig
    stages: Stages
    checkpoint: Checkpoint | None
    per_epoch: int
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: tuple[float | None, float | None] = (None, None)

    def prune_and_train(
        self,
        data: Iterable[Any] | None,
        loss: LossFunction | None,
        evaluate: Evaluate | None,
        teacher: nn.Module | None,
    ) -> None:
        """Prune the student, at once or while it is trained."""
        before = after = self.before(evaluate)
        if (self.checkpoint is None or self.checkpoint.state is None) and self.pruner.due:
            after = self.prune_at_once(evaluate, before)
        if self.checkpoint is not None:
            self.checkpoint.extra = {"history": list(self.history), "before": before}
        if data is not None and self.training.epochs:
            outputs: Outputs | None = self.pruner.config.outputs
            with self.stages("distill"):
                records = distill(
                    self.student, copy_of(self.model) if teacher is None else teacher, data, loss=loss,
                    evaluate=evaluate, config=self.training, pruner=self.pruner, checkpoint=self.checkpoint,
                    outputs=outputs, before=after,
                )  # fmt: skip
            self.history += [record.to_dict() for record in records]
            after = self.trained(records, evaluate, after)
        if not self.pruner.done:  # the data was shorter than its length
            self.pruner.note(
                "The data ran out before the pruning schedule was complete; the remaining channels were removed after "
                "the training."
            )
            while not self.pruner.done:
                self.pruner.prune()
            after = self.evaluated(evaluate, "after the training")
        self.student.eval()
        check_whole(self.model, self.student, self.call)
        self.metrics = (before, after)

    def prune_at_once(self, evaluate: Evaluate | None, before: float | None) -> float | None:
        """The first change, before any training; the metric after it."""
        raise NotImplementedError

    def evaluated(self, evaluate: Evaluate | None, when: str, model: nn.Module | None = None) -> float | None:
        """The metric of a model, or of the student as it is."""
        if evaluate is None:
            return None
        with self.stages("evaluate"):
            return evaluated(evaluate, self.student if model is None else model, when)

    def untrained(
        self, evaluate: Evaluate | None, name: str, before: float | None, pruned: float | None
    ) -> float | None:
        """The metric of the student once it is pruned, before any training; noted with what it is called.

        Args:
            evaluate: gives it.
            name: what it is called in the note.
            before: that of the model as it was given.
            pruned: that directly after pruning, before what is done without training; None where it was not looked at.
        """
        found, recovery = self.evaluated(evaluate, "after pruning"), self.pruner.recovery
        if found is not None:
            told_of = {"before": before, "pruned": pruned, "recovery": None if recovery is None else recovery.chosen}
            known = {key: value for key, value in told_of.items() if value is not None}
            self.history.append({"epoch": 0, "metric": found, **known})
            self.pruner.note(f"{name}: {told(metric_name(evaluate), found)}.")
        return found

    def trained(self, records: Sequence[EpochRecord], evaluate: Evaluate | None, before: float | None) -> float | None:
        """The metric after the training; what is kept of it is noted where that is not the end."""
        found, text = kept_weights(records, metric_name(evaluate), before)
        if text is not None:
            self.pruner.note(text)
        if records and not any(record.kept for record in records):
            self.history = [{**row, "kept": True} if row["epoch"] == 0 else row for row in self.history]
        return found

    def before(self, evaluate: Evaluate | None) -> float | None:
        """The metric of the model as it was given; that of the checkpoint, with its history, where there is one."""
        if self.checkpoint is None or self.checkpoint.state is None:
            return self.evaluated(evaluate, "before pruning")
        with self.checkpoint.taken_up():
            extra = conform(self.checkpoint.extra, Before, "a state")
        self.history = extra["history"]
        return extra["before"]

    def note_source(self, source: str | None) -> None:
        """Say so where `cpd.load` does not build the model by the name of its source."""
        if source is not None and (fault := why_not_by_name(source)):
            self.pruner.note(f"cpd.load cannot build {source} itself ({fault}): pass it a fresh model.")
