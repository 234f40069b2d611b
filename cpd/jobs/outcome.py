"""What a compression gives: the result, its report, and the folder it is saved to."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn

from cpd.config import PruneConfig
from cpd.deploy.latency import LatencyComparison
from cpd.deploy.machine import environment, installation
from cpd.deploy.runtimes.catalogue import names_of
from cpd.distillation.config import DistillConfig, EpochRecord
from cpd.errors import some
from cpd.model import sources
from cpd.options import FLAG, PATH, changed, checked, plain
from cpd.plan import Plan
from cpd.pruner import Pruner
from cpd.report.artifacts import PRETRAINED, check_output_dir, save_pretrained, save_result
from cpd.report.records import BranchRow, Figures, GroupRow, LayerRow, TriedRow
from cpd.report.report import Report
from cpd.selection.bounds import MB
from cpd.selection.target import Target
from cpd.sparsity.config import SparseConfig
from cpd.tasks.metric import told
from cpd.tasks.task import as_itself

#: Widths that a note names.
NAMED = 8


@dataclass(frozen=True, repr=False)
class Result:
    """The result of `cpd.compress`.

    Attributes:
        model: The compressed model, in eval mode. Its class is that of the original.
        report: The figures of every stage.
        plan: Which channels of the original were kept.
    """

    model: nn.Module
    report: Report
    plan: Plan
    _onnx: bytes | None = field(default=None)
    _int8: bytes | None = field(default=None)

    def __repr__(self) -> str:
        """The figures before and after compression."""
        return repr(self.report).replace(type(self.report).__name__, type(self).__name__, 1)

    @property
    def speedup(self) -> float | None:
        """Measured latency of the original divided by that of the result; None if the result was not exported."""
        return self.report.speedup

    @checked(directory=PATH, overwrite=FLAG)
    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write weights, plan, ONNX model, report and model card to a folder that `cpd.load` reads.

        All files appear at once and replace those of an earlier result. If writing is interrupted, the folder holds
        the earlier result in full, or the new one in full.

        Args:
            directory: The folder. It is created if it does not exist, and may hold other files with other names.
            overwrite: Whether to replace files that have the name of one of these files, but were not written by cpd
                or were changed since.

        Returns:
            The path of the folder.

        Raises:
            InputError: If `directory` is not a folder, cannot be written to, or holds such files and `overwrite` is
                False.
            ArtifactError: If a file cannot be written. The folder is then unchanged.
        """
        target = check_output_dir(directory, overwrite=overwrite)
        save_result(target, self.model, self.plan, self.report, self._onnx, self._int8)
        return target

    @checked(directory=PATH, overwrite=FLAG)
    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write `config.json`, `model.safetensors` and a model card to a folder that `cpd.from_pretrained` reads.

        Args:
            directory: The folder, as for `save`.
            overwrite: Whether to replace files that cpd did not write or that were changed since, as for `save`. A
                model card that you edited counts as changed.

        Returns:
            The path of the folder.

        Raises:
            InputError: As for `save`.
            ArtifactError: As for `save`.
        """
        target = check_output_dir(directory, PRETRAINED, overwrite=overwrite)
        save_pretrained(target, self.model, self.plan, self.report)
        return target


def call_record(
    config: PruneConfig | SparseConfig, training: DistillConfig, objects: Mapping[str, Any], output_dir: Path | None
) -> dict[str, Any]:
    """The call as a report keeps it: what is not the default, and the seed; of objects their names alone."""
    learned = {name: value for name, value in changed(training).items() if name not in ("seed", "progress")}
    own: dict[str, Any] = {name: learned.pop(name) for name in ("epochs", "lr") if name in learned}
    pruned = {name: plain(value) for name, value in changed(config).items() if name != "latency_inputs"}
    if isinstance(config, PruneConfig) and "runtime" in pruned:
        pruned["runtime"] = ",".join(names_of(config.runtime))
    return {
        **pruned,
        "seed": config.seed,
        **own,
        **({"training": learned} if learned else {}),
        **({} if output_dir is None else {"output_dir": os.fspath(output_dir)}),
        **{name: name for name, value in objects.items() if value is not None},
        **({"latency_inputs": "latency_inputs"} if getattr(config, "latency_inputs", ()) else {}),
    }


class Before(TypedDict):
    """What was found before the training, as its checkpoint has it."""

    history: list[dict[str, Any]]
    before: float | None


@dataclass(frozen=True)
class Deployed:
    """The result as it ships.

    Attributes:
        onnx: the float ONNX model.
        latency: its comparison with the original in the runtime.
        nodes: one dict a node, with its time before and after.
        int8: the INT8 models of the original and of the result; None where the runtime computes in float.
        files: bytes of what is run of both.
        in_float: nodes of the INT8 models of both that stay in float; nothing where there are none.
    """

    onnx: bytes
    latency: LatencyComparison
    nodes: tuple[dict[str, Any], ...]
    int8: tuple[bytes, bytes] | None
    files: tuple[int, int] | tuple[None, None] = (None, None)
    in_float: tuple[list[str], ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a user should know of it."""
        if not any(self.in_float):
            return []
        original, result = map(len, self.in_float)
        return [
            f"The nodes to which rounding to 8 bits adds most noise stay in float: {original} in the original's INT8 "
            f"model, {result} in that of the result."
        ]


