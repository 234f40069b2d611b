"""The parts of the loss that a student is trained on: the task's, given or inferred, and the distillation losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd.errors import InputError
from cpd.inputs import logits

LossFunction = Callable[[Any, Any], Tensor]  # loss(output, target) -> scalar, on the output as the model gives it
DistillationLoss = Callable[[Tensor, Tensor, float], Tensor]  # (student's logits, teacher's, temperature) -> scalar
IGNORED_CLASS = -100  # as in `torch.nn.functional.cross_entropy`


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, section 2 of Hinton et al. 2015.

    arXiv 1503.02531. `T^2` keeps the size of the gradients independent of the temperature.

    Args:
        student_logits: `[N, C, ...]`, classes in dim 1.
        teacher_logits: of the same shape.
        temperature: T > 0; a higher one shows more of the teacher's unlikely classes.

    Returns:
        A scalar, float32 at least: summed over the classes, averaged over the batch and any trailing dims.

    Raises:
        InputError: if the shapes differ, or there are not two classes at least.
    """
    shape = list(student_logits.shape)
    if student_logits.shape != teacher_logits.shape or len(shape) < 2 or shape[1] < 2:
        raise InputError(
            "The KL divergence needs logits [N, C, ...] of one shape and two classes at least; the student's "
            f"are {shape}, the teacher's {list(teacher_logits.shape)}. Give a teacher of the same task, "
            "or kd='none' with a loss."
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=1)
    pointwise = F.kl_div(student, teacher, reduction="none", log_target=True)
    return pointwise.sum(dim=1).mean() * temperature**2


KD_LOSSES: dict[str, DistillationLoss] = {"kl": kl_divergence}


def task_loss(output: Any, target: Any, loss: LossFunction | None = None) -> Tensor | None:
    """The loss of the task: the user's, else cross-entropy inferred from the target.

    Args:
        output: the model's output; for an inferred loss `cpd.inputs.logits(output)` is taken, `[N, C, ...]`.
        target: class indices `[N, ...]` of an integer type (-100 is ignored), or class probabilities of
            the logits' shape; with `loss`, anything that it takes.
        loss: `loss(output, target) -> scalar`, on the unchanged output.

    Returns:
        A scalar; None where there is neither target nor loss.

    Raises:
        InputError: if no loss can be inferred, or `loss` returns no scalar tensor.
    """
    if loss is not None:
        value = loss(output, target)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss= must return a tensor of one number, not {found}: average over the batch in it.")
    if target is None:
        return None
    prediction = logits(output)
    _check_target(prediction, target)
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = target.to(prediction.dtype) if target.is_floating_point() else target.long()
    return F.cross_entropy(prediction, target, ignore_index=IGNORED_CLASS)


def _check_target(prediction: Tensor, target: Any) -> None:
    """Raise `InputError` unless `target` holds class indices or class probabilities for `prediction`."""
    shape, found, remedy = prediction.shape, type(target).__name__, "a function (output, target) -> scalar"
    if isinstance(target, Tensor) and len(shape) >= 2:
        found = f"{target.dtype} target of shape {list(target.shape)}"
        if target.is_floating_point() and target.shape == shape:
            total = target.float().sum(dim=1)
            if bool((target >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-2):
                return
            found += " that is no distribution over dim 1"
            remedy = "for instance torch.nn.BCEWithLogitsLoss() for multi-label targets"
        integral = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        if integral and target.shape == (shape[0], *shape[2:]):
            wrong = target[(target != IGNORED_CLASS) & ((target < 0) | (target >= shape[1]))]
            if not wrong.numel():
                return
            found += f" that holds the class {int(wrong[0])}"
            remedy = f"for instance torch.nn.CrossEntropyLoss(ignore_index={int(wrong[0])}) to leave it out"
    raise InputError(
        f"No loss can be inferred from an output of shape {list(shape)} and a {found}: cross-entropy needs "
        f"[N, C, ...] with class indices [N, ...] or class probabilities [N, C, ...]. Pass loss=, {remedy}."
    )
