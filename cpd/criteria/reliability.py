"""How far scores are noise: what one half of the samples says of the channels of a group, and what the other half says.

A score that is a mean over samples is known as well as the samples are many and alike. They tell it themselves: cut in
halves, each half scores the channels, and r is the correlation of the two, the mean over all ways to cut. All samples
together have the reliability R = 2 r / (1 + r) (Spearman 1910 and Brown 1910, "Some experimental results in the
correlation of mental abilities"). By it the scores of a group are drawn together, as Stein's estimator does (Efron and
Morris 1975, "Data analysis using Stein's estimator and its generalizations"): what seems far from the others is in part
only lucky, and the lowest scores of the noisiest group would be the first to go.

Scores are above 0 and spread over orders of magnitude, their errors with them, so r is taken, and they are drawn, on
the logarithms: score' = score^R, times what leaves the mean of the group as it was. A score of 0 stays one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from cpd.criteria.context import Setting

#: Parts that samples are kept in: there are 35 ways to cut eight in halves.
PARTS = 8
#: The reliability that one sample, or batch, alone is taken to have: nothing tells it.
ALONE = 0.5
#: A correlation of halves below this, less two standard errors of 1 / sqrt(channels), is none.
LEAST = 0.25
#: Scores below this share of their mean are alike.
NEXT_TO_NOTHING = 1e-6


class Means:
    """Means over samples, or over batches, kept in a few parts, of which halves can be made.

    Args:
        unit: what is averaged over, in the plural, for the reader.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._sums: list[Tensor] = []
        self._counts = torch.zeros(PARTS)

    def add(self, values: Iterable[Tensor], units: int = 1) -> None:
        """Add tensors [units, size], or [size] of one unit: one unit after the other to one part after the other."""
        parts = (int(self._counts.sum()) + torch.arange(units)) % PARTS
        rows = [value.view(units, -1) for value in values]
        self._sums = self._sums or [row.new_zeros(PARTS, row.shape[1]) for row in rows]
        for sums, row in zip(self._sums, rows, strict=True):
            sums.index_add_(0, parts.to(row.device), row)
        self._counts.index_add_(0, parts, torch.ones(units))

    def pool(self, setting: Setting) -> None:
        """Sum over processes, where each has added units of its own."""
        self._sums, self._counts = [setting.total(sums) for sums in self._sums], setting.total(self._counts)

    def scores(self, setting: Setting, of: Callable[[list[Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The scores of all units; their reliability, and which say too little, go into the setting.

        Args:
            setting: where that goes.
            of: {group name: Tensor[…, size]} of the means [..., size].
        """
        halves = list(self._halves())
        chosen = torch.stack([torch.ones(PARTS), *halves, *(1 - half for half in halves)])
        counts = (chosen @ self._counts)[:, None]
        means = [chosen.to(sums) @ sums / counts.to(sums) for sums in self._sums]
        found = {name: score.expand(len(chosen), -1) for name, score in of(means).items()}
        for name, score in found.items():
            agreement = _agreement(*score[1:].double().cpu().chunk(2)) if halves else ALONE / (2 - ALONE)
            setting.reliability[name] = max(0.0, 2 * agreement / (1 + agreement)) if agreement > -1 else 0.0
            if halves and agreement < _least(score.shape[1]):
                setting.untrusted[name] = self._told(agreement, score.shape[1])
        return {name: score[0] for name, score in found.items()}

    def _halves(self) -> Iterator[Tensor]:
        """All ways to cut the parts that hold anything in halves: [parts] of 1 and 0."""
        held = self._counts.nonzero()[:, 0].tolist()
        if len(held) > 1:
            for half in combinations(held, (len(held) + 1) // 2):
                if half[0] == held[0]:
                    yield torch.zeros(PARTS).index_fill_(0, torch.tensor(half), 1)

    def _told(self, agreement: float, size: int) -> str:
        """Why the scores of a group say too little, in words that follow its name."""
        count, least = int(self._counts.sum()), _least(size)
        needed = ""
        if agreement > 0:
            wanted = math.ceil(count * least / (1 - least) * (1 - agreement) / agreement)
            needed = f"; it would take at least about {wanted}"
        return (
            f"half of the {count} {self.unit} seen and the other half order its {size} channels differently "
            f"(correlation {agreement:.2f}){needed}"
        )


def _least(size: int) -> float:
    """The agreement of halves from which on they order so many channels alike."""
    return LEAST - 2 / math.sqrt(size)


def _agreement(one: Tensor, two: Tensor) -> float:
    """The correlation of the logarithms of two halves' scores, [ways to cut, size]; the mean over the ways.

    Where both halves score all channels alike, there is nothing to be noise: 1.
    """
    (one, two) = (_spread(half) for half in (one, two))
    size = (one.square().mean(1) * two.square().mean(1)).sqrt()
    alike = ((one - two).abs().amax(1) < 1e-6).to(one)
    return float(torch.where(size > 1e-12, (one * two).mean(1) / size.clamp_min(1e-12), alike).mean())


def _spread(scores: Tensor) -> Tensor:
    """The logarithms of scores, less their mean."""
    logs = (scores + NEXT_TO_NOTHING * scores.mean(1, keepdim=True) + 1e-300).log()
    return logs - logs.mean(1, keepdim=True)


def drawn(scores: Tensor, reliability: float) -> Tensor:
    """The scores of a group, drawn towards their mean by their reliability, from 0 to 1."""
    if reliability == 1 or not bool(scores.any()):
        return scores
    powers = scores.double() ** reliability
    return powers * (scores.double().mean() / powers.mean())
