"""Every option of pruning, once: `compress`, `Pruner`, `sweep`, the command line and recipes take theirs from here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpd.deploy.runtimes.catalogue import DEFAULT, RUNTIME, RUNTIMES, grain_of, names_of
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
from cpd.selection.limits import Limits
from cpd.selection.schedule import FRACTION, SCHEDULE, Schedule, Scheduled
from cpd.selection.target import TARGETS, Target
from cpd.selection.weighing import NORMALIZATIONS, SCOPES, Normalization, Scope

if TYPE_CHECKING:  # torch takes seconds to import
    from cpd.criteria import Criterion
    from cpd.model.outputs import Outputs


def _read_shapes(texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """`8x3x224x224` as a shape."""
    try:
        return tuple(tuple(int(size) for size in text.lower().split("x")) for text in texts)
    except ValueError:
        raise InputError(f"latency_inputs takes shapes, as in 8x3x224x224; got {', '.join(texts)}.") from None


def _criteria() -> Collection[str]:
    """The names of criteria, whose import takes torch's seconds."""
    from cpd.criteria import CRITERIA

    return CRITERIA


_AMOUNT = number("above 0: a share up to 1, or an amount", lambda value: value > 0)
_ABOVE_ZERO = number("above 0", lambda value: value > 0)
_SPEEDUP = number("of at least 1 (original over result: for half the latency, 2)", lambda value: value >= 1)
_INSIDE = number("between 0 and 1", lambda value: 0 < value < 1)
_CRITERION = Check(
    "a name in cpd.criteria.CRITERIA, or a function of a cpd.criteria.Setting",
    lambda value: is_function(value) or (isinstance(value, str) and value in _criteria()),
    names=lambda: _criteria(),
)
_RATIOS = Check(
    "a mapping from patterns of group names to shares of at least 0 and below 1", are_shares, read=read_shares
)
_INPUTS = Check("a sequence of inputs or shapes", lambda value: isinstance(value, (list, tuple)), read=_read_shapes)