@dataclass(frozen=True)
class Measured:
    """What was measured of the original and of the result.

    Attributes:
        latency: the comparison in the runtime; None where the result was not exported.
        nodes: one dict a node, with its time before and after.
        metrics: of the original and of the result; None without `evaluate`.
        metric_name: what they are, with the unit in brackets.
        elsewhere: the same result in other runtimes.
        tried: the speed-ups that were tried, where the metric was the target.
        files: bytes of what is run of both; None where nothing was exported.
    """

    latency: LatencyComparison | None
    nodes: tuple[dict[str, Any], ...]
    metrics: tuple[float | None, float | None]
    metric_name: str
    elsewhere: tuple[dict[str, Any], ...] = ()
    tried: tuple[TriedRow, ...] = ()
    files: tuple[int, int] | tuple[None, None] = (None, None)


def report_of(
    model: nn.Module,
    pruner: Pruner,
    measured: Measured,
    *,
    call: dict[str, Any],
    source: str | None,
    per_epoch: int,
    history: list[dict[str, Any]],
    seconds: dict[str, float],
) -> Report:
    """Every stage of a run in numbers.

    Args:
        model: the original.
        pruner: holds the result, and how it came about.
        measured: latency and metrics of both.
        call: as `call_record` gives it.
        source: how a fresh model is built by name; None: found out.
        per_epoch: optimizer steps an epoch.
        history: one dict an epoch.
        seconds: of each stage.
    """
    comb, groups, latency = pruner.comb, pruner.plan.groups, measured.latency
    kept = {group.axis: len(groups[group.name]) for group in comb.groups}
    times = (latency.original_ms, latency.candidate_ms) if latency else (None, None)
    left, bounds = comb.without(pruner.plan.removed), pruner.bounds
    before, after = (
        Figures(
            cost.parameters, cost.macs, cost.activations, time_ms, metric, None if size is None else size / MB, memory,
        )
        for cost, time_ms, metric, size, memory in zip(
            (comb.cost({}), left.cost(kept)), times, measured.metrics, measured.files if bounds.asked else (None, None),
            (bounds.memory(comb, {}), bounds.memory(left, kept)) if bounds.asked else (None, None), strict=True,
        )
    )  # fmt: skip
    return Report(
        call=call,
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        source=source_of(model, source),
        criterion=pruner.criterion_name,
        criterion_reason=pruner.why,
        normalization=pruner.normalization,
        original=before,
        result=after,
        latency=None if latency is None else {**latency.to_dict(), "elsewhere": list(measured.elsewhere)},
        groups=tuple(_row(group, len(groups[group.name])) for group in comb.groups),
        branches=tuple(
            BranchRow(item.name, item.parameters, item.macs, item.name in pruner.plan.removed, item.frozen)
            for item in pruner.branches
        ),
        layers=layer_rows(model, pruner.model),
        nodes=measured.nodes,
        shrinks=tuple({"epoch": item.step / max(per_epoch, 1), **asdict(item)} for item in pruner.shrinks),
        checks=pruner.checks,
        history=tuple(history),
        metric_name=measured.metric_name,
        search=tuple(pruner.search),
        seconds=seconds,
        environment={**environment_of(), **({} if latency is None else latency.environment)},
        notes=tuple(pruner.notes),
        tried=tuple({**row} for row in measured.tried),
    )


