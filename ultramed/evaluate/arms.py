"""Results of an experiment's arms, which carry the artifacts that they rest on, and paired comparisons between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ultramed.core.store import Artifact
from ultramed.evaluate import stats


@dataclass(frozen=True)
class Answers:
    """One arm's answers: a row a question with id, subset, concept, gold, letter (None: unparsed), correct, strict, seed; and
    `weight` where the questions of a subset do not count alike.

    `artifacts` are those that the rows rest on: the model and what it answered.
    """

    frame: pd.DataFrame
    artifacts: tuple[Artifact, ...] = ()

    def only(self, rows: pd.Series) -> "Answers":
        """The rows that a boolean column (n,) selects."""
        return replace(self, frame=self.frame[rows])

    def right_where(self, column: str) -> "Answers":
        """The same answers counted right where another 0/1 column says so, such as `strict` (the asked form)."""
        return replace(self, frame=self.frame.assign(correct=self.frame[column]))

    def assign(self, **columns) -> "Answers":
        return replace(self, frame=self.frame.assign(**columns))

    @property
    def accuracy(self) -> float:
        """The mean of the subsets' accuracies."""
        return float(self.frame.groupby("subset").correct.mean().mean())


def pooled(answers: Iterable[Answers]) -> Answers:
    """Answers of several arms to the same questions as one, pairable with another pool in the same order.

    A question keeps its concept, so that its copies stay together when whole concepts are resampled.
    """
    parts = list(answers)
    frames = [part.frame.assign(id=f"{number}:" + part.frame.id.astype(str)) for number, part in enumerate(parts)]
    return Answers(pd.concat(frames, ignore_index=True), artifacts_of(parts))


def joined(answers: Iterable[Answers]) -> Answers:
    """Answers to different questions, or of different seeds, one after the other."""
    parts = list(answers)
    return Answers(pd.concat([part.frame for part in parts], ignore_index=True), artifacts_of(parts))


def artifacts_of(source) -> tuple[Artifact, ...]:
    """Every artifact that a result rests on, each once: of an artifact, of anything with `artifacts`, or of many of them."""
    if isinstance(source, Artifact):
        return (source,)
    if hasattr(source, "artifacts"):
        return tuple(source.artifacts)
    parts = source.values() if isinstance(source, Mapping) else source
    return tuple(dict.fromkeys(art for part in parts for art in artifacts_of(part)))


