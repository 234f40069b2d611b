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
    """How a student is trained; every value is checked on construction.

    Options:
        Each may be read as an attribute.

    Raises:
        InputError: if a value is out of range (the message gives the range), or the optimizer cannot be made.
    """

    epochs: float = option(
        10, number("from 0 to 100000", lambda value: 0 <= value <= 100_000),
        "Passes over the data; 0 prunes without a gradient step. A fraction (0.5, 2.5) ends within the last pass and "
        "needs data with a length.",
    )  # fmt: skip
    optimizer: str = option(
        "sgd", _OPTIMIZER, "A name of timm.optim.list_optimizers(), as sgd (with Nesterov momentum) or adamw."
    )
    lr: float | None = option(
        None, _POSITIVE, "Peak learning rate. Default: 0.01 for sgd, 5e-4 for adamw; other optimizers need it given."
    )
    momentum: float = option(0.9, _BELOW_1, "Momentum of the optimizers that have one.")
    weight_decay: float = option(
        1e-4, _AT_LEAST_0, "Weight decay; biases and norm weights (all 1-d parameters) are left out, as timm does."
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
        "Distillation loss: kl (of the logits), cwd (channel-wise, for label maps), cirkd (cross-image relations of "
        "pixels), mse (of features), or none.",
    )  # fmt: skip
    task_weight: float = option(
        1.0, _AT_LEAST_0, "Weight of the task's loss; 0 learns from the teacher alone, which is best with few images."
    )
    kd_weight: float | None = option(
        None, _AT_LEAST_0, "Weight of the distillation loss beside the task's. Default: what is usual for the loss."
    )
    temperature: float | None = option(
        None, _POSITIVE, "Distillation temperature. Default: what is usual for the loss."
    )
    features: Sequence[str] | Mapping[str, str] = option(
        (), _FEATURES,
        "Modules whose outputs the distillation loss compares (Python: or {the student's: the teacher's}), through a "
        "learned linear map where the student's is narrower. Default: the logits; for cirkd what the last layer "
        "reads; for mse the residual stream at the end of each stage, or, where there is none, what the last layer "
        "reads.",
    )  # fmt: skip
    ema: float | None = option(
        None, number("between 0 and 1", lambda value: 0 < value < 1),
        "Decay of an average of the weights that takes the student's place at the end, and in evaluation.",
    )  # fmt: skip
    mixup: float = option(0.0, _AT_LEAST_0, "Alpha of mixup (Zhang et al. 2018), for class targets.")
    cutmix: float = option(
        0.0, _AT_LEAST_0, "Alpha of CutMix (Yun et al. 2019); with mixup too, each batch gets one of them."
    )
    mixed_precision: str = option(
        "no", choice("no", "fp16", "bf16"), "Mixed precision: no, bf16, or fp16 (with loss scaling; not on a CPU)."
    )
    accumulate: int = option(1, integer(1), "Batches whose gradients are averaged for one step.")
    max_grad_norm: float | None = option(
        5.0, _POSITIVE, "L2 norm to which the gradient of all parameters is clipped; None: no clipping.", optional=True
    )
    keep_best: bool = option(
        True, flag(),
        "Keep the weights that do best by `evaluate`, of those before the training and after each epoch (once all "
        "pruning is done); otherwise, and without `evaluate`, the last.",
    )  # fmt: skip
    seed: int = option(0, SEED, "Seed of the training; global random states are as before after it.")
    progress: bool | None = option(None, flag(), "Whether a progress line is shown. Default: if stderr is a terminal.")

    def __post_init__(self) -> None:
        """Check every field."""
        check_options(self)
        if self.lr is None and self.optimizer not in DEFAULT_LR:
            raise InputError(f"lr must be given for the optimizer {self.optimizer!r}.")
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
        """Whether the distillation loss counts."""
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
        """{the student's module: the teacher's} whose outputs the distillation loss compares."""
        given = self.features
        return dict(given) if isinstance(given, Mapping) else {name: name for name in given}


TRAINING = instance(DistillConfig, "a cpd.DistillConfig")


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of `distill` gave; losses are means over its batches.

    Attributes:
        epoch: counted from 1.
        loss: the whole loss that was minimised.
        task_loss: its task part; None if there was no target.
        kd_loss: its distillation part before weighting; None without one.
        lr: the learning rate at the last step.
        steps_per_second: optimizer steps a second; evaluation, shrinks and checkpoints are not counted.
        metric: what `evaluate` returned; None without it.
        kept: whether the student has the weights after this epoch now.
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