@with_help
@dataclass(frozen=True, kw_only=True)
class PruneConfig(Scheduled):
    """Every option of pruning, checked on construction.

    Functions take them by name; a config holds them together, to be used several times or changed:

        config = cpd.PruneConfig(round_to=16, max_ratio=0.8)
        cpd.compress(model, target_speedup=2, data=loader, config=config)

    Options:
        Each may be read as an attribute.

    Raises:
        InputError: if a value is out of range (the message gives the range), or there are two targets.
    """

    target_speedup: float | None = option(
        None, _SPEEDUP,
        "Latency of the original over that of the result, measured in the runtime on this machine; at least 1.",
    )  # fmt: skip
    target_latency_ms: float | None = option(
        None,
        _ABOVE_ZERO,
        "Latency of the result in ms for one run, measured in the runtime.",
    )
    target_macs: float | None = option(
        None, _AMOUNT, "Multiply-accumulates that are kept: a share up to 1, or a number of them."
    )
    target_params: float | None = option(
        None, _AMOUNT, "Parameters that are kept: a share up to 1, or a number of them."
    )
    target_memory: float | None = option(
        None, _AMOUNT, "Elements of all intermediate tensors that are kept: a share up to 1, or a number of them."
    )
    criterion: str | Criterion | None = option(
        None, _CRITERION,
        "Importance of a channel: a name in cpd.criteria.CRITERIA (Python: or a callable). Default: obs with data, "
        "magnitude without; taylor for a Pruner without data, from the training's own gradients.",
    )  # fmt: skip
    normalization: Normalization | None = option(
        None, choice(*NORMALIZATIONS),
        "What a removed channel saves, by which its score is divided: memory, macs, parameters, latency (predicted "
        "for this machine) or none. Default: macs for scores from data; else latency for measured targets, none for "
        "others.",
    )  # fmt: skip
    exponent: float = option(
        1.0, number("of at least 0", lambda value: value >= 0), "Scores are divided by the saving to this power."
    )
    scope: Scope | None = option(
        None, choice(*SCOPES),
        "Among which channels scores are compared: global, isomorphic (groups of one structure) or group. Default: "
        "global; for measured targets with data, group is tried too and the better one is kept.",
    )  # fmt: skip
    compensation: bool = option(
        True, flag(), "Refit the layers that read removed channels, in closed form, where there is data."
    )
    score_batches: int | None = option(
        None, integer(1),
        "Batches of the data that scores, compensation and recalibration use at most. Default: 16, and more where they "
        "hold fewer images than the widest layer asks for: one for eight channels behind a pooling.",
    )  # fmt: skip
    memory_gb: float = option(
        4.0, _ABOVE_ZERO,
        "GiB of activations that may be alive at a time, about, while layers are refitted: samples are taken in parts "
        "that fit.",
    )  # fmt: skip
    schedule: str | Schedule = option(
        "one-shot", SCHEDULE,
        "When channels are removed: one-shot (all at once, before the training), or gradually during the training: "
        "linear or cubic (Python: or a Schedule).",
    )  # fmt: skip
    prune_from: float = option(0.0, FRACTION, "Fraction of the training before the first pruning step.")
    prune_until: float = option(
        0.5, FRACTION, "Fraction of the training at which pruning is complete, of a gradual schedule."
    )
    interval: int | None = option(
        None, integer(1), "Optimizer steps between two pruning steps of a gradual schedule. Default: ten pruning steps."
    )
    regularization: str | None = option(
        None, choice("group-lasso", "growing", "batchnorm"),
        "Sparse learning, in the training before and between shrinks: group-lasso (the norm of each channel over its "
        "group), growing (weight decay that grows, most for small channels), or batchnorm (L1 of the scales of "
        "BatchNorm). With schedule one-shot, prune_from says how long. Default: none.",
    )  # fmt: skip
    regularization_strength: float | None = option(
        None, _ABOVE_ZERO,
        "Its strength: the share of the mean norm that a channel loses in a unit of learning rate (0.05); of growing "
        "the weight decay of the smallest channel at the last shrink (1).",
    )  # fmt: skip
    round_to: int | None = option(
        None, integer(1), "Widths are kept to multiples of this. Default: what is fast in the runtime, 8 or 16."
    )
    max_ratio: float = option(0.9, _INSIDE, "Largest share of a group that may be removed.")
    min_width: int = option(1, integer(1), "Fewest channels that a group keeps.")
    ratios: Mapping[str, float] | None = option(
        None, _RATIOS,
        "Groups that you decide on: the share that is removed, by a shell pattern of group names; 0 keeps all, and "
        "branches that are named like this too. On the command line PATTERN=SHARE, any number of times.",
    )  # fmt: skip
    branches: bool | None = option(
        None, flag(),
        "Whether whole branches may be removed, such as residual blocks, beside channels. Default: with data; without, "
        "what a branch is worth is not known.",
    )  # fmt: skip
    max_removed: float = option(0.75, FRACTION, "Largest share of the branches that may be removed.")
    outputs: Outputs | None = option(
        None, OUTPUTS,
        "The parts of the model's output that matter, where it returns more than is read (hidden states, lists of "
        "features): a key, an attribute or a position, as in a.b or 1.0 inside another, several of them (Python: or a "
        "function of the output). These keep their width, the others may become narrower. Default: all matter.",
    )  # fmt: skip
    masks: str = option(
        "keep", choice("keep", "permanent"),
        "Masks of torch.nn.utils.prune: keep (they are narrowed with their weights), or permanent (multiplied into "
        "the weights and taken off before anything else).",
    )  # fmt: skip
    proof_copies: int = option(
        1000, integer(1),
        "Narrower copies of the model that are tried to prove what can be removed; what is not proved by then stays.",
    )  # fmt: skip
    proof_seconds: float | None = option(
        None,
        _ABOVE_ZERO,
        "Seconds after which what is not proved stays. Default: no limit, so that the same model gives the same plan.",
    )
    tolerance: float = option(0.05, _INSIDE, "Relative distance from a measured target at which the search may end.")
    runtime: Any = option(
        DEFAULT, RUNTIME,
        f"What latency is measured in: {', '.join(RUNTIMES)}; several with commas between, or in a list, of which the "
        "slowest counts (Python: also a function measure(paths) -> [ms] for a device of your own).",
    )  # fmt: skip
    threads: int = option(1, THREADS, "Threads of the runtime when latency is measured.")
    latency_inputs: Sequence[Any] = option(
        (), _INPUTS,
        "Further inputs (other batch or image sizes) for which a measured target must hold: the slowest counts. "
        "Inputs, or their shapes; on the command line shapes as 8x3x224x224, any number of times.",
    )  # fmt: skip
    seed: int = option(0, SEED, "Seed of every random choice.")

    def __post_init__(self) -> None:
        """Check every field, and that there is one target at most."""
        super().__post_init__()
        if len(self._targets) > 1:
            raise InputError(f"Give exactly one target; got {', '.join(item.name for item in self._targets)}.")
        if self.regularization is None and self.regularization_strength is not None:
            raise InputError("regularization_strength is that of a regularization: pass regularization='group-lasso'.")
        if self.regularization is not None and self.schedule == "one-shot" and not self.prune_from:
            raise InputError(
                f"regularization={self.regularization!r} acts on a training before and between shrinks: pass "
                "prune_from=0.3 (for the first three tenths of it), or take schedule='cubic'."
            )

    @property
    def _targets(self) -> list[Target]:
        values = {name: getattr(self, name) for name in TARGETS}
        return [Target(name, value) for name, value in values.items() if value is not None]

    @property
    def target(self) -> Target:
        """The target.

        Raises:
            InputError: if none is given.
        """
        if not self._targets:
            raise InputError(f"Give exactly one target of {', '.join(TARGETS)}; got none.")
        return self._targets[0]

    @property
    def measures(self) -> bool:
        """Whether pruning takes latencies, for its target or for what a channel saves."""
        return self.normalization == "latency" or any(target.is_measured for target in self._targets)

    @property
    def limits(self) -> Limits:
        """What a selection may do to a group."""
        return Limits(
            self.round_to or grain_of(self.runtime),
            self.max_ratio,
            self.min_width,
            dict(self.ratios or {}),
            self.max_removed,
        )

    @property
    def combing(self) -> dict[str, Any]:
        """The options of `cpd.comb`."""
        return {name: getattr(self, name) for name in ("outputs", "proof_copies", "proof_seconds")}

    def settings(self) -> dict[str, Any]:
        """All options as JSON types but for the inputs, as a checkpoint keeps them."""
        found = super().settings()
        del found["latency_inputs"]
        return {**found, "runtime": ",".join(names_of(self.runtime))}


PRUNING = instance(PruneConfig, "a cpd.PruneConfig")
