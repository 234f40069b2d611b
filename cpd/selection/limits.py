"""Limits: what a selection may do to a group."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpd.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import
    from cpd.coupling.comb import Comb, Group


@dataclass(frozen=True)
class Limits:
    """What a selection may do to a group.

    Attributes:
        round_to: widths are kept to a multiple of this many channels (of the whole width, where a group is one
            factor of it: heads of 64 channels go one by one).
        max_ratio: the largest share of a group that may go.
        min_width: the fewest channels that a group may keep.
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
