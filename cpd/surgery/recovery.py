"""Recovery without training: BatchNorm recalibrated, compensation, or both: what comes nearest to the unpruned model.

What is nearest is judged on samples that were not fitted: on those that were, the variant that fits most always wins.
Each is tried on few samples, and the chosen one done once more, on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpd.errors import InputError
from cpd.model.inputs import Batch, Call, batches, device_of, evaluating, logits
from cpd.model.outputs import whole
from cpd.model.tensors import restore, state_of
from cpd.plan import Plan
from cpd.surgery.batchnorm import recalibrate_batchnorm
from cpd.surgery.calibration import Calibration
from cpd.surgery.compensation import Refit, refit

NOTHING, RECALIBRATION = "nothing", "recalibration"
#: Samples in a batch whose statistics are averaged.
BATCH = 32
#: Samples that tell two plans apart, or two variants, and that choose how much to damp.
TRIED = 128
#: Samples that tell one branch from another: refitted on, and judged by.
FEW, FEWER = 64, 32
COMPENSATION, WITH_NORMS = "compensation", "compensation with BatchNorm"


@dataclass(frozen=True)
class Recovery:
    """What was tried to recover accuracy without training, and what was kept.

    Attributes:
        chosen: Name of the variant that was kept.
        errors: {variant: mean squared difference of the logits from those of the unpruned model, relative to their
            variance, on held-out samples}.
        agreements: {variant: share of predicted classes that agree with the unpruned model, on the same samples}.
        failure: Why compensation was not possible, if it was not.
        samples: Number of samples used for fitting and choosing.
    """

    chosen: str
    errors: dict[str, float]
    agreements: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    samples: int = 0

    def __str__(self) -> str:
        tried = ", ".join(
            f"{name} {error:.3g}"
            + (f" ({self.agreements[name]:.1%} of the classes agree)" if name in self.agreements else "")
            for name, error in self.errors.items()
        )
        return (
            f"Recovery without training: kept {self.chosen!r}. Relative squared error of the logits, and share of "
            f"predicted classes that agree with the unpruned model, on held-out samples: {tried}."
        )


def recover(
    model: nn.Module, calibration: Calibration, plan: Plan, support: Mapping[str, Tensor] | None = None
) -> Recovery:
    """Bring a narrower model near to the unpruned one, in place, by forward passes alone.

    Args:
        model: the narrower model.
        calibration: the samples, and what the unpruned model makes of them; of its layers too, if compensation is to be
            tried.
        plan: what `model` keeps of it.
        support: weight -> which of its entries may differ from zero, bool of its shape; None: all of every weight.

    Raises:
        TrainingError: if statistics are not finite.
    """
    trial = _Trial(model, calibration, plan, support)
    trial.of(NOTHING, lambda: lambda: None)
    normed = any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())
    failure = None
    if normed:
        trial.of(RECALIBRATION, trial.recalibrated)
    variants = {COMPENSATION: False, WITH_NORMS: True} if normed else {COMPENSATION: True}
    try:
        for name, norms in variants.items() if calibration.layers else ():
            if norms and plan.digest in calibration.tried:
                trial.known(name)
            else:
                trial.of(name, partial(trial.refitted, norms))
    except InputError as error:
        failure = str(error)
    chosen = min(trial.errors, key=lambda name: trial.errors[name])
    trial.again[chosen]()
    return Recovery(chosen, trial.errors, trial.agreements, failure, calibration.samples)


def recovered_error(model: nn.Module, calibration: Calibration, plan: Plan, *, roughly: bool = False) -> float:
    """The error of the logits that recovery will leave, about: by one variant on some samples; `model` is changed.

    `recover` goes on from what was found here of the same plan, but roughly.

    Args:
        model: the narrower model.
        calibration: the samples, and what the unpruned model makes of them.
        plan: what `model` keeps of it.
        roughly: on half as many samples.
    """
    try:
        chosen = refit(model, calibration, plan, norms=True, samples=FEW if roughly else TRIED)
    except InputError:
        _recalibrate(model, calibration, _tried(calibration))
        return calibration.judge(model)[0]
    judged = calibration.judge(model)
    if not roughly:
        calibration.tried[plan.digest] = chosen, judged
    return judged[0]


def error_without(model: nn.Module, calibration: Calibration, plan: Plan) -> float:
    """The error of the logits without some branches, about, once the layers before them give what those gave.

    Args:
        model: the model without them; changed.
        calibration: the samples, and what the unpruned model makes of them.
        plan: what `model` keeps of it.
    """
    with suppress(InputError):
        refit(model, calibration, plan, samples=FEW, alone=True)
    return calibration.judge(model, FEWER)[0]


class _Trial:
    """Variants of one recovery, each judged on what it was not fitted to; the model is as before after each.

    Attributes:
        again: name -> does it once more, on all samples.
    """

    def __init__(
        self, model: nn.Module, calibration: Calibration, plan: Plan, support: Mapping[str, Tensor] | None
    ) -> None:
        self.model, self.calibration, self.plan, self.support = model, calibration, plan, support
        self.before = state_of(model)
        self.errors: dict[str, float] = {}
        self.agreements: dict[str, float] = {}
        self.again: dict[str, Callable[[], object]] = {}

    def of(self, name: str, run: Callable[[], Callable[[], object]]) -> None:
        """Try a variant; `run` does it and gives what does it on all samples."""
        try:
            self.again[name] = run()
            self.errors[name], self.agreements[name] = self.calibration.judge(self.model)
        finally:
            restore(self.model, self.before)

    def known(self, name: str) -> None:
        """Take what `recovered_error` found of the variant with the statistics of BatchNorm, if there are any."""
        chosen, (self.errors[name], self.agreements[name]) = self.calibration.tried[self.plan.digest]
        self.again[name] = lambda: self._refit(chosen, norms=True)

    def recalibrated(self) -> Callable[[], object]:
        """BatchNorm recalibrated."""
        model, calibration = self.model, self.calibration
        _recalibrate(model, calibration, _tried(calibration))
        return lambda: _recalibrate(model, calibration, _batches(calibration.all(BATCH)))

    def refitted(self, norms: bool) -> Callable[[], object]:
        """Compensated."""
        chosen = self._refit(None, norms=norms, samples=TRIED)
        if self.support is None:
            return lambda: self._refit(chosen, norms=norms)
        return lambda: self._chosen_by_all(norms)

    def _chosen_by_all(self, norms: bool) -> dict[str, Refit]:
        """Compensated, how much to damp chosen on all samples: with a support it differs from layer to layer."""
        chosen = self._refit(None, norms=norms)
        restore(self.model, self.before)
        return self._refit(chosen, norms=norms)

    def _refit(self, chosen: Mapping[str, Refit] | None, **options: Any) -> dict[str, Refit]:
        return refit(self.model, self.calibration, self.plan, chosen, support=self.support, **options)


def _recalibrate(model: nn.Module, calibration: Calibration, samples: list[Batch]) -> None:
    """BatchNorm recalibrated; of several processes, each on its own batches, the mean over all of them."""
    step = calibration.step
    with step.together():
        recalibrate_batchnorm(model, samples)
        if step.count > 1:
            norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
            found = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
            number, *sums = step.totals(
                "recalibration", [torch.tensor(len(samples)), *(t * len(samples) for t in found)]
            )
            for tensor, total in zip(found, sums, strict=True):
                tensor.copy_(total / number.to(total.device))


def _tried(calibration: Calibration) -> list[Batch]:
    """The samples that a variant is tried on."""
    most = max(1, TRIED // BATCH // calibration.step.count)
    return _batches(islice(calibration.fitted(BATCH), most))


def _batches(calls: Iterable[Call]) -> list[Batch]:
    return [Batch(call, None) for call in calls]


@torch.no_grad()
def logits_error(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Any],
    limit: int | None = None,
    read: Callable[[Any], Any] = whole,
) -> float:
    """The mean squared difference of two models' logits, relative to the variance of the second's."""
    difference = total = count = 0.0
    mean: Tensor | float = 0.0
    with evaluating(model), evaluating(original):
        for batch in batches(data, limit):
            found = logits(read(batch.to(device_of(model)).on(model))).double()
            expected = logits(read(batch.to(device_of(original)).on(original))).double().to(found.device)
            difference += float((found - expected).square().sum())
            mean = mean + expected.sum(0)
            total += float(expected.square().sum())
            count += len(expected)
    spread = total - float((torch.as_tensor(mean) / count).square().sum()) * count
    return difference / max(spread, 1e-30)
