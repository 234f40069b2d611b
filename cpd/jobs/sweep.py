"""Sweep: one model at several speed-ups, and what accuracy each leaves."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cpd import processes
from cpd.config import PruneConfig
from cpd.errors import ArtifactError, InputError, TargetError, needs_extra
from cpd.files.folder import reading, write_files
from cpd.files.reading import check_signed, conform, naming, read_json, signed
from cpd.jobs.compress import compressed
from cpd.jobs.sensitivity import check_plot
from cpd.model.arguments import NAMED_MODEL
from cpd.model.progress import part, shown
from cpd.options import FLAG, PATH, checked, number, several, takes_options
from cpd.report.artifacts import PAGE, SWEEP, SWEPT, check_output_dir
from cpd.report.metrics import Metric
from cpd.report.records import Figures, SweepPoint, plain_fields
from cpd.report.report import sweep_page
from cpd.selection.common import Common
from cpd.selection.target import TARGETS
from cpd.tasks.metric import UNNAMED, metric_name

log = logging.getLogger("cpd")


@dataclass(frozen=True)
class Sweep:
    """Results of one model at several speed-ups.

    Attributes:
        original: figures of the unpruned model.
        points: one a speed-up, in the order asked.
        metric_name: what was evaluated, with its unit in brackets.
    """

    original: Figures | None
    points: tuple[SweepPoint, ...]
    metric_name: str = UNNAMED

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types, NaN and infinity None; the name of the metric only where it has one."""
        return {name: value for name, value in plain_fields(self).items() if (name, value) != ("metric_name", UNNAMED)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sweep:
        """The sweep that `to_dict` wrote.

        Raises:
            ArtifactError: if a field is missing or is not what `to_dict` writes.
        """
        found = conform(data, cls, "a sweep")
        if any(
            point.figures is not None and (point.speedup is None or not point.figures.latency_ms)
            for point in found.points
        ):
            raise ArtifactError("This is not a sweep that cpd wrote: a speed-up was reached, but not measured.")
        return found

    def to_html(self) -> str:
        """Accuracy against measured latency as one self-contained page, with links to the reports in the folders."""
        return sweep_page(self.original, self.points, self.metric_name)

    @checked(path=PATH)
    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw accuracy (or the share of MACs that is left, where none was evaluated) against measured latency.

        Raises:
            InputError: if the file's ending names no format, it cannot be written, or no point was reached.
        """
        with needs_extra("plot", "A picture"):
            from matplotlib.figure import Figure

        target = check_plot(path)
        reached = [(point, point.figures) for point in self.points if point.figures is not None]
        if self.original is None or not reached:
            raise InputError("No speed-up of the sweep was reached: there is nothing to draw.")
        original, metric = self.original, Metric.of(self.metric_name, self.original.metric)
        measured = all(figures.metric is not None for figures in (original, *(found for _, found in reached)))
        every = [(original, "original"), *((found, f"{p.asked:g}x ({p.speedup:.2f}x)") for p, found in reached)]
        points = sorted(
            (
                item.latency_ms or 0.0,
                metric.shown(item.metric or 0.0) if measured else 100 * item.macs / max(original.macs, 1), text,
            )
            for item, text in every
        )  # fmt: skip
        times, values, _ = zip(*points, strict=True)
        figure = Figure(figsize=(6, 4), layout="constrained")
        area = figure.add_subplot()
        area.plot(times, values, "o-", color="#0969da")
        for time, value, text in points:
            beyond = time > 0.8 * max(times)  # a text to the right would leave the frame
            area.annotate(
                text, (time, value), textcoords="offset points", xytext=(-6 if beyond else 6, -12), fontsize=8,
                ha="right" if beyond else "left",
            )  # fmt: skip
        area.set_title("speed-up asked for (measured)", fontsize=9, loc="left")
        area.set(xlabel="measured latency [ms]", ylabel=metric.axis if measured else "MACs left [%]")
        area.set_xlim(0, None)
        area.margins(y=0.1)
        area.grid(alpha=0.3)
        try:
            figure.savefig(target)
        except OSError as error:
            raise InputError(f"The picture cannot be written to {target}: {error}.") from error
        return target


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder.

    Raises:
        ArtifactError: if it is missing, truncated, changed or foreign.
    """
    with reading(folder) as files:
        path = files.file(SWEEP)
        content = read_json(path)
        check_signed(content, path)
    with naming(path):
        return Sweep.from_dict(content)


def parted(options: Mapping[str, Any], job: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `cpd.compress`, and those that are options of pruning.

    Raises:
        InputError: a target among them, or an option that there is not.
    """
    for name in (*TARGETS, "max_drop"):
        if options.get(name) is not None:
            raise InputError(f"{job} takes its targets from speedups; leave {name} out.")
    own = inspect.signature(compressed).parameters
    given = {name: value for name, value in options.items() if name in own}
    pruning = {name: value for name, value in options.items() if name not in own and name not in TARGETS}
    PruneConfig.of(given.get("config"), pruning, f"cpd.{job}")
    return given, pruning


_SPEEDUP = number("", lambda value: value >= 1)
SPEEDUPS = several(
    _SPEEDUP.accepts, "a list of at least one speed-up, each a number of at least 1, as [1.5, 2, 3]"
)  # fmt: skip


@takes_options(PruneConfig, leave_out=TARGETS, others=True)
@checked(model=NAMED_MODEL, speedups=SPEEDUPS, output_dir=PATH, overwrite=FLAG)
def sweep(
    model: nn.Module | str,
    speedups: Sequence[float],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Sweep:
    """Compress a model to each of several speed-ups.

    What does not depend on the target is found once: groups, scores, what the model makes of the data, the latency of
    its kernels. `cpd.family` gives models of which each is a slice of the next larger.

    Args:
        model: a trained model, left as it was; or the name of one, as for `cpd.compress`.
        speedups: measured latency of the original over each result's, each at least 1.
        output_dir: each result goes into a folder of its own here, such as `1.5x`, and the figures of all into
            `sweep.json` and `report.html`; None writes nothing.
        overwrite: as for `cpd.compress`, of all these folders.
        options: all other arguments of `cpd.compress` but for its targets, those of `cpd.PruneConfig` among them:

    Raises:
        InputError: no speed-up, or what `cpd.compress` raises for an unusable argument. A speed-up that is out of
            reach is no error here: its point says so.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> found = cpd.sweep(model, [1.5, 2], example_inputs=torch.randn(1, 3, 32, 32), tolerance=0.3)
        >>> [point.asked for point in found.points]
        [1.5, 2]
        >>> found.points[0].figures.macs < found.original.macs
        True
    """
    asked = list(speedups)
    given, pruning = parted(options, "sweep")
    folder = None if output_dir is None else check_output_dir(output_dir, SWEPT, overwrite=overwrite)
    if folder is not None:
        for speedup in asked:
            check_output_dir(folder / f"{speedup:g}x", overwrite=overwrite)
    original: Figures | None = None
    common = Common()
    points: list[SweepPoint] = []
    named = metric_name(options.get("evaluate"))
    processes.start()
    with shown(options.get("progress") if processes.rank() == 0 else False):
        for speedup in asked:
            place = None if folder is None else folder / f"{speedup:g}x"
            which = f"target {len(points) + 1} of {len(asked)}"
            log.info("Sweep: %g times as fast (%s)", speedup, which)
            try:
                with part(f"{which}: {speedup:g}x"):
                    result = compressed(
                        model, {"target_speedup": speedup, **pruning}, common=common, output_dir=place,
                        overwrite=overwrite, **given,
                    )  # fmt: skip
            except TargetError as error:
                log.warning("%s", error)
                points.append(SweepPoint(speedup, None, None, error=str(error)))
            else:
                original = original or result.report.original
                points.append(
                    SweepPoint(speedup, result.speedup, result.report.result, None if place is None else str(place))
                )
            found = Sweep(original, tuple(points), named)
            if folder is not None:
                figures = json.dumps(signed(found.to_dict()), indent=1)
                files = {SWEEP: figures.encode(), PAGE: found.to_html().encode()}
                processes.from_first(partial(write_files, folder, files))
    return found
