"""A family: models of one origin at several speeds, each a slice of the next larger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpd.deploy.latency import LatencyTable, measure_latency
from cpd.deploy.runtimes.catalogue import DEFAULT, RUNTIME, names_of
from cpd.errors import InputError, TargetError
from cpd.jobs.sweep import Sweep
from cpd.model.arguments import INPUTS, MODEL
from cpd.options import FLAG, PATH, SECONDS, THREADS, checked, number
from cpd.plan import Plan
from cpd.report.artifacts import FAMILY, check_output_dir
from cpd.report.families import FamilyRecord, read_family, save_family
from cpd.report.records import Figures, SweepPoint
from cpd.report.report import Report

_MILLISECONDS = number("above 0, in milliseconds per run", lambda value: value > 0)
_ASKED = number("a speed-up that a member was asked for", lambda value: value >= 1)


@dataclass(frozen=True, repr=False)
class Member:
    """One model of a family.

    Attributes:
        asked: The speed-up that was asked for.
        speedup: The speed-up that was measured, on the machine where the family was made.
        model: The model, in eval mode. Its class is that of the original.
        plan: What it keeps of the original. It keeps no channel that a larger member has removed.
        figures: Its cost, latency and metric, from the machine where the family was made.
        report: All figures of how it was made; None in a family that was loaded.
    """

    asked: float
    speedup: float
    model: nn.Module
    plan: Plan
    figures: Figures
    report: Report | None = field(default=None)

    def __repr__(self) -> str:
        """Its speed and size."""
        return f"Member({self.asked:g}x, measured {self.speedup:.2f}x, {self.figures.parameters:,} parameters)"


@dataclass(frozen=True, repr=False)
class Family:
    """The result of `cpd.family`: models at several speeds, each a slice of the next larger one.

    Attributes:
        members: The members, the widest first.
        original: Figures of the unpruned model.
        metric_name: Name of the metric, with its unit in brackets.
        missing: {speed-up that is out of reach: the reason}.
        source: The name from which a fresh model can be built, if it is known.
        model_class: The class of the model.
        inputs: The inputs on which latency was measured, if they are plain tensors.
    """

    members: tuple[Member, ...]
    original: Figures
    metric_name: str
    missing: Mapping[float, str]
    source: str | None
    model_class: str
    inputs: tuple[Tensor, ...] = ()
    _timed: dict[tuple[str, int], LatencyTable] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The members' speeds."""
        told = ", ".join(f"{member.asked:g}x" for member in self.members)
        return f"Family of {self.model_class}: {told}"

    @checked(speedup=_ASKED)
    def __getitem__(self, speedup: float) -> Member:
        """The member that was made for a speed-up.

        Raises:
            InputError: If there is no such member. The message lists those that exist.
        """
        found = next((member for member in self.members if member.asked == speedup), None)
        if found is None:
            there = ", ".join(f"{member.asked:g}" for member in self.members)
            why = f" It was out of reach: {self.missing[speedup]}" if speedup in self.missing else ""
            raise InputError(f"This family has no member {speedup:g}; it has {there}.{why}")
        return found

    @property
    def figures(self) -> Sweep:
        """The figures of all members as a `cpd.Sweep`, with `to_html()` and `plot(path)`."""
        return Sweep(self.original, self._points, self.metric_name)

    @property
    def _points(self) -> tuple[SweepPoint, ...]:
        points = [SweepPoint(member.asked, member.speedup, member.figures) for member in self.members]
        points += [SweepPoint(asked, None, None, error=why) for asked, why in self.missing.items()]
        return tuple(sorted(points, key=lambda point: point.asked))

    @checked(latency_ms=_MILLISECONDS, example_inputs=INPUTS, runtime=RUNTIME, threads=THREADS, seconds=SECONDS)
    def pick(
        self,
        latency_ms: float,
        *,
        example_inputs: Any = None,
        runtime: Any = DEFAULT,
        threads: int = 1,
        seconds: float = 60.0,
    ) -> Member:
        """Return the best member that runs within a given time on this machine.

        All members are timed here, in turn, once for each runtime; later calls reuse these times. The best member is
        the one with the highest metric or, if no metric was evaluated, the widest.

        Args:
            latency_ms: The longest allowed time for one run, in milliseconds.
            example_inputs: The batch that is timed: a tensor, a tuple, or (tuple, dict). Default: the inputs on which
                the family was measured.
            runtime: Where the models run, as for `cpd.compare_latency`. Of several runtimes, the slowest decides.
            threads: Threads that each runtime uses.
            seconds: Longest time that the timing takes. Export is not included.

        Raises:
            InputError: If an argument cannot be used, or if no example inputs are known.
            TargetError: If no member is fast enough. The message gives the time of the fastest.
        """
        times = self._times(example_inputs, runtime, threads, seconds)
        fast = [member for member in self.members if times[member.asked] <= latency_ms]
        if not fast:
            asked = min(times, key=lambda name: times[name])
            raise TargetError(
                f"No member runs within {latency_ms:g} ms on this machine: the fastest, {asked:g}x, takes "
                f"{times[asked]:.3g} ms. Ask for {times[asked]:.3g}, or make a family with a larger speed-up."
            )
        return max(fast, key=lambda member: (member.figures.metric or 0.0, member.figures.macs))

    def _times(self, example_inputs: Any, runtime: Any, threads: int, seconds: float) -> dict[float, float]:
        """The time of each member on this machine, in ms, by the speed-up that it was made for."""
        inputs = self.inputs if example_inputs is None else example_inputs
        if example_inputs is None and not self.inputs:
            raise InputError("The inputs on which this family was timed were not saved: pass example_inputs=.")
        key = ",".join(names_of(runtime)), threads
        table = self._timed.get(key) if example_inputs is None else None
        if table is None:
            models = {f"{member.asked:g}": member.model for member in self.members}
            table = measure_latency(models, inputs, runtime=runtime, threads=threads, seconds=seconds)
        if example_inputs is None and isinstance(runtime, str):
            self._timed[key] = table
        return {
            member.asked: max(row.median_ms for row in table.rows if row.name == f"{member.asked:g}")
            for member in self.members
        }

    @checked(directory=PATH, overwrite=FLAG)
    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write weights, plans, figures and a page to a folder that `Family.load` reads.

        The weights of all members are in one file: those of the widest in full, and of the others only the tensors
        that are not slices of the widest.

        Args:
            directory: The folder. It is created if it does not exist.
            overwrite: Whether to replace files that have the name of one of these files, but were not written by cpd
                or were changed since.

        Returns:
            The path of the folder.

        Raises:
            InputError: If `directory` is not a folder, cannot be written to, or holds such files and `overwrite` is
                False.
            ArtifactError: If a file cannot be written. The folder is then unchanged.
        """
        target = check_output_dir(directory, FAMILY, overwrite=overwrite)
        save_family(
            target,
            FamilyRecord(
                tuple(member.model for member in self.members), tuple(member.plan for member in self.members),
                self._points, self.original, self.source, self.model_class, self.metric_name, self.inputs,
            ),
        )  # fmt: skip
        return target

    @staticmethod
    @checked(directory=PATH, model=MODEL, trust_source=FLAG)
    def load(
        directory: str | os.PathLike[str], model: nn.Module | None = None, *, trust_source: bool = False
    ) -> Family:
        """Rebuild a family from its folder. No code in the folder is run, and nothing is downloaded.

        Args:
            directory: The folder that `save` wrote.
            model: A fresh model of the original architecture; it is not changed. Default: one built from the saved
                name in timm or torchvision.
            trust_source: Whether to import and call a saved `package.module:factory`, which runs its code.

        Raises:
            ArtifactError: If a file is missing, truncated, changed or not written by cpd; or if no model is given and
                none can be built from a saved name.
        """
        found = read_family(Path(directory), model, trust_source=trust_source)
        reached = sorted((item for item in found.points if item.figures is not None), key=lambda item: item.asked)
        members = tuple(
            Member(point.asked, point.speedup or 0.0, model, plan, point.figures)
            for point, model, plan in zip(reached, found.models, found.plans, strict=True)
            if point.figures is not None
        )
        missing = {point.asked: point.error or "" for point in found.points if point.figures is None}
        return Family(
            members, found.original, found.metric_name, missing, found.source, found.model_class, found.inputs
        )
