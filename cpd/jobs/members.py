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

_MILLISECONDS = number("above 0, in ms for one run", lambda value: value > 0)
_ASKED = number("a speed-up that a member was asked for", lambda value: value >= 1)


@dataclass(frozen=True, repr=False)
class Member:
    """One model of a family.

    Attributes:
        asked: the speed-up that it was made for.
        speedup: the one measured where it was made.
        model: of the original's class, in eval mode.
        plan: what it keeps of the original; nothing that a larger member has removed.
        figures: its cost, latency and metric, as measured where it was made.
        report: every figure of how it was made; None in a family that was loaded.
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
    """What `cpd.family` gives.

    Attributes:
        members: the widest first.
        original: figures of the unpruned model.
        metric_name: what was evaluated, with its unit in brackets.
        missing: {speed-up that is out of reach: why}.
        source: how a fresh model is built by name, if it is known.
        model_class: the class of the model.
        inputs: what latency was measured on, where those were plain tensors.
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
            InputError: if there is none; the message says which there are.
        """
        found = next((member for member in self.members if member.asked == speedup), None)
        if found is None:
            there = ", ".join(f"{member.asked:g}" for member in self.members)
            why = f" It was asked for, but: {self.missing[speedup]}" if speedup in self.missing else ""
            raise InputError(f"There is no member {speedup:g}; there are {there}.{why}")
        return found

    @property
    def figures(self) -> Sweep:
        """The figures of all members, as those of a sweep: `to_html()`, `plot(path)`."""
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
        """The best member that takes at most so long on this machine.

        All members are timed here, in turn, once for each runtime; a second call takes the same times. The best is the
        one with the highest metric, or, where none was evaluated, the widest.

        Args:
            latency_ms: the longest time for one run, in ms.
            example_inputs: the batch that is timed: a tensor, a tuple, or (tuple, dict); None: what the family was
                measured on.
            runtime: what runs the models, as for `cpd.compare_latency`; of several the slowest counts.
            threads: of the runtimes given by name.
            seconds: the timing ends after this time, export not counted.

        Raises:
            InputError: an unusable argument, or no example inputs known.
            TargetError: no member is as fast; the message gives the fastest one's time.
        """
        times = self._times(example_inputs, runtime, threads, seconds)
        fast = [member for member in self.members if times[member.asked] <= latency_ms]
        if not fast:
            asked = min(times, key=lambda name: times[name])
            raise TargetError(
                f"No member takes at most {latency_ms:g} ms here: the fastest, {asked:g}x, takes {times[asked]:.3g} "
                f"ms. Ask for {times[asked]:.3g}, or make a family with a larger speed-up."
            )
        return max(fast, key=lambda member: (member.figures.metric or 0.0, member.figures.macs))

    def _times(self, example_inputs: Any, runtime: Any, threads: int, seconds: float) -> dict[float, float]:
        """The time of each member on this machine, in ms, by the speed-up that it was made for."""
        inputs = self.inputs if example_inputs is None else example_inputs
        if example_inputs is None and not self.inputs:
            raise InputError("What this family was timed on was not saved: pass example_inputs=.")
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
        """Write one file of weights, the plans and figures, and a page, to a folder that `Family.load` reads.

        Of every member but the widest only what is no slice of the widest is written.

        Args:
            directory: the folder; made if there is none.
            overwrite: whether files may be replaced that cpd did not write, or that were changed since.

        Raises:
            InputError: if `directory` is no folder, cannot be written to, or holds such files.
            ArtifactError: if a file cannot be written; the folder is then as it was.
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
        """Rebuild a family from its folder. No code of the folder is run, and nothing is downloaded.

        Args:
            directory: what `save` wrote.
            model: a fresh model of the original architecture, left as it is; None builds one by the name in timm or
                torchvision that was saved.
            trust_source: whether a `package.module:factory` that was saved is imported and called, which runs its code.

        Raises:
            ArtifactError: if a file is missing, truncated, changed or foreign, or no name was saved that is built here
                and no model given.
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
