"""One answer out of N samples: vote, reward, or both; and accuracy as a function of N from one set of samples.

A selection takes `letters` (Q, N) of option letters ('' if unparsed) and `rewards` (Q, N), and returns (Q,) letters.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.store import Artifact
from ultramed.evaluate.arms import Answers, Arms, artifacts_of, compare, percent
from ultramed.evaluate.sample import read_feedback, read_samples
from ultramed.evaluate.stats import Estimate, clustered, task_weights


def weighted_vote(letters: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The letter with the largest sum of weights; unparsed samples do not vote, all unparsed gives ''.

    A tie goes to the letter that was sampled first, so that the result depends on nothing but the samples.
    """
    names = [name for name in np.unique(letters) if name]
    if not names:
        return np.full(len(letters), "")
    mass = np.stack([(weights * (letters == name)).sum(1) for name in names], 1)  # (Q, letters)
    first = np.stack([np.where((letters == n).any(1), (letters == n).argmax(1), letters.shape[1]) for n in names], 1)
    present = first < letters.shape[1]
    best = np.where(present, mass, -np.inf).max(1, keepdims=True)
    tied = present & np.isclose(mass, best, rtol=1e-9, atol=1e-12)
    pick = np.where(tied, first, letters.shape[1] + 1).argmin(1)
    return np.where(present.any(1), np.array(names)[pick], "")


