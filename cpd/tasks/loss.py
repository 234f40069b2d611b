"""The loss of the task: the user's own, or cross-entropy inferred from the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from cpd.errors import InputError, of_the_user, some
from cpd.model.inputs import Batch, logits
from cpd.model.outputs import whole

LossFunction = Callable[[Any, Any], Tensor]  # loss(output, target) -> scalar, on the output as the model gives it


IGNORED_CLASS = -100  # as in `torch.nn.functional.cross_entropy`


def loss_on(
    batch: Batch,
    model: nn.Module,
    loss: LossFunction | None = None,
    read: Callable[[Any], Any] = whole,
    whose: str = "The model",
    through: Callable[[Callable[[nn.Module], Any]], Any] | None = None,
) -> tuple[Any, Tensor | None]:
    """The output of a model on a batch, and the loss of the task: the user's, else the model's own, else inferred.

    Args:
        batch: where a task has read it, it says how the model gives its own loss.
        model: in the mode that it is to run in.
        loss: as for `task_loss`.
        read: as for `task_loss`.
        whose: the model, in words, for a message.
        through: calls what it is given with the model, as `Trainee` does, which may be wrapped for several processes.

    Raises:
        InputError: if the model fails on the batch, its own loss is no scalar, or as `task_loss`.
    """
    forward = through or (lambda run: run(model))
    if loss is not None or batch.learn is None:
        output = forward(lambda model: batch.on(model, whose))
        return output, task_loss(output, batch.target, loss, read, batch.place)
    learn = batch.learn
    with of_the_user(whose, f"on {batch.place}, with its target"):
        output, value = forward(lambda model: learn(model, batch.call, batch.target))
    if value is None:
        return output, task_loss(output, batch.target, None, read, batch.place)
    return output, _scalar(value, f"{whose}'s own loss", batch.place)


def read_by_loss_alone(model: nn.Module, batch: Batch, read: Callable[[Any], Any] = whole) -> frozenset[str]:
    """Parameters that a model's own loss depends on, and what matters of its output does not: auxiliary heads.

    Nothing else shows that their widths are fixed, as those of a head that gives classes.

    Args:
        model: in the mode that it is to run in; its parameters may lose their gradients.
        batch: as its task has read it.
        read: gives the part of an output that matters.
    """
    if batch.learn is None:
        return frozenset()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    before = {name: parameter.requires_grad for name, parameter in named.items()}

    def depending(value: Tensor) -> set[str]:
        if not value.requires_grad:
            return set()
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}

    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            _, loss = loss_on(batch, model)
            leaves = [leaf for leaf in tree_leaves(read(batch.on(model))) if isinstance(leaf, Tensor)]
            given = [leaf.float().sum() for leaf in leaves if leaf.is_floating_point()]
            if loss is None or not given:
                return frozenset()
            return frozenset(depending(loss) - depending(torch.stack(given).sum()))
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])


def task_loss(
    output: Any,
    target: Any,
    loss: LossFunction | None = None,
    read: Callable[[Any], Any] = whole,
    place: str = "a batch of data",
) -> Tensor | None:
    """The loss of the task: the user's, else cross-entropy inferred from the target.

    Args:
        output: the model's output; for an inferred loss `cpd.model.inputs.logits(output)` is taken, `[N, C, ...]`.
        target: class indices `[N, ...]` of an integer type (-100 is ignored), or class probabilities of
            the logits' shape; with `loss`, anything that it takes.
        loss: `loss(output, target) -> scalar`, on the unchanged output.
        read: gives the part of the output that an inferred loss is taken of.
        place: which batch it is, for a message.

    Returns:
        A scalar; None where there is neither target nor loss.

    Raises:
        InputError: if no loss can be inferred, or `loss` returns no scalar tensor.
    """
    if loss is not None:
        with of_the_user("loss", f"on {place}"):
            value = loss(output, target)
        return _scalar(value, "loss=", place)
    if target is None:
        return None
    prediction = logits(read(output))
    _check_target(prediction, target, place)
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = target.to(prediction.dtype) if target.is_floating_point() else target.long()
    return F.cross_entropy(prediction, target, ignore_index=IGNORED_CLASS)


def _scalar(value: Any, what: str, place: str) -> Tensor:
    """A loss as a tensor without dimensions; `InputError` if it is no tensor of one number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(
        f"{what} must return a tensor of one number, not {found} (on {place}): average over the batch in it."
    )


def _check_target(prediction: Tensor, target: Any, place: str) -> None:
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
            others = [int(value) for value in wrong.unique()]
            if len(others) > 1:
                raise InputError(
                    f"The model has {shape[1]} classes (its output is {list(shape)}), and the targets hold others: "
                    f"{some(others, 3)} (on {place}). Pass a model of as many classes as the data has, or loss=."
                )
            found += f" that holds the class {others[0]}"
            remedy = f"for instance torch.nn.CrossEntropyLoss(ignore_index={int(wrong[0])}) to leave it out"
    raise InputError(
        f"No loss can be inferred from an output of shape {list(shape)} and a {found} (on {place}): cross-entropy "
        f"needs [N, C, ...] with class indices [N, ...] or class probabilities [N, C, ...]. Pass loss=, {remedy}."
    )
