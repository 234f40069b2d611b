"""Sensitivity: what each group's loss alone does to the model, as data and as a picture.

Every group is pruned by itself to several widths, on a copy, by the scores given, and nothing makes up for it. Surgery
takes milliseconds, so this costs about one evaluation a point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from cpd.coupling.comb import COMB, Comb
from cpd.criteria.score import score
from cpd.errors import InputError, needs_extra
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import batches, check_model, device_of, evaluated, evaluating
from cpd.model.task_loss import task_loss
from cpd.model.tensors import copy_of
from cpd.options import EVALUATE, FLAG, LIMIT, LOSS, PATH, Check, checked, number
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector
from cpd.surgery.recovery import logits_error
from cpd.surgery.shrink import shrink

#: Shares of a group that go.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Point:
    """One group pruned alone.

    Attributes:
        group: its name.
        ratio: the share that was to go.
        kept: how many channels stayed (of this group; ties may have narrowed nothing else).
        size: how many there were.
        macs: share of the model's MACs left.
        error: mean squared change of the logits, relative to their variance.
        loss: of the task; None without targets.
        metric: what `evaluate` gave; None without it.
    """

    group: str
    ratio: float
    kept: int
    size: int
    macs: float
    error: float
    loss: float | None = None
    metric: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What pruning each group alone does.

    Attributes:
        points: one for each group and ratio.
        loss: of the unpruned model.
        metric: of the unpruned model.
    """

    points: tuple[Point, ...]
    loss: float | None = None
    metric: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"loss": self.loss, "metric": self.metric, "points": [asdict(point) for point in self.points]}

    @property
    def by_group(self) -> dict[str, list[Point]]:
        """The points of each group, the least that went first."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.group, []).append(point)
        return found

    @property
    def shown(self) -> str:
        """Which figure of the points is shown: "metric" where there is one, else "loss", else "error"."""
        return "metric" if self.metric is not None else "loss" if self.loss is not None else "error"

    @checked(path=PATH)
    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw a map, groups by ratios, to a file of any format that matplotlib knows: metric, else loss, else error.

        Raises:
            InputError: if the file's ending names no format, or it cannot be written.
        """
        with needs_extra("plot", "A picture"):
            from matplotlib.figure import Figure

        target = check_plot(path)
        name, groups = self.shown, self.by_group
        ratios = sorted({point.ratio for point in self.points})
        found = {(point.group, point.ratio): getattr(point, name) for point in self.points}
        values = [[found.get((group, ratio), float("nan")) for ratio in ratios] for group in groups]
        figure = Figure(figsize=(2.5 + 0.6 * len(ratios), 1.5 + 0.22 * len(groups)), layout="constrained")
        area = figure.add_subplot()
        image = area.imshow(values, aspect="auto", cmap="viridis" if name == "metric" else "viridis_r")
        area.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
        labels = [f"{group} ({points[0].size})" for group, points in groups.items()]
        area.set_yticks(range(len(groups)), labels, fontsize=7)
        area.set_xlabel("share of the group that goes, alone")
        before = getattr(self, name, None)
        figure.colorbar(image, label=name if before is None else f"{name} (unpruned {before:.4g})")
        try:
            figure.savefig(target)
        except OSError as error:
            raise InputError(f"The picture cannot be written to {target}: {error}.") from error
        return target


def check_plot(path: str | os.PathLike[str]) -> Path:
    """The path, if its ending names a format that matplotlib writes.

    Raises:
        InputError: if it does not.
    """
    with needs_extra("plot", "A picture"):
        from matplotlib.backend_bases import FigureCanvasBase

    target, known = Path(path), FigureCanvasBase.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in known:
        raise InputError(f"{target}: the ending must name a format, one of {', '.join(sorted(known))}.")
    return target


