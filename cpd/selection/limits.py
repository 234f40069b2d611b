"""Limits: what a selection may do to a group, and to a branch."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpd.errors import InputError, some

if TYPE_CHECKING:  # torch takes seconds to import
    from cpd.coupling.branches import Branch
    from cpd.coupling.comb import Comb
    from cpd.coupling.groups import Group

#: Names of groups in a message.
NAMED = 8


@dataclass(frozen=True)
class Limits:
    """What a selection may do to a group.

    Attributes:
        round_to: widths are kept to a multiple of this many channels (of the whole width, where a group is one
            factor of it: heads of 64 channels go one by one).
        max_ratio: the largest share of a group that may go.
        min_width: the fewest channels that a group may keep.
        ratios: {pattern of names of groups or branches, as of a shell: share that goes}: groups that take no part in
            the selection, and branches that stay; the first pattern that matches counts.
        max_removed: the largest share of the branches that may go.
    """

    round_to: int = 8
    max_ratio: float = 0.9
    min_width: int = 1
    ratios: Mapping[str, float] = field(default_factory=dict)
    max_removed: float = 1.0

    def ratio_of(self, item: Group | Branch) -> float | None:
        """The share of a group that goes in any case; None where selection decides."""
        matches = (share for pattern, share in self.ratios.items() if fnmatch.fnmatchcase(item.name, pattern))
        return next(matches, None)


def _names(pattern: str, branch: Branch) -> bool:
    return fnmatch.fnmatchcase(branch.name, pattern)


def check_ratios(comb: Comb, limits: Limits) -> None:
    """Raise `InputError` unless every pattern of `limits.ratios` names an open group or a branch."""
    names = [group.name for group in comb.groups if group.frozen is None]
    for pattern, share in limits.ratios.items():
        if not fnmatch.filter(names, pattern) and not any(_names(pattern, branch) for branch in comb.branches):
            others = _groups_of_layers(comb, pattern)
            there = f"The prunable groups are {some(names, NAMED)}"
            why = f"{_its_channels(pattern, others)} Name that group" if others else there
            raise InputError(f"No prunable group has a name that matches {pattern!r}. {why}.")
        if not 0 <= share < 1:
            raise InputError(f"The share of {pattern!r} must be at least 0 and below 1; got {share!r}.")


def ratios_notes(comb: Comb, limits: Limits) -> list[str]:
    """What a pattern of `limits.ratios` leaves undecided that who wrote it may have meant: it names a branch alone."""
    names, notes = [group.name for group in comb.groups if group.frozen is None], []
    decided = {name for pattern in limits.ratios for name in fnmatch.filter(names, pattern)}
    for pattern in limits.ratios:
        others = [name for name in _groups_of_layers(comb, pattern) if name not in decided]
        if others and not fnmatch.filter(names, pattern):
            notes.append(
                f"ratios: {pattern!r} matches the name of a branch, which is kept, but of no group. "
                f"{_its_channels(pattern, others)} To set their share as well, name that group."
            )
    return notes


def _groups_of_layers(comb: Comb, pattern: str) -> list[str]:
    """The open groups, however they are named, that hold output channels of layers named like this."""
    return [
        group.name
        for group in comb.groups
        if group.frozen is None
        and any(
            member.dim == 0 and not member.contracted and fnmatch.fnmatchcase(member.tensor.rpartition(".")[0], pattern)
            for member in group.members
        )
    ]


def _its_channels(pattern: str, groups: list[str]) -> str:
    return f"The channels of {pattern!r} belong to {some(map(repr, groups), NAMED)}."
