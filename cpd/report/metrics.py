"""The metric as a report shows it: its name, its unit, and what each stage of the run left of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpd.report.charts import is_number
from cpd.tasks.metric import is_share, title, written

#: Words in the name of a metric that lies between 0 and 1, unless its values say otherwise.
_FRACTIONS = frozenset(
    ("accuracy", "acc", "top1", "top5", "top", "iou", "miou", "map", "ap", "f1", "dice", "precision", "recall", "auc")
)
#: What was done without training -> what the model is called after it; nothing was done: it has no step of its own.
_RECOVERED = {
    "nothing": "",
    "recalibration": "with BatchNorm recalibrated",
    "compensation": "compensated",
    "compensation with BatchNorm": "compensated",
}


@dataclass(frozen=True)
class Metric:
    """How values of a metric are written.

    Attributes:
        name: of it, with its unit in brackets.
        scale: what a value is multiplied by: 100 where a fraction is shown in per cent.
    """

    name: str
    scale: float = 1.0

    @classmethod
    def of(cls, name: str, original: float | None) -> Metric:
        """The metric of that name, in per cent where name and value say that it is a fraction.

        Args:
            name: as `evaluate` has it.
            original: its value for the unpruned model: one that is above 1 is none.
        """
        words = re.split(r"[^a-z0-9]+", name.lower())
        if original is not None and 0 <= original <= 1 and not is_share(name) and _FRACTIONS.intersection(words):
            return cls(f"{name} [%]", 100.0)
        return cls(name)

    @property
    def title(self) -> str:
        """Its name without its unit."""
        return title(self.name)

    @property
    def headed(self) -> str:
        """Its name without its unit, at the beginning of a line."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def axis(self) -> str:
        """Its name with its unit, at the beginning of a line."""
        return self.name[:1].upper() + self.name[1:]

    def shown(self, value: float) -> float:
        """A value in the unit of the name."""
        return self.scale * value

    def written(self, value: float) -> str:
        """A value with its unit: `91.30 %`, or four places of a fraction."""
        return written(self.name, self.shown(value))

    def change(self, before: float, after: float) -> str:
        """The difference, to the places of a value."""
        places = len(self.written(before).split()[0].partition(".")[2])
        return f"{self.shown(after) - self.shown(before):+.{places}f}".replace("-", "−")


class Step(NamedTuple):
    """What one stage left of the metric, ready to print: `98.83 %`, `compensated`."""

    value: str
    words: str


def trail(
    metric: Metric, history: Sequence[Mapping[str, Any]], before: float | None, after: float | None, runtime: str = ""
) -> tuple[Step, ...]:
    """The metric from stage to stage: before, after pruning, compensated, trained.

    Args:
        metric: how it is written.
        history: of the report: the row of epoch 0 says what was found before the training.
        before: the metric of the unpruned model.
        after: that of the result; nothing is told where either is not known.
        runtime: that the result was measured in.
    """
    if before is None or after is None:
        return ()
    first: Mapping[str, Any] = next((row for row in history if row.get("epoch") == 0), {})
    trained = [row for row in history if is_number(row.get("metric")) and row.get("epoch") != 0]
    kept = [row for row in trained if row.get("kept")] or ([] if first.get("kept") else trained[-1:])
    pruned = first.get("pruned")
    unsaid = "" if is_number(pruned) else "before training" if trained else "after pruning"
    found = [(first.get("before", before), "before"), (pruned, "after pruning")]
    if words := _RECOVERED.get(str(first.get("recovery")), unsaid):
        found.append((first.get("metric"), words))
    found += [(row["metric"], "trained") for row in kept[-1:]]
    steps = [(float(value), words) for value, words in found if is_number(value)]
    if len(steps) < 2 or metric.written(steps[-1][0]) != metric.written(after):
        last = "in INT8" if runtime.endswith(":int8") else "in the end" if len(steps) > 1 else "after"
        steps.append((after, last))
    return tuple(Step(metric.written(value), words) for value, words in steps)
