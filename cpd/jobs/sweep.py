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
    """The figures of one model at several speed-ups.

    Attributes:
        original: Figures of the unpruned model.
        points: One `SweepPoint` for each speed-up, in the order given.
        metric_name: Name of the metric, with its unit in brackets.
    """

    original: Figures | None
    points: tuple[SweepPoint, ...]
    metric_name: str = UNNAMED

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types. NaN and infinity become None; an unnamed metric is left out."""
        return {name: value for name, value in plain_fields(self).items() if (name, value) != ("metric_name", UNNAMED)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sweep:
        """Rebuild a sweep from the dict that `to_dict` returned.

        Raises:
            ArtifactError: If a field is missing or has another form than `to_dict` writes.
        """
        found = conform(data, cls, "a sweep")
        if any(
            point.figures is not None and (point.speedup is None or not point.figures.latency_ms)
            for point in found.points
        ):
            raise ArtifactError(
                "This is not a sweep that cpd wrote: it says that a speed-up was reached, but not measured."
            )
        return found

    def to_html(self) -> str:
        """A self-contained page of accuracy against measured latency, with links to the reports in the folders."""
        return sweep_page(self.original, self.points, self.metric_name)

    @checked(path=PATH)
    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw accuracy against measured latency, or the share of MACs that is left if no metric was evaluated.

        Args:
            path: The picture's file. Its ending names the format, such as `.png`.

        Returns:
            The path of the file.

        Raises:
            InputError: If the ending names no known format, the file cannot be written, or no speed-up was reached.
        """
        with needs_extra("plot", "A picture"):
            from matplotlib.figure import Figure

        target = check_plot(path)
        reached = [(point, point.figures) for point in self.points if point.figures is not None]
        if self.original is None or not reached:
            raise InputError("No speed-up of this sweep was reached, so there is nothing to draw.")
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
            raise InputError(f"{job} takes its targets from speedups: leave {name} out.")
    own = inspect.signature(compressed).parameters
    given = {name: value for name, value in options.items() if name in own}
    pruning = {name: value for name, value in options.items() if name not in own and name not in TARGETS}
    PruneConfig.of(given.get("config"), pruning, f"cpd.{job}")
    return given, pruning


_SPEEDUP = number("", lambda value: value >= 1)
SPEEDUPS = several(
    _SPEEDUP.accepts, "a list of at least one speed-up, each a number of at least 1, such as [1.5, 2, 3]"
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

    Everything that does not depend on the target is computed once: groups, scores, the model's responses to the data,
    and the latency of its kernels. With `cpd.family`, each result is a slice of the next larger one.

    Args:
        model: The trained model, which is not changed, or the name of one, as for `cpd.compress`.
        speedups: For each result, the latency of the original divided by that of the result; each at least 1.
        output_dir: The folder in which each result gets its own folder, such as `1.5x`, beside `sweep.json` and
            `report.html` with the figures of all. Default: nothing is written.
        overwrite: Whether to replace files that cpd did not write or that were changed since, as for `cpd.compress`,
            in all these folders.
        options: All other arguments of `cpd.compress` except its targets. They include the options of
            `cpd.PruneConfig`:

    Returns:
        A `Sweep` with `points`, `to_html()` and `plot(path)`.

    Raises:
        InputError: No speed-up is given, or an argument cannot be used, as for `cpd.compress`. A speed-up that is out
            of reach raises no error: its point holds the message.

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
            log.info("Sweep: speed-up %g (%s)", speedup, which)
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
