"""Which branches go: in what order, and how many.

Branches go in the order of what they cost for what they save: the error of the logits without each, once the layers
before it give what it gave, over the time or figure that it takes. How many go is tried: for each number that is, the
widths of what is left are chosen for the target, and what comes of both is recovered from and compared with the model
as it is, on samples that were not fitted (a database of errors and a search over it, as in Kurtic et al. 2023, ZipLM,
arXiv 2302.04089, with the number of branches for its levels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from cpd.coupling.branches import may_follow
from cpd.coupling.comb import Comb
from cpd.errors import InputError
from cpd.selection.limits import Limits

#: Numbers of branches that are tried at most, none included.
MOST_TRIALS = 6
#: After so many others without success, none goes.
HOPELESS = 2
#: Numbers of which the error is guessed.
GUESSES = 18
#: By how much less, relative to it, the error must be than without removing any.
CLEARLY = 0.05


@dataclass(frozen=True)
class Candidate:
    """A number of branches, and what is left of the model without them at the target.

    Attributes:
        scores: the sum of the scores of the channels that go.
        error: gives the error of the logits after recovery, on samples that were not fitted.
    """

    scores: float
    error: Callable[[], float]


def check_branches(branches: bool | None, data: object) -> None:
    """Raise `InputError` where branches may be removed, and there is nothing to tell what they are worth by."""
    if branches and data is None:
        raise InputError("branches=True needs data=: what a branch is worth shows in what the model makes of it.")


def removable_branches(comb: Comb, limits: Limits) -> list[str]:
    """The branches that a selection may remove."""
    return [branch.name for branch in comb.branches if branch.frozen is None and limits.ratio_of(branch) != 0]


def in_order(
    comb: Comb, errors: Mapping[str, float], saved: Mapping[str, float], most: float, gone: Sequence[str] = ()
) -> list[str]:
    """Branches in the order in which they go; of each sum and concatenation one operand stays.

    Args:
        comb: the comb.
        errors: what each costs.
        saved: what it saves.
        most: the largest share of them that may go.
        gone: those that have gone: they come first.
    """
    order = sorted(errors, key=lambda name: errors[name] / max(saved[name], 1e-12))
    named, found = {branch.name: branch for branch in comb.branches}, list(gone)
    for name in order:
        if name not in found and may_follow(named[name], found):
            found.append(name)
    return found[: max(len(gone), math.floor(most * len(found) + 1e-9))]


def best_number(
    errors: Sequence[float], candidate: Callable[[int], Candidate | None], least: int = 0
) -> dict[int, float]:
    """How many branches go: the error of each number that was tried.

    The error is foretold as that of the widths, told by the scores and by what the model without any branch removed
    has shown, and that of the branches, by the sum of what each costs alone and by what others tried have shown. The
    number that should be best is tried next, until that is known.

    Args:
        errors: what each branch costs, in the order in which they go.
        candidate: number of branches -> what is left at the target; None where it is out of reach.
        least: so many have gone.
    """
    known, tried = dict[int, Candidate | None](), dict[int, float]()
    alone = [0.0, *accumulate(errors)]
    alone = [max(value - alone[least], 0.0) for value in alone]
    factors: dict[int, float] = {}  # of the errors of so many branches, over the sum of what each costs alone
    numbers = sorted({least + round((len(errors) - least) * step / GUESSES) for step in range(GUESSES + 1)})

    def at(number: int) -> Candidate | None:
        if number not in known:
            known[number] = candidate(number)
        return known[number]

    def attempt(number: int) -> None:
        found = at(number)
        tried[number] = math.inf if found is None else found.error()
        if number > least and found is not None:
            factors[number] = max(tried[number] - worth * found.scores, 0.0) / max(alone[number], 1e-30)

    def expected(number: int) -> float:
        found, places = at(number), sorted(factors)
        factor = float(np.interp(number, places, [factors[place] for place in places])) if places else 1.0
        return math.inf if found is None else factor * alone[number] + worth * found.scores

    worth = 0.0
    attempt(least)
    widths = at(least)
    if widths is not None and widths.scores > 0:
        worth = tried[least] / widths.scores
    while len(tried) < MOST_TRIALS:
        best = min(tried, key=lambda number: (tried[number], number))
        near = [number for number in (best - 1, best + 1) if best > least and least < number <= len(errors)]
        upcoming = min({*numbers, *near, best}, key=lambda number: (tried.get(number, expected(number)), number))
        if upcoming in tried or (best == least and len(tried) > HOPELESS):
            break
        attempt(upcoming)
    return tried


def chosen_number(tried: Mapping[int, float]) -> int:
    """The number of branches whose error is least, if it is clearly less than that of the fewest that were tried."""
    best = min(tried, key=lambda number: (tried[number], number))
    few = min(tried)
    return best if tried[best] < (1 - CLEARLY) * tried[few] else few
