"""Intervals and paired tests. Every accuracy has its n and a 95% interval; every 'A beats B' is a paired test."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

BLOCK = 250  # bootstrap draws at a time, so that large test sets fit into memory


Errors = tuple[tuple[float, float], ...]  # standard errors, each with its degrees of freedom; the most careful one counts
FEW = 30  # clusters: with fewer, percentiles of resampled means are too narrow (two miss 24%, five 10%)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; n counts all questions, unparsed ones included (they are wrong). `errors` are what the
    interval and every test of the mean are made from: each must be passed, since with few degrees of freedom one standard
    error decides near the middle and another one in the tails."""

    value: float
    low: float
    high: float
    n: int
    errors: Errors = ()

    @property
    def se(self) -> float:
        """The standard error with which the 95% interval is made; NaN where none is known."""
        return widest(self.errors)[0] if self.errors else float("nan")

    def within(self, low: float, high: float) -> "Estimate":
        """With the interval cut to what the mean can be."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))

    def row(self, name: str = "accuracy") -> dict:
        """As tables hold it: the value under `name`, its interval, n."""
        return {name: self.value, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self):
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def _half(error: tuple[float, float]) -> float:
    """Half the 95% interval that a standard error and its degrees of freedom make."""
    return float(stats.t.isf(0.025, error[1]) * error[0])


def widest(errors: Errors) -> tuple[float, float]:
    """The standard error, with its degrees of freedom, that makes the 95% interval."""
    return max(errors, key=_half)


def wilson(correct, level: float = 0.95) -> Estimate:
    """Wilson score interval of a mean of 0/1 values, shape (n,). Raises ValueError for no values."""
    x = np.asarray(correct, dtype=float)
    if not len(x):
        raise ValueError("an accuracy over no questions has no value")
    test = stats.binomtest(int(x.sum()), len(x))
    low, high = test.proportion_ci(level, method="wilson")
    return Estimate(float(x.mean()), float(low), float(high), len(x), ((float(x.std() / len(x) ** 0.5), np.inf),))


def numbered(labels) -> np.ndarray:
    """Labels (n,) as whole numbers from 0 on."""
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def task_weights(tasks, seeds=None, within=None) -> np.ndarray:
    """Weights (n,), 1 on average, under which every task (labels, shape (n,)) counts the same however many questions it has:
    the weighted mean of questions is the mean of tasks, which is what both papers report. Where `seeds`, shape (n,), are
    given, that holds for each of them, and each counts the same. within, shape (n,): how much a question counts in its own
    task; None: all alike."""
    task = numbered(tasks)
    seed = np.zeros(len(task), dtype=int) if seeds is None else numbered(seeds)
    tasks_of_seed = np.array([len(set(task[seed == s])) for s in range(seed.max() + 1)])
    cell = numbered(seed * (task.max() + 1) + task)
    own = np.ones(len(task)) if within is None else np.asarray(within, dtype=float)
    return len(task) * own / (len(tasks_of_seed) * tasks_of_seed[seed] * np.bincount(cell, weights=own)[cell])


def bootstrap_means(values, clusters, draws: int = 2000, seed: int = 0, weights=None) -> np.ndarray:
    """Means of `draws` resampled data sets, shape (draws,); weighted where `weights` are given. values, clusters, weights:
    shape (n,). Whole clusters (questions about one concept) are drawn with replacement."""
    x, cluster = np.asarray(values, dtype=float), numbered(clusters)
    w = _weights(weights, len(x))
    total, count = np.bincount(cluster, weights=w * x), np.bincount(cluster, weights=w)
    rng, out = np.random.default_rng(seed), []
    for start in range(0, draws, BLOCK):
        drawn = _times_drawn(rng, min(BLOCK, draws - start), len(total))
        out.append((drawn @ total) / (drawn @ count))
    return np.concatenate(out)


def _times_drawn(rng: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """How often each of `count` things was drawn in `count` draws with replacement, shape (draws, count)."""
    pick = rng.integers(0, count, size=(draws, count))
    offset = np.arange(draws)[:, None] * count
    return np.bincount((pick + offset).ravel(), minlength=draws * count).reshape(draws, count)


def clustered(values, clusters, seeds=None, draws: int = 2000, seed: int = 0, weights=None) -> Estimate:
    """A (weighted) mean of values, shape (n,), with its 95% interval: over clusters (labels, shape (n,); weights likewise) by
    `bootstrap_means` (percentiles), over fewer than FEW clusters by Student's t, and by `over_seeds` where `seeds`, shape (n,),
    names several training seeds. Values that are all alike do not show how they vary; see `unseen`. Raises ValueError for no
    values, and for some that are no numbers."""
    x = np.asarray(values, dtype=float)
    if not len(x) or np.isnan(x).any():
        raise ValueError(f"a mean is of numbers: {np.isnan(x).sum()} of {len(x)} values are none")
    if seeds is not None and len(set(seeds)) > 1:
        return over_seeds(x, clusters, seeds, weights)
    w, cluster = _weights(weights, len(x)), numbered(clusters)
    value = float(np.average(x, weights=w))
    deviation = np.bincount(cluster, weights=w * (x - value) / w.sum())
    if len(deviation) < FEW or not _varies(_variance(deviation)):
        return _by_t(value, len(x), [_of_clusters(deviation, w, cluster)])
    means = bootstrap_means(x, cluster, draws, seed, weights)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(x), ((float(means.std(ddof=1)), np.inf),))


def _weights(weights, count: int) -> np.ndarray:
    return np.ones(count) if weights is None else np.asarray(weights, dtype=float)


def _by_t(value: float, n: int, errors: list[tuple[float, float]]) -> Estimate:
    """The widest of the intervals that the standard errors make."""
    errors = tuple((float(se), float(df)) for se, df in errors)
    half = _half(widest(errors))
    return Estimate(value, value - half, value + half, n, errors)


def _variance(deviation: np.ndarray) -> float:
    """Of a mean whose clusters lie `deviation` (..., clusters), each times its share, away from it; summed over rows."""
    many = deviation.shape[-1]
    return float(many / max(1, many - 1) * (deviation**2).sum())


def _varies(variance: float) -> bool:
    return variance > 1e-12


def _of_clusters(deviation, weights, cluster) -> tuple[float, float]:
    """The standard error, with its degrees of freedom, that clusters with these deviations (clusters,) show; `unseen` for
    none."""
    variance = _variance(deviation)
    return (variance**0.5, len(deviation) - 1) if _varies(variance) else unseen(weights, cluster)


def unseen(weights, cluster) -> tuple[float, float]:
    """Standard error where no two clusters (n,) differ, so that none can be measured: the one whose interval is the rule of
    three's 3 / n, which is the 95% upper bound of a share that was never seen among n clusters, n being as many as would
    count alike (Kish's effective number). Values are taken to be shares or differences of shares."""
    each = np.bincount(cluster, weights=weights)
    effective = each.sum() ** 2 / (each**2).sum()
    return 3 / effective / stats.norm.isf(0.025), np.inf


def over_seeds(values, clusters, seeds, weights=None) -> Estimate:
    """A (weighted) mean of training seeds' means, with an interval that covers other seeds as well as other questions.

    values, clusters, seeds, weights: shape (n,); every seed counts the same, however many questions it answered. The seeds' own
    means are the sample, as if each were one observation: k of them give a t interval with k - 1 degrees of freedom, 4.3
    standard errors for three seeds and 2.8 for five. That holds where each seed has questions of its own. Questions that
    several seeds answer move all of these alike, which the spread of the seeds does not show, so their covariance over common
    clusters is added (Satterthwaite 1946 for the degrees of freedom). Seeds that agree by luck make no interval narrower than
    the questions alone allow, and no p smaller than seeds allow: all errors are kept, and the most careful counts.
    """
    x, seed, cluster = np.asarray(values, dtype=float), numbered(seeds), numbered(clusters)
    k, many, w = seed.max() + 1, cluster.max() + 1, _weights(weights, len(x))
    w = w / (k * np.bincount(seed, weights=w)[seed])
    value, mean = float(w @ x), k * np.bincount(seed, weights=w * x)
    between = ((mean - value) ** 2).sum() / (k * (k - 1))
    deviation = np.bincount(seed * many + cluster, weights=w * (x - mean[seed]), minlength=k * many).reshape(k, many)
    shared = max(0.0, _variance(deviation.sum(0)) - _variance(deviation)) * k / (k - 1)
    total, parts = between + shared, between**2 / (k - 1) + shared**2 / max(1, many - 1)
    errors = [(total**0.5, total**2 / parts)] if parts > 1e-24 else []
    errors += [(between**0.5, k - 1)] if _varies(between) and shared else []  # what is added must not hide how few seeds are
    return _by_t(value, len(x), [*errors, _of_clusters(deviation.sum(0), w, cluster)])


def difference(a, b, clusters=None, seeds=None, draws: int = 2000, seed: int = 0, weights=None) -> Estimate:
    """Mean of a - b over pairs, each shape (n,), with the interval of `clustered`, which the rest is for; n counts the
    pairs."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return clustered(d, np.arange(len(d)) if clusters is None else clusters, seeds, draws=draws, seed=seed, weights=weights)


def mcnemar(a, b) -> float:
    """Exact two-sided McNemar test of paired 0/1 values, shape (n,); 1.0 if no pair differs.

    Worked by hand: 10 pairs only A right, 2 only B right: 2 * P(X <= 2 | 12, 1/2) = 0.0386. Raises ValueError for
    arrays of different lengths.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"paired values must be as many: {a.shape} and {b.shape}")
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    return float(test(table, exact=True).pvalue) if (a != b).any() else 1.0


