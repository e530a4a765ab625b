"""The experiment of notebook 11: which kind of fine-tuning makes a model better at medical examinations?

Each seed trains every arm on the same rows and examines it on its own slice of the test questions, so that the
questions of all seeds together are distinct and every comparison between two arms is paired question by question.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from ultramed.core.config import arm_config
from ultramed.core.schema import ModelConfig, Profile, TrainConfig
from ultramed.core.store import Artifact
from ultramed.data import rows as canonical
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.sources import dataset
from ultramed.evaluate import stats
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.lm import models
from ultramed.train.sft import sft


def _names(counts: dict[str, Any]) -> list[str]:
    return sorted({s.partition(":")[0] for s in counts})


@dataclass(frozen=True)
class Bench:
    """One model of a profile, ready to be trained and examined."""

    profile: Profile
    config: ModelConfig
    model: Artifact

    @classmethod
    def of(cls, profile: Profile, config: ModelConfig) -> "Bench":
        return cls(profile, config, models.base_model(config))

    # ------------------------------------------------------------------------------------------------------- training

    def rows(self, config: TrainConfig, side: str = "train") -> Artifact:
        """The mixture that a training configuration asks for; on the dev side, `tuning_questions` of every exam source."""
        counts: dict[str, int | float] = dict(config.mixture)
        if side == "dev":
            counts = dict.fromkeys(self.profile.usmle.dev_sources, self.profile.usmle.tuning_questions)
        given = {name: dataset(self.profile, name) for name in _names(counts)}
        seed = config.seed if side == "train" else 0
        return mixture(MixtureConfig(counts=counts, answer_form=config.answer_form, side=side, seed=seed), **given)

    def train(self, arm: str, fraction: float = 1.0, dev: bool = False, **changes) -> Artifact:
        """Train one arm. `fraction` scales the rows of every source, `dev` measures the dev loss (both for tuning)."""
        config = arm_config(self.profile, arm, **changes)
        if fraction != 1:
            counts = {k: max(1, round(v * fraction)) if isinstance(v, int) else v * fraction for k, v in config.mixture.items()}
            config = config.model_copy(update={"mixture": counts})
        held = {"dev": self.rows(config, "dev")} if dev else {}
        return sft(config, model=self.model, data=self.rows(config), **held)

    def tune(self, arms: list[str]) -> pd.DataFrame:
        """Dev loss of every learning rate of the arm's grid; columns arm, learning_rate, dev_loss, seconds."""
        setting, out = self.profile.usmle, []
        for arm in arms:
            for rate in setting.grid[arm_config(self.profile, arm).method]:
                made = self.train(arm, setting.tuning_fraction, dev=True, learning_rate=rate, seed=setting.seeds[0])
                m = made.metrics
                out.append({"arm": arm, "learning_rate": rate, "dev_loss": m["dev_loss"], "seconds": m["train_seconds"]})
        return pd.DataFrame(out)

    # ---------------------------------------------------------------------------------------------------- examination

    def examine(self, model: Artifact, seed: int, limit: int = 0, **changes) -> tuple[pd.DataFrame, list[Artifact]]:
        """Answers to the seed's questions, one row a question, with columns of the ledger and `seed`."""
        config = self.profile.eval.model_copy(update=changes)
        index, frames, made = self.profile.usmle.seeds.index(seed), [], []
        for name in _names(self.profile.usmle.questions):
            given = dataset(self.profile, name)
            have = pd.Series([r["subset"] for r in canonical.read_questions(given / "test.parquet")]).value_counts()
            select = {}
            for key, count in self.profile.usmle.questions.items():
                if key.partition(":")[0] != name:
                    continue
                for subset in [key.partition(":")[2]] if ":" in key else list(have.index):
                    n = min(count, int(have[subset]))
                    start = index * n if (index + 1) * n <= have[subset] else 0
                    select[subset] = [start, start + (min(n, limit) if limit else n)]
            made.append(answers(config, model=model, questions=given, select=select))
            frames.append(read_answers(made[-1]).assign(seed=seed))
        # Ledgers are in the order of the batches, longest first; a reader expects Step 1 before Step 2.
        return pd.concat(frames).sort_values("subset", kind="stable", ignore_index=True), made


def best_rates(tuning: pd.DataFrame) -> dict[str, float]:
    """Learning rate with the lowest dev loss of every arm."""
    best = tuning.loc[tuning.groupby("arm", sort=False).dev_loss.idxmin()]
    return dict(zip(best.arm, best.learning_rate, strict=True))


def accuracy_table(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Accuracy with a 95% interval (bootstrap over concepts), outcomes and seeds, by the named columns and over all subsets."""
    out = []
    whole = frame.assign(subset="all")
    for keys, part in pd.concat([frame, whole]).groupby([*by, "subset"], sort=False):
        e = stats.clustered(part.correct, part.concept)
        seeds = part.groupby("seed").correct.mean()
        out.append(
            {
                **dict(zip([*by, "subset"], keys, strict=True)),
                "accuracy": e.value,
                "low": e.low,
                "high": e.high,
                "n": e.n,
                "unparsed": int(part.letter.isna().sum()),
                "well_formed": float(part.strict.mean()),
                "seeds": len(seeds),
                "seed_sd": float(seeds.std()) if len(seeds) > 1 else None,
            }
        )
    return pd.DataFrame(out)


def compare(a: pd.DataFrame, b: pd.DataFrame) -> dict:
    """Paired comparison of two arms on the questions both answered: difference a - b, McNemar's p, and the clustered p.

    `p` is the larger of the two: questions about one concept are not independent, and McNemar's test takes them as such.
    """
    both = a.merge(b, on=["id", "seed"], suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        raise ValueError("the two arms have no question in common")
    d = stats.difference(both.correct_a, both.correct_b, both.concept_a)
    mc = stats.mcnemar(both.correct_a, both.correct_b)
    flip = stats.sign_flip(both.correct_a, both.correct_b, both.concept_a)
    return {
        "a": both.correct_a.mean(),
        "b": both.correct_b.mean(),
        "difference": d.value,
        "low": d.low,
        "high": d.high,
        "n": len(both),
        "mcnemar": mc,
        "clustered": flip,
        "p": max(mc, flip),
    }


def compare_all(frames: dict[str, pd.DataFrame], wanted: list[tuple[str, str]]) -> pd.DataFrame:
    """`compare` of every (A, B) with Holm's correction over the family; columns A, B, those of `compare`, p_holm."""
    made = pd.DataFrame([{"A": a, "B": b, **compare(frames[a], frames[b])} for a, b in wanted])
    return made.assign(p_holm=stats.holm(list(made.p)))


def pool(*frames: pd.DataFrame) -> pd.DataFrame:
    """Answers of several arms to the same questions as one arm, pairable with another pool in the same order."""
    return pd.concat([f.assign(seed=number) for number, f in enumerate(frames)], ignore_index=True)


def better_base(frames: dict[str, pd.DataFrame]) -> str:
    """Name of the base model's best protocol over all questions: the fine-tuned arms must beat that one."""
    return max(frames, key=lambda k: frames[k].correct.mean())
