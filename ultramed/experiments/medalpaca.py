"""MedAlpaca's experiment (notebook 11): which kind of fine-tuning makes a model better at medical examinations?

Each seed trains every arm on the same rows and examines it on its own slice of the test questions, so that the
questions of all seeds together are distinct and every comparison between two arms is paired question by question. Models
of several sizes are trained on the same rows and asked the same questions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import pandas as pd

from ultramed.core.config import arm_config
from ultramed.core.profile import Profile
from ultramed.core.schema import ModelConfig, TrainConfig, WordsConfig
from ultramed.core.store import Artifact
from ultramed.data import rows as canonical
from ultramed.data.mixture import MixtureConfig, mixture_of
from ultramed.data.sources import dataset, names_in
from ultramed.evaluate.accuracy import answers, by_likelihood, read_answers
from ultramed.evaluate.arms import Answers, Arms, accuracy_row, better, joined, percent
from ultramed.evaluate.stats import wilson
from ultramed.evaluate.words import can_count, word_answers
from ultramed.experiments.jobs import Job
from ultramed.lm.models import base_model
from ultramed.papers import published
from ultramed.train.sft import sft
from ultramed.train.training import training_log

PUBLISHED_ROWS = {  # arm -> row of MedAlpaca's main table
    "base": "LLaMA {size} / {size} / pretrained",
    "alpaca": "Alpaca {size} naive / {size} / alpaca full",
    "alpaca_lora": "Alpaca {size} LoRA / {size} / alpaca lora",
    "full": "MedAlpaca {size} / {size} / full",
    "lora": "MedAlpaca {size} LoRA / {size} / lora",
    "lora_8bit": "MedAlpaca {size} LoRA 8bit / {size} / lora 8bit",
}
MEDALPACAS_WAY = {"protocol": "medalpaca", "answer_form": "medalpaca", "engine": "transformers"}


@dataclass(frozen=True)
class MedAlpaca:
    """One model of a profile, ready to be trained and examined."""

    profile: Profile
    config: ModelConfig

    @classmethod
    def of(cls, profile: Profile) -> "MedAlpaca":
        return cls(profile, profile.models[0])

    @classmethod
    def all_of(cls, profile: Profile) -> "list[MedAlpaca]":
        """The experiment on every model of the profile, in its order."""
        return [cls(profile, config) for config in profile.models]

    @cached_property
    def base(self) -> Artifact:
        """The model that every arm starts from; made or looked up when it is first needed."""
        return base_model(self.config)

    @property
    def settings(self):
        return self.profile.usmle

    @property
    def first(self) -> bool:
        """Whether this is the profile's first model, whose arms have no prefix."""
        return self.config == self.profile.models[0]

    def key(self, arm: str) -> str:
        """What an arm is called among those of all models: 'lora', of a further model 'LLaMA-13B_lora'."""
        return arm if self.first else f"{self.config.label}_{arm}"

    def seeds(self, arm: str = "") -> list[int]:
        """Seeds of an arm, all of them where the profile says nothing else."""
        return self.settings.seeds[: self.settings.arm_seeds.get(arm)]

    # ------------------------------------------------------------------------------------------------- arms and rates

    @property
    def arm_names(self) -> list[str]:
        """The arms of the main table that this model has."""
        further = self.settings.further_arms
        return list(self.settings.arms) if self.first or further is None else further

    @property
    def method_arms(self) -> list[str]:
        """The arms that differ in method only: same rows, same answer form."""
        return [arm for arm in self.arm_names if not self.settings.arms[arm].get("mixture")]

    @property
    def other_rate_arms(self) -> list[str]:
        """The arms that are trained at both rates: MedAlpaca's one for all, and the tuned one."""
        named = self.settings.other_rate_arms
        return self.method_arms if named is None else [arm for arm in named if arm in self.arm_names]

    @property
    def tuned_arms(self) -> list[str]:
        """The arms that are trained at a tuned rate, in the main table or beside it."""
        return self.arm_names if self.settings.main_rate == "tuned" else self.other_rate_arms

    def main_rates(self, tuning: "Tuning") -> dict[str, float]:
        """Arm -> its learning rate in the main table."""
        if self.settings.main_rate == "paper":
            return dict.fromkeys(self.arm_names, self.settings.paper_learning_rate)
        return {arm: tuning.best[arm] for arm in self.arm_names}

    def other_rates(self, tuning: "Tuning") -> dict[str, float]:
        """Arm -> the learning rate that it is tried at beside the main table."""
        if self.settings.main_rate == "paper":
            return {arm: tuning.best[arm] for arm in self.other_rate_arms}
        return dict.fromkeys(self.other_rate_arms, self.settings.paper_learning_rate)

    def grid(self, arm: str) -> list[float]:
        """Learning rates that an arm is tuned over; none where the profile sets its rate."""
        return self.settings.grid.get(arm_config(self.profile, arm).method, [])

    def published_rows(self) -> dict[str, str]:
        """Arm's key -> its row in the published table, of the size that the profile sets this model beside."""
        sizes = dict(zip([m.label for m in self.profile.models], self.settings.published_sizes, strict=False))
        printed = {cell["row"] for cell in published.cells("medalpaca_usmle")}
        rows = {self.key(arm): row.format(size=sizes.get(self.config.label)) for arm, row in PUBLISHED_ROWS.items()}
        return {key: row for key, row in rows.items() if row in printed}

    # ------------------------------------------------------------------------------------------------------- training

    def training_rows(self, config: TrainConfig) -> Artifact:
        """The mixture that a training configuration asks for."""
        return self._rows(config, config.mixture, "train", config.seed)

    def dev_rows(self, config: TrainConfig) -> Artifact:
        """`tuning_questions` of every dev source, in the configuration's answer form."""
        return self._rows(config, self.settings.dev_counts, "dev", 0)

    def _rows(self, config: TrainConfig, counts: dict, side: str, seed: int) -> Artifact:
        made = MixtureConfig(counts=counts, answer_form=config.answer_form, side=side, seed=seed)
        return mixture_of(self.profile, made)

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

    def try_rate(self, arm: str, rate: float) -> tuple[Artifact, Answers]:
        """A tuning run, and its answers to the dev questions."""
        config = self.tuning_config(arm, rate)
        trained = sft(config, model=self.base, data=self.training_rows(config), dev=self.dev_rows(config))
        return trained, self._ask(trained, self.settings.dev_counts, "dev")

    def tune_rates(self) -> "Tuning":
        """Train `tuned_arms` at every learning rate of their grid and ask them the dev questions, as they are asked the test
        questions; the loss of the right dev answers stands beside. An arm without a grid keeps the profile's rate."""
        rows, artifacts, fixed = [], [], {}
        for arm in self.tuned_arms:
            if not self.grid(arm):
                fixed[arm] = arm_config(self.profile, arm).learning_rate
            for rate in self.grid(arm):
                trained, asked = self.try_rate(arm, rate)
                m = {**wilson(asked.frame.correct).row(), **trained.metrics}
                rows.append({"arm": arm, "learning_rate": rate} | {key: m[key] for key in Tuning.MEASURED})
                artifacts += asked.artifacts
        frame = pd.DataFrame(rows, columns=["arm", "learning_rate", *Tuning.MEASURED])
        return Tuning(frame, tuple(artifacts), fixed)

    def train_and_examine(self, arm: str, rate: float) -> tuple[Answers, pd.DataFrame]:
        """(answers of all seeds, training curve: arm, seed, step, loss) of an arm at a learning rate."""
        parts, curves = [], []
        for seed in self.seeds(arm):
            model = self.train_arm(arm, seed, learning_rate=rate)
            parts.append(self.examine(model, seed))
            curves.append(training_log(model)[["step", "loss"]].assign(arm=arm, seed=seed))
        return joined(parts), pd.concat(curves)

    def train_and_examine_all(self, tuning: "Tuning") -> Arms:
        """This model's rows of the main table, the base among them, under their keys."""
        made = self.examine_base(better(self.examine_dev()))
        made |= {arm: self.train_and_examine(arm, rate)[0] for arm, rate in self.main_rates(tuning).items()}
        return Arms({self.key(arm): answered for arm, answered in made.items()})

    # ---------------------------------------------------------------------------------------------------- examination

    def examine(self, model: Artifact, seed: int, limit: int = 0, **changes) -> Answers:
        """Answers to the seed's questions; `changes` are to the profile's `eval`, `limit` is for each subset."""
        whole = self._ask(model, self.settings.questions, "test", seed, limit, **changes)
        # Ledgers are in the order of the batches, longest first; a reader expects Step 1 before Step 2.
        return Answers(whole.frame.sort_values("subset", kind="stable", ignore_index=True), whole.artifacts)

    def _ask(self, model: Artifact, counts: dict, side: str, seed: int | None = None, limit: int = 0, **changes) -> Answers:
        """Answers to so many questions of every source in `counts`: the seed's own, or, without a seed, the first ones."""
        config, parts = self.profile.eval.model_copy(update=changes), []
        for data, select in self._where(counts, side, seed, limit):
            asked = answers(config, model=model, questions=data, side=side, select=select)
            parts.append(Answers(read_answers(asked).assign(seed=seed or 0), (model, asked)))
        return joined(parts)

    def _where(self, counts: dict, side: str, seed: int | None, limit: int = 0) -> Iterator[tuple[Artifact, dict]]:
        """The data sets of `counts`, each with its slices."""
        place, skip = (0, 0) if seed is None else (self.settings.seeds.index(seed), self.settings.skip)
        for name in names_in(counts):
            data = dataset(self.profile, name)
            yield data, _slices(name, data, counts, side, place, limit, skip)

    @property
    def has_words(self) -> bool:
        """Whether the yardstick of words can be had."""
        return can_count(self.settings.questions, arm_config(self.profile, self.method_arms[0]).mixture)

    def examine_words(self, sees: str) -> Answers:
        """The yardstick of words (evaluate/words.py) on the questions of all seeds; of each seed's training rows, as the
        arms."""
        parts = []
        for seed in self.settings.seeds:
            rows = self.training_rows(arm_config(self.profile, self.method_arms[0], seed=seed))
            for data, select in self._where(self.settings.questions, "test", seed):
                asked = word_answers(WordsConfig(sees=sees), rows=rows, questions=data, select=select)
                parts.append(Answers(read_answers(asked).assign(seed=seed), (rows, asked)))
        return joined(parts)

    def examine_dev(self) -> Arms:
        """The base model on the dev questions by likelihood: of the letters ('letter') and of the option texts ('text')."""
        counts = self.settings.dev_counts
        return Arms({target: self._ask(self.base, counts, "dev", **by_likelihood(target)) for target in ("letter", "text")})

    def examine_base(self, target: str) -> Arms:
        """The base model over the questions of all seeds: asked as every arm is ('base'), and by the likelihood of `target`
        ('base_likelihood'), since a model that was never told the asked form should not be judged by it alone."""
        seeds = self.settings.seeds
        return Arms(
            base=joined(self.examine(self.base, seed) for seed in seeds),
            base_likelihood=joined(self.examine(self.base, seed, **by_likelihood(target)) for seed in seeds),
        )

    @property
    def form(self) -> str:
        """How the arms of the main table answer and are asked."""
        return f"{self.profile.eval.answer_form.replace('_', ' ')}, {self.profile.eval.protocol}"

    def _rate(self, arm: str, tuning: "Tuning", main: bool) -> str:
        """What a table says of an arm's rate in the main table, or of the other one: '2e-05, MedAlpaca's'."""
        if main == (self.settings.main_rate == "paper"):
            return f"{self.settings.paper_learning_rate:g}, MedAlpaca's"
        return f"{tuning.best[arm]:g}, " + ("set in the profile" if arm in tuning.fixed else "tuned")

    def main_variants(self, tuning: "Tuning", arms: Arms) -> list["Variant"]:
        """The main table's arms that the variants stand beside."""
        return [
            Variant(self.key(arm), self.form, self._rate(arm, tuning, True), arms[self.key(arm)]) for arm in self.method_arms
        ]

    def examine_variants(self, tuning: "Tuning") -> list["Variant"]:
        """The arms at the other rate, and in MedAlpaca's form, asked greedily and as its evaluation asks (five tries)."""
        seed, limit, variants = self.settings.seeds[0], self.settings.tries_limit, []
        for arm, rate in self.other_rates(tuning).items():
            answered = self.examine(self.train_arm(arm, seed, learning_rate=rate), seed)
            variants.append(Variant(self.key(arm), self.form, self._rate(arm, tuning, False), answered))
        for arm in self.settings.letter_arms if self.first else ():
            seeds, rate = self.settings.seeds[: self.settings.letter_seeds], self.main_rates(tuning)[arm]
            trained = {s: self.train_arm(arm, s, learning_rate=rate, answer_form="medalpaca") for s in seeds}
            greedy = [self.examine(model, s, protocol="greedy", answer_form="medalpaca") for s, model in trained.items()]
            tried = [self.examine(model, s, limit, **MEDALPACAS_WAY) for s, model in trained.items()]
            told = self._rate(arm, tuning, True)
            variants.append(Variant(arm, "medalpaca, greedy", told, joined(greedy)))
            variants.append(Variant(arm, "medalpaca, medalpaca", told, joined(tried)))
        if self.profile.eval.protocol != "medalpaca":
            base = self.examine(self.base, seed, limit, **MEDALPACAS_WAY)
            variants.append(Variant(self.key("base"), "medalpaca, medalpaca", "-", base))
        return variants

    # ----------------------------------------------------------------------------------------------------------- plan

    def jobs(self) -> list[Job]:
        """The training runs of notebook 11 and the examinations of what they made, with the configurations that the verbs above
        give the stages."""
        profile, settings, jobs = self.profile, self.settings, []

        def train(arm: str, what: str, *, questions: dict[str, int] = settings.questions, config: TrainConfig) -> None:
            what = f"{arm}: {what}" if self.first else f"{arm}: {what}, {self.config.label}"
            jobs.append(Job.sft("11", what, config))
            jobs.append(Job.replies("11", f"{what}, answers", sum(questions.values()), profile.eval))

        for arm in self.tuned_arms:
            for rate in self.grid(arm):
                config = self.tuning_config(arm, rate)
                train(arm, f"tuning, rate {rate:g}", questions=self.settings.dev_counts, config=config)
        for arm in self.arm_names:
            for seed in self.seeds(arm):
                train(arm, f"seed {seed}", config=arm_config(profile, arm, seed=seed))
        for arm in self.other_rate_arms:
            train(arm, "the other rate", config=arm_config(profile, arm, seed=settings.seeds[0]))
        for arm in settings.letter_arms if self.first else ():
            for seed in settings.seeds[: settings.letter_seeds]:
                config = arm_config(profile, arm, seed=seed, answer_form="medalpaca")
                train(arm, f"MedAlpaca's form, seed {seed}", config=config)
        return jobs