def source_of(model: nn.Module, source: str | None) -> str | None:
    """How a fresh model is built by name: as given, or found out; None where it is not known."""
    if source:
        return source
    with as_itself(model):
        found = sources.identify(model)
    return str(found) if found else None


def kept_weights(records: Sequence[EpochRecord], metric: str, before: float | None) -> tuple[float | None, str | None]:
    """The metric after a training, and which of its weights are kept, in a sentence, where those are not the last.

    Args:
        records: one an epoch.
        metric: the name of what was evaluated.
        before: what it was before the training.
    """
    kept = next((record for record in records if record.kept), None)
    if kept is not None:
        if kept is records[-1] or kept.metric is None:
            return kept.metric, None
        best = told(metric, kept.metric)
        return kept.metric, f"The weights after epoch {kept.epoch} of {len(records)} did best and are kept: {best}."
    if not records or before is None:
        return before, None
    return before, (
        f"No epoch improved the model, so the weights before the training are kept ({told(metric, before)}). A lower "
        "lr, more epochs or less augmentation may help."
    )


def missed(target: Target, found: LatencyComparison, tolerance: float, bound: bool = False) -> str | None:
    """What to say where the last timing lies outside the tolerance; where a bound decided, faster is not."""
    if not target.is_measured or abs(target.attained(found) - 1) <= tolerance:
        return None
    if bound and target.attained(found) > 1:
        return None
    return (
        f"The target was {target.name}={target.value:g}; the final timing gave a speed-up of {found.speedup:.2f} "
        f"({found.candidate_ms:.3g} ms in {found.runtime}), which is more than {tolerance:.0%} from it. Widths change "
        "in steps, and other work on this machine disturbs timings. Time both models again on an idle machine "
        "(cpd latency)."
    )


def would_meet(pruner: Pruner, plan: Plan) -> str:
    """The plan that would meet the target, for whom the last timing missed it."""
    comb, groups = pruner.comb, plan.groups
    left = comb.without(plan.removed).cost({item.axis: len(groups[item.name]) for item in comb.groups}).macs
    moved = [name for name, channels in groups.items() if len(channels) != len(pruner.plan.groups[name])]
    widths = some((f"{name} {len(groups[name])}" for name in moved), NAMED)
    return (
        f"By the final timing, a model with {left / max(comb.cost({}).macs, 1):.1%} of the MACs would meet the target. "
        f"These widths would differ: {widths or 'none'}."
    )


def layer_rows(original: nn.Module, result: nn.Module) -> tuple[LayerRow, ...]:
    """The width of every layer that has a matrix or a kernel of weights, before and after; 0 where it has gone."""

    def width(module: nn.Module, weight: Tensor) -> int:
        names = ("out_channels", "out_features", "embedding_dim")
        return next((found for name in names if isinstance(found := getattr(module, name, None), int)), len(weight))

    rows, left = [], dict(result.named_modules(remove_duplicate=False))
    for name, module in original.named_modules():
        weights = [(key, weight) for key, weight in module.named_parameters(recurse=False) if weight.dim() >= 2]
        if weights:
            (key, weight), narrower = weights[0], left.get(name)
            parameter = None if narrower is None else narrower._parameters.get(key)
            after = 0 if narrower is None or parameter is None else width(narrower, parameter)
            rows.append(LayerRow(name, type(module).__name__, width(module, weight), after))
    return tuple(rows)


def _row(group: Any, kept: int) -> GroupRow:
    return GroupRow(group.name, group.size, kept, group.exact, group.frozen, tuple(map(str, group.members)))


def environment_of() -> dict[str, str]:
    """Versions and hardware.

    A package that was not installed under its usual name, as cpd where it runs from its sources, is left out.
    """
    versions = {name: version for name, version in installation().items() if name in ("cpd", "onnx", "timm")}
    return {"python": sys.version.split()[0], **environment(), **versions}