@dataclass(frozen=True)
class Comparison:
    """Arm A against arm B on the questions both answered; values are fractions, `low` and `high` a 95% interval of A - B,
    `errors` what it is made from (stats.Estimate).

    Where subsets differ in size, values are means of the subsets' means, and there is no McNemar test, which counts questions;
    nor is there one for several seeds, which it would take for fixed.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    errors: stats.Errors
    n: int
    seeds: int
    mcnemar: float | None
    clustered: float

    @property
    def p(self) -> float:
        """Of no difference. Over several seeds that of the interval; of one the larger of McNemar's and the clustered one,
        because questions about one concept are not independent, and McNemar's test takes them as such."""
        return max(self.mcnemar or 0.0, self.clustered)

    @property
    def se(self) -> float:
        """The standard error with which the interval is made."""
        return stats.widest(self.errors)[0]

    def __str__(self):
        return f"{100 * self.difference:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def compare(a: Answers | pd.DataFrame, b: Answers | pd.DataFrame) -> Comparison:
    """Paired comparison of two arms, over concepts and, where there are several, seeds. Raises ValueError for nothing in
    common."""
    left, right = (x.frame if isinstance(x, Answers) else x for x in (a, b))
    both = left.merge(right, on=["id", "seed"], suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        raise ValueError("the two arms have no question in common")
    weights = stats.task_weights(both.subset_a, both.seed, both.get("weight_a"))
    given = (both.correct_a, both.correct_b, both.concept_a, both.seed)
    d = stats.difference(*given, weights=weights).within(-1, 1)
    seeds = both.seed.nunique()
    return Comparison(
        a=float(np.average(both.correct_a, weights=weights)),
        b=float(np.average(both.correct_b, weights=weights)),
        difference=d.value,
        low=d.low,
        high=d.high,
        errors=d.errors,
        n=len(both),
        seeds=seeds,
        mcnemar=stats.mcnemar(*given[:2]) if seeds == 1 and np.allclose(weights, 1) else None,
        clustered=stats.not_zero(d.value, d.errors) if seeds > 1 else stats.sign_flip(*given[:3], weights=weights),
    )


class Arms(dict[str, Answers]):
    """Arms of one experiment by key. What a table calls them is said at the table."""

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return artifacts_of(dict(self))

    def write(self, path: Path) -> None:
        """Every arm's right and wrong answers as Parquet, a row a question: arm, id, seed, subset, concept, correct and, where
        there are, weight, letter and strict. What any other interval or test needs, long after the store is gone. Raises
        ValueError for an arm without answers, which a table of answers cannot hold."""
        if empty := [name for name, arm in self.items() if arm.frame.empty]:
            raise ValueError(f"arms without answers cannot be kept: {empty}")
        whole = pd.concat([arm.frame.assign(arm=name) for name, arm in self.items()], ignore_index=True)
        columns = ["arm", "id", "seed", "subset", "concept", "correct", "weight", "letter", "strict"]
        whole = whole[[name for name in columns if name in whole]].astype({"id": str, "concept": str, "correct": float})
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        whole.to_parquet(part, index=False, compression="zstd")
        part.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> "Arms":
        """Arms that `write` kept, without their artifacts."""
        arms = cls()
        for name, part in pd.read_parquet(path).groupby("arm", sort=False):
            lacks = [
                column for column in ("weight", "strict") if column in part and part[column].isna().all()
            ]  # others have it
            if "strict" in lacks:
                lacks.append("letter")  # of pairs there is no reply to be read
            arms[name] = Answers(part.drop(columns=["arm", *lacks], errors="ignore").reset_index(drop=True))
        return arms

    def accuracy(self, index: str = "arm") -> pd.DataFrame:
        """Accuracy with a 95% interval of every arm, by subset and over all ('all'): columns `index`, subset, accuracy,
        low, high, n, unparsed, well_formed, seeds, seed_sd (of the seeds' accuracies, where there are several)."""
        rows = []
        for name, arm in self.items():
            subsets = {subset: part for subset, part in arm.frame.groupby("subset", sort=False)}
            for subset, part in {**subsets, "all": arm.frame}.items():
                rows.append({index: name, "subset": subset, **accuracy_row(part)})
        return pd.DataFrame(rows)


def accuracy_row(frame: pd.DataFrame) -> dict:
    """Accuracy of answers (the mean of their subsets), its interval over concepts and seeds, and the outcomes beside it."""
    weights = stats.task_weights(frame.subset, frame.seed)
    e = stats.clustered(frame.correct, frame.concept, frame.seed, weights=weights).within(0, 1)
    by_seed = frame.groupby(["seed", "subset"]).correct.mean().groupby("seed").mean()
    return {
        **e.row(),
        "unparsed": int(frame.letter.isna().sum()),
        "well_formed": float(frame.strict.mean()),
        "seeds": len(by_seed),
        "seed_sd": float(by_seed.std()) if len(by_seed) > 1 else None,
    }


SPELLING = {
    "ultramed": "UltraMed",
    "ultramix": "UltraMix",
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "nca": "NCA",
    "lora": "LoRA",
    "8bit": "8-bit",
}


def label(key: str) -> str:
    """What tables and figures call an arm: 'ultramed_sft' is 'UltraMed SFT'."""
    return " ".join(SPELLING.get(word, word) for word in key.split("_"))


def wide(accuracy: pd.DataFrame, index: str = "arm", more: tuple[str, ...] = ("n", "unparsed", "well_formed")) -> pd.DataFrame:
    """`Arms.accuracy` as a reader wants it: a row an arm by its label, '48.7 [45.4, 51.9]' a subset, and the
    columns `more` over all."""
    accuracy = accuracy.assign(**{index: accuracy[index].map(label)})
    cells = accuracy.assign(score=percent(accuracy))
    table = cells.pivot_table(index=index, columns="subset", values="score", aggfunc="first", sort=False)
    overall = accuracy[accuracy.subset == "all"].set_index(index)
    return table.join(overall[list(more)]).reset_index()


def percent(frame: pd.DataFrame, value: str = "accuracy") -> pd.Series:
    """'48.7 [45.4, 51.9]' of the columns value, low, high (fractions)."""
    numbers = zip(frame[value], frame.low, frame.high, strict=True)
    return pd.Series([f"{100 * v:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]" for v, lo, hi in numbers], index=frame.index)


def better(arms: Mapping[str, Answers]) -> str:
    """Key of the arm with the highest accuracy, the first of equals."""
    return max(arms, key=lambda name: arms[name].accuracy)
