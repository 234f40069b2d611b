"""Count ties whose sides are products with a number: widths in a ratio."""

from itertools import product

import pytest

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Fixed
from cpd.algebra.ties import Tie


@pytest.mark.parametrize(("times_left", "times_right", "left", "right"), [(1, 2, 8, 4), (2, 3, 12, 8), (3, 1, 4, 12)])
def test_widths_in_a_ratio_are_raised_to_the_next_that_keep_it(times_left, times_right, left, right) -> None:
    one, other = Axis(left), Axis(right)
    tie = Tie(axes.product([Fixed(times_left), one]), axes.product([Fixed(times_right), other]), "a ratio")
    assert tie.axes == [one, other]
    for a, b in product(range(1, left + 1), range(1, right + 1)):
        found = ties.repair({one: a, other: b}, [tie])
        assert times_left * found[one] == times_right * found[other]
        assert a <= found[one] <= left
        assert b <= found[other] <= right
        smaller = {one: found[one] - times_right, other: found[other] - times_left}
        assert smaller[one] < a or smaller[other] < b
