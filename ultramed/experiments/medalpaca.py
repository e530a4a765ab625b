"""MedAlpaca's experiment (notebook 11): which kind of fine-tuning makes a model better at medical examinations?

Each seed trains every arm on the same rows and examines it on its own slice of the test questions, so that the
questions of all seeds together are distinct and every comparison between two arms is paired question by question.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from ultramed.core.config import arm_config
from ultramed.core.profile import Profile
from ultramed.core.schema import ModelConfig, TrainConfig
from ultramed.core.store import Artifact
from ultramed.data import rows as canonical
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.sources import dataset, names_in
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.arms import Answers, Arms, accuracy_row, joined
from ultramed.evaluate.stats import Estimate
from ultramed.experiments.jobs import Job
from ultramed.lm.models import base_model
from ultramed.train.sft import sft

PUBLISHED_ROWS = {  # arm -> row of MedAlpaca's main table
    "base": "LLaMA {size} / {size} / pretrained",
    "alpaca": "Alpaca {size} naive / {size} / alpaca full",
    "full": "MedAlpaca {size} / {size} / full",
    "lora": "MedAlpaca {size} LoRA / {size} / lora",
    "lora_8bit": "MedAlpaca {size} LoRA 8bit / {size} / lora 8bit",
}
BASELINES = {"letter": "base_letter", "text": "base_text"}  # likelihood target -> arm


@dataclass(frozen=True)
class MedAlpaca:
    """One model of a profile, ready to be trained and examined."""

    profile: Profile
    config: ModelConfig

    @classmethod
    def of(cls, profile: Profile, config: ModelConfig | None = None) -> "MedAlpaca":
        return cls(profile, config or profile.models[0])

    @cached_property
    def base(self) -> Artifact:
        """The model that every arm starts from; made or looked up when it is first needed."""
        return base_model(self.config)

    @property
    def settings(self):
        return self.profile.usmle

    def seeds(self, arm: str = "") -> list[int]:
        """Seeds of an arm, all of them where the profile says nothing else."""
        return self.settings.seeds[: self.settings.arm_seeds.get(arm)]

    @property
    def method_arms(self) -> list[str]:
        """The arms that differ in method only: same rows, same answer form."""
        return [arm for arm, changes in self.settings.arms.items() if not changes.get("mixture")]

    @property
    def paper_rate_arms(self) -> list[str]:
        """The arms that are trained at the paper's one learning rate, too."""
        return self.method_arms if self.settings.paper_rate_arms is None else self.settings.paper_rate_arms

    def published_rows(self) -> dict[str, str]:
        """Arm -> its row in the published table, of the size that the profile stands beside."""
        return {arm: row.format(size=self.settings.published_size) for arm, row in PUBLISHED_ROWS.items()}

    # ------------------------------------------------------------------------------------------------------- training

    def training_rows(self, config: TrainConfig) -> Artifact:
        """The mixture that a training configuration asks for."""
        return self._rows(config, config.mixture, "train", config.seed)

    def dev_rows(self, config: TrainConfig) -> Artifact:
        """`tuning_questions` of every dev source, in the configuration's answer form."""
        return self._rows(config, dict.fromkeys(self.settings.dev_sources, self.settings.tuning_questions), "dev", 0)

    def _rows(self, config: TrainConfig, counts: dict, side: str, seed: int) -> Artifact:
        datasets = {name: dataset(self.profile, name) for name in names_in(counts)}
        return mixture(MixtureConfig(counts=counts, answer_form=config.answer_form, side=side, seed=seed), **datasets)

    def train_arm(self, arm: str, seed: int = 0, **changes) -> Artifact:
        """The arm's model; `changes` are to its configuration."""
        config = arm_config(self.profile, arm, seed=seed, **changes)
        return sft(config, model=self.base, data=self.training_rows(config))

    def tuning_config(self, arm: str, rate: float) -> TrainConfig:
        """A tuning run: a part of the arm's rows, the first seed, one learning rate."""
        config, fraction = (
            arm_config(self.profile, arm, learning_rate=rate, seed=self.settings.seeds[0]),
            self.settings.tuning_fraction,
        )
        if fraction == 1:
            return config
        part = {s: max(1, round(n * fraction)) if isinstance(n, int) else n * fraction for s, n in config.mixture.items()}
        return config.model_copy(update={"mixture": part})

    def tune_rates(self, arms: Iterable[str] = ()) -> "Tuning":
        """Train arms (all, if none is named) at every learning rate of their grid and measure the loss of the right dev answers."""
        rows, artifacts = [], []
        for arm in arms or self.settings.arms:
            for rate in self.settings.grid[arm_config(self.profile, arm).method]:
                config = self.tuning_config(arm, rate)
                trained = sft(config, model=self.base, data=self.training_rows(config), dev=self.dev_rows(config))
                m = trained.metrics
                rows.append({"arm": arm, "learning_rate": rate, "dev_loss": m["dev_loss"], "seconds": m["train_seconds"]})
                artifacts.append(trained)
        return Tuning(pd.DataFrame(rows), tuple(artifacts))

    def train_and_examine(self, arm: str, rate: float, seeds: Iterable[int] = ()) -> tuple[Answers, pd.DataFrame]:
        """(answers of all seeds, training curve: arm, seed, step, loss) of an arm at a learning rate."""
        parts, curves = [], []
        for seed in seeds or self.seeds(arm):
            model = self.train_arm(arm, seed, learning_rate=rate)
            parts.append(self.examine(model, seed))
            log = pd.read_json(model / "log.jsonl", lines=True).dropna(subset="loss")
            curves.append(log[["step", "loss"]].assign(arm=arm, seed=seed))
        return joined(parts), pd.concat(curves)

    # ---------------------------------------------------------------------------------------------------- examination

    def examine(self, model: Artifact, seed: int, limit: int = 0, **changes) -> Answers:
        """Answers to the seed's questions; `changes` are to the profile's `eval`, `limit` is for each subset."""
        config, parts = self.profile.eval.model_copy(update=changes), []
        for name in names_in(self.settings.questions):
            questions = dataset(self.profile, name)
            asked = answers(config, model=model, questions=questions, select=self._slices(name, questions, seed, limit))
            parts.append(Answers(read_answers(asked).assign(seed=seed), (model, asked)))
        whole = joined(parts)
        # Ledgers are in the order of the batches, longest first; a reader expects Step 1 before Step 2.
        return Answers(whole.frame.sort_values("subset", kind="stable", ignore_index=True), whole.artifacts)

    def _slices(self, name: str, questions: Artifact, seed: int, limit: int) -> dict[str, list[int]]:
        """subset -> [start, stop] of the seed's questions; a seed for which too few are left has the first ones."""
        rows = canonical.read_questions(questions / "test.parquet")
        available = pd.Series([row["subset"] for row in rows]).value_counts()
        place, out = self.settings.seeds.index(seed), {}
        for source, count in self.settings.questions.items():
            dataset_name, _, subset = source.partition(":")
            for key in ([subset] if subset else list(available.index)) if dataset_name == name else ():
                size = min(count, int(available[key]))
                start = place * size if (place + 1) * size <= available[key] else 0
                out[key] = [start, start + (min(size, limit) if limit else size)]
        return out

    def examine_base(self) -> Arms:
        """The base model by the likelihood of the letters and of the option texts, over the questions of all seeds.

        A model that was never told the asked form should not be judged by it; the fine-tuned arms must beat the better
        of the two.
        """
        return Arms(
            {
                arm: joined(
                    self.examine(self.base, s, protocol="likelihood", likelihood_target=target, engine="transformers")
                    for s in self.settings.seeds
                )
                for target, arm in BASELINES.items()
            }
        )

    def examine_variants(self, rates: dict[str, float]) -> list["Variant"]:
        """The arms at the paper's one rate, and in its answer form, greedily and with its five tries."""
        first, paper_rate, variants = self.settings.seeds[0], self.settings.paper_learning_rate, []
        limit, tries = (
            self.settings.tries_limit,
            {"protocol": "medalpaca", "answer_form": "letter_first", "engine": "transformers"},
        )
        for arm in self.paper_rate_arms:
            model = self.train_arm(arm, first, learning_rate=paper_rate)
            variants.append(Variant(arm, "content first", "MedAlpaca's 2e-5", self.examine(model, first)))
        for arm in self.settings.letter_arms:
            seeds = self.settings.seeds[: self.settings.letter_seeds]
            trained = {s: self.train_arm(arm, s, learning_rate=rates[arm], answer_form="letter_first") for s in seeds}
            greedy = [self.examine(model, seed, answer_form="letter_first") for seed, model in trained.items()]
            tried = [self.examine(model, seed, limit, **tries) for seed, model in trained.items()]
            variants.append(Variant(arm, "letter first", "tuned", joined(greedy)))
            variants.append(Variant(arm, "letter first, 5 tries", "tuned", joined(tried)))
        base = self.examine(self.base, first, limit, **tries)
        return [*variants, Variant("base", "letter first, 5 tries", "-", base)]

    # ----------------------------------------------------------------------------------------------------------- plan

    def jobs(self) -> list[Job]:
        """The training runs of notebook 11 and the examinations of what they made, with the configurations that the verbs above give the stages."""
        profile, settings, jobs = self.profile, self.settings, []
        asked = sum(settings.questions.values())

        def train(arm: str, what: str, *, examined: bool = True, config: TrainConfig) -> None:
            jobs.append(Job.sft("11", f"{arm}: {what}", config))
            if examined:
                jobs.append(Job.replies("11", f"{arm}: {what}, answers", asked, profile.eval))

        for arm in settings.arms:
            for rate in settings.grid[arm_config(profile, arm).method]:
                train(arm, f"tuning, rate {rate:g}", examined=False, config=self.tuning_config(arm, rate))
            for seed in self.seeds(arm):
                train(arm, f"seed {seed}", config=arm_config(profile, arm, seed=seed))
        paper = {"seed": settings.seeds[0], "learning_rate": settings.paper_learning_rate}
        for arm in self.paper_rate_arms:
            train(arm, "the paper's rate", config=arm_config(profile, arm, **paper))
        for arm in settings.letter_arms:
            for seed in settings.seeds[: settings.letter_seeds]:
                train(arm, f"letter first, seed {seed}", config=arm_config(profile, arm, seed=seed, answer_form="letter_first"))
        return jobs


@dataclass(frozen=True)
class Tuning:
    """Dev losses by learning rate: arm, learning_rate, dev_loss, seconds."""

    frame: pd.DataFrame
    artifacts: tuple[Artifact, ...]

    @property
    def best(self) -> dict[str, float]:
        """Learning rate with the lowest dev loss of every arm."""
        best = self.frame.loc[self.frame.groupby("arm", sort=False).dev_loss.idxmin()]
        return dict(zip(best.arm, best.learning_rate, strict=True))


@dataclass(frozen=True)
class Variant:
    """An arm trained or asked in another way than in the main table."""

    arm: str
    form: str
    rate: str
    answers: Answers

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return self.answers.artifacts


def variants_table(variants: Iterable[Variant]) -> pd.DataFrame:
    """Accuracy over all questions, a row a variant."""
    rows = []
    for variant in variants:
        row = accuracy_row(variant.answers.frame)
        score = str(Estimate(row.pop("accuracy"), row.pop("low"), row.pop("high"), row["n"]))
        rows.append({"arm": variant.arm, "form": variant.form, "rate": variant.rate, "accuracy": score, **row})
    return pd.DataFrame(rows)
