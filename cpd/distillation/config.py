"""The recipe of a training: every setting of `distill`, checked on construction, and what an epoch of it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cpd.errors import InputError
from cpd.options import SEED, Check, check_options, choice, flag, instance, integer, number, option, with_help
from cpd.tasks.metric import told

DEFAULT_LR = {"sgd": 0.01, "adamw": 5e-4}
#: Every distillation loss -> the temperature that is usual for it, and its usual weight beside the task's loss.
KD_LOSSES: dict[str, tuple[float, float]] = {
    "kl": (2.0, 1.0),
    "cwd": (4.0, 3.0),
    "cirkd": (0.1, 1.0),
    "mse": (1.0, 1.0),
}
#: Schedulers of timm that need nothing but the length of the training.
SCHEDULERS = ("cosine", "poly", "tanh", "step")


def _is_optimizer(name: object) -> bool:
    """Whether timm knows an optimizer of that name."""
    if not isinstance(name, str) or name in DEFAULT_LR:
        return isinstance(name, str)
    from timm.optim import list_optimizers  # some seconds to import, hence not at the top

    return name in list_optimizers()


_POSITIVE = number("above 0", lambda value: value > 0)
_AT_LEAST_0 = number("of at least 0", lambda value: value >= 0)
_BELOW_1 = number("of at least 0 and below 1", lambda value: 0 <= value < 1)
_OPTIMIZER = Check("a name of timm.optim.list_optimizers()", _is_optimizer)
_FEATURES = Check(
    "a list of names of modules, or a mapping of them",
    lambda value: isinstance(value, (Mapping, Sequence)) and not isinstance(value, str),
    read=tuple,
)


@with_help
@dataclass(frozen=True)
class DistillConfig:
    """All options of the training. They are checked when the config is made.

    Options:
        Each can be read as an attribute.

    Raises:
        InputError: If a value is out of range (the message gives the range), or if the optimizer cannot be made.
    """

    epochs: float = option(
        10, number("from 0 to 100000", lambda value: 0 <= value <= 100_000),
        "Passes over the data. 0 prunes without a gradient step. A fraction (0.5, 2.5) stops within the last pass and "
        "needs data with a length.",
    )  # fmt: skip
    optimizer: str = option(
        "sgd", _OPTIMIZER, "Any name in timm.optim.list_optimizers(), such as sgd (with Nesterov momentum) or adamw."
    )
    lr: float | None = option(
        None, _POSITIVE, "Peak learning rate. Default: 0.01 for sgd, 5e-4 for adamw; other optimizers have no default."
    )
    momentum: float = option(0.9, _BELOW_1, "Momentum, for optimizers that have one.")
    weight_decay: float = option(
        1e-4, _AT_LEAST_0, "Weight decay. As in timm, it is not applied to biases and normalization weights (1-d)."
    )
    warmup: float = option(
        0.05, _BELOW_1, "Fraction of the training in which the learning rate rises linearly from zero to its peak."
    )
    scheduler: str = option(
        "cosine", choice(*SCHEDULERS),
        "Learning-rate schedule after the warm-up: cosine (to zero), poly (linearly to zero), tanh, or step (to a "
        "tenth after each third).",
    )  # fmt: skip
    kd: str = option(
        "kl", choice(*KD_LOSSES, "none"),
        "Distillation loss: kl (Kullback-Leibler divergence of the logits), cwd (channel-wise, for segmentation), "
        "cirkd (relations between pixels across images), mse (mean squared error of features), or none.",
    )  # fmt: skip
    task_weight: float = option(
        1.0, _AT_LEAST_0, "Weight of the task's loss. 0 trains on the teacher alone, which is best with few images."
    )
    kd_weight: float | None = option(
        None, _AT_LEAST_0, "Weight of the distillation loss. Default: the usual value for that loss."
    )
    temperature: float | None = option(
        None, _POSITIVE, "Temperature of the distillation loss. Default: the usual value for that loss."
    )
    features: Sequence[str] | Mapping[str, str] = option(
        (), _FEATURES,
        "Names of modules whose outputs the distillation loss compares (in Python also {student's module: teacher's}). "
        "Where the student is narrower, a learned linear map is put between. Default: the logits; for cirkd the input "
        "of the last layer; for mse the residual stream at the end of each stage or, if there is none, the input of "
        "the last layer.",
    )  # fmt: skip
    ema: float | None = option(
        None, number("between 0 and 1", lambda value: 0 < value < 1),
        "Decay of an exponential moving average of the weights. The average is what is evaluated, and what the student "
        "has at the end. Default: no average.",
    )  # fmt: skip
    mixup: float = option(0.0, _AT_LEAST_0, "Alpha of mixup (Zhang et al. 2018), for targets that are classes.")
    cutmix: float = option(
        0.0, _AT_LEAST_0, "Alpha of CutMix (Yun et al. 2019). If mixup is set as well, each batch gets one of the two."
    )
    freeze_batchnorm: bool = option(
        False, flag(),
        "Whether BatchNorm layers use their running statistics during training too, and keep them. Their weights are "
        "still trained. This is better where a batch, or all of the data, has too few images for their statistics.",
    )  # fmt: skip
    mixed_precision: str = option(
        "no", choice("no", "fp16", "bf16"), "Mixed precision: no, bf16, or fp16 (with loss scaling, not on a CPU)."
    )
    accumulate: int = option(1, integer(1), "Batches whose gradients are averaged for one optimizer step.")
    max_grad_norm: float | None = option(
        5.0,
        _POSITIVE,
        "L2 norm to which the gradient of all parameters is clipped; None for no clipping.",
        optional=True,
    )
    keep_best: bool = option(
        True, flag(),
        "Whether to keep the weights with the best value of `evaluate`, of those before the training and after each "
        "epoch (once pruning is complete). Otherwise, and without `evaluate`, the last weights are kept.",
    )  # fmt: skip
    seed: int = option(0, SEED, "Seed of the training. Global random states are restored after it.")
    progress: bool | None = option(
        None, flag(), "Whether to show a progress line. Default: shown if stderr is a terminal."
    )

    def __post_init__(self) -> None:
        """Check every field."""
        check_options(self)
        if self.lr is None and self.optimizer not in DEFAULT_LR:
            raise InputError(f"lr must be given: the optimizer {self.optimizer!r} has no default learning rate.")
        if self.optimizer not in DEFAULT_LR:  # those two can always be made
            from torch import nn  # seconds to import, and the command line shows these options in its help

            from cpd.distillation.optimizers import make_optimizer

            make_optimizer(nn.Linear(1, 1), self.optimizer, self.peak_lr, self.weight_decay, self.momentum)

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.lr if self.lr is not None else DEFAULT_LR[self.optimizer]

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a distillation loss with a weight above 0."""
        return self.kd != "none" and self.weight_of_kd > 0

    @property
    def weight_of_kd(self) -> float:
        """The weight of the distillation loss."""
        return self.kd_weight if self.kd_weight is not None else KD_LOSSES.get(self.kd, (1.0, 1.0))[1]

    @property
    def kd_temperature(self) -> float:
        """The temperature of the distillation loss."""
        return self.temperature if self.temperature is not None else KD_LOSSES.get(self.kd, (1.0, 1.0))[0]

    @property
    def feature_pairs(self) -> dict[str, str]:
        """{student's module: teacher's module} whose outputs the distillation loss compares."""
        given = self.features
        return dict(given) if isinstance(given, Mapping) else {name: name for name in given}


