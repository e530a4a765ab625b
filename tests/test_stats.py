"""Numbers worked by hand, and agreement with textbook cases."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramed.evaluate import stats


def test_wilson_by_hand():
    """8 of 10: z = 1.96, z^2 = 3.8416; centre (8 + 1.9208) / 13.8416 = 0.7167; half-width
    1.96 / 13.8416 * sqrt(8 * 2 / 10 + 0.9604) = 0.2266; so [0.4902, 0.9433]."""
    e = stats.wilson([1] * 8 + [0] * 2)
    assert (e.value, e.n) == (0.8, 10)
    assert (e.low, e.high) == pytest.approx((0.4902, 0.9433), abs=2e-4)


def test_wilson_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no questions"):
        stats.wilson([])


def test_mcnemar_by_hand():
    """12 discordant pairs, 2 one way: 2 * (1 + 12 + 66) / 2^12 = 158 / 4096 = 0.03857."""
    a = [1] * 10 + [0] * 2 + [1] * 5
    b = [0] * 10 + [1] * 2 + [1] * 5
    assert stats.mcnemar(a, b) == pytest.approx(158 / 4096)
    assert stats.mcnemar(a, a) == 1.0


def test_mcnemar_needs_pairs():
    with pytest.raises(ValueError, match="as many"):
        stats.mcnemar([1], [1, 0])


def test_holm_by_hand():
    """0.01 * 3; max(0.03, 0.03 * 2 = 0.06); max(0.06, 0.04 * 1) = 0.06."""
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_sign_flip_with_one_question_a_cluster_agrees_with_mcnemar():
    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.6, rng.random(300) < 0.5
    assert stats.sign_flip(a, b, np.arange(300)) == pytest.approx(stats.mcnemar(a, b), abs=0.02)


def test_clusters_make_the_test_more_careful():
    """Ten copies of twelve discordant questions are still twelve questions: p stays near McNemar's of the twelve."""
    a = np.repeat([1] * 10 + [0] * 2, 10)
    clusters = np.repeat(np.arange(12), 10)
    assert stats.mcnemar(a, 1 - a) < 1e-10
    assert stats.sign_flip(a, 1 - a, clusters) == pytest.approx(158 / 4096, abs=0.01)


def test_clustered_interval_is_wider_than_that_of_independent_questions():
    x = np.repeat(np.arange(40) % 2, 10)
    alone, together = stats.clustered(x, np.arange(400)), stats.clustered(x, np.repeat(np.arange(40), 10))
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert alone.value == together.value == 0.5


def test_bootstrap_agrees_with_wilson():
    x = np.arange(500) % 3 == 0
    a, b = stats.clustered(x, np.arange(500)), stats.wilson(x)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.01)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted = stats.holm(p)
    assert all(q >= x - 1e-12 and q <= 1 for q, x in zip(adjusted, p, strict=True))
    order = np.argsort(p)
    assert all(adjusted[i] <= adjusted[j] + 1e-12 for i, j in pairwise(order))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_an_interval_holds_its_estimate(x):
    e = stats.wilson(x)
    assert 0 <= e.low <= e.value + 1e-9
    assert e.value - 1e-9 <= e.high <= 1
