"""Which branches go, in what order, and how many."""

from __future__ import annotations

import math

import pytest

from cpd.selection.branching import Candidate, best_number, chosen_number


def search(error, scores, count):
    """The numbers tried of so many branches, each of which costs 0.01 alone."""
    asked = []

    def candidate(number):
        def found():
            asked.append(number)
            return error(number)

        return None if scores(number) is None else Candidate(scores(number), found)

    tried = best_number([0.01] * count, candidate)
    assert asked == [number for number in tried if scores(number) is not None]  # each once
    return tried


def test_the_number_whose_error_is_least_is_found_in_few_trials():
    """Widths cost less the more branches go, and branches more than the sum of what each costs alone."""
    tried = search(lambda n: 5 * (1 - n / 16) ** 2 * 0.1 + 0.015 * n, lambda n: (1 - n / 16) ** 2 * 0.1, 12)
    assert chosen_number(tried) == min(range(13), key=lambda n: 5 * (1 - n / 16) ** 2 * 0.1 + 0.015 * n)
    assert len(tried) <= 6


def test_none_goes_where_each_makes_it_worse():
    tried = search(lambda n: 0.2 + 0.05 * n, lambda n: 0.04, 9)
    assert chosen_number(tried) == 0
    assert len(tried) <= 3


def test_none_goes_for_a_gain_within_what_is_noise():
    assert chosen_number({0: 0.2, 3: 0.195}) == 0
    assert chosen_number({0: 0.2, 3: 0.18}) == 3


def test_so_many_go_as_bring_the_target_into_reach():
    tried = search(lambda n: 0.1 * n, lambda n: None if n < 4 else 0.01, 6)
    assert math.isinf(tried[0])
    assert chosen_number(tried) == 4


@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_branches(count):
    tried = search(lambda n: 1 - n / (2 * count), lambda n: 0.1 * (1 - n / (2 * count)), count)
    assert chosen_number(tried) == max(tried) == count


def test_widths_that_alone_do_not_reach_the_target_count_for_what_they_cost():
    """The smallest number that reaches it leaves the narrowest widths, the worst of all."""

    def scores(number):
        return None if number < 4 else (1 - number / 32) ** 6

    def error(number):
        return min(1.0, 40 * scores(number)) + 0.004 * number

    tried = search(error, scores, 27)
    best = min(error(number) for number in range(4, 28))
    assert error(chosen_number(tried)) <= 1.2 * best
    assert len(tried) <= 7
