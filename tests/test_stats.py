"""Numbers worked by hand, and agreement with textbook cases."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
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


@settings(max_examples=25)
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


def test_the_smallest_p_of_a_permutation_test():
    """Forty clusters that all point one way: no draw of 999 does as well, so p is (0 + 1) / (999 + 1)."""
    assert stats.sign_flip(np.ones(40), np.zeros(40), np.arange(40), draws=999) == 1 / 1000
    assert stats.sign_flip(np.ones(4), np.ones(4), np.arange(4), draws=99) == 1.0


def test_a_large_cluster_weighs_as_many_rows_as_it_has():
    """Nine right rows in one cluster, a wrong one in another: drawn together they are 9 / 10 right, not one half."""
    means = stats.bootstrap_means([1] * 9 + [0], [0] * 9 + [1], draws=400)
    assert {round(m, 9) for m in means} == {0.0, 0.9, 1.0}
    assert np.mean(means == 1.0) == pytest.approx(0.25, abs=0.07)


def test_seeds_with_questions_of_their_own_by_hand():
    """Three seeds with means 0.6, 0.5, 0.1: mean 0.4, variance of the three 0.07, standard error (0.07 / 3) ** 0.5 = 0.15275,
    and 4.30265 of them at 2 degrees of freedom."""
    x = [1] * 6 + [0] * 4 + [1] * 5 + [0] * 5 + [1] * 1 + [0] * 9
    e = stats.clustered(x, np.arange(30), np.repeat([7, 8, 9], 10))
    assert (e.value, e.n, e.errors[0][1]) == (pytest.approx(0.4), 30, pytest.approx(2))
    assert e.se == pytest.approx((0.07 / 3) ** 0.5)
    assert (e.low, e.high) == pytest.approx((0.4 - 4.30265 * e.se, 0.4 + 4.30265 * e.se), abs=1e-5)
    assert stats.clustered(x, np.arange(30), np.zeros(30)) == stats.clustered(x, np.arange(30)), "one seed is none"


def test_questions_that_seeds_share_by_hand():
    """Two seeds, the same four questions: 1 1 1 0 and 0 0 1 0, means 3/4 and 1/4. Between the seeds: (1/2)^2 / 2 / 2 = 1/16.
    Deviations 1/4 1/4 1/4 -3/4 and -1/4 -1/4 3/4 -1/4, each an eighth of the mean: their products come to 1/4, so the
    covariance is 4/3 x 2 x 1/4 / 64 = 1/96, and twice as much is added, for the square of a mean of two is half covariance."""
    e = stats.over_seeds([1, 1, 1, 0, 0, 0, 1, 0], [0, 1, 2, 3] * 2, [0] * 4 + [1] * 4)
    assert e.value == 1 / 2
    assert e.errors[0][0] == pytest.approx((1 / 16 + 1 / 48) ** 0.5)
    assert e.errors[1] == (1 / 4, 1), "and no surer than two means are"
    assert e.errors[0][1] == pytest.approx((1 / 12) ** 2 / ((1 / 16) ** 2 / 1 + (1 / 48) ** 2 / 3))


def test_seeds_that_agree_by_luck_make_no_interval_narrower_than_the_questions_do():
    x, seed = [1] * 5 + [0] * 5 + [0] * 5 + [1] * 5, np.repeat([0, 1], 10)
    e = stats.over_seeds(x, np.arange(20), seed)
    assert e.se == pytest.approx((0.25 / 19) ** 0.5), "of twenty questions, half of them right"
    assert e.errors == ((pytest.approx((0.25 / 19) ** 0.5), 19),)


def test_seeds_that_agree_by_luck_make_no_p_smaller_than_seeds_can():
    """Three seeds of 200 questions win 40, 42 and 44 and lose 20: the interval is that of the questions, but three means of
    0.10, 0.11, 0.12 have a standard error of 0.00577, so t is 19.05 with 2 degrees of freedom, p 0.0027, where 599 would have
    1e-6."""
    won = (40, 42, 44)
    x = np.concatenate([[1] * w + [-1] * 20 + [0] * (180 - w) for w in won])
    e = stats.over_seeds(x, np.arange(600), np.repeat([0, 1, 2], 200))
    assert e.se == pytest.approx(x.std(ddof=1) / 600**0.5, rel=0.01), "the interval is that of the questions"
    assert stats.not_zero(e.value, e.errors) == pytest.approx(0.00274, abs=2e-5)
    assert stats.not_zero(e.value, e.errors[1:]) < 1e-4
    assert stats.detectable(e.errors) == max(stats.detectable(e.errors[:1]), stats.detectable(e.errors[1:]))


def test_questions_that_seeds_share_unequally_pull_nothing_below_the_questions_alone():
    """Seeds that make up for each other on shared questions have a negative covariance, which is no reason to be more sure."""
    x, seed = [1, 0, 1, 0, 0, 1, 0, 1], np.repeat([0, 1], 4)
    e = stats.over_seeds(np.array(x) + 0.1 * seed, np.tile(np.arange(4), 2), seed)
    assert e.errors[0] == (pytest.approx(0.05), pytest.approx(1))


def test_every_seed_counts_the_same_however_many_questions_it_answered():
    x, seed = [1] * 8 + [1, 0] + [0, 0], np.repeat([0, 1, 2], [8, 2, 2])
    e = stats.over_seeds(x, np.arange(12), seed)
    assert e.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert e.errors[0] == (pytest.approx((0.25 / 3) ** 0.5), pytest.approx(2))


def test_weights_over_seeds_by_hand():
    """Each of two seeds has a task of three questions and one of one: its mean is that of its two tasks, 3/4 and 1/6."""
    x, seed, task = [1, 1, 1, 0.5, 0, 0, 1, 0], np.repeat([0, 1], 4), ["a", "a", "a", "b"] * 2
    e = stats.clustered(x, np.arange(8), seed, weights=stats.task_weights(task, seed))
    assert e.value == pytest.approx((3 / 4 + 1 / 6) / 2)
    assert e.errors[0] == (pytest.approx((3 / 4 - 1 / 6) / 2), pytest.approx(1))


def test_what_never_varied_is_not_certain():
    """The rule of three: none of n clusters differed, so up to 3 / n of others may."""
    assert stats.clustered([1] * 60, range(60)).low == pytest.approx(1 - 3 / 60)
    e = stats.difference(np.ones(3), np.zeros(3), np.zeros(3), [0, 1, 2])  # one question, three seeds
    assert e.within(-1, 1).low == -1
    assert stats.not_zero(e.value, e.errors) > 0.4
    uneven = stats.clustered(np.ones(1000), range(1000), weights=stats.task_weights(["a"] * 999 + ["b"]))
    assert uneven.value - uneven.low > 0.7, "the single question of b is half the mean"


@pytest.mark.parametrize("many", [2, 3, 5, 10])
def test_few_clusters_miss_no_more_often_than_many(many):
    rng, missed = np.random.default_rng(0), 0
    for _ in range(1000):
        e = stats.clustered(rng.normal(0, 1, many), range(many))
        missed += not e.low <= 0 <= e.high
    assert 28 <= missed <= 72, "50 are expected, with a standard deviation of 7"


@pytest.mark.parametrize("x", [[], [1, float("nan")]])
def test_a_mean_is_of_numbers(x):
    with pytest.raises(ValueError, match=r"of numbers: \d of \d"):
        stats.clustered(x, range(len(x)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.08])
def test_intervals_over_seeds_miss_as_often_as_they_say(shared, spread):
    """800 experiments of three seeds by 40 questions, whose truth is 0: at most 5% of the intervals may miss it, and chance."""
    rng, seed, missed = np.random.default_rng(0), np.repeat([0, 1, 2], 40), 0
    question = np.tile(np.arange(40), 3) if shared else np.arange(120)
    for _ in range(800):
        x = rng.normal(0, 0.5, 120)[question] + rng.normal(0, 0.1, 120) + rng.normal(0, spread, 3)[seed]
        e = stats.over_seeds(x, question, seed)
        missed += not e.low <= 0 <= e.high
        assert (stats.not_zero(e.value, e.errors) < 0.05) == (not e.low <= 0 <= e.high), "one verdict, read either way"
    assert 3 <= missed <= 56, "at most 40 are expected, with a standard deviation of 6"


def test_what_one_lucky_seed_explains_is_no_evidence():
    a = np.concatenate([np.ones(60), np.zeros(120)])  # the first of three seeds wins every question, the others none
    assert stats.sign_flip(a, np.zeros(180), np.arange(180)) < 0.001
    e = stats.difference(a, np.zeros(180), np.arange(180), np.repeat([0, 1, 2], 60))
    assert stats.not_zero(e.value, e.errors) > 0.3


def test_one_sided_tests_by_hand():
    """d = 1, se = 2: above -5 by z = 3 (p 0.00135), above 0 by z = 0.5 (p 0.3085); level within 5: the larger of 0.00135
    and, for z = (5 - 1) / 2 = 2, 0.02275."""
    two = ((2, np.inf),)
    assert stats.not_below(1, two, -5) == pytest.approx(0.00135, abs=1e-5)
    assert stats.not_below(1, two, 0) == pytest.approx(0.30854, abs=1e-5)
    assert stats.equivalence(1, two, 5) == pytest.approx(0.02275, abs=1e-5)
    assert stats.equivalence(-1, two, 5) == stats.equivalence(1, two, 5)
    for nothing in (0.0, float("nan")):
        assert np.isnan(stats.not_below(1, ((nothing, 2),), 0))
        assert np.isnan(stats.not_zero(1, ((1, 2), (nothing, 2))))


def test_tests_of_few_degrees_of_freedom_by_hand():
    """Student's t of 2 degrees of freedom is 4.30265 at 2.5% and 1.06066 at 20%."""
    one = ((1, 2),)
    assert stats.not_zero(4.30265, one) == stats.not_zero(-8.6053, ((2, 2),)) == pytest.approx(0.05, abs=1e-6)
    assert stats.not_zero(1.959964, ((1, np.inf),)) == pytest.approx(0.05, abs=1e-6)
    assert stats.not_zero(4.30265, ((1, 2), (0.5, 2))) == pytest.approx(0.05, abs=1e-6), "the more careful counts"
    assert stats.not_below(1, one, -3.30265) == pytest.approx(0.025, abs=1e-6)
    assert stats.equivalence(0.5, one, 4.80265) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("df", [2, 4])
