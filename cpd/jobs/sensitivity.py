"""Sensitivity: what each group's loss alone does to the model, as data and as a picture.

Every group is pruned by itself to several widths, on a copy, by the scores given, and nothing makes up for it. Groups
that are tied in number (the halves of a chunk, say) go together, each to the same share of its width, for a tie would
bring back what went from one of them. Surgery takes milliseconds, so this costs about one evaluation a point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpd.algebra import ties
from cpd.coupling.comb import COMB, Comb
from cpd.coupling.groups import Group
from cpd.criteria.score import score
from cpd.errors import InputError, needs_extra
from cpd.model.architecture import check_architecture
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import batches, check_model, device_of, evaluated, evaluating
from cpd.model.progress import part, shown
from cpd.model.tensors import copy_of
from cpd.options import EVALUATE, FLAG, LIMIT, LOSS, NUMBER, PATH, Check, checked, number, several, text
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector
from cpd.surgery.recovery import logits_error
from cpd.surgery.shrink import shrink
from cpd.tasks.loss import loss_on
from cpd.tasks.metric import UNNAMED, metric_name, title, written

#: Shares of a group that go.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Point:
    """One group pruned alone, or several groups whose widths are tied to each other.

    Attributes:
        group: Name of the group; the first one if several are tied.
        ratio: Share of the channels to be removed from each group.
        kept: Number of channels that this group kept: more than `ratio` says if a minimum or a tie requires it.
        size: Number of channels before.
        macs: Share of the model's MACs that is left.
        error: Mean squared change of the logits, relative to their variance.
        loss: The task's loss; None without targets.
        metric: The value of `evaluate`; None without it.
        tied: Names of the other groups that were pruned with this one.
    """

    group: str
    ratio: float
    kept: int
    size: int
    macs: float
    error: float
    loss: float | None = None
    metric: float | None = None
    tied: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A name for tables: "a", "a with b" or "a with 24 tied to it"."""
        others = self.tied[0] if len(self.tied) == 1 else f"{len(self.tied)} tied to it"
        return f"{self.group} with {others}" if self.tied else self.group


