"""Models timed in turn (A B, B A, A B, ...), and what the times say: medians, ratios, how sure they are."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cpd.deploy.runtimes.base import Run, Session
from cpd.model.progress import Part, part

Times = np.ndarray[Any, np.dtype[np.float64]]

MIN_PAIRS = 6
"""Fewer pairs give no 95 % confidence interval of a median."""

_BLOCK_MS = 20.0  # a sample of a faster model is the mean over a block of runs that lasts about so long
_LEAD_MS = 20.0  # before the sample of a faster model it runs untimed for so long: others have taken its caches
_WARM_UP_RUNS = 3
_WARM_UP_MS = 50.0


class _Runner:
    """What is timed, and how many runs make a sample."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._repeat = 1
        self._lead = 0

    def warm_up(self) -> None:
        """Run until memory, caches and clock have settled, and choose the block from the fastest run."""
        times: list[float] = []
        while len(times) < _WARM_UP_RUNS or sum(times) < _WARM_UP_MS:
            times.append(self._timed(1))
        self._repeat = max(1, math.ceil(_BLOCK_MS / min(times)))
        self._lead = math.ceil(_LEAD_MS / min(times)) if min(times) < _LEAD_MS else 0

    def samples(self) -> list[float]:
        """One sample: ms a run, the mean over one block."""
        if self._lead:
            self._timed(self._lead)
        return [self._timed(self._repeat)]

    def _timed(self, repeat: int) -> float:
        run = self._run
        start = time.perf_counter_ns()
        for _ in range(repeat):
            run()
        return (time.perf_counter_ns() - start) / repeat / 1e6


class _Together:
    """Several sessions that their device times itself, in one go."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions

    def warm_up(self) -> None:
        """Nothing: how a device is brought to its pace, its function knows."""

    def samples(self) -> list[float]:
        """The times of all, in ms."""
        together = self._sessions[0].together
        assert together is not None
        return together(self._sessions)


def time_rounds(sessions: Sequence[Session], seconds: float, min_runs: int, precision: float) -> Times:
    """Times in ms `[rounds, models]`; each round begins with the next model, so that none is always first.

    The intervals are looked at ever more rarely (each 20 % more rounds), for a stop at the first lucky look
    would make them too narrow. Where a device times models itself, `MIN_PAIRS` rounds are enough.
    """
    turns = _turns(sessions)
    for turn, _ in turns:
        turn.warm_up()
    least = MIN_PAIRS if any(isinstance(turn, _Together) for turn, _ in turns) else min_runs
    with part("timing", seconds, undisturbed=True) as timing:
        return _rounds(turns, len(sessions), seconds, least, precision, timing)


def _turns(sessions: Sequence[Session]) -> list[tuple[_Runner | _Together, list[int]]]:
    """What is timed one after the other, and the places of its times in a row."""
    own: list[tuple[_Runner | _Together, list[int]]] = []
    devices: dict[Any, list[int]] = {}
    for index, session in enumerate(sessions):
        if session.together is None:
            own.append((_Runner(session.run), [index]))
        else:
            devices.setdefault(session.together, []).append(index)
    return own + [(_Together([sessions[index] for index in places]), places) for places in devices.values()]


def _rounds(
    turns: Sequence[tuple[_Runner | _Together, list[int]]],
    width: int,
    seconds: float,
    min_runs: int,
    precision: float,
    timing: Part,
) -> Times:
    times: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    look = min_runs
    while True:
        row = [0.0] * width
        for offset in range(len(turns)):
            turn, places = turns[(len(times) + offset) % len(turns)]
            for place, ms in zip(places, turn.samples(), strict=True):
                row[place] = ms
        times.append(row)
        timing.advance(timing.seconds - timing.done)
        if len(times) < min_runs:
            continue
        if len(times) >= look:
            look = math.ceil(1.2 * look)
            if _settled(np.array(times), precision):
                break
        if time.perf_counter() >= deadline:
            break
    return np.array(times)


def _settled(times: Times, precision: float) -> bool:
    """Whether the confidence intervals of all median ratios lie within +-precision of them."""
    found = (column(times, index) for index in range(1, times.shape[1]))
    return all(
        item.speedup_low >= item.speedup * (1 - precision) and item.speedup_high <= item.speedup * (1 + precision)
        for item in found
    )


@dataclass(frozen=True)
class Column:
    """The figures of one model, against the first; times in ms."""

    median_ms: float
    p90_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


def column(times: Times, index: int) -> Column:
    """The figures of one model, against the first."""
    ratios = times[:, 0] / times[:, index]
    low, high = median_interval(ratios)
    own = times[:, index]
    return Column(float(np.median(own)), float(np.percentile(own, 90)), float(np.median(ratios)), low, high)


def median_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """The 95 % confidence interval of the median of `values` `[n]`, n >= 6, by order statistics.

    The k-th smallest and the k-th largest value, k the largest rank for which
    `P(Binomial(n, 1/2) < k) <= 2.5 %` (David and Nagaraja, Order Statistics, section 7.1).
    """
    ordered = np.sort(values)
    rank = _rank(len(ordered))
    return float(ordered[rank - 1]), float(ordered[-rank])


@lru_cache(maxsize=256)
def _rank(count: int) -> int:
    """The largest k with `P(Binomial(count, 1/2) < k) <= 1/40`, in exact integers; 0 if count < 6."""
    below, term, rank = 0, 1, 0  # sum of C(count, j) over j < rank; C(count, rank)
    while 40 * (below + term) <= 2**count:
        below += term
        term = term * (count - rank) // (rank + 1)
        rank += 1
    return rank
