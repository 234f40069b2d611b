"""What pruners of one model to several targets have in common: the first finds it, the others take it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cpd.coupling.comb import Comb
from cpd.criteria.score import Scores
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
        around: the next plan keeps all that this one keeps; None: it may remove anything.
    """

    comb: Comb | None = None
    scores: Scores | None = None
    trials: Trials | None = None
    found: Found = field(default_factory=Found)
    metric: float | None = None
    around: Plan | None = None

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

    def held(self, comb: Comb, plan: Plan, scores: Scores) -> tuple[Scores, frozenset[str]]:
        """Scores of a model in which those of channels that must stay are infinite; and the branches that must stay.

        Args:
            comb: its comb.
            plan: what is kept of it so far.
            scores: of its channels.
        """
        if self.around is None or plan.changes:
            return scores, frozenset()
        found = {name: score.clone() for name, score in scores.items()}
        for name in found.keys() & self.around.groups.keys():  # the others have gone with a branch
            found[name][list(self.around.groups[name])] = math.inf
        stay = {branch.name for branch in comb.branches} - {*self.around.removed}
        return Scores(found, scores.untrusted, {}), frozenset(stay)


COMMON = instance(Common, "a cpd.selection.common.Common")
