"""Iterative preference learning (notebooks 22 and 26): rounds of sampling, ranking by the reward model, and training on."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from ultramed.annotate.pairs import PairConfig, pairs
from ultramed.core.config import preference_config
from ultramed.core.profile import IterativeSection
from ultramed.core.store import Artifact
from ultramed.evaluate.arms import Answers, accuracy_row, joined, label
from ultramed.evaluate.sample import read_feedback
from ultramed.experiments.ultramedical import UltraMedical, drawn
from ultramed.train.preference import preference


@dataclass(frozen=True)
class Round:
    """One round of iterative preference learning; number 0 is the vanilla policy. reward: mean of its samples; stopped:
    the reward has risen while accuracy on dev questions fell (over-optimisation)."""

    number: int
    model: Artifact
    answers: Answers
    dev_accuracy: float
    reward: float
    stopped: bool


@dataclass(frozen=True)
class Iteration:
    """The rounds of an experiment's policies, as the profile's section `iterative` says."""

    experiment: UltraMedical

    @property
    def settings(self) -> IterativeSection | None:
        return self.experiment.settings.iterative

    @property
    def arms(self) -> list[str]:
        """The arms of preference learning that are iterated, none where the profile leaves iteration out."""
        return self.settings.arms if self.settings else []

    @property
    def seeds(self) -> list[int]:
        """The seeds whose policies are iterated."""
        return self.experiment.seeds[: self.settings.seeds] if self.settings else []

    def train_rounds(self, arm: str, seed: int = 0) -> Iterator[Round]:
        """Iterative preference learning: each round samples the current policy on fresh prompts, the reward model picks
        best and worst, and training goes on from the current policy. Yields the vanilla policy first.

        Stops early when the reward rises while accuracy on dev questions falls, if the profile says so.
        """
        settings = self.settings
        model, last = self.experiment.train_preference(settings.mixture, arm, seed), None
        for number in range(settings.rounds + 1):
            scored = self._score_round(model, number, seed)
            mean = float(pd.Series([c["score"] for row in read_feedback(scored) for c in row["candidates"]]).mean())
            answered, dev = self.experiment.examine(model, seed), self.experiment.examine(model, seed, dev=True)
            stopped = last is not None and mean > last.reward and dev.accuracy < last.dev_accuracy
            artifacts = (*answered.artifacts, *dev.artifacts, scored)
            last = Round(number, model, Answers(answered.frame, artifacts), dev.accuracy, mean, stopped)
            yield last
            if number == settings.rounds or (stopped and settings.stop):
                return
            model = self._train_round(model, scored, arm, seed, number)

    def train(self, arm: str) -> list[list[Round]]:
        """The rounds of each of `seeds`."""
        return [list(self.train_rounds(arm, seed)) for seed in self.seeds]

    def examine(self, arm: str) -> Answers:
        """Answers after the last round, for each of `seeds`."""
        return joined(rounds[-1].answers for rounds in self.train(arm))

    def answers_by_round(self, rounds: dict[str, list[list[Round]]]) -> dict[str, Answers]:
        """arm -> the rounds of each seed, as arms 'dpo_round_0', 'dpo_last' and, where the profile has the control,
        'dpo_longer'."""
        made = {}
        for arm, seeds in rounds.items():
            for number in range(max(map(len, seeds))):
                made[f"{arm}_round_{number}"] = joined(each[number].answers for each in seeds if len(each) > number)
            made[f"{arm}_last"] = joined(each[-1].answers for each in seeds)
            if self.settings.control:
                both = zip(self.seeds, seeds, strict=True)
                made[f"{arm}_longer"] = joined(
                    self.experiment.examine(self.train_longer(arm, each, seed), seed) for seed, each in both
                )
        return made

    def _score_round(self, model: Artifact, number: int, seed: int) -> Artifact:
        """The reward model's feedback on the policy's samples of fresh prompts."""
        settings, heat = self.settings, self.experiment.settings.preference.on_policy.temperature
        config = self.experiment.sampling(n=settings.n, temperature=heat, seed=100 + number)
        fresh = self.experiment.prompts(settings.prompts, settings.first_of(number))
        return self.experiment.score(drawn(config, model, fresh, f"round{number}_"), seed)

    def round_config(self, arm: str, number: int, seed: int = 0, **changes):
        """The arm's configuration in the round that follows round `number`."""
        return preference_config(
            self.experiment.profile, arm, **{"seed": 100 * (number + 1) + seed, **self.settings.train, **changes}
        )

    def _train_round(self, model: Artifact, scored: Artifact, arm: str, seed: int, number: int) -> Artifact:
        data = pairs(PairConfig(take={"round": 0}, rule="best_worst", max_per_prompt=1, seed=number), round=scored)
        settings = self.settings
        reference = {"reference": self.experiment.train_sft(settings.mixture, seed)} if settings.reference == "initial" else {}
        return preference(self.round_config(arm, number, seed), model=model, pairs=data, **reference)

    def train_longer(self, arm: str, rounds: list[Round], seed: int = 0) -> Artifact:
        """The control of iteration: the vanilla policy trained on with its own pairs for as many steps as the rounds took."""
        steps = sum(r.model.metrics["steps"] for r in rounds[1:])
        config = self.round_config(arm, 0, seed, max_steps=steps)
        return preference(config, model=rounds[0].model, pairs=self.experiment.preference_pairs(self.settings.mixture, seed))


def rounds_table(rounds: dict[str, list[list[Round]]]) -> pd.DataFrame:
    """arm, round, accuracy, low, high, n, reward, stop: a row a round of every arm; `rounds`: arm -> seed's rounds. The seeds
    that ran a round are taken together: the mean reward, and how many stopped after it."""
    rows = []
    for arm, seeds in rounds.items():
        for number in range(max(map(len, seeds))):
            made = [each[number] for each in seeds if len(each) > number]
            found = accuracy_row(joined(r.answers for r in made).frame)
            numbers = {key: found[key] for key in ("accuracy", "low", "high", "n")}
            mean = sum(r.reward for r in made) / len(made)
            rows.append({"arm": label(arm), "round": number, **numbers, "reward": mean, "stop": sum(r.stopped for r in made)})
    return pd.DataFrame(rows)