def test_what_few_seeds_can_see_is_seen_in_four_of_five_cases(df):
    rng, size = np.random.default_rng(0), stats.detectable(((1.0, df),))
    t = (rng.normal(size, 1, 40_000)) / (rng.chisquare(df, 40_000) / df) ** 0.5
    assert np.mean(abs(t) > scipy.stats.t.isf(0.025, df)) == pytest.approx(0.8, abs=0.01)


def test_what_many_questions_can_see_nears_what_the_normal_distribution_says():
    """The first solver fails at 1,427 degrees of freedom, and another one answers in another form."""
    seen = [stats.detectable(((1.0, df),)) for df in (50, 227, 713, 1427, 5000)]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(2.8016, abs=2e-3)


def test_what_a_run_can_see_by_hand():
    """1.95996 + 0.84162 = 2.80158 standard errors at 5% and 80% power."""
    assert stats.detectable(((2, np.inf),)) == pytest.approx(5.60316, abs=1e-4)
    assert stats.detectable(((1, np.inf),), power=0.5) == pytest.approx(1.95996, abs=1e-4)


def test_a_difference_is_of_a_less_b():
    d = stats.difference([1, 1, 1, 0], [0, 1, 0, 0])
    assert (d.value, d.n) == (0.5, 4)
    assert d.errors == ((pytest.approx((1 / 12) ** 0.5), 3),), "twice 0.5 and twice -0.5: squares of 1, over 4 x 3"


