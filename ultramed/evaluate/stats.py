"""Intervals and paired tests. Every accuracy has its n and a 95% interval; every 'A beats B' is a paired test."""

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95% interval; n counts all questions, unparsed ones included (they are wrong)."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def dict(self) -> dict:
        return asdict(self)


def wilson(correct, level: float = 0.95) -> Estimate:
    """Wilson score interval of a mean of 0/1 values, shape (n,). Raises ValueError for no values."""
    x = np.asarray(correct, dtype=float)
    if not len(x):
        raise ValueError("an accuracy over no questions has no value")
    test = stats.binomtest(int(x.sum()), len(x))
    low, high = test.proportion_ci(level, method="wilson")
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def clustered(values, clusters, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Estimate:
    """Percentile bootstrap of a mean, drawing whole clusters.

    values: shape (n,); clusters: a label each. For questions that share a concept, or replicates of one question.
    """
    x, labels = np.asarray(values, dtype=float), np.unique(np.asarray(clusters), return_inverse=True)[1]
    total = np.bincount(labels, weights=x)
    count = np.bincount(labels)
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, len(total), size=(draws, len(total)))
    means = total[pick].sum(1) / count[pick].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def mcnemar(a, b) -> float:
    """Exact two-sided McNemar test of paired 0/1 values, shape (n,): binomial on the discordant pairs.

    1.0 if no pair differs. Worked by hand: 10 pairs only A right, 2 only B right: 2 * P(X <= 2 | 12, 1/2) = 0.0386.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"paired values must be as many: {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return 1.0 if only_a + only_b == 0 else float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def difference(a, b, clusters=None, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of a - b over pairs with its bootstrap interval (by cluster where given); n counts the pairs."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return clustered(d, np.arange(len(d)) if clusters is None else clusters, draws=draws, seed=seed)


def sign_flip(a, b, clusters, draws: int = 20000, seed: int = 0) -> float:
    """Two-sided permutation test that the mean of a - b is zero, flipping the sign of whole clusters together.

    McNemar's test treats pairs as independent; this one holds when several questions share a concept. Smallest
    possible p: 1 / (draws + 1).
    """
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    total = np.bincount(labels, weights=d)
    total = total[total != 0]
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, 1000):
        signs = rng.choice([-1.0, 1.0], size=(min(1000, draws - start), len(total)))
        hits += int((np.abs(signs @ total) >= abs(total.sum()) - 1e-9).sum())
    return (hits + 1) / (draws + 1)


def holm(pvalues: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given. Worked by hand: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]."""
    order = np.argsort(pvalues)
    adjusted, running = np.empty(len(pvalues)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(pvalues) - rank) * pvalues[i])
        adjusted[i] = min(1.0, running)
    return adjusted.tolist()


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