_RATIO = number("between 0 and 1", lambda value: 0 < value < 1)
_RATIOS = Check(
    "a list of numbers between 0 and 1",
    lambda value: isinstance(value, (list, tuple)) and bool(value) and all(map(_RATIO.accepts, value)),
)
_SCORES = Check(
    "a mapping from names of groups to tensors of scores, as cpd.score gives it",
    lambda value: isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values()),
)


@checked(
    model=MODEL, comb=COMB, data=DATA, loss=LOSS, evaluate=EVALUATE, scores=_SCORES, ratios=_RATIOS, limit=LIMIT,
    progress=FLAG,
)  # fmt: skip
def sensitivity(
    model: nn.Module,
    comb: Comb,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    ratios: Sequence[float] = RATIOS,
    limit: int = 4,
    progress: bool | None = None,
) -> Sensitivity:
    """Prune each open group alone, at several ratios, and see what it does.

    Args:
        model: the unpruned model; left as it was.
        comb: its comb.
        data: batches, of which the first few are used.
        loss: `loss(output, target) -> scalar`; None infers one.
        evaluate: `evaluate(model) -> float`, higher is better; run once a point.
        scores: which channels go; "magnitude" if None.
        ratios: shares of a group that go.
        limit: batches used.
        progress: whether a bar is shown on stderr; None: if it is a terminal.

    Returns:
        A `Sensitivity`: points, `to_dict()`, `plot(path)`.

    Raises:
        InputError: a ratio out of range, or no loss can be inferred.
        TrainingError: if there is no data.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
        >>> data = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))]
        >>> found = cpd.sensitivity(model, comb, data, ratios=(0.25, 0.5, 0.75))
        >>> for point in found.points:
        ...     print(f"{point.group}: {point.kept} of {point.size} channels, {point.macs:.0%} of the MACs")
        0: 12 of 16 channels, 75% of the MACs
        0: 8 of 16 channels, 50% of the MACs
        0: 4 of 16 channels, 25% of the MACs
        >>> found.points[0].error < found.points[-1].error
        True
    """
    model = check_model(model)
    kept = [(batch.call, batch.target) for batch in batches(data, limit, finite=True)]
    scores = score(model, comb, criterion="magnitude") if scores is None else scores
    for group in comb.open:
        if group.name not in scores or tuple(scores[group.name].shape) != (group.size,):
            raise InputError(
                f"scores must hold a tensor of {group.size} numbers for {group.name}, as for every open group."
            )
    selector, full = Selector(comb, scores, Limits(round_to=1)), comb.cost({}).macs
    console, points = Console(stderr=True), []

    def figures(narrow: nn.Module, when: str) -> tuple[float | None, float | None]:
        return _loss(narrow, kept, loss, comb.read), evaluated(evaluate, narrow, when)

    before = figures(model, "before pruning")
    with Progress(console=console, disable=not (console.is_terminal if progress is None else progress)) as bar:
        for group in bar.track(comb.open, description="sensitivity"):
            for ratio in ratios:
                count = max(group.minimum, round(group.size * (1 - ratio)))
                plan = comb.plan({group.name: sorted(selector.order[group.name][:count].tolist())})
                narrow = shrink(copy_of(model), plan)
                counts = {item.axis: len(plan.groups[item.name]) for item in comb.groups}
                error = logits_error(narrow, model, kept, read=comb.read)
                macs, left = comb.cost(counts).macs / max(full, 1), len(plan.groups[group.name])
                points.append(
                    Point(
                        group.name, ratio, left, group.size, macs, error, *figures(narrow, f"with {group.name} pruned")
                    )
                )
    return Sensitivity(tuple(points), *before)


@torch.no_grad()
def _loss(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    read: Callable[[Any], Any],
) -> float | None:
    """The mean loss over the batches; None without targets."""
    values = []
    with evaluating(model):
        for batch in batches(data):
            batch = batch.to(device_of(model))
            value = task_loss(batch.on(model), batch.target, loss, read, batch.place)
            if value is None:
                return None
            values.append(float(value))
    return sum(values) / len(values)
