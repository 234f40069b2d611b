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


_SPARSITY = number("of at least 0 and below 1 (the share of zeros)", lambda value: 0 <= value < 1)
_CRITERION = Check(
    "one of magnitude, taylor, obs, random, or a function that takes a cpd.sparsity.scores.WeightSetting",
    lambda value: is_function(value) or (isinstance(value, str) and value in _criteria()),
    names=lambda: _criteria(),
)
_RATIOS = Check(
    "erk, lamp, a cpd.Sensitivity, or a mapping from patterns of names to shares of at least 0 and below 1",
    _are_ratios,
    read=partial(read_shares, rules=RULES),
)
_PATTERN = Check("unstructured, N:M (such as 2:4), RxC (such as 1x3 or 4x1), kernel, or channel", _is_pattern)
_NORM = integer(1, 2)


@with_help
@dataclass(frozen=True, kw_only=True)
class SparseConfig(Scheduled):
    """All options of sparsity. They are checked when the config is made.

    Options:
        Each can be read as an attribute.

    Raises:
        InputError: If a value is out of range, or if options contradict each other.
    """

    sparsity: float | None = option(
        None, _SPARSITY,
        "Share of zeros among all weights of convolutions and linear layers. A pattern N:M sets the share itself.",
    )  # fmt: skip
    pattern: str = option(
        "unstructured", _PATTERN,
        "Which weights are set to zero together: unstructured (single weights); N:M (2:4 keeps 2 of every 4 along the "
        "input channels); RxC (blocks of R outputs by C inputs: 1x3 is a row of a 3x3 kernel, 4x1 spans four output "
        "channels); kernel (whole kernels); or channel (whole channels, in the groups of the comb).",
    )  # fmt: skip
    scope: str = option(
        "global", choice("global", "layer"),
        "Which weights compete with each other: global (all), or layer (those of one layer, so that every layer gets "
        "the same share of zeros).",
    )  # fmt: skip
    norm: int = option(1, _NORM, "Norm by which the magnitude of a block is computed: 1 or 2.")
    criterion: str | WeightCriterion = option(
        "magnitude", _CRITERION,
        "Which weights are set to zero: those with the smallest magnitude, taylor, obs or random score (in Python also "
        "a function).",
    )  # fmt: skip
    ratios: Ratios | None = option(
        None, _RATIOS,
        "How zeros are distributed over layers: erk, lamp, or shares that you set yourself, by shell pattern of the "
        "parameter's name (in Python also a cpd.Sensitivity). On the command line: PATTERN=SHARE, any number of times.",
    )  # fmt: skip
    max_ratio: float = option(
        0.99, number("above 0 and at most 1", lambda value: 0 < value <= 1),
        "Largest share of zeros in one layer, unless ratios set its share.",
    )  # fmt: skip
    compensation: bool = option(
        True, flag(), "Whether the weights that are kept are refitted, in closed form. This needs data."
    )  # fmt: skip
    score_batches: int = option(16, integer(1), "Largest number of batches used for scores and refits.")
    memory_gb: float = option(
        4.0, number("above 0", lambda value: value > 0),
        "Approximate limit, in GiB, of the activations held in memory while layers are refitted.",
    )  # fmt: skip
    schedule: str | Schedule = option(
        "one-shot", SCHEDULE,
        "When weights are set to zero: one-shot (all at once, before the training), or linear or cubic (gradually, "
        "during the training). In Python also a cpd.Schedule.",
    )  # fmt: skip
    prune_from: float = option(0.0, FRACTION, "Fraction of the training before the first change of the masks.")
    prune_until: float = option(
        0.5, FRACTION, "Fraction of the training at which a gradual schedule, or regrowth, is complete."
    )
    interval: int | None = option(
        None, integer(1), "Optimizer steps from one change of the masks to the next. Default: what gives ten changes."
    )
    regrow: str | None = option(
        None, choice(*REGROWTHS),
        "How removed weights can come back during the training: soft (all weights are trained, and the masks are "
        "chosen again at every change), splice (dynamic network surgery: masked weights are trained too and return "
        "once they are large), or rigl (each change removes some weights and brings back as many, where the gradient "
        "is largest). Default: they do not come back.",
    )  # fmt: skip
    outputs: Outputs | None = option(
        None, OUTPUTS,
        "The parts of the model's output that you use, as for cpd.compress. Default: all parts.",
    )  # fmt: skip
    threads: int = option(1, THREADS, "Threads that ONNX Runtime uses when latency is measured.")
    seed: int = option(0, SEED, "Seed of every random choice.")

    def __post_init__(self) -> None:
        """Check every field, and that they fit each other."""
        super().__post_init__()
        said = self.layout.share
        if said is not None and self.sparsity is not None and abs(self.sparsity - said) > 1e-6:
            raise InputError(
                f"pattern={self.pattern!r} sets a share of {said:g} to zero: leave sparsity out, or change pattern."
            )
        if said is not None and self.ratios is not None and not isinstance(self.ratios, Mapping):
            raise InputError(f"pattern={self.pattern!r} gives every layer the same share of zeros: leave ratios out.")
        if said is not None and self.schedule != "one-shot":
            raise InputError(f"pattern={self.pattern!r} has no steps in between: use schedule='one-shot'.")

    @property
    def layout(self) -> Pattern:
        """The pattern."""
        from cpd.sparsity.patterns import Pattern

        return Pattern.of(self.pattern)

    @property
    def share(self) -> float:
        """The share of zeros to reach.

        Raises:
            InputError: If no share is set.
        """
        found = self.layout.share if self.layout.share is not None else self.sparsity
        if found is None:
            raise InputError("sparsity must be given (the share of zeros, such as 0.8), or use pattern='2:4'.")
        return found

    def settings(self) -> dict[str, Any]:
        """All options as JSON types, as a checkpoint keeps them."""
        return {**super().settings(), **({"ratios": "a Sensitivity"} if _tells_curves(self.ratios) else {})}


SPARSE = instance(SparseConfig, "a cpd.SparseConfig")
