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

from cpd.coupling.comb import Comb
from cpd.selection.limits import Limits

#: Numbers of branches that are tried at most, none included.
MOST_TRIALS = 6
#: Numbers of which the error is guessed.
GUESSES = 9


@dataclass(frozen=True)
class Candidate:
    """A number of branches, and what is left of the model without them at the target.

    Attributes:
        scores: the sum of the scores of the channels that go.
        error: gives the error of the logits after recovery, on samples that were not fitted.
    """

    scores: float
    error: Callable[[], float]


def removable_branches(comb: Comb, limits: Limits) -> list[str]:
    """The branches that a selection may remove."""
    protected = (0.0, *(share for share in limits.ratios.values() if share == 0))
    return [
        branch.name for branch in comb.branches if branch.frozen is None and limits.ratio_of(branch) not in protected
    ]


def in_order(comb: Comb, errors: Mapping[str, float], saved: Mapping[str, float], most: float) -> list[str]:
    """Branches in the order in which they go, of each sum one.

    Args:
        comb: the comb.
        errors: what each costs.
        saved: what it saves.
        most: the largest share of them that may go.
    """
    order = sorted(errors, key=lambda name: errors[name] / max(saved[name], 1e-12))
    sums = {branch.name: branch.found.sum for branch in comb.branches}
    seen, found = set(), list[str]()
    for name in order:
        if sums[name] not in seen:
            seen.add(sums[name])
            found.append(name)
    return found[: math.floor(most * len(found) + 1e-9)]


def best_number(errors: Sequence[float], candidate: Callable[[int], Candidate | None]) -> dict[int, float]:
    """How many branches go: the error of each number that was tried; the least is the best.

    What channels cost beside branches is told by the widths alone; so the number that should be best is known, and
    from there on the search goes to where the error falls.

    Args:
        errors: what each branch costs, in the order in which they go.
        candidate: number of branches -> what is left at the target; None where it is out of reach.
    """
    known, tried, most = dict[int, Candidate | None](), dict[int, float](), len(errors)

    def at(number: int) -> Candidate | None:
        if number not in known:
            known[number] = candidate(number)
        return known[number]

    def attempt(number: int) -> None:
        found = at(number)
        tried[number] = math.inf if found is None else found.error()

    attempt(0)
    widths = at(0)
    worth = tried[0] / widths.scores if widths is not None and widths.scores > 0 else 0.0
    branches = [0.0, *accumulate(errors)]

    def expected(number: int) -> float:
        found = at(number)
        return math.inf if found is None else branches[number] + worth * found.scores

    spread = sorted({round(most * step / GUESSES) for step in range(1, GUESSES + 1)})
    if spread:
        attempt(min(spread, key=expected))
    step = max(1, round(most / GUESSES))
    while len(tried) < MOST_TRIALS and step:
        best = min(tried, key=lambda number: (tried[number], number))
        beside = [number for number in (best + step, best - step) if 0 <= number <= most and number not in tried]
        if beside:
            attempt(beside[0])
        else:
            step //= 2
    return tried
