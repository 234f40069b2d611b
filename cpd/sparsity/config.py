"""Every option of sparsity, once: `mask`, `sparsify`, `Sparsifier` and the command line take theirs from here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cpd.errors import InputError
from cpd.options import (
    OUTPUTS,
    SEED,
    THREADS,
    Check,
    are_shares,
    choice,
    flag,
    instance,
    integer,
    is_function,
    number,
    option,
    read_shares,
    with_help,
)
from cpd.selection.schedule import FRACTION, SCHEDULE, Schedule, Scheduled

if TYPE_CHECKING:  # torch takes seconds to import
    from cpd.model.outputs import Outputs
    from cpd.sparsity.patterns import Pattern
    from cpd.sparsity.ratios import Ratios
    from cpd.sparsity.scores import WeightCriterion

#: How weights come back, by the name of its paper.
REGROWTHS = ("soft", "splice", "rigl")
#: Rules of how zeros are shared out over layers.
RULES = ("erk", "lamp")


def _criteria() -> Collection[str]:
    """The names of criteria, whose import takes torch's seconds."""
    from cpd.sparsity.scores import CRITERIA

    return CRITERIA


def _are_ratios(value: Any) -> bool:
    if isinstance(value, str):
        return value in RULES
    return are_shares(value) or _tells_curves(value)


def _tells_curves(value: Any) -> bool:
    """Whether a value is a `cpd.Sensitivity`, or tells what one tells."""
    try:
        return isinstance(value.by_group, Mapping)
    except Exception:  # whatever an object of the user's raises
        return False


def _is_pattern(value: Any) -> bool:
    from cpd.sparsity.patterns import Pattern

    try:
        return isinstance(value, str) and bool(Pattern.of(value))
    except InputError:
        return False


_SPARSITY = number("of at least 0 and below 1: the share of zeros", lambda value: 0 <= value < 1)
_CRITERION = Check(
    "one of magnitude, taylor, obs, random, or a function of a cpd.sparsity.scores.WeightSetting",
    lambda value: is_function(value) or (isinstance(value, str) and value in _criteria()),
    names=lambda: _criteria(),
)
_RATIOS = Check(
    "erk, lamp, a cpd.Sensitivity, or a mapping from patterns of names to shares of at least 0 and below 1",
    _are_ratios,
    read=partial(read_shares, rules=RULES),
)
_PATTERN = Check("unstructured, N:M (as 2:4), RxC (as 1x3 or 4x1), kernel, or channel", _is_pattern)
_NORM = integer(1, 2)


@with_help
@dataclass(frozen=True, kw_only=True)
class SparseConfig(Scheduled):
    """Every option of sparsity, checked on construction.

    Options:
        Each may be read as an attribute.

    Raises:
        InputError: if a value is out of range, or the options contradict each other.
    """

    sparsity: float | None = option(
        None, _SPARSITY,
        "Share of zeros among all weights of convolutions and linear layers. Not for N:M, whose name says it.",
    )  # fmt: skip
    pattern: str = option(
        "unstructured", _PATTERN,
        "Which weights are zero together: unstructured; N:M (2:4 keeps 2 of each 4 along the input channels); RxC, "
        "blocks of R outputs by C inputs (1x3 is a row of a 3x3 kernel, 4x1 four channels); kernel; or channel, by the "
        "comb's groups.",
    )  # fmt: skip
    scope: str = option(
        "global", choice("global", "layer"),
        "Among which weights scores are compared: global, or layer (the same share of each).",
    )  # fmt: skip
    norm: int = option(1, _NORM, "Norm by which the magnitude of a block is taken: 1 or 2.")
    criterion: str | WeightCriterion = option(
        "magnitude", _CRITERION,
        "Which weights are zero: those of least magnitude, taylor, obs or random score (Python: or a function).",
    )  # fmt: skip
    ratios: Ratios | None = option(
        None, _RATIOS,
        "How zeros are shared out over layers: erk, lamp, or the share of layers that you decide on, by a shell "
        "pattern of names (Python: or a cpd.Sensitivity). On the command line PATTERN=SHARE, any number of times.",
    )  # fmt: skip
    max_ratio: float = option(
        0.99, number("above 0 and at most 1", lambda value: 0 < value <= 1),
        "Largest share of a layer's weights that may be zero, where nothing decides on it by name.",
    )  # fmt: skip
    compensation: bool = option(
        True, flag(), "Refit the weights that stay, in closed form, where there is data."
    )  # fmt: skip
    score_batches: int = option(16, integer(1), "Batches of the data that scores and refits use at most.")
    memory_gb: float = option(
        4.0, number("above 0", lambda value: value > 0),
        "GiB of activations that may be alive at a time, about, while layers are refitted.",
    )  # fmt: skip
    schedule: str | Schedule = option(
        "one-shot", SCHEDULE,
        "When weights become zero: one-shot (before the training), or gradually during it: linear or cubic (Python: or "
        "a Schedule).",
    )  # fmt: skip
    prune_from: float = option(0.0, FRACTION, "Fraction of the training before the first step of pruning.")
    prune_until: float = option(
        0.5, FRACTION, "Fraction of the training at which pruning, or regrowth, is complete, of a gradual schedule."
    )
    interval: int | None = option(
        None, integer(1), "Optimizer steps between two changes of the masks. Default: ten changes."
    )
    regrow: str | None = option(
        None, choice(*REGROWTHS),
        "How weights come back while it trains: soft (all go on being trained, the masks are chosen anew), splice "
        "(dynamic network surgery: weights under the masks go on being trained and return once they are large), or "
        "rigl (as many as go come back where the gradient is largest).",
    )  # fmt: skip
    outputs: Outputs | None = option(
        None, OUTPUTS,
        "The parts of the model's output that matter, as for cpd.compress. Default: all.",
    )  # fmt: skip
    threads: int = option(1, THREADS, "Threads of ONNX Runtime when latency is measured.")
    seed: int = option(0, SEED, "Seed of every random choice.")

    def __post_init__(self) -> None:
        """Check every field, and that they fit each other."""
        super().__post_init__()
        said = self.layout.share
        if said is not None and self.sparsity is not None and abs(self.sparsity - said) > 1e-6:
            raise InputError(
                f"pattern={self.pattern!r} makes a share of {said:g} zero; leave sparsity out, or take another one."
            )
        if said is not None and self.ratios is not None and not isinstance(self.ratios, Mapping):
            raise InputError(f"pattern={self.pattern!r} leaves every layer the same share: leave ratios out.")
        if said is not None and self.schedule != "one-shot":
            raise InputError(f"pattern={self.pattern!r} has no share in between: take schedule='one-shot'.")

    @property
    def layout(self) -> Pattern:
        """The pattern."""
        from cpd.sparsity.patterns import Pattern

        return Pattern.of(self.pattern)

    @property
    def share(self) -> float:
        """The share of zeros that is asked for.

        Raises:
            InputError: if none is given.
        """
        found = self.layout.share if self.layout.share is not None else self.sparsity
        if found is None:
            raise InputError("sparsity must be given: the share of zeros, as 0.8; or take pattern='2:4'.")
        return found

    def settings(self) -> dict[str, Any]:
        """All options as JSON types, as a checkpoint keeps them."""
        return {**super().settings(), **({"ratios": "a Sensitivity"} if _tells_curves(self.ratios) else {})}


SPARSE = instance(SparseConfig, "a cpd.SparseConfig")
