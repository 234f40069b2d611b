"""Limits: what a selection may do to a group."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

from cpd.coupling.comb import Comb, Group
from cpd.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What a selection may do to a group.

    Attributes:
        round_to: widths are kept to a multiple of this many positions (of the whole width, where a group is one
            factor of it: heads of 64 positions go one by one).
        max_ratio: the largest share of a group that may go.
        min_width: the fewest positions that a group may keep.
        ratios: {pattern of group names, as of a shell: share that goes}: groups that take no part in the selection;
            the first pattern that matches counts.
    """

    round_to: int = 8
    max_ratio: float = 0.9
    min_width: int = 1
    ratios: Mapping[str, float] = field(default_factory=dict)

    def ratio_of(self, group: Group) -> float | None:
        """The share of a group that goes in any case; None where selection decides."""
        matches = (share for pattern, share in self.ratios.items() if fnmatch.fnmatchcase(group.name, pattern))
        return next(matches, None)


def check_ratios(comb: Comb, limits: Limits) -> None:
    """Raise `InputError` unless every pattern of `limits.ratios` names an open group, and every share is one."""
    names = [group.name for group in comb.open]
    for pattern, share in limits.ratios.items():
        if not fnmatch.filter(names, pattern):
            raise InputError(f"No open group is named like {pattern!r}; there are {', '.join(names[:8])}, …")
        if not 0 <= share < 1:
            raise InputError(f"The share of {pattern!r} must be at least 0 and below 1; got {share!r}.")


def check_limits(
    round_to: int,
    max_ratio: float,
    min_width: int,
    ratios: Mapping[str, float],
    tolerance: float,
    threads: int,
    score_batches: int,
) -> Limits:
    """The limits of a selection, and the other numbers beside them.

    Raises:
        InputError: if one is out of range.
    """
    numbers = {"round_to": round_to, "min_width": min_width, "threads": threads, "score_batches": score_batches}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1; got {value!r}.")
    for name, share in (("max_ratio", max_ratio), ("tolerance", tolerance)):
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1; got {share!r}.")
    return Limits(round_to, max_ratio, min_width, dict(ratios))