def _slices(name: str, data: Artifact, counts: dict, side: str, place: int, limit: int, skip: int) -> dict[str, list[int]]:
    """subset -> [start, stop] of the questions of the seed at `place`, after `skip`; one for which too few are left has the
    first."""
    available, out = canonical.subset_sizes(data / f"{side}.parquet"), {}
    for source, count in counts.items():
        dataset_name, _, subset = source.partition(":")
        for key in ([subset] if subset else list(available)) if dataset_name == name else ():
            start, stop = canonical.slice_of_seed(available[key], min(count, available[key]), place, skip)
            out[key] = [start, min(stop, start + limit) if limit else stop]
    return out


@dataclass(frozen=True)
class Tuning:
    """What the dev questions say of learning rates. frame: arm, learning_rate, accuracy (low, high, n), dev_loss, seconds;
    `fixed`: arm -> rate that the profile sets."""

    MEASURED: ClassVar = ["accuracy", "low", "high", "n", "dev_loss", "train_seconds"]
    frame: pd.DataFrame
    artifacts: tuple[Artifact, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, float]:
        """Learning rate with most dev questions right of every arm (of equals the lower loss), or the one that the profile
        sets."""
        ranked = self.frame.sort_values(["accuracy", "dev_loss"], ascending=[False, True], kind="stable")
        best = ranked.drop_duplicates("arm").sort_index()
        return dict(zip(best.arm, best.learning_rate, strict=True)) | self.fixed

    def chosen(self) -> pd.DataFrame:
        """The rate of every arm and where it is from."""
        told = [("set in the profile" if arm in self.fixed else "best on dev questions") for arm in self.best]
        return pd.DataFrame({"arm": list(self.best), "learning_rate": list(self.best.values()), "from": told})

    def table(self) -> pd.DataFrame:
        """The rates tried, with the accuracy on dev questions and its interval."""
        return self.frame.assign(accuracy=percent(self.frame)).drop(columns=["low", "high"])


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
    frame = pd.DataFrame([{"arm": v.arm, "form": v.form, "rate": v.rate, **accuracy_row(v.answers.frame)} for v in variants])
    return frame.assign(accuracy=percent(frame)).drop(columns=["low", "high"])