def sign_flip(a, b, clusters, draws: int = 20000, seed: int = 0, weights=None) -> float:
    """Two-sided permutation test that the (weighted) mean of a - b is zero, flipping the sign of whole clusters together.

    McNemar's test treats pairs as independent; this one holds when several questions share a concept. Smallest possible p:
    1 / (draws + 1).
    """
    d, cluster = np.asarray(a, dtype=float) - np.asarray(b, dtype=float), numbered(clusters)
    w = _weights(weights, len(d))
    total = np.bincount(cluster, weights=w * d)
    total = total[total != 0]
    rng, hits, sum_of_all = np.random.default_rng(seed), 0, abs((w * d).sum())
    for start in range(0, draws, 1000):
        signs = rng.choice([-1.0, 1.0], size=(min(1000, draws - start), len(total)))
        hits += int((np.abs(signs @ total) >= sum_of_all - 1e-9).sum())
    return (hits + 1) / (draws + 1)


def not_zero(value: float, errors: Errors) -> float:
    """Two-sided p of the null hypothesis that the mean is 0 (Student's t), the largest over its errors; NaN where one of them
    is no positive number, which tests nothing."""
    return 2 * not_below(abs(value), errors, 0.0)


def not_below(value: float, errors: Errors, bound: float) -> float:
    """One-sided p of the null hypothesis that the mean is at most `bound`, likewise."""
    if not all(se > 0 for se, _ in errors):
        return float("nan")
    return max(float(stats.t.sf((value - bound) / se, df)) for se, df in errors)


