"""The parts of the loss that a student is trained on: the task's, given or inferred, and the distillation losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd.errors import InputError


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
            "The KL divergence needs logits [N, C, ...] of the same shape, with at least two classes; those of the "
            f"student have shape {shape}, those of the teacher {list(teacher_logits.shape)}. Pass a teacher for the "
            "same task, or kd='none' with a loss."
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
            "Channel-wise distillation needs maps [N, C, positions ...] of the same shape; those of the student have "
            f"shape {shape}, those of the teacher {list(teacher.shape)}. For class logits, use kd='kl'."
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
