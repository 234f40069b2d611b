"""How fast within so many points: what a metric loses, with its uncertainty, and which speed is tried next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

#: The first speed-up that is tried, and by how much the next one is faster while all have held.
FIRST, GROWTH = 1.5, 1.5
#: The search ends where the fastest that held and the slowest that did not are so near, or after so many tries.
RESOLUTION, MOST = 1.06, 8


@dataclass(frozen=True)
class Drop:
    """What a metric loses.

    Attributes:
        value: the metric before less the one after, in its own unit.
        upper: what it loses at most, with the confidence asked for; None where nothing is known of chance.
        samples: that it was taken over; None likewise.
        confidence: that the loss is within `limit`, one-sided; None likewise.
        limit: what it may lose.
    """

    value: float
    upper: float | None
    samples: int | None
    confidence: float | None
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the loss is within the limit, as surely as was asked for."""
        return (self.value if self.upper is None else self.upper) <= self.limit


def drop_of(
    before: Sequence[float], after: Sequence[float], limit: float, confidence: float, span: float = 0.0
) -> Drop:
    """What the mean of a value for each sample loses, from one model to another on the same samples.

    The differences are paired, so what both models get right or wrong adds no uncertainty. The one-sided bound is that
    of Wald with two more pairs, which differ by the whole span of the values, one each way (of right and wrong: Agresti
    and Min, Statistics in Medicine 24, 2005): without, a few samples that happen to agree would prove too much.

    Args:
        before: one value a sample, of the first model; a single one is a metric of which nothing more is known.
        after: those of the second.
        limit: what may be lost.
        confidence: of the bound, one-sided.
        span: by how much two values can differ, where these do not show it.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    value, count = float(np.mean(first - second)), len(first)
    if count < 2:
        return Drop(value, None, None, None, limit)
    span = max(span, float(max(first.max(), second.max()) - min(first.min(), second.min())))
    mean = float(np.sum(first - second)) / (count + 2)
    square = (float(np.sum((first - second) ** 2)) + span**2) / (count + 2)
    error = math.sqrt(max(square - mean**2, 0.0) / (count + 2))
    if error == 0.0:
        return Drop(value, value, count, float(value <= limit), limit)
    normal = NormalDist()
    upper = mean + normal.inv_cdf(confidence) * error
    return Drop(value, upper, count, normal.cdf((limit - mean) / error), limit)


def samples_needed(limit: float, span: float, confidence: float) -> int:
    """Samples on which an unchanged model would be told to lose at most `limit`, of values that differ by `span`."""
    return math.ceil(NormalDist().inv_cdf(confidence) * span / limit)


class Bracket:
    """The fastest speed-up that held, and the slowest that did not, closer with every one that is tried.

    Args:
        held: one that is known to hold.
        failed: one that is known not to.
        most: tries at most.

    Attributes:
        held: the fastest that held.
        failed: the slowest that did not; None as long as all have.
    """

    def __init__(self, held: float = 1.0, failed: float | None = None, most: int = MOST) -> None:
        self.held, self.failed = held, failed
        self._left = most

    @property
    def upcoming(self) -> float | None:
        """The next to be tried; None where the search is over."""
        if self._left <= 0 or (self.failed is not None and self.failed / self.held <= RESOLUTION):
            return None
        if self.failed is None:
            return FIRST if self.held == 1.0 else self.held * GROWTH
        return math.sqrt(self.held * self.failed)

    def learn(self, speedup: float, holds: bool) -> None:
        """Take note of one that was tried."""
        self._left -= 1
        if holds:
            self.held = max(self.held, speedup)
        elif self.failed is None or speedup < self.failed:
            self.failed = max(speedup, self.held)