def test_the_standard_error_is_the_spread_of_the_means():
    x = np.arange(400) % 2
    assert stats.clustered(x, np.arange(400)).se == pytest.approx((0.25 / 400) ** 0.5, rel=0.1)
    assert stats.wilson(x).se == pytest.approx((0.25 / 400) ** 0.5)


def test_an_estimate_reads_in_per_cent():
    assert str(stats.Estimate(0.123, 0.05, 0.2, 7, 0.04)) == "12.3 [5.0, 20.0]"


def test_wilson_takes_its_level():
    """One of one: the lower bound is 1 / (1 + z^2); z = 1.96 and 1.2816 (80%)."""
    assert stats.wilson([1]).low == pytest.approx(1 / (1 + 1.959964**2))
    assert stats.wilson([1], level=0.8).low == pytest.approx(1 / (1 + 1.281552**2), abs=1e-5)


def test_the_interval_is_read_off_the_means():
    x, cluster = np.arange(80) % 5, np.repeat(np.arange(40), 2)
    means = stats.bootstrap_means(x, cluster, 300, 7)
    assert len(means) == 300
    made = stats.clustered(x, cluster, draws=300, seed=7)
    assert (made.low, made.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert made.se == np.std(means, ddof=1)


def test_a_difference_is_a_clustered_mean():
    rng = np.random.default_rng(0)
    a, b, cluster, seeds = rng.integers(0, 2, 24), rng.integers(0, 2, 24), np.repeat(np.arange(8), 3), np.tile([0, 1, 2], 8)
    assert stats.difference(a, b, cluster, None, 300, 7) == stats.clustered(a - b, cluster, draws=300, seed=7)
    assert stats.difference(a, b, cluster, seeds) == stats.over_seeds(a - b, cluster, seeds)
    assert stats.difference(a, b) == stats.clustered(a - b, np.arange(24))


def test_a_permutation_counts_every_draw_once():
    """One cluster that differs: every sign gives the same size, so all 1,500 draws count, and p is 1 exactly."""
    assert stats.sign_flip([1, 1, 0], [0, 0, 0], [0, 0, 1], draws=1500) == 1
    assert stats.sign_flip([1, 0.25], [0, 0], [0, 1], draws=4000) == pytest.approx(0.5, abs=0.03), "signs alike, or not"


def test_tests_come_out_the_same_again():
    rng = np.random.default_rng(1)
    a, b, cluster = rng.integers(0, 2, 40), rng.integers(0, 2, 40), np.repeat(np.arange(20), 2)
    a[:10], b[:10] = 1, 0
    assert stats.sign_flip(a, b, cluster, 999) == stats.sign_flip(a, b, cluster, 999) < 0.9
    assert stats.difference(a, b, cluster) == stats.difference(a, b, cluster)


def test_a_win_rate_without_what_length_bought():
    """Half the replies are much longer and win, half are as much shorter and lose: at equal length there is no winner."""
    longer = np.array([500.0, -500.0] * 40)
    assert stats.length_controlled(longer > 0, longer).value == pytest.approx(0.5, abs=1e-6)
    rng = np.random.default_rng(0)
    longer = rng.normal(300, 400, 4000)  # longer on the whole, which helps; by itself it would win 70%
    chance = 1 / (1 + np.exp(-(np.log(0.7 / 0.3) + 1.2 * np.tanh(longer / longer.std()))))
    worth = rng.random(4000) < chance
    e = stats.length_controlled(worth, longer, draws=50)
    assert worth.mean() > 0.75
    assert e.value == pytest.approx(0.7, abs=0.02)
    assert e.low < 0.7 < e.high
    assert stats.length_controlled([1, 1, 1], [4, 5, 6]).value == 1.0


def test_tasks_count_the_same_whatever_their_size():
    """Three questions of one task, one of another: weights 4 / (2 * 3) and 4 / (2 * 1), 1 on average."""
    weights = stats.task_weights(["a", "a", "a", "b"])
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    made = stats.clustered([1, 1, 0, 0], range(4), weights=weights)
    assert made.value == pytest.approx((2 / 3 + 0) / 2), "the mean of the tasks, not of the questions"
    assert stats.task_weights(["x"] * 3).tolist() == [1, 1, 1]


def test_weights_decide_a_test_as_they_decide_the_mean():
    """Of 100 questions of one task A wins ten, of 10 of another it loses ten: by questions even, by tasks lost."""
    a, b = [1] * 10 + [0] * 100, [0] * 100 + [1] * 10
    weights = stats.task_weights(["large"] * 100 + ["small"] * 10)
    assert stats.difference(a, b, weights=weights).value == pytest.approx((0.1 - 1) / 2)
    assert stats.sign_flip(a, b, range(110)) == 1
    assert stats.sign_flip(a, b, range(110), weights=weights) < 0.01
