"""As fast as can be within so many points: the search over speed behind `compress(max_drop=…)`.

Speeds are tried without training first, which takes a fraction of the time; a training is spent on the last few. Each
is judged by `evaluate`, on data that nothing else is taken from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from cpd import processes
from cpd.config import PruneConfig
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.quantize import OnnxModule
from cpd.deploy.runtimes.catalogue import runtimes_of
from cpd.errors import InputError, TargetError, first_line, of_the_user
from cpd.model.inputs import Call, evaluated, evaluating
from cpd.model.progress import part
from cpd.pruner import Pruner
from cpd.report.records import TriedRow
from cpd.selection.drop import FIRST, Bracket, Drop, drop_of, samples_needed
from cpd.selection.target import TARGETS
from cpd.tasks.metric import each_of, is_share, metric_name, title

log = logging.getLogger("cpd")

#: Speeds that a training is spent on at most.
MOST_TRAINED = 3
#: How near, as a fraction, a speed is hit that is one of several to choose from.
NEARLY = 0.1
#: That `max_drop` holds, where nothing else is asked for.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Within:
    """What is searched within.

    Attributes:
        limit: what the metric may lose, in its own unit.
        confidence: that it does, one-sided, where each sample's value is known.
        evaluate: the metric.
    """

    limit: float
    confidence: float
    evaluate: Callable[[nn.Module], float]

    @property
    def span(self) -> float:
        """By how much the values of two samples can differ at least, as far as its unit says so."""
        return 100.0 if is_share(metric_name(self.evaluate)) else 0.0


class Attempt(Protocol):
    """A model that was pruned to a speed."""

    student: nn.Module
    pruner: Pruner
    metrics: tuple[float | None, float | None]


A = TypeVar("A", bound=Attempt)


@dataclass
class Fastest(Generic[A]):
    """A search for the fastest model whose metric loses no more than it may.

    Args:
        model: the original, as it ships.
        within: what its metric may lose.
        attempt: prunes a copy to a speed-up, and trains it if the second argument says so.
        shipped: a pruned model as it ships, which is what is evaluated.

    Attributes:
        tried: one row a speed-up.
    """

    model: nn.Module
    within: Within
    attempt: Callable[[float, bool], A]
    shipped: Callable[[nn.Module], nn.Module]
    tried: list[TriedRow] = field(default_factory=list)

    def search(self, trains: bool) -> A:
        """The fastest that holds.

        Args:
            trains: whether a training is spent on the last candidates.

        Raises:
            InputError: where the data is too small for any speed-up to be told to hold.
            TargetError: where none does.
        """
        before, best, held = self._before(), None, 1.0
        for trained in (False, True) if trains else (False,):
            bracket = self._further(held) if trained else Bracket()
            while (speedup := bracket.upcoming) is not None:
                found = self._try(speedup, trained, before)
                bracket.learn(speedup, found is not None)
                if found is not None and speedup > held:
                    best, held = found, speedup
        if best is None:
            tried = "; ".join(_sentence(row) for row in self.tried)
            raise TargetError(
                f"max_drop={self.within.limit:g}: no speed-up was found within it. Tried: {tried}. Allow a larger "
                "drop, evaluate on more samples (or with less confidence), train (epochs), or train for longer."
            )
        best.pruner.note(self._told(before))
        return best

    def _further(self, held: float) -> Bracket:
        """The search with training: from what holds without it to what is out of reach."""
        unreached = [row["asked"] for row in self.tried if row["error"] is not None]
        return Bracket(held, min(unreached, default=None), MOST_TRAINED)

    def _before(self) -> list[float]:
        """The values of the original, which must be enough to tell anything."""
        values = self._values(self.model, "before pruning")
        limit, confidence = self.within.limit, self.within.confidence
        if 0 < (whole := float(np.mean(values))) <= limit:
            raise InputError(
                f"max_drop={limit:g} would allow the whole metric to be lost, which is {whole:.4g} for the unpruned "
                f"model. max_drop is in the unit of the metric; {0.01 * whole:.2g} is one per cent of it."
            )
        needed = samples_needed(limit, max(max(values) - min(values), self.within.span), confidence)
        if 1 < len(values) < needed:
            raise InputError(
                f"evaluate uses {len(values)} samples, with which not even an unchanged model could be shown to lose "
                f"at most {limit:g} at a confidence of {confidence:.0%}: that takes {needed}. Evaluate on more "
                "samples, raise max_drop, or lower confidence."
            )
        return values

    def _try(self, speedup: float, trained: bool, before: Sequence[float]) -> A | None:
        """One speed-up; None where it does not hold."""
        row = TriedRow(
            asked=speedup, speedup=None, macs_left=None, trained=trained, metric=None, drop=None, upper=None,
            confidence=None, holds=False, error=None,
        )  # fmt: skip
        self.tried.append(row)
        with part(f"try {len(self.tried)}: {speedup:.2f}x{', trained' if trained else ''}"):
            try:
                found = self.attempt(speedup, trained)
            except TargetError as error:
                row["error"] = first_line(error)
                return None
            after = self._values(self.shipped(found.student), f"of the model pruned to {speedup:.2f}x")
        drop, pruner = self._drop(before, after), found.pruner
        found.metrics = float(np.mean(before)), float(np.mean(after))
        row["speedup"] = pruner.search[-1]["speedup"] if pruner.search else None
        row["macs_left"] = pruner.shrinks[-1].macs / max(pruner.comb.cost({}).macs, 1)
        row["metric"], row["drop"], row["upper"] = found.metrics[1], drop.value, drop.upper
        row["confidence"], row["holds"] = drop.confidence, drop.holds
        log.info("Tried: %s.", _sentence(row))
        return found if drop.holds else None

    def _drop(self, before: Sequence[float], after: Sequence[float]) -> Drop:
        if len(before) != len(after):
            raise InputError(
                f"evaluate.each returned {len(before)} values for the original and {len(after)} for a pruned model: it "
                "must return one for each sample, for the same samples in the same order."
            )
        return drop_of(before, after, self.within.limit, self.within.confidence, self.within.span)

    def _values(self, model: nn.Module, when: str) -> list[float]:
        """The metric, sample by sample where that is known, as the first process has found it."""
        return processes.from_first(partial(_values_of, self.within.evaluate, model, when))

    def _told(self, before: Sequence[float]) -> str:
        """What came of it, in a sentence."""
        row = [row for row in self.tried if row["holds"]][-1]
        name = title(metric_name(self.within.evaluate))
        chance = (
            f"at most {row['upper']:.3g} with a confidence of {self.within.confidence:.0%}, by {len(before):,} samples"
            if row["upper"] is not None
            else "evaluate returns one number, so its variation by chance is not known: give it an attribute each"
        )
        tries = f"The result is the fastest of {len(self.tried)} models tried for max_drop={self.within.limit:g}"
        return f"{tries}: {name} falls by {row['drop']:.3g} ({chance})."


def searched(
    settings: PruneConfig,
    max_drop: float | None,
    confidence: float,
    evaluate: Callable[[nn.Module], float] | None,
    resume: bool,
) -> tuple[PruneConfig, Within | None]:
    """The options of a run, and what it searches the speed for; the same options and None without `max_drop`.

    Raises:
        InputError: if there is a target beside, no metric, or a run to go on with.
    """
    if max_drop is None:
        return settings, None
    given = [name for name in TARGETS if getattr(settings, name) is not None]
    if given:
        raise InputError(f"Give max_drop or one target; got both max_drop and {', '.join(given)}.")
    if evaluate is None:
        raise InputError(
            "max_drop needs evaluate(model) -> float, a metric on data that is used for nothing else. On the command "
            "line: a folder with validation images."
        )
    if resume:
        raise InputError("A search for max_drop keeps no checkpoint: leave resume out, and it starts again.")
    return replace(settings, target_speedup=FIRST), Within(max_drop, confidence, evaluate)


def recorded(record: dict[str, Any], within: Within | None) -> dict[str, Any]:
    """The call as a report keeps it: what was asked for, rather than the speeds that were tried for it."""
    if within is None:
        return record
    rest = {name: value for name, value in record.items() if name != "target_speedup"}
    sure = {} if within.confidence == CONFIDENCE else {"confidence": within.confidence}
    return {"max_drop": within.limit, **sure, **rest}


def shipping(
    model: nn.Module, call: Call, settings: PruneConfig, calibration: Iterable[Any] | None
) -> Callable[[nn.Module], nn.Module]:
    """What makes of a model what is evaluated: its INT8 model where the runtime computes in integers, else itself."""
    if all(each.precision != "int8" for each in runtimes_of(settings.runtime, settings.threads)):
        return lambda pruned: pruned
    probe = LatencyProbe(model, call, runtime=settings.runtime, threads=settings.threads, calibration=calibration)
    return lambda pruned: OnnxModule(probe.artifact(pruned).int8)


def _values_of(evaluate: Callable[[nn.Module], float], model: nn.Module, when: str) -> list[float]:
    """What `evaluate` gives, or what it is the mean of."""
    each = each_of(evaluate)
    if each is None:
        found = evaluated(evaluate, model, when)
        assert found is not None
        return [found]
    with torch.no_grad(), evaluating(model), of_the_user("evaluate.each", when):
        values = each(model)
        values = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise InputError(
            f"evaluate.each must return one finite number for each sample; {when} it returned an array of shape "
            f"{list(values.shape)}."
        )
    return [float(value) for value in values]


def _sentence(row: TriedRow) -> str:
    """One that was tried."""
    what = f"{row['asked']:.2f}x{', trained' if row['trained'] else ''}"
    if row["drop"] is None:
        return f"{what} is out of reach"
    most = "" if row["upper"] is None else f" (at most {row['upper']:.3g})"
    return f"{what} loses {row['drop']:.3g}{most}"