def equivalence(value: float, errors: Errors, margin: float) -> float:
    """p of the two one-sided tests that the mean lies within `margin` of zero (Schuirmann 1987): the larger of the two."""
    return max(not_below(value, errors, -margin), not_below(-value, errors, -margin))


def detectable(errors: Errors, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided t test at 5% finds with probability `power`: 2.8 standard errors, 5.7 of them
    with the 2 degrees of freedom of three seeds, 3.8 with the 4 of five; the largest over the errors."""
    from statsmodels.stats.power import TTestPower

    def of(se: float, df: float) -> float:
        if not np.isfinite(df):
            return se * (stats.norm.isf(0.025) + stats.norm.isf(1 - power))
        effect = TTestPower().solve_power(nobs=df + 1, alpha=0.05, power=power)
        return se * (df + 1) ** 0.5 * np.asarray(effect).item()  # a number, or, where its first solver fails, an array of one

    return max(float(of(se, df)) for se, df in errors)


def holm(pvalues: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given. Worked by hand: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(pvalues, method="holm")[1].tolist() if len(pvalues) else []


def krippendorff(ratings, level: str = "nominal") -> float:
    """Krippendorff's alpha of ratings (units, raters), NaN where a rater gave none; 1 is agreement, 0 is chance.

    level 'nominal' counts any difference as one, 'interval' takes its square. NaN if all ratings are the same.
    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    x = np.asarray(ratings, dtype=float)
    x = x[(~np.isnan(x)).sum(1) >= 2]

    def distance(a):
        d = a[:, None] - a[None, :]
        return (d != 0).astype(float) if level == "nominal" else d**2

    values = [row[~np.isnan(row)] for row in x]
    every = np.concatenate(values) if values else np.array([])
    observed = sum(distance(v).sum() / (len(v) - 1) for v in values) / max(1, len(every))
    expected = distance(every).sum() / (len(every) * (len(every) - 1)) if len(every) > 1 else 0.0
    return float(1 - observed / expected) if expected else float("nan")


def length_controlled(worth, longer, draws: int = 500, seed: int = 0) -> Estimate:
    """Win rate that replies as long as the baseline's would have (Dubois et al. 2024, section 3, without its term for how hard
    an instruction is): a logistic regression of what a prompt was worth (n,), 0 to 1, on tanh of the difference in length (n,)
    over its spread, read at no difference. The interval is by bootstrap over prompts."""
    from sklearn.linear_model import LogisticRegression

    y, d = np.asarray(worth, dtype=float), np.asarray(longer, dtype=float)
    if not 0 < y.mean() < 1:  # won or lost all: nothing that a length could explain
        return clustered(y, range(len(y))).within(0, 1)
    x = np.tanh(d / (d.std() or 1.0))

    def at_equal_length(rows: np.ndarray) -> float:
        if not 0 < y[rows].mean() < 1:
            return float(y[rows].mean())
        both = np.concatenate([x[rows], x[rows]])[:, None]
        outcome, weight = np.repeat([1, 0], len(rows)), np.concatenate([y[rows], 1 - y[rows]])
        fitted = LogisticRegression(C=10.0).fit(both, outcome, sample_weight=weight)
        return float(1 / (1 + np.exp(-fitted.intercept_[0])))

    rng, every = np.random.default_rng(seed), np.arange(len(y))
    drawn = [at_equal_length(rng.choice(every, len(y))) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(at_equal_length(every), float(low), float(high), len(y), ((float(np.std(drawn)), np.inf),))
