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


_AMOUNT = number("above 0: a share up to 1, or an absolute amount", lambda value: value > 0)
_ABOVE_ZERO = number("above 0", lambda value: value > 0)
_SPEEDUP = number("of at least 1 (2 means half the latency)", lambda value: value >= 1)
_INSIDE = number("between 0 and 1", lambda value: 0 < value < 1)
_CRITERION = Check(
    "a name in cpd.criteria.CRITERIA, or a function that takes a cpd.criteria.Setting",
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
    """All options of pruning. They are checked when the config is made.

    Functions take these options by name. A config holds them together, so that they can be reused or changed:

        config = cpd.PruneConfig(round_to=16, max_ratio=0.8)
        cpd.compress(model, target_speedup=2, data=loader, config=config)

    Options:
        Each can be read as an attribute.

    Raises:
        InputError: If a value is out of range (the message gives the range), or if there are two targets.
    """

    target_speedup: float | None = option(
        None, _SPEEDUP,
        "Latency of the original divided by that of the result, measured in the runtime on this machine; at least 1.",
    )  # fmt: skip
    target_latency_ms: float | None = option(
        None,
        _ABOVE_ZERO,
        "Latency of the result in milliseconds per run, measured in the runtime on this machine.",
    )
    target_macs: float | None = option(
        None, _AMOUNT, "Multiply-accumulate operations (MACs) to keep: a share up to 1, or an absolute number."
    )
    target_params: float | None = option(None, _AMOUNT, "Parameters to keep: a share up to 1, or an absolute number.")
    target_memory: float | None = option(
        None, _AMOUNT, "Elements of all intermediate tensors to keep: a share up to 1, or an absolute number."
    )
    max_file_mb: float | None = option(
        None, _ABOVE_ZERO,
        "Limit beside the target: size in MB (10^6 bytes) of the file that is run, the ONNX model in the runtime's "
        "precision.",
    )  # fmt: skip
    max_memory_mb: float | None = option(
        None, _ABOVE_ZERO,
        "Limit beside the target: MB (10^6 bytes) of weights and of tensors in memory at once while the example inputs "
        "run.",
    )  # fmt: skip
    criterion: str | Criterion | None = option(
        None, _CRITERION,
        "How the importance of a channel is estimated: a name in cpd.criteria.CRITERIA (in Python also a callable). "
        "Default: obs with data and magnitude without; a Pruner without data uses taylor, on the gradients of the "
        "training.",
    )  # fmt: skip
    normalization: Normalization | None = option(
        None, choice(*NORMALIZATIONS),
        "What scores are divided by, so that channels that save more are removed first: the memory, macs, parameters "
        "or latency (predicted for this machine) that a channel costs, or none. Default: macs for scores from data. "
        "For scores from weights: latency if the target is measured, else none.",
    )  # fmt: skip
    exponent: float = option(
        1.0,
        number("of at least 0", lambda value: value >= 0),
        "Power to which the saving of the option normalization is raised before scores are divided by it.",
    )
    scope: Scope | None = option(
        None, choice(*SCOPES),
        "Which channels compete with each other: global (all), isomorphic (those of groups with the same structure) or "
        "group (those of one group). Default: global. For measured targets with data, group is tried as well and the "
        "better result is kept.",
    )  # fmt: skip
    compensation: bool = option(
        True, flag(), "Whether layers that read removed channels are refitted, in closed form. This needs data."
    )
    score_batches: int | None = option(
        None, integer(1),
        "Largest number of batches used for scores, compensation and recalibration. Default: 16, or more if those hold "
        "too few images for the widest layer (behind a global pooling it needs one image for eight channels).",
    )  # fmt: skip
    memory_gb: float = option(
        4.0, _ABOVE_ZERO,
        "Approximate limit, in GiB, of the activations held in memory while layers are refitted. Samples are processed "
        "in parts that fit.",
    )  # fmt: skip
    schedule: str | Schedule = option(
        "one-shot", SCHEDULE,
        "When channels are removed: one-shot (all at once, before the training), or linear or cubic (gradually, during "
        "the training). In Python also a cpd.Schedule.",
    )  # fmt: skip
    prune_from: float = option(0.0, FRACTION, "Fraction of the training before the first pruning step.")
    prune_until: float = option(
        0.5, FRACTION, "Fraction of the training at which a gradual schedule completes pruning."
    )
    interval: int | None = option(
        None,
        integer(1),
        "Optimizer steps from one pruning step of a gradual schedule to the next. Default: what gives ten of them.",
    )
    regularization: str | None = option(
        None, choice("group-lasso", "growing", "batchnorm"),
        "Penalty that makes channels small while the model trains, before and between pruning steps: group-lasso (on "
        "the norm of each channel over its group), growing (a weight decay that increases, most for small channels), "
        "or batchnorm (L1 on the scales of BatchNorm). With schedule one-shot, prune_from sets how long it acts. "
        "Default: no penalty.",
    )  # fmt: skip
    regularization_strength: float | None = option(
        None, _ABOVE_ZERO,
        "Strength of the regularization. For growing: the weight decay of the smallest channel at the last pruning "
        "step (default 1). For the others: the share of the mean norm that a channel loses per unit of learning rate "
        "(default 0.05).",
    )  # fmt: skip
    round_to: int | None = option(
        None, integer(1), "Widths are multiples of this. Default: what is fast in the runtime, 8 or 16."
    )
    max_ratio: float = option(0.9, _INSIDE, "Largest share of a group that may be removed.")
    min_width: int = option(1, integer(1), "Fewest channels that a group keeps.")
    ratios: Mapping[str, float] | None = option(
        None, _RATIOS,
        "Shares of channels to remove that you set yourself, by shell pattern of the group's name. A share of 0 keeps "
        "every channel of the group, and branches whose names match. On the command line: PATTERN=SHARE, any number of "
        "times.",
    )  # fmt: skip
    branches: bool | None = option(
        None, flag(),
        "Whether whole branches, such as residual blocks, may be removed as well as channels. Default: yes with data; "
        "no without, because the importance of a branch cannot be estimated then.",
    )  # fmt: skip
    max_removed: float = option(0.75, FRACTION, "Largest share of the branches that may be removed.")
    outputs: Outputs | None = option(
        None, OUTPUTS,
        "The parts of the model's output that you use, if it returns more than those (hidden states, lists of "
        "features). Each part is a key, an attribute or an index; dots lead into nested outputs, as in a.b or 1.0 (in "
        "Python also a function of the output). These parts keep their width; others may become narrower. Default: all "
        "parts.",
    )  # fmt: skip
    masks: str = option(
        "keep", choice("keep", "permanent"),
        "What happens to masks of torch.nn.utils.prune: keep (they are narrowed with their weights), or permanent "
        "(they are first multiplied into the weights and then removed).",
    )  # fmt: skip
    proof_copies: int = option(
        1000, integer(1),
        "Largest number of narrower copies of the model tried to verify what can be removed. Groups not verified by "
        "then are kept.",
    )  # fmt: skip
    proof_seconds: float | None = option(
        None,
        _ABOVE_ZERO,
        "Time limit of that verification in seconds. Groups not verified by then are kept. Default: no limit, so that "
        "the same model always gives the same plan.",
    )
    tolerance: float = option(
        0.05, _INSIDE, "Relative distance from a measured target within which the search may end."
    )
    runtime: Any = option(
        DEFAULT, RUNTIME,
        f"Where latency is measured: {', '.join(RUNTIMES)}. Give several with commas between them, or in a list; the "
        "slowest decides. In Python also a function measure(paths) -> [ms], for a device of your own.",
    )  # fmt: skip
    threads: int = option(1, THREADS, "Threads that the runtime uses when latency is measured.")
    latency_inputs: Sequence[Any] = option(
        (), _INPUTS,
        "More inputs (other batch or image sizes) for which a measured target must hold; the slowest decides. Give "
        "inputs or their shapes. On the command line: shapes such as 8x3x224x224, any number of times.",
    )  # fmt: skip
    seed: int = option(0, SEED, "Seed of every random choice.")

    def __post_init__(self) -> None:
        """Check every field, and that there is one target at most."""
        super().__post_init__()
        if len(self._targets) > 1:
            raise InputError(f"Give exactly one target; got {', '.join(item.name for item in self._targets)}.")
        if self.regularization is None and self.regularization_strength is not None:
            raise InputError(
                "regularization_strength has no effect without a regularization: pass regularization='group-lasso', "
                "or leave it out."
            )
        if self.regularization is not None and self.schedule == "one-shot" and not self.prune_from:
            raise InputError(
                f"regularization={self.regularization!r} acts on the training before and between pruning steps: pass "
                "prune_from=0.3 (to apply it in the first 30 % of the training), or use schedule='cubic'."
            )

    @property
    def _targets(self) -> list[Target]:
        values = {name: getattr(self, name) for name in TARGETS}
        return [Target(name, value) for name, value in values.items() if value is not None]

    @property
    def target(self) -> Target:
        """The one target that is set.

        Raises:
            InputError: If no target is set.
        """
        if not self._targets:
            raise InputError(f"Give exactly one target of {', '.join(TARGETS)}; got none.")
        return self._targets[0]

    @property
    def measures(self) -> bool:
        """Whether pruning needs latencies, for its target or to normalize scores."""
        return self.normalization == "latency" or any(target.is_measured for target in self._targets)

    @property
    def limits(self) -> Limits:
        """How much may be removed from a group, and to which multiples."""
        return Limits(
            self.round_to or grain_of(self.runtime),
            self.max_ratio,
            self.min_width,
            dict(self.ratios or {}),
            self.max_removed,
        )

    @property
    def combing(self) -> dict[str, Any]:
        """The options that `cpd.comb` takes."""
        return {name: getattr(self, name) for name in ("outputs", "proof_copies", "proof_seconds")}

    def settings(self) -> dict[str, Any]:
        """All options but `latency_inputs`, as JSON types, which a checkpoint keeps."""
        found = super().settings()
        del found["latency_inputs"]
        return {**found, "runtime": ",".join(names_of(self.runtime))}


PRUNING = instance(PruneConfig, "a cpd.PruneConfig")
