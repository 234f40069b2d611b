"""Schedules: when a model shrinks during its training, and how much of what is to go has gone by then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Self

from cpd.errors import InputError
from cpd.options import (
    LIMIT,
    Check,
    check_names,
    check_options,
    checked,
    choice,
    instance,
    integer,
    number,
    options_of,
    plain,
)

#: Shrinks of a gradual schedule for which no interval is given.
SHRINKS = 10

#: Kind -> share of what is to go that has gone at a share of the time; s = 1 - (1 - t)^3 is eq. 1 of Zhu and Gupta
#: 2017, "To prune, or not to prune", arXiv 1710.01878.
KINDS: dict[str, Callable[[float], float]] = {
    "one-shot": lambda time: 1.0,
    "linear": lambda time: time,
    "cubic": lambda time: 1 - (1 - time) ** 3,
}
#: Options of a config that a `Schedule` holds too, and what it calls them.
SCHEDULED = {"prune_from": "start", "prune_until": "end", "interval": "interval"}
FRACTION = number("from 0 to 1", lambda value: 0 <= value <= 1)
SCHEDULE = Check(
    f"one of {', '.join(KINDS)}, or a Schedule",
    lambda value: isinstance(value, str) and value in KINDS,
    names=lambda: KINDS,
)


@dataclass(frozen=True)
class Schedule:
    """When a model is pruned during its training.

    Attributes:
        kind: "one-shot" (all at once), "linear" (in equal steps), or "cubic" (most in the first steps).
        start: Fraction of the training before the first pruning step, at least 0 and below 1.
        end: Fraction of the training at which pruning is complete, above `start` and at most 1. The rest is
            fine-tuning. It does not apply to "one-shot", whose only pruning step is at `start`.
        interval: Optimizer steps from one pruning step to the next. Default: what gives ten pruning steps.
        warmup: The former name of `start`.

    Raises:
        InputError: If a value is out of range.
    """

    kind: str = "cubic"
    start: float = field(default=0.0, kw_only=True)
    end: float = field(default=0.5, kw_only=True)
    interval: int | None = field(default=None, kw_only=True)
    warmup: InitVar[float | None] = field(default=None, kw_only=True)

    def __post_init__(self, warmup: float | None) -> None:
        """Check every field."""
        if warmup is not None:
            warnings.warn("Schedule(warmup=…) is now named start=….", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "start", warmup)
        choice(*KINDS).demand("kind", self.kind)
        for name in ("start", "end"):
            FRACTION.demand(name, getattr(self, name))
        LIMIT.demand("interval", self.interval, optional=True)
        if not (0 <= self.start < 1 and (self.kind == "one-shot" or self.start < self.end <= 1)):
            raise InputError(
                "The fraction of the training at which pruning starts must be below the one at which it ends, and both "
                f"must be from 0 to 1; got {self.start!r} and {self.end!r}."
            )

    @staticmethod
    def of(schedule: Schedule | str) -> Schedule:
        """The schedule itself or, for the name of a kind, the schedule of that kind with defaults."""
        return Schedule(schedule) if isinstance(schedule, str) else schedule

    @checked(steps=integer(0))
    def events(self, steps: int) -> list[tuple[int, float]]:
        """The pruning steps in order: (optimizer step after which the model is pruned, share of the removal then done).

        Args:
            steps: Number of optimizer steps of the whole training.

        Raises:
            InputError: If the training is too short for a pruning step.
        """
        first = round(self.start * steps)
        if self.kind == "one-shot":
            return [(first, 1.0)]
        last = round(self.end * steps)
        count = min(SHRINKS, last - first) if self.interval is None else (last - first) // self.interval
        if count < 1:
            raise InputError(
                f"A training of {steps} steps is too short for {self}: train longer, let pruning end later, or use a "
                "shorter interval."
            )
        span = (last - first) / count if self.interval is None else self.interval
        times = range(1, count + 1)
        return [(first + round(time * span), KINDS[self.kind](time / count)) for time in times]


# The constructor alone takes it; the default that dataclasses leave on the class would be read as a value.
del Schedule.warmup  # type: ignore[attr-defined]


class Scheduled:
    """What configs have in common whose options say when a model is pruned: that of pruning, and that of sparsity.

    Attributes:
        schedule: the kind of a schedule; a `Schedule` on construction, which is taken apart.
        prune_from: its start.
        prune_until: its end.
        interval: its interval.
    """

    schedule: str | Schedule
    prune_from: float
    prune_until: float
    interval: int | None

    def __post_init__(self) -> None:
        """Take a `Schedule` apart; check every field."""
        if isinstance(self.schedule, Schedule):
            for item in options_of(self):
                if item.name in SCHEDULED and getattr(self, item.name) != item.default:
                    raise InputError(f"{item.name} is part of the Schedule that was passed: set it there.")
            for name, attribute in SCHEDULED.items():
                object.__setattr__(self, name, getattr(self.schedule, attribute))
            object.__setattr__(self, "schedule", self.schedule.kind)
        check_options(self)
        _ = self.when

    @classmethod
    def of(cls, config: Self | None, given: Mapping[str, Any], what: str) -> Self:
        """A config, or the defaults, with the options that are given.

        Args:
            config: the config; None: all defaults.
            given: {option: value}.
            what: the function that takes them, for the message.

        Raises:
            InputError: an unknown option, or a value out of range.
        """
        instance(cls, f"a cpd.{cls.__name__}").demand("config", config, optional=True)
        defaults = {item.name: item.default for item in options_of(cls)}
        check_names(given, defaults, what)
        start = {name: defaults[name] for name in SCHEDULED if isinstance(given.get("schedule"), Schedule)}
        return replace(config or cls(), **{**start, **given})  # type: ignore[type-var]

    @property
    def when(self) -> Schedule:
        """The schedule."""
        return Schedule(str(self.schedule), start=self.prune_from, end=self.prune_until, interval=self.interval)

    def settings(self) -> dict[str, Any]:
        """All options as JSON types, as a checkpoint keeps them."""
        return {name: plain(value) for name, value in vars(self).items()}
