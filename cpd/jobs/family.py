"""Family: models at several speeds from one run, each a slice of the next larger.

What does not depend on the speed is found once (`cpd.selection.common`). The narrowest member is chosen first, and
each next one around it: it keeps what that keeps, and more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from cpd import processes
from cpd.config import PruneConfig
from cpd.deploy.export import export_onnx
from cpd.distillation.slimmable import check_together, distill_together
from cpd.errors import InputError, TargetError
from cpd.jobs.compress import compressed
from cpd.jobs.members import Family, Member
from cpd.jobs.outcome import Result
from cpd.jobs.request import example_call, given_of, training_settings
from cpd.jobs.sweep import SPEEDUPS, parted
from cpd.model.arguments import NAMED_MODEL
from cpd.model.inputs import Call, evaluated
from cpd.model.progress import part, shown
from cpd.model.state import preserved
from cpd.model.tensors import copy_of
from cpd.options import FLAG, PATH, checked, takes_options
from cpd.report.artifacts import FAMILY, check_output_dir
from cpd.selection.common import Common
from cpd.selection.target import TARGETS
from cpd.surgery.batchnorm import recalibrate_batchnorm
from cpd.surgery.shrink import slice_of
from cpd.tasks.metric import metric_name
from cpd.tasks.task import itself, on_itself

log = logging.getLogger("cpd")

#: Arguments of `cpd.compress` that a family takes none of: it leaves no checkpoint.
_NOT_TAKEN = ("resume", "checkpoint_minutes")
#: Batches that the statistics of BatchNorm are taken over after a training together.
_BATCHES = 64


@takes_options(PruneConfig, leave_out=TARGETS, others=True)
@checked(model=NAMED_MODEL, speedups=SPEEDUPS, together=FLAG, output_dir=PATH, overwrite=FLAG)
def family(
    model: nn.Module | str,
    speedups: Sequence[float],
    *,
    together: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Family:
    """Make one model for each of several speed-ups, in one run.

    Groups, scores, the model's responses to the data, and the latency of its kernels are computed once. Plans are
    nested: no member keeps a channel that a larger one has removed, so each member is a slice of the next larger one.
    Each member has its own BatchNorm statistics and its own refit.

    Args:
        model: The trained model, which is not changed, or the name of one, as for `cpd.compress`.
        speedups: For each member, the latency of the original divided by that of the member; each at least 1.
        together: Whether to train all members at once, as slices of one set of weights (the sandwich rule with in-place
            distillation), rather than each by itself. This takes about as long as one or two trainings. All members
            then share one file of weights, apart from the normalization layers of the narrower ones.
        output_dir: The folder to which the family is written, as by `Family.save`. Default: nothing is written.
        overwrite: Whether to replace files that cpd did not write or that were changed since, as for `Family.save`.
        options: All other arguments of `cpd.compress` except its targets, `resume` and `checkpoint_minutes`. They
            include the options of `cpd.PruneConfig`:

    Returns:
        A `Family` with `members`, `family[2]`, `pick(latency_ms=8)` and `save(dir)`.

    Raises:
        InputError: No speed-up is given, the schedule is not one-shot, or an argument cannot be used, as for
            `cpd.compress`.
        TargetError: None of the speed-ups is in reach. If only some are out of reach, `Family.missing` gives the
            reasons.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
        >>> found = cpd.family(model, [1.5, 2], example_inputs=torch.randn(1, 3, 32, 32), tolerance=0.3)
        >>> wide, narrow = found.members
        >>> set(narrow.plan.groups["0"]) <= set(wide.plan.groups["0"])  # nested
        True
        >>> found.pick(latency_ms=1000, seconds=1) is wide  # the widest that is as fast on this machine
        True
        >>> cpd.Family.load(found.save("out"), model).members[1].asked
        2
    """
    asked = sorted(set(speedups))
    given, pruning = parted(options, "family")
    for name in _NOT_TAKEN:
        if given.pop(name, None):
            raise InputError(f"cpd.family writes no checkpoint that a run could continue from: leave {name} out.")
    settings = PruneConfig.of(given.get("config"), pruning, "cpd.family")
    if settings.schedule != "one-shot":
        raise InputError(
            f"A family is pruned before any training: schedule must be 'one-shot'; got {settings.schedule!r}."
        )
    folder = None if output_dir is None else check_output_dir(output_dir, FAMILY, overwrite=overwrite)
    processes.start()
    with shown(options.get("progress") if processes.rank() == 0 else False):
        job = _Job(model, asked, given, pruning, settings, together)
        found = job.run()
    if folder is not None:
        processes.from_first(partial(found.save, folder, overwrite=overwrite))
    return found


@dataclass
class _Job:
    """One family in the making."""

    model: nn.Module | str
    asked: list[float]
    given: dict[str, Any]
    pruning: dict[str, Any]
    settings: PruneConfig
    together: bool

    def run(self) -> Family:
        """All members."""
        read = given_of(
            self.model, *(self.given.get(name) for name in ("task", "data", "calibration", "evaluate", "source"))
        )
        learning = training_settings(
            self.given.get("training"), self.given.get("epochs"), self.given.get("lr"), self.settings.seed,
            self.given.get("progress"), read.task.training(read.model),
        )  # fmt: skip
        trains = self.together and read.data is not None and learning.epochs > 0
        if trains:
            check_together(learning)
        call = example_call(read.model, self.given.get("example_inputs"), read.batches()[0], read.task)
        common, results, missing = Common(), dict[float, Result](), dict[float, str]()
        for number, speedup in enumerate(reversed(self.asked), 1):
            log.info("Family: speed-up %g (member %d of %d)", speedup, number, len(self.asked))
            try:
                with part(f"member {number} of {len(self.asked)}: {speedup:g}x"):
                    results[speedup] = self._member(speedup, common, 0 if trains else self.given.get("epochs"))
            except TargetError as error:
                log.warning("%s", error)
                missing[speedup] = str(error)
            else:
                common.around = results[speedup].plan
        results, missing = dict(sorted(results.items())), dict(sorted(missing.items()))
        if not results:
            raise TargetError(next(iter(missing.values())))
        if trains:
            common.trials = None  # what the unpruned model made of the data is not asked for again
            with part("train together"):
                results = self._trained(read, results, learning, call)
        members = [
            Member(speedup, found.speedup or 1.0, found.model, found.plan, found.report.result, found.report)
            for speedup, found in results.items()
        ]
        first = next(iter(results.values())).report
        inputs = call.args if not call.kwargs and all(isinstance(item, Tensor) for item in call.args) else ()
        return Family(
            tuple(members), first.original, first.metric_name, missing, first.source, first.model_class, inputs
        )

    def _member(self, speedup: float, common: Common, epochs: float | None) -> Result:
        """One member, around the one before it."""
        given = {**self.given, "epochs": epochs}
        return compressed(self.model, {"target_speedup": speedup, **self.pruning}, common=common, **given)

    def _trained(self, read: Any, results: dict[float, Result], learning: Any, call: Call) -> dict[float, Result]:
        """The members trained together; their reports say so."""
        data, calibration = read.batches()
        teacher = self.given.get("teacher")
        models = [found.model for found in results.values()]
        plans = [found.plan for found in results.values()]
        guide = copy_of(read.model) if teacher is None else teacher
        slices = [partial(slice_of, plan=plan.since(plans[0])) for plan in plans[1:]]
        with preserved(read.model), read.task.viewed(guide, *models):
            records = distill_together(
                models, slices, guide, data, loss=self.given.get("loss"),
                evaluate=on_itself(read.evaluate), config=learning, outputs=read.completed(self.settings).outputs,
            )  # fmt: skip
            plain = data if calibration is None else calibration
            for model in models:
                processes.from_first(partial(recalibrate_batchnorm, model, plain, limit=_BATCHES))
                processes.copy_from_first(model.buffers())
        history = [record.to_dict() for record in records]
        return {
            speedup: _with_training(found, read.evaluate, history, call, len(results))
            for speedup, found in results.items()
        }


def _with_training(found: Result, evaluate: Any, history: Iterable[dict[str, Any]], call: Call, count: int) -> Result:
    """A result whose model was trained with those of a family: its metric and its ONNX model are found anew."""
    model = itself(found.model).eval()
    metric = None if evaluate is None else evaluated(evaluate, model, "after the training")
    note = (
        f"Trained together with {count - 1} other members, as slices of one set of weights. The metric of an epoch is "
        f"the mean of {metric_name(evaluate)} over the members. BatchNorm statistics were recalibrated afterwards."
    )
    report = replace(
        found.report, result=replace(found.report.result, metric=metric), notes=(*found.report.notes, note),
        history=(*found.report.history, *history),
    )  # fmt: skip
    onnx = None if found._onnx is None else export_onnx(model, call)
    return replace(found, report=report, _onnx=onnx)