def majority(letters: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
    """Self-consistency: the letter that most samples gave."""
    return weighted_vote(letters, np.ones(letters.shape))


def best_of_n(letters: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """The letter of the sample with the highest reward, be it unparsed; the first of equals."""
    return letters[np.arange(len(letters)), rewards.argmax(1)]


def reward_vote(letters: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Votes weighted with the softmax of the rewards over a question's samples."""
    weights = np.exp(rewards - rewards.max(1, keepdims=True))
    return weighted_vote(letters, weights / weights.sum(1, keepdims=True))


def majority_of_bests(letters: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Majority among the better half of the samples by reward."""
    keep = -(-letters.shape[1] // 2)
    top = np.sort(np.argsort(-rewards, axis=1, kind="stable")[:, :keep], axis=1)
    return majority(np.take_along_axis(letters, top, 1))


SELECTIONS = {
    "self_consistency": majority,
    "best_of_n": best_of_n,
    "reward_weighted_vote": reward_vote,
    "majority_of_the_bests": majority_of_bests,
}
SIZES = (1, 2, 3, 4, 6, 8, 10, 16, 32)  # samples a question at which curves have a point


class Votes:
    """Samples of every question, scored by a reward model or not, out of which one answer is chosen.

    `sources`: seed -> the artifacts of `samples` (name -> artifact), or one of `reward_feedback`. id, subset, concept, gold,
    seed: shape (Q,); letters (Q, N), '' where unparsed; rewards (Q, N), None without a reward model.
    """

    def __init__(self, sources: Mapping[int, Mapping[str, Artifact] | Artifact]):
        self.artifacts, scored, rows = artifacts_of(sources), False, []
        for seed, source in sources.items():
            if scored := isinstance(source, Artifact):
                rows += [(seed, row, row["candidates"]) for row in read_feedback(source)]
            else:
                rows += [(seed, row, row["replies"]) for artifact in source.values() for row in read_samples(artifact)]
        self.seed = np.array([seed for seed, *_ in rows])
        self.id, self.subset, self.concept, self.gold = (
            np.array([row[key] for _, row, _ in rows]) for key in ("id", "subset", "concept", "gold")
        )
        self.letters = np.array([[c["letter"] or "" for c in candidates] for *_, candidates in rows])
        self.rewards = None
        if scored:
            self.rewards = np.array([[c["score"] for c in candidates] for *_, candidates in rows], dtype=float)

    def select(self, name: str, like: Answers) -> Answers:
        """One selection's answers, comparable with the greedy answers `like` to the same questions."""
        chosen = SELECTIONS[name](self.letters, self.rewards)
        about = {"id": self.id, "subset": self.subset, "concept": self.concept, "gold": self.gold, "seed": self.seed}
        frame = pd.DataFrame(about).assign(letter=chosen, strict=chosen != "", correct=chosen == self.gold)
        frame["letter"] = frame.letter.where(frame.letter != "", None)
        return Answers(frame, artifacts_of([like, self]))

    def select_all(self, like: Answers) -> Arms:
        """Answers of every selection."""
        return Arms({name: self.select(name, like) for name in SELECTIONS})

    @property
    def sizes(self) -> list[int]:
        return [n for n in SIZES if n <= self.letters.shape[1]]

    def summary(self, between: str = "\n") -> str:
        """How many samples are right or unread, and, after `between`, what their rewards are worth."""
        questions, samples = self.letters.shape
        right, unread = (self.letters == self.gold[:, None]).mean(), (self.letters == "").mean()
        line = f"{questions} questions, {samples} samples each: {100 * right:.1f}% right, {100 * unread:.1f}% unparsed"
        if prefers := self.prefers_right():
            line += (
                f"{between}of a right and a wrong sample of one question the reward prefers the right one in {prefers}% "
                f"({prefers.n} questions that have both; chance is 50)"
            )
        return line

    def prefers_right(self) -> Estimate | None:
        """How often the reward is higher for a right sample than for a wrong one of the same question, ties half: the mean over
        questions that have both, with an interval over seeds where there are several. None without rewards or such questions.

        What a bench of candidates does not tell: there, other models' replies are among the wrong ones.
        """
        if self.rewards is None:
            return None
        right = self.letters == self.gold[:, None]
        both, shares = right.any(1) & ~right.all(1), []
        for good, rewards in zip(right[both], self.rewards[both], strict=True):
            ahead = rewards[good][:, None] - rewards[~good]
            shares.append(((ahead > 0) + 0.5 * (ahead == 0)).mean())
        return clustered(shares, self.concept[both], self.seed[both]).within(0, 1) if shares else None

    def curves(self, sizes: Iterable[int] = ()) -> pd.DataFrame:
        """Accuracy against N (of all `sizes`, or the given ones) by selection, a mean of tasks as everywhere else; see
        `curves`."""
        how = {"weights": self.weights, "clusters": self.concept, "seeds": self.seed}
        return curves(self.letters, self.rewards, self.gold, list(sizes) or self.sizes, **how)

    @property
    def weights(self) -> np.ndarray:
        """Of the questions (Q,), so that every task counts the same."""
        return task_weights(self.subset, self.seed)

    def passes(self) -> pd.DataFrame:
        """pass@N (mean of tasks) beside what guessing among four options reaches."""
        found = {n: pass_at(self.letters, self.gold, n, self.weights) for n in self.sizes}
        return pd.DataFrame([{"N": n, "pass@N": rate, "pass@N of guessing": chance_at(n)} for n, rate in found.items()])


def by_reward_model(votes: Mapping[int, Votes], like: Answers) -> pd.DataFrame:
    """The same samples re-ranked by several reward models, a row each: best-of-N in per cent, how far it is ahead of the vote
    and of the greedy answers `like` (points, with 95% intervals), and how often it prefers a right sample."""
    rows = []
    for seed, scored in votes.items():
        best = scored.select("best_of_n", like)
        found = Arms({"best": best}).accuracy().query("subset == 'all'")
        rows.append(
            {
                "reward model": f"seed {seed}",
                "best of N": percent(found).item(),
                "minus the vote": str(compare(best, scored.select("self_consistency", like))),
                "minus greedy": str(compare(best, like)),
                "prefers a right sample": str(scored.prefers_right() or ""),
            }
        )
    return pd.DataFrame(rows)


def temperature_curve(votes: Mapping[float, Votes]) -> pd.DataFrame:
    """Accuracy of one sample and of the vote of all, by temperature: the columns of `curves` with temperature and answer."""
    parts = []
    for temperature, drawn in votes.items():
        ends = drawn.curves((1, drawn.sizes[-1])).query("selection == 'self_consistency'")
        parts.append(ends.assign(temperature=temperature, answer=["one sample" if n == 1 else f"vote of {n}" for n in ends.n]))
    return pd.concat(parts, ignore_index=True)


def pass_at(letters: np.ndarray, gold: np.ndarray, n: int, weights: np.ndarray | None = None) -> float:
    """Chance that at least one of n samples is right, unbiased from all N (Chen et al. 2021, equation 1); the mean of the
    questions, or with `weights` (Q,) their weighted mean."""
    total, right = letters.shape[1], (letters == gold[:, None]).sum(1)
    missed = np.array([np.prod([(total - c - i) / (total - i) for i in range(n)]) if total - c >= n else 0.0 for c in right])
    return float(1 - np.average(missed, weights=weights))


def chance_at(n: int, options: int = 4) -> float:
    """pass@n of random guessing; for four options and n = 8 it is 0.90, which is why pass@n alone shows nothing."""
    return 1 - (1 - 1 / options) ** n


def curves(
    letters: np.ndarray,
    rewards: np.ndarray | None,
    gold: np.ndarray,
    sizes: list[int],
    draws: int = 50,
    seed: int = 0,
    *,
    clusters=None,
    **how,
) -> pd.DataFrame:
    """Accuracy against N: for every size, subsets of the N samples, each question its own; columns selection, n, accuracy, low,
    high (95% interval of the mean over subsets).

    clusters: concepts (Q,), without them every question is one. how: weights (Q,) and seeds (Q,), see `stats.clustered`.
    Without rewards only self-consistency is drawn.
    """
    if max(sizes) > letters.shape[1]:
        raise ConfigError(f"a curve to N = {max(sizes)} needs as many samples; there are {letters.shape[1]}")
    rng, out = np.random.default_rng(seed), []
    chosen = {k: f for k, f in SELECTIONS.items() if rewards is not None or k == "self_consistency"}
    for size in sizes:
        repeats = 1 if size == letters.shape[1] else draws
        hits = {name: np.zeros(len(gold)) for name in chosen}
        for _ in range(repeats):
            order = np.argsort(rng.random(letters.shape), axis=1)[:, :size]
            pick = np.sort(order, axis=1)  # the order of sampling decides ties
            some = np.take_along_axis(letters, pick, 1)
            value = None if rewards is None else np.take_along_axis(rewards, pick, 1)
            for name, select in chosen.items():
                hits[name] += select(some, value) == gold
        for name, hit in hits.items():
            found = clustered(hit / repeats, np.arange(len(gold)) if clusters is None else clusters, **how).within(0, 1)
            out.append({"selection": name, "n": size, "accuracy": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(out)
