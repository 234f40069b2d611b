"""The parts of the loss that a student is trained on: the task's, given or inferred, and the distillation losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd.errors import InputError
from cpd.model.inputs import logits

LossFunction = Callable[[Any, Any], Tensor]  # loss(output, target) -> scalar, on the output as the model gives it
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


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation, eq. 4 of Shu et al. 2021 (arXiv 2011.13256), for dense prediction.

    Of each channel a softmax over all positions; `T^2 / C` times the sum over channels of the KL divergence of the
    student's from the teacher's.

    Args:
        student: `[N, C, ...]`, logits or features, with two positions at least.
        teacher: of the same shape.
        temperature: T > 0.

    Returns:
        A scalar, float32 at least: the mean over the batch.

    Raises:
        InputError: if the shapes differ, or there are no positions.
    """
    shape = list(student.shape)
    if student.shape != teacher.shape or len(shape) < 3 or math.prod(shape[2:]) < 2:
        raise InputError(
            "Channel-wise distillation needs maps [N, C, positions ...] of one shape; the student's are "
            f"{shape}, the teacher's {list(teacher.shape)}. For class logits without positions take kd='kl'."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    found, wanted = (F.log_softmax(maps.to(dtype).flatten(2) / temperature, dim=2) for maps in (student, teacher))
    pointwise = F.kl_div(found, wanted, reduction="none", log_target=True)
    return pointwise.sum(dim=2).mean() * temperature**2


def relations(anchors: Tensor, contrasts: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the contrasts of the similarities of embeddings of unit length, over the temperature.

    Args:
        anchors: `[..., A, C]`.
        contrasts: `[..., K, C]`.
        temperature: above 0.

    Returns:
        `[..., A, K]`.
    """
    return F.log_softmax(anchors @ contrasts.transpose(-1, -2) / temperature, dim=-1)


def cross_image(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Mini-batch pixel-to-pixel relations, eq. 3 and 4 of CIRKD (Yang et al. 2022, arXiv 2204.06986).

    For every pair of images of a batch the similarities of all positions of one to all of the other; the KL
    divergence of the student's distribution over the second image from the teacher's, averaged over positions and
    pairs.

    Args:
        student: `[N, P, C]`, embeddings of unit length.
        teacher: `[N, P, C']`, likewise.
        temperature: by which similarities are divided, > 0.
    """
    losses = [
        F.kl_div(
            relations(student[image], student, temperature), relations(teacher[image], teacher, temperature),
            reduction="none", log_target=True,
        ).sum(-1).mean()
        for image in range(len(student))
    ]  # fmt: skip
    return torch.stack(losses).mean()


def to_memory(student: Tensor, teacher: Tensor, memory: Tensor, temperature: float = 0.1) -> Tensor:
    """Relations of pixels to a memory of the teacher's embeddings, eq. 7 and 11 of CIRKD: tau^2 times the divergence.

    Args:
        student: `[A, C]`, anchors of unit length, in the teacher's space.
        teacher: `[A, C]`, the teacher's at the same positions.
        memory: `[K, C]`.
        temperature: tau.
    """
    found, wanted = (relations(anchors, memory, temperature) for anchors in (student, teacher))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of features of one shape, relative to the teacher's mean square.

    Romero et al. 2015 (FitNets, arXiv 1412.6550), eq. 3; relative, so that layers of any scale count alike.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def task_loss(output: Any, target: Any, loss: LossFunction | None = None) -> Tensor | None:
    """The loss of the task: the user's, else cross-entropy inferred from the target.

    Args:
        output: the model's output; for an inferred loss `cpd.model.inputs.logits(output)` is taken, `[N, C, ...]`.
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
