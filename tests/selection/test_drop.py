"""The fastest within so many points: what is concluded from how many samples, and which speed is next."""

import numpy as np
import pytest

from cpd.selection.drop import MOST, RESOLUTION, Bracket, drop_of, samples_needed


def test_a_drop_is_paired_so_what_both_models_do_alike_adds_no_uncertainty():
    rng = np.random.default_rng(0)
    before = 100.0 * (rng.random(2000) < 0.7)
    after = before.copy()
    after[:20] = 100.0 - after[:20]  # twenty of two thousand are another answer
    found = drop_of(before, after, 1.0, 0.95)
    assert found.value == pytest.approx(float(np.mean(before) - np.mean(after)))
    assert 0 < found.upper - found.value < 0.5  # of independent images it would be 2.4
    shuffled = rng.permutation(after)
    assert drop_of(before, shuffled, 1.0, 0.95).upper - found.value > 2


def test_more_samples_and_less_confidence_bring_the_bound_down():
    before, after = np.array([100.0] * 8 + [0.0] * 2), np.array([100.0] * 7 + [0.0] * 3)
    bounds = [drop_of(np.tile(before, n), np.tile(after, n), 1.0, 0.95).upper for n in (1, 10, 100)]
    assert bounds == sorted(bounds, reverse=True)
    assert drop_of(before, after, 1.0, 0.6).upper < bounds[0]
    assert drop_of(before, after, 12.0, 0.95).confidence > 0.4


def test_a_single_number_says_nothing_of_chance():
    found = drop_of([91.0], [90.5], 1.0, 0.95)
    assert (found.value, found.upper, found.confidence, found.holds) == (0.5, None, None, True)
    assert not drop_of([91.0], [89.5], 1.0, 0.95).holds


def test_a_few_samples_that_all_agree_prove_little():
    same = [100.0] * 50
    assert drop_of(same, same, 1.0, 0.95, span=100.0).upper > 1.0
    assert drop_of(same * 10, same * 10, 1.0, 0.95, span=100.0).holds


def test_an_unchanged_model_holds_only_on_enough_samples():
    needed = samples_needed(1.0, 100.0, 0.95)
    for count, holds in ((needed, True), (needed // 2, False)):
        values = np.array([100.0] * (count // 2) + [0.0] * (count - count // 2))
        assert drop_of(values, values, 1.0, 0.95).holds is holds


def test_the_bracket_closes_around_the_fastest_that_holds():
    for fastest in (1.2, 1.5, 2.9, 6.0):
        bracket, tried = Bracket(), []
        while (speedup := bracket.upcoming) is not None:
            tried.append(speedup)
            bracket.learn(speedup, speedup <= fastest)
        assert len(tried) <= MOST
        assert bracket.held <= fastest < bracket.failed
        assert fastest / bracket.held < RESOLUTION**2


def test_where_nothing_holds_the_bracket_ends_at_the_original():
    bracket, tried = Bracket(), []
    while (speedup := bracket.upcoming) is not None:
        tried.append(speedup)
        bracket.learn(speedup, False)
    assert bracket.held == 1.0
    assert tried == sorted(tried, reverse=True)
    assert tried[-1] < RESOLUTION**1.5


def test_what_is_chosen_holds_on_images_that_were_not_seen():
    """Right and wrong answers drawn: the true loss at the speed that is chosen is allowed nine times of ten."""
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        before = 100.0 * (rng.random(1500) < 0.9)
        noise = rng.random((2, 1500))  # the same images, harder and harder: those that flip flip at all higher speeds

        def after(speedup, before=before, noise=noise):
            lost = (before > 0) & (noise[0] < 0.03 * (speedup - 1))
            won = (before == 0) & (noise[1] < 0.1 * (speedup - 1))
            return np.where(lost, 0.0, np.where(won, 100.0, before))

        bracket = Bracket()
        while (speedup := bracket.upcoming) is not None:
            bracket.learn(speedup, drop_of(before, after(speedup), 1.0, 0.95).holds)
        held += 100 * (0.9 * 0.03 - 0.1 * 0.1) * (bracket.held - 1) <= 1.0
    assert held >= 180
