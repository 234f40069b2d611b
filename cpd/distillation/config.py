"""The recipe of a training: every setting of `distill`, checked on construction, and what an epoch of it gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real

from torch import nn

from cpd.distillation.optimizers import make_optimizer
from cpd.errors import InputError

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


def _within(value: object, low: float, below: float = math.inf, *, exclusive: bool = False) -> bool:
    """True if `value` is a real number in `[low, below)`, in `(low, below)` if exclusive."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return low <= float(value) < below and not (exclusive and float(value) == low)


def _knows_optimizer(name: object) -> bool:
    """True if timm knows an optimizer of that name."""
    if not isinstance(name, str) or name in DEFAULT_LR:
        return isinstance(name, str)
    from timm.optim import list_optimizers  # some seconds to import, hence not at the top

    return name in list_optimizers()


@dataclass(frozen=True)
class DistillConfig:
    """How a student is trained; every value is checked on construction.

    Attributes:
        epochs: passes over the data, >= 0. A fraction (0.5, 2.5) ends within the last pass and needs data
            with a length. 0 trains nothing.
        optimizer: a name of `timm.optim.list_optimizers()`, as "sgd" (with Nesterov momentum) or "adamw"; it is made
            once, to see that this machine can.
        lr: the peak learning rate, > 0. None takes 0.01 for "sgd", 5e-4 for "adamw"; any other optimizer
            needs it given.
        momentum: of the optimizers that have one, in [0, 1).
        weight_decay: >= 0; biases and norm weights (all 1-d parameters) are left out, as timm does.
        warmup: the share of the training, in [0, 1), in which the rate rises linearly from zero to its
            peak; it is set anew at every step.
        scheduler: how it falls from there, a scheduler of timm: "cosine" (half a cosine, to zero), "poly" (linearly,
            to zero), "tanh", or "step" (to a tenth after each third).
        kd: the distillation loss: "kl" (Hinton), "cwd" (channel-wise, for maps), "cirkd" (cross-image relations
            between pixels, within a batch and to a memory), "mse" (on features), or "none".
        task_weight: the weight of the task's loss, >= 0; at 0 the student learns from the teacher alone, which is
            best where there are few images.
        kd_weight: the weight of the distillation loss beside the task's, >= 0; 0 is the same as kd="none". None:
            what is usual for the loss (`cpd.distillation.config.KD_LOSSES`).
        temperature: by which logits or similarities are divided in the distillation loss, > 0. None: what is usual.
        features: modules by name, or {the student's: the teacher's}, of which the loss compares the outputs, the
            student's through a learned linear map where it is narrower. None: the logits; for "cirkd" and "mse" what
            the last layer reads.
        ema: decay, in (0, 1), of an average of the weights that takes the student's place at the end, and in
            `evaluate`; it starts anew at every shrink. None: no average.
        mixup: alpha of mixup (Zhang et al. 2018), >= 0; for class targets.
        cutmix: alpha of CutMix (Yun et al. 2019), >= 0; with both, each batch gets one of them.
        mixed_precision: "no", "bf16", or "fp16" (with loss scaling; not on a CPU).
        accumulate: batches whose gradients are averaged for one step, >= 1.
        max_grad_norm: the L2 norm to which the gradient of all parameters is clipped, > 0; None: no clipping.
        seed: for `random`, NumPy and PyTorch while training, >= 0; their former states are put back after it.
        progress: whether a progress bar is shown on stderr; None: if stderr is a terminal.

    Raises:
        InputError: if a value is out of range (the message gives the range), or the optimizer cannot be made.
    """

    epochs: float = 10
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    scheduler: str = "cosine"
    kd: str = "kl"
    task_weight: float = 1.0
    kd_weight: float | None = None
    temperature: float | None = None
    features: Sequence[str] | Mapping[str, str] = ()
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixed_precision: str = "no"
    accumulate: int = 1
    max_grad_norm: float | None = 5.0
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        kinds, clip, heat = (*KD_LOSSES, "none"), self.max_grad_norm, self.temperature
        checks = (
            ("epochs", _within(self.epochs, 0), "a finite number >= 0 (0 trains nothing)"),
            ("optimizer", _knows_optimizer(self.optimizer), "a name of timm.optim.list_optimizers()"),
            ("lr", self.lr is None or _within(self.lr, 0, exclusive=True), "a number > 0, or None"),
            ("lr", self.lr is not None or self.optimizer in DEFAULT_LR, "given for this optimizer"),
            ("momentum", _within(self.momentum, 0, 1), "in [0, 1)"),
            ("weight_decay", _within(self.weight_decay, 0), "a number >= 0"),
            ("warmup", _within(self.warmup, 0, 1), "a share of the training in [0, 1)"),
            ("kd", self.kd in kinds, f"one of {', '.join(kinds)}"),
            ("scheduler", self.scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}"),
            ("task_weight", _within(self.task_weight, 0), "a number >= 0"),
            ("kd_weight", self.kd_weight is None or _within(self.kd_weight, 0), "a number >= 0, or None"),
            ("temperature", heat is None or _within(heat, 0, exclusive=True), "a number > 0, or None"),
            ("features", not isinstance(self.features, str), "a list of names of modules, or a mapping"),
            ("ema", self.ema is None or _within(self.ema, 0, 1, exclusive=True), "in (0, 1), or None"),
            ("mixup", _within(self.mixup, 0), "a number >= 0"),
            ("cutmix", _within(self.cutmix, 0), "a number >= 0"),
            ("mixed_precision", self.mixed_precision in ("no", "fp16", "bf16"), "one of no, fp16, bf16"),
            ("accumulate", isinstance(self.accumulate, int) and self.accumulate >= 1, "an integer >= 1"),
            ("max_grad_norm", clip is None or _within(clip, 0, exclusive=True), "a number > 0, or None"),
            ("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**31, "an integer in [0, 2^31)"),
            ("progress", self.progress in (None, True, False), "True, False, or None"),
        )
        for name, good, wanted in checks:
            if not good:
                raise InputError(f"DistillConfig: {name} is {getattr(self, name)!r}; it must be {wanted}.")
        if self.optimizer not in DEFAULT_LR:  # which can always be made
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
    """

    epoch: int
    loss: float
    task_loss: float | None
    kd_loss: float | None
    lr: float
    steps_per_second: float
    metric: float | None = None

    def __str__(self) -> str:
        """One line of a log."""
        parts = (("task", self.task_loss), ("distillation", self.kd_loss))
        told = ", ".join(f"{name} {value:.4g}" for name, value in parts if value is not None)
        metric = "" if self.metric is None else f", metric {self.metric:.4g}"
        return f"Epoch {self.epoch}: loss {self.loss:.4g} ({told}){metric}, {self.steps_per_second:.3g} steps/s"

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, ready for JSON."""
        return asdict(self)
