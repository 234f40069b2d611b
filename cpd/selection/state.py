"""The state of a pruner between two shrinks, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpd.coupling.comb import Comb
from cpd.errors import ArtifactError, CheckpointError, PlanError
from cpd.plan import Architecture, Plan
from cpd.selection.weighing import Scope


@dataclass(frozen=True)
class Shrink:
    """One pruning step.

    Attributes:
        step: Number of optimizer steps before it.
        share: How much of the whole removal is done after it, from 0 to 1.
        macs: Multiply-accumulates (MACs) of one pass over the example inputs that are left.
        parameters: Number of parameters that are left.
        plan_hash: SHA-256 of all channels that are kept so far. It is the same in every process, and in every run with
            the same seed.
    """

    step: int
    share: float
    macs: int
    parameters: int
    plan_hash: str


@dataclass(frozen=True)
class PrunerState:
    """What `Pruner.state_dict` wrote.

    Attributes:
        plan: what is kept.
        shrinks: what has been done.
        steps_taken: optimizer steps before it.
        scopes: the scopes that are still in question.
        goal: the figure that the schedule runs in, at the target.
        leaving: the branches that go until the target is reached; None before the first decision.
        search: one dict a measured candidate.
        seen: sums of gradients, and of how many steps.
        notes: what a user should know.
        checks: errors of checks by name.
    """

    plan: Plan
    shrinks: list[Shrink]
    steps_taken: int
    scopes: tuple[Scope, ...]
    goal: float | None
    leaving: tuple[str, ...] | None
    search: list[dict[str, Any]]
    seen: dict[str, Any]
    notes: list[str]
    checks: dict[str, float]


def state_of(state: Mapping[str, Any], comb: Comb) -> PrunerState:
    """The state that a mapping holds, of a pruner of this comb.

    Raises:
        CheckpointError: if it is of another model or version.
    """
    try:
        then = Architecture.from_dict(state["architecture"]) if "architecture" in state else comb.architecture
        if (found := then.difference(comb.architecture)) is not None:
            raise CheckpointError(f"This state belongs to a different model: {found}.")
        plan = comb.plan(state["plan"], remove=state.get("removed", ()))
        if plan.digest != state["digest"]:
            raise CheckpointError("This checkpoint belongs to a different model: its plan keeps different channels.")
        leaving = state.get("leaving", ())
        return PrunerState(
            plan, [Shrink(**item) for item in state["shrinks"]], int(state["steps_taken"]), tuple(state["scopes"]),
            state["goal"], None if leaving is None else tuple(leaving), list(state["search"]),
            {"sums": list(state["sums"]), "count": int(state["count"])}, list(state["notes"]), dict(state["checks"]),
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, ArtifactError, PlanError) as error:
        raise CheckpointError(f"This state belongs to a different model: {type(error).__name__}: {error}.") from error