TRAINING = instance(DistillConfig, "a cpd.DistillConfig")


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch of `distill`. Losses are means over its batches.

    Attributes:
        epoch: Number of the epoch, counted from 1.
        loss: The whole loss that was minimised.
        task_loss: Its task part; None if there were no targets.
        kd_loss: Its distillation part, before weighting; None without distillation.
        lr: The learning rate at the last step.
        steps_per_second: Optimizer steps per second. The time for evaluation, pruning steps and checkpoints is left
            out.
        metric: The value of `evaluate`; None without it.
        kept: Whether the student ends with the weights from after this epoch.
    """

    epoch: int
    loss: float
    task_loss: float | None
    kd_loss: float | None
    lr: float
    steps_per_second: float
    metric: float | None = None
    kept: bool = False

    def __str__(self) -> str:
        """One line of a log."""
        parts = (("task", self.task_loss), ("distillation", self.kd_loss))
        told = ", ".join(f"{name} {value:.4g}" for name, value in parts if value is not None)
        metric = "" if self.metric is None else f", metric {self.metric:.4g}"
        return f"Epoch {self.epoch}: loss {self.loss:.4g} ({told}){metric}, {self.steps_per_second:.3g} steps/s"

    def told(self, metric: str, epochs: int) -> str:
        """A short line of a log, with the metric by its name."""
        found = "" if self.metric is None else f"{told(metric, self.metric)}, "
        return f"Epoch {self.epoch} of {epochs}: {found}loss {self.loss:.4g}, {self.steps_per_second:.3g} steps/s"

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Progressed:
    """How far a training is, as its checkpoint has it.

    Attributes:
        epoch: epochs behind.
        done: steps of this one.
        sums: the losses of those steps.
        records: one for each epoch behind.
    """

    epoch: int
    done: int
    sums: dict[str, list[float]]
    records: tuple[EpochRecord, ...]
