"""One answer out of N samples: vote, reward, or both; and accuracy as a function of N from one set of samples.

Everything works on arrays of one row a question: `letters` (Q, N) of option letters ('' if unparsed), `rewards` (Q, N)
floats, `gold` (Q,) letters. A selection returns (Q,) letters.
"""

import numpy as np
import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.store import Artifact
from ultramed.evaluate.sample import read_feedback, read_samples


def arrays(feedback: Artifact) -> dict[str, np.ndarray]:
    """id, subset, concept, gold (Q,), letters and rewards (Q, N) of a reward model's feedback on samples."""
    rows = read_feedback(feedback)
    out = {k: np.array([r[k] for r in rows]) for k in ("id", "subset", "concept", "gold")}
    out["letters"] = np.array([[c["letter"] or "" for c in r["candidates"]] for r in rows])
    out["rewards"] = np.array([[c["score"] for c in r["candidates"]] for r in rows], dtype=float)
    return out


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
    "self-consistency": majority,
    "best of N by reward": best_of_n,
    "reward-weighted vote": reward_vote,
    "majority of the bests": majority_of_bests,
}


def as_answers(data: dict[str, np.ndarray], chosen: np.ndarray, like: pd.DataFrame) -> pd.DataFrame:
    """Chosen letters as a table of answers, one row a question, comparable with the greedy answers `like`."""
    made = pd.DataFrame({k: data[k] for k in ("id", "subset", "concept", "gold")}).assign(letter=chosen, strict=chosen != "")
    made["correct"] = made.letter == made.gold
    made["letter"] = made.letter.where(made.letter != "", None)
    return made.assign(seed=like.seed.iloc[0])


def voted(sampled: dict[str, Artifact], like: pd.DataFrame) -> pd.DataFrame:
    """Self-consistency of `samples` artifacts as a table of answers."""
    rows = [row for artifact in sampled.values() for row in read_samples(artifact)]
    data = {k: np.array([r[k] for r in rows]) for k in ("id", "subset", "concept", "gold")}
    return as_answers(data, majority(np.array([[c["letter"] or "" for c in r["replies"]] for r in rows])), like)


def pass_at(letters: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Chance that at least one of n samples is right, unbiased from all N (Chen et al. 2021, equation 1)."""
    total, right = letters.shape[1], (letters == gold[:, None]).sum(1)
    missed = np.array([np.prod([(total - c - i) / (total - i) for i in range(n)]) if total - c >= n else 0.0 for c in right])
    return float(1 - missed.mean())


def chance_at(n: int, options: int = 4) -> float:
    """pass@n of random guessing; for four options and n = 8 it is 0.90, which is why pass@n alone shows nothing."""
    return 1 - (1 - 1 / options) ** n


def curves(
    letters: np.ndarray, rewards: np.ndarray | None, gold: np.ndarray, sizes: list[int], draws: int = 50, seed: int = 0
) -> pd.DataFrame:
    """Accuracy against N: for every size, subsets of the N samples, each question its own; columns selection, n, accuracy, low, high.

    The band is a bootstrap over questions of the mean over subsets. Without rewards only self-consistency is drawn.
    """
    if max(sizes) > letters.shape[1]:
        raise ConfigError(f"a curve to N = {max(sizes)} needs as many samples; there are {letters.shape[1]}")
    rng, out = np.random.default_rng(seed), []
    chosen = {k: f for k, f in SELECTIONS.items() if rewards is not None or k == "self-consistency"}
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
            per_question = hit / repeats
            means = per_question[rng.integers(0, len(gold), size=(1000, len(gold)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            out.append({"selection": name, "n": size, "accuracy": per_question.mean(), "low": low, "high": high})
    return pd.DataFrame(out)
