"""The loss of the task: what is inferred from the targets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from cpd.errors import InputError
from cpd.tasks.loss import task_loss
from helpers.teaching import CLASSES


def test_task_loss_is_inferred() -> None:
    logits = torch.randn(5, CLASSES)
    target = torch.tensor([0, 1, 2, 3, -100])
    expected = -torch.log_softmax(logits, 1)[range(4), range(4)].mean()
    torch.testing.assert_close(task_loss(logits, target), expected)
    torch.testing.assert_close(task_loss({"logits": logits}, target.int()), expected)
    soft = torch.softmax(torch.randn(5, CLASSES), 1)
    torch.testing.assert_close(task_loss(logits, soft), -(soft * torch.log_softmax(logits, 1)).sum(1).mean())
    assert task_loss(logits, None) is None
    assert task_loss(logits, "anything", lambda output, target: output.sum()) == logits.sum()


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (torch.zeros(5, 7).long(), "shape"),
        (torch.zeros(5, CLASSES), "BCEWithLogitsLoss"),
        (torch.zeros(5), "class indices"),
        (torch.zeros(5, dtype=torch.bool), "torch.bool"),
        (torch.full((5,), 255), r"ignore_index=255"),
        ({"boxes": torch.zeros(3)}, "dict"),
    ],
)
def test_task_loss_that_cannot_be_inferred(target: object, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        task_loss(torch.zeros(5, CLASSES), target)
    assert "loss=" in str(caught.value)


def test_task_loss_must_be_a_scalar() -> None:
    with pytest.raises(InputError, match="one number"):
        task_loss(torch.zeros(5, CLASSES), None, lambda output, target: output)
    with pytest.raises(InputError, match="not float"):
        task_loss(torch.zeros(5, CLASSES), None, lambda output, target: 0.5)
