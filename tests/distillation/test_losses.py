"""The loss of a student's logits against the formula by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cpd.distillation.losses import kl_divergence
from cpd.errors import InputError
from helpers.teaching import CLASSES


def test_kl_equals_the_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, CLASSES, dtype=torch.float64)
    expected = 0.0
    for row in range(5):
        p = [math.exp(value / 3) for value in teacher[row].tolist()]
        q = [math.exp(value / 3) for value in student[row].tolist()]
        expected += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert kl_divergence(student, teacher, 3.0).item() == pytest.approx(9 * expected / 5, rel=1e-12)


def test_kl_of_equal_logits_is_zero_and_its_gradient_too() -> None:
    student = torch.randn(5, CLASSES, requires_grad=True)
    value = kl_divergence(student, student.detach().clone(), 2.0)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max().item() < 1e-7


def test_kl_averages_over_space() -> None:
    student, teacher = torch.randn(2, 3, CLASSES, 2, 5)
    rows = [logits.permute(0, 2, 3, 1).reshape(-1, CLASSES) for logits in (student, teacher)]
    torch.testing.assert_close(kl_divergence(student, teacher, 2.0), kl_divergence(*rows, 2.0))


def test_kl_of_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 3, CLASSES, dtype=torch.bfloat16)
    assert kl_divergence(student, teacher).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 1), (2, 1)), ((3,), (3,))])
def test_kl_refuses_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match="two classes"):
        kl_divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
