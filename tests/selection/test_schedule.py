"""Schedules: when what share of the channels goes."""

from __future__ import annotations

import pytest

from cpd.errors import InputError
from cpd.selection.schedule import Schedule


def test_schedules_end_at_everything_and_rise_as_they_say() -> None:
    linear = Schedule("linear", start=0.1, end=0.5).events(100)
    cubic = Schedule("cubic", start=0.1, end=0.5, interval=8).events(100)
    assert [step for step, _ in linear] == [14, 18, 22, 26, 30, 34, 38, 42, 46, 50]
    assert [share for _, share in linear] == pytest.approx([k / 10 for k in range(1, 11)])
    assert cubic == [(18, pytest.approx(1 - 0.8**3)), (26, pytest.approx(1 - 0.6**3)), (34, pytest.approx(1 - 0.4**3)),
                     (42, pytest.approx(1 - 0.2**3)), (50, 1.0)]  # fmt: skip
    assert Schedule("one-shot", start=0.25).events(40) == [(10, 1.0)]
    assert [step for step, _ in Schedule("linear", end=1.0).events(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule("exponential"),
        lambda: Schedule("cubic", start=0.6),
        lambda: Schedule("cubic", end=1.5),
        lambda: Schedule("cubic", interval=0),
        lambda: Schedule("cubic", interval=30).events(50),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(InputError):
        make()