@dataclass(frozen=True)
class Sensitivity:
    """The result of `cpd.sensitivity`: the effect of pruning each group alone.

    Attributes:
        points: One `Point` for each group (or set of tied groups) and each ratio.
        loss: The loss of the unpruned model; None without targets.
        metric: The metric of the unpruned model; None without `evaluate`.
        metric_name: Name of the metric, with its unit in brackets.
    """

    points: tuple[Point, ...]
    loss: float | None = None
    metric: float | None = None
    metric_name: str = UNNAMED

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        own = {"loss": self.loss, "metric": self.metric, "metric_name": self.metric_name}
        return {**own, "points": [asdict(point) for point in self.points]}

    @property
    def by_group(self) -> dict[str, list[Point]]:
        """{group: its points, the smallest ratio first}; tied groups are listed under the first of them."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.group, []).append(point)
        return found

    @property
    def shown(self) -> str:
        """Which figure is shown: "metric" if there is one, else "loss" if there is one, else "error"."""
        return "metric" if self.metric is not None else "loss" if self.loss is not None else "error"

    @checked(state=text("a word for the unpruned model"))
    def heading(self, state: str) -> str:
        """A heading: the figure's name with its value for the unpruned model, which is called `state`."""
        name, before = self.shown, getattr(self, self.shown, None)
        called = title(self.metric_name) if name == "metric" else name
        return called if before is None else f"{called} ({state} {self.value(before)})"

    @checked(found=NUMBER)
    def value(self, found: float) -> str:
        """A value of the figure that is shown, as text."""
        return written(self.metric_name, found) if self.shown == "metric" else f"{found:.4g}"

    @checked(path=PATH)
    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw a map of groups by ratios, coloured by the metric, or else by the loss, or else by the error.

        Args:
            path: The picture's file. Its ending names the format, which can be any that matplotlib writes.

        Returns:
            The path of the file.

        Raises:
            InputError: If the ending names no known format, or the file cannot be written.
        """
        with needs_extra("plot", "A picture"):
            from matplotlib.figure import Figure

        target = check_plot(path)
        name, groups = self.shown, self.by_group
        ratios = sorted({point.ratio for point in self.points})
        found = {(point.group, point.ratio): getattr(point, name) for point in self.points}
        values = [[found.get((group, ratio), float("nan")) for ratio in ratios] for group in groups]
        drawing = Figure(figsize=(2.5 + 0.6 * len(ratios), 1.5 + 0.22 * len(groups)), layout="constrained")
        area = drawing.add_subplot()
        image = area.imshow(values, aspect="auto", cmap="viridis" if name == "metric" else "viridis_r")
        area.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
        labels = [f"{points[0].label} ({points[0].size})" for points in groups.values()]
        area.set_yticks(range(len(groups)), labels, fontsize=7)
        area.set_xlabel("share of the group that is removed")
        drawing.colorbar(image, label=self.heading("unpruned"))
        try:
            drawing.savefig(target)
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
        raise InputError(f"The ending of {target} must name a picture format: one of {', '.join(sorted(known))}.")
    return target


_RATIO = number("between 0 and 1", lambda value: 0 < value < 1)
_RATIOS = several(_RATIO.accepts, "a list of numbers between 0 and 1")
_SCORES = Check(
    "a mapping from names of groups to tensors of scores, such as the result of cpd.score",
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
    """Measure how much each open group matters: prune it alone at several ratios, and measure the effect.

    Groups whose widths are tied to each other are pruned together. Nothing is refitted or trained.

    Args:
        model: The unpruned model. It is not changed.
        comb: The comb of the model.
        data: Batches, of which the first `limit` are used.
        loss: `loss(output, target) -> scalar`. Default: cross-entropy if the targets are classes.
        evaluate: `evaluate(model) -> float`, where higher is better. It is called once for each point.
        scores: Scores that decide which channels are removed. Default: those of the criterion "magnitude".
        ratios: Shares of a group to remove, each between 0 and 1.
        limit: Number of batches to use.
        progress: Whether to show a progress line on stderr. Default: shown if stderr is a terminal.

    Returns:
        A `Sensitivity` with `points`, `to_dict()` and `plot(path)`.

    Raises:
        InputError: A ratio is out of range, the comb belongs to another model, or no loss can be inferred.
        TrainingError: There is no data.

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
    check_architecture(model, comb.architecture, InputError, "The comb was made for", "Call cpd.comb on this model.")
    kept = list(batches(data, limit, finite=True))
    scores = score(model, comb, criterion="magnitude") if scores is None else scores
    for group in comb.open:
        if group.name not in scores or tuple(scores[group.name].shape) != (group.size,):
            raise InputError(
                f"scores must hold a tensor of {group.size} numbers for {group.name}, and one for every open group."
            )
    ratios = [float(ratio) for ratio in ratios]
    selector, full = Selector(comb, scores, Limits(round_to=1)), comb.cost({}).macs
    points = []

    def figures(narrow: nn.Module, when: str) -> tuple[float | None, float | None]:
        return _loss(narrow, kept, loss, comb.read), evaluated(evaluate, narrow, when)

    together = _tied(comb)
    with shown(progress), part("sensitivity", len(together) * len(ratios)) as under_way:
        before = figures(model, "before pruning")
        for first, *others in together:
            for ratio in ratios:
                counts = {item: max(item.minimum, round(item.size * (1 - ratio))) for item in (first, *others)}
                plan = comb.plan(
                    {item.name: sorted(selector.order[item.name][:count].tolist()) for item, count in counts.items()}
                )
                narrow = shrink(copy_of(model), plan)
                macs = comb.cost({item.axis: len(plan.groups[item.name]) for item in comb.groups}).macs / max(full, 1)
                error, left = logits_error(narrow, model, kept, read=comb.read), len(plan.groups[first.name])
                tied = tuple(item.name for item in others)
                found = figures(narrow, f"with {first.name} pruned")
                points.append(Point(first.name, ratio, left, first.size, macs, error, *found, tied))
                under_way.advance()
    return Sensitivity(tuple(points), *before, metric_name(evaluate))


def _tied(comb: Comb) -> list[list[Group]]:
    """The open groups, those together that ties join."""
    groups = {group.axis: group for group in comb.open}
    return [[groups[axis] for axis in part] for part, _ in ties.components(groups, comb.ties)]


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
            _, value = loss_on(batch, model, loss, read)
            if value is None:
                return None
            values.append(float(value))
    return sum(values) / len(values)
