"""Which branches go: in what order, and how many.

Branches go in the order of what they cost for what they save: the error of the logits without each, once the layers
before it give what it gave, over the time or figure that it takes. How many go is tried: for each number that is, the
widths of what is left are chosen for the target, and what comes of both is recovered from and compared with the model
as it is, on samples that were not fitted (a database of errors and a search over it, as in Kurtic et al. 2023, ZipLM,
arXiv 2302.04089, with the number of branches for its levels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from cpd.coupling.branches import may_follow
from cpd.coupling.comb import Comb
from cpd.errors import InputError
from cpd.selection.limits import Limits

#: Numbers of branches that are tried at most; one more where none is out of reach, and so costs nothing.
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
        raise InputError("branches=True needs data=: without data, the importance of a branch cannot be estimated.")


def removable_branches(comb: Comb, limits: Limits) -> list[str]:
    """The branches that a selection may remove."""
    return [branch.name for branch in comb.branches if branch.frozen is None and limits.ratio_of(branch) != 0]


def in_order(
    comb: Comb, errors: Mapping[str, float], saved: Mapping[str, float], most: float, gone: Sequence[str] = (),
    stay: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """Branches in the order in which they go; of each sum and concatenation one operand stays.

    Args:
        comb: the comb.
        errors: what each costs.
        saved: what it saves.
        most: the largest share of them that may go.
        gone: those that have gone: they come first.
        stay: those that must stay; `most` counts them.
    """
    order = sorted(errors, key=lambda name: errors[name] / max(saved[name], 1e-12))
    named = {branch.name: branch for branch in comb.branches}

    def followed(names: Iterable[str]) -> list[str]:
        found = list(gone)
        for name in names:
            if name not in found and may_follow(named[name], found):
                found.append(name)
        return found

    count = max(len(gone), math.floor(most * len(followed(order)) + 1e-9))
    return followed(name for name in order if name not in stay)[:count]


def best_number(errors: Sequence[float], candidate: Callable[[int], Candidate | None]) -> dict[int, float]:
    """How many branches go: the error of each number that was tried.

    The error is foretold as that of the widths, told by the scores and by what the model without any branch removed
    has shown, and that of the branches, by the sum of what each costs alone and by what others tried have shown. The
    number that should be best is tried next, until that is known; then those between it and the next that were tried.
    Where widths alone do not reach the target, two numbers that do tell the two parts apart.

    Args:
        errors: what each branch costs, in the order in which they go.
        candidate: number of branches -> what is left at the target; None where it is out of reach.
    """
    known, tried = dict[int, Candidate | None](), dict[int, float]()
    alone = [0.0, *accumulate(errors)]
    numbers = sorted({round(len(errors) * step / GUESSES) for step in range(GUESSES + 1)})

    def at(number: int) -> Candidate | None:
        if number not in known:
            known[number] = candidate(number)
        return known[number]

    def attempt(number: int) -> None:
        found = at(number)
        tried[number] = math.inf if found is None else found.error()

    attempt(0)
    reached = [number for number in numbers if number and at(number) is not None] if math.isinf(tried[0]) else []
    for number in sorted({*reached[:1], *reached[len(reached) // 2 :][:1]}):
        attempt(number)  # the widths' part in the error takes two numbers to tell where none alone is in reach
    trials = MOST_TRIALS + int(math.isinf(tried[0]))
    while len(tried) < trials:
        expected = _foretold({number: (at(number), error) for number, error in tried.items()}, alone)
        best = min(tried, key=lambda number: (tried[number], number))
        near = [number for number in (best - 1, best + 1) if best and 0 < number <= len(errors)]
        guesses = {number: tried[number] if number in tried else expected(number, at(number))
                   for number in {*numbers, *near, best}}  # fmt: skip
        upcoming = min(guesses, key=lambda number: (guesses[number], number))
        if best and upcoming in tried:
            upcoming = _middle(best, [*tried, len(errors) + 1], max(1, round(len(errors) / GUESSES)))
        if upcoming in tried or (best == 0 and len(tried) > HOPELESS):
            break
        attempt(upcoming)
    return tried


def _middle(best: int, tried: Iterable[int], apart: int) -> int:
    """The middle of the wider gap beside the best number, where errors may be less; itself if both are narrow."""
    low, high = max(n for n in tried if n < best), min(n for n in tried if n > best)
    below, above = best - low, high - best
    if max(below, above) <= apart + 1:
        return best
    return best - below // 2 if below > above else best + above // 2


def _foretold(
    tried: Mapping[int, tuple[Candidate | None, float]], alone: Sequence[float]
) -> Callable[[int, Candidate | None], float]:
    """Foretells the error of a number of branches that was not tried.

    Args:
        tried: number -> what is left, and its error.
        alone: number -> the sum of what the branches cost, each alone.
    """
    seen = {number: (found.scores, error) for number, (found, error) in tried.items() if found is not None}
    worth = 0.0  # of a unit of the widths' scores
    if 0 in seen and seen[0][0] > 0:
        worth = seen[0][1] / seen[0][0]
    elif 0 not in seen and len(seen) > 1:
        rows = np.array([[scores, alone[number]] for number, (scores, _) in seen.items()])
        found_errors = np.array([error for _, error in seen.values()]).clip(1e-12)
        worth = max(0.0, float(np.linalg.lstsq(rows / found_errors[:, None], np.ones(len(rows)), rcond=None)[0][0]))
    #: Of the errors of so many branches, over the sum of what each costs alone.
    factors = {
        number: max(error - worth * scores, 0.0) / max(alone[number], 1e-30)
        for number, (scores, error) in sorted(seen.items())
        if number
    }

    def expected(number: int, found: Candidate | None) -> float:
        if found is None:
            return math.inf
        factor = float(np.interp(number, list(factors), list(factors.values()))) if factors else 1.0
        return factor * alone[number] + worth * found.scores

    return expected


def chosen_number(tried: Mapping[int, float]) -> int:
    """The number of branches whose error is least, if it is clearly less than that of none."""
    best = min(tried, key=lambda number: (tried[number], number))
    return best if tried[best] < (1 - CLEARLY) * tried.get(0, math.inf) else 0
