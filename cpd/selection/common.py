"""What pruners of one model to several targets have in common: the first finds it, the others take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cpd.coupling.comb import Comb
from cpd.criteria.score import Scores, whole_scores
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.deploy.several import SlowestModel
from cpd.options import instance
from cpd.plan import Plan
from cpd.surgery.trials import Trials


@dataclass
class Found:
    """What is measured of the unpruned model, whatever the target is.

    Attributes:
        probe: times candidates beside the unpruned model; None until something is timed.
        latency: predicts the latency of any widths, corrected by all that was timed.
        original_ms: the latency of the unpruned model.
        spread: by how much a device disagrees with itself.
        without: {branch: error of the logits without it}.
    """

    probe: LatencyProbe | None = None
    latency: LatencyModel | SlowestModel | None = None
    original_ms: float | None = None
    spread: float | None = None
    without: dict[str, float] = field(default_factory=dict)


@dataclass
class Common:
    """What holds for every target of one model, with the same data and options.

    Attributes:
        comb: of the model.
        scores: of its channels, before anything has gone.
        trials: what it makes of the data, and the refits that were tried on it.
        found: what was measured.
        metric: of the unpruned model, where it was evaluated.
        within: the next plan keeps nothing that this one has removed; None: it may keep anything.
    """

    comb: Comb | None = None
    scores: Scores | None = None
    trials: Trials | None = None
    found: Found = field(default_factory=Found)
    metric: float | None = None
    within: Plan | None = None

    def scored(self, score: Callable[[], Scores], is_shared: bool) -> Scores:
        """The scores of a model, taken where they are not known yet.

        Args:
            score: takes them.
            is_shared: whether the model is still the one that all pruners begin with.
        """
        if not is_shared:
            return score()
        if self.scores is None:
            self.scores = score()
        return self.scores

    def allowed(
        self, comb: Comb, plan: Plan, scores: Scores
    ) -> tuple[Scores, Mapping[str, tuple[int, ...]], tuple[str, ...]]:
        """What may still be kept of a model, by its scores; its channels; and the branches that have gone.

        Args:
            comb: its comb.
            plan: what is kept of it so far.
            scores: of its channels.
        """
        if self.within is None or plan.changes:
            return scores, plan.groups, plan.removed
        left = {name: scores[name][list(kept)] for name, kept in self.within.groups.items() if name in scores}
        return (
            Scores(whole_scores(comb, self.within, left), scores.untrusted, {}), self.within.groups, self.within.removed
        )  # fmt: skip


COMMON = instance(Common, "a cpd.selection.common.Common")
