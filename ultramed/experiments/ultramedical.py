"""The experiments of notebooks 21 to 26: UltraMedical's suites of policies, preferences, reward models and rounds.

`Suite` names what the notebooks share; everything it returns is an artifact of the store, so that a notebook that needs
another one's models finds them there or makes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from ultramed.annotate.feedback import OracleConfig, feedback, reward_feedback
from ultramed.annotate.pairs import PairConfig, pairs
from ultramed.core.config import known, merge, preference_config, validate
from ultramed.core.errors import ConfigError
from ultramed.core.schema import ModelConfig, Profile, ScoringConfig, TrainConfig
from ultramed.core.store import Artifact
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.sources import dataset
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.sample import read_feedback, references, samples
from ultramed.lm import models
from ultramed.train.preference import preference
from ultramed.train.reward import reward
from ultramed.train.sft import sft

DOMAINS = ("medical", "general")


@dataclass(frozen=True)
class Suite:
    """One base model of a profile with its policies."""

    profile: Profile
    config: ModelConfig
    base: Artifact

    @classmethod
    def of(cls, profile: Profile) -> "Suite":
        if profile.ultramedical is None:
            raise ConfigError(f"profile {profile.name!r} has no section `ultramedical`")
        return cls(profile, profile.models[0], models.base_model(profile.models[0]))

    @property
    def own(self):
        return self.profile.ultramedical

    # ------------------------------------------------------------------------------------------------------- policies

    def sft_config(self, counts: dict[str, int | float]) -> TrainConfig:
        changes = {"seed": self.own.seed, "mixture": counts}
        return validate(TrainConfig, merge(merge(self.profile.train.model_dump(mode="json"), self.own.sft), changes), "sft")

    def rows(self, counts: dict[str, int | float], seed: int = 0) -> Artifact:
        given = {name: dataset(self.profile, name) for name in {s.partition(":")[0] for s in counts}}
        return mixture(MixtureConfig(counts=counts, answer_form=self.profile.eval.answer_form, seed=seed), **given)

    def sft(self, name: str) -> Artifact:
        """The policy fine-tuned on a mixture of the profile: 'ultramed', 'ultramix', or 'control'.

        'control' is UltraMix trained on with the questions whose answers the medical reward model has seen: without
        it, re-ranking would be praised for what more labelled questions do.
        """
        known(name, [*self.own.mixtures, "control"], f"profile {self.profile.name!r}, ultramedical.mixtures")
        start, counts = self.base, self.own.mixtures.get(name)
        if name == "control":
            start = self.sft("ultramix")
            counts = {f"{source}[0:{count}]": 1.0 for source, count in self.own.prompts["medical"].items()}
        config = self.sft_config(counts)
        data = self.rows(config.mixture, config.seed)
        return sft(config, model=start, data=data)

    def prefer(self, mix: str, arm: str, **changes) -> Artifact:
        """Preference learning from the SFT policy `mix`, on medical pairs for UltraMed, on all for UltraMix."""
        config = preference_config(self.profile, arm, **changes)  # a wrong arm should fail before anything is trained
        start, data = self.sft(mix), self.pairs("best_random", DOMAINS if mix == "ultramix" else ("medical",))
        return preference(config, model=start, pairs=data)

    # ---------------------------------------------------------------------------------------------------- preferences

    def prompts(self, spec: dict[str, int], first: int = 0, held: bool = False) -> Iterator[tuple[Artifact, str, dict]]:
        """(questions, side, slices) of a prompt specification: source -> count, from the `first`-th of each on."""
        grouped: dict[tuple, dict] = {}
        for source, count in spec.items():
            name, _, subset = source.partition(":")
            side = "dev" if held else "train"
            if subset == "general":  # the bundled exam keeps general questions in files of their own
                side = "general_test" if held else "general_train"
            grouped.setdefault((name, side), {})[subset] = [first, first + count]
        for (name, side), select in grouped.items():
            yield dataset(self.profile, name), side, select

    def candidates(self, domain: str, held: bool = False) -> dict[str, Artifact]:
        """Samples of every policy in the pool for the domain's prompts; `held` ones are for the reward benches."""
        made = {}
        for number, member in enumerate(self.own.pool):
            name, model = f"{member.policy}_t{str(member.temperature).replace('.', '')}", None
            if member.policy not in ("reference", "guess"):
                model = self.base if member.policy == "base" else self.sft(member.policy)
            changes = {"n": member.n, "temperature": member.temperature, "seed": number}
            config = self.own.sample.model_copy(update=changes)
            spec = (self.own.held_prompts if held else self.own.prompts)[domain]
            for questions, side, select in self.prompts(spec, held=held):
                given = {"questions": questions, "side": side, "select": select}
                if model is None:
                    made[member.policy] = references(config, **given, guess=member.policy == "guess")
                else:
                    made[name] = samples(config, model=model, **given)
        return made

    def feedback(self, domain: str, held: bool = False) -> Artifact:
        """The oracle's ranking of the domain's candidates."""
        return feedback(OracleConfig(), **self.candidates(domain, held))

    def pairs(self, rule: str, domains: tuple[str, ...] = ("medical",), held: bool = False, share: float = 1.0) -> Artifact:
        """Preference pairs; with several domains every one gives all its prompts times `share`."""
        judged = {d: self.feedback(d, held) for d in domains}
        take = {d: round(share * art.metrics["prompts"]) if share < 1 else 0 for d, art in judged.items()}
        if rule == "best_random":
            take = {d: self.own.preference_prompts.get(d, 0) for d in domains}
        config = PairConfig(
            take=take,
            rule=rule,
            margin=self.own.margin,
            seed=self.own.seed,
            max_per_prompt=1 if rule != "all" else self.own.pairs_per_prompt,
        )
        return pairs(config, **judged)

    # -------------------------------------------------------------------------------------------------- reward models

    def reward(self, arm: str, **changes) -> Artifact:
        """A reward model trained on the pairs of the arm's domains; equal steps for all arms."""
        known(arm, self.own.reward_arms, f"profile {self.profile.name!r}, ultramedical.reward_arms")
        domains = tuple(self.own.reward_arms[arm])
        data = self.pairs("all", domains, share=1 / len(domains))
        config = self.own.reward.model_copy(update=changes)
        start = self.base if self.own.reward_start == "base" else self.sft(self.own.reward_start)
        return reward(config, model=start, pairs=data)

    def scored(self, sampled: dict[str, Artifact], arm: str | None = None) -> Artifact:
        """A reward model's feedback on samples."""
        rm = self.reward(arm or self.own.judge_arm)
        return reward_feedback(ScoringConfig(), reward=rm, **sampled)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def test_prompts(self, domain: str) -> Iterator[tuple[Artifact, str, dict]]:
        """Test questions: (questions, side, slices)."""
        for questions, side, select in self.prompts(self.own.questions[domain], self.own.skip):
            yield questions, side.replace("train", "test"), select

    def examine(self, model: Artifact, domain: str = "medical", **changes) -> tuple[pd.DataFrame, list[Artifact]]:
        """Answers to the domain's test questions, one row a question; `changes` are to the profile's `eval`."""
        config = self.profile.eval.model_copy(update=changes)
        made = [
            answers(config, model=model, questions=q, side=side, select=select) for q, side, select in self.test_prompts(domain)
        ]
        frame = pd.concat([read_answers(a) for a in made]).assign(seed=self.own.seed, domain=domain)
        return frame.sort_values("subset", kind="stable", ignore_index=True), made

    def sample_test(self, model: Artifact) -> dict[str, Artifact]:
        """`selection_n` samples of every medical test question."""
        config = self.own.sample.model_copy(update={"n": self.own.selection_n, "seed": self.own.seed})
        return {
            f"test{number}": samples(config, model=model, questions=q, side=side, select=select)
            for number, (q, side, select) in enumerate(self.test_prompts("medical"))
        }

    # ------------------------------------------------------------------------------------------------------ iteration

    def rounds(self, arm: str, mix: str = "ultramix") -> Iterator[dict]:
        """Iterative preference learning: each round samples the current policy on fresh prompts, the reward model picks
        best and worst, and training goes on from the current policy.

        Yields round (0: vanilla), model, its test answers, and the mean reward of its samples on the round's prompts.
        Stops early when the reward rises while accuracy falls (over-optimisation), if the profile says so.
        """
        model, first = self.prefer(mix, arm), max(self.own.prompts["medical"].values())
        initial, last = self.sft(mix), None
        for number in range(self.own.iterative.rounds + 1):
            frame, made = self.examine(model)
            config = self.own.sample.model_copy(update={"n": self.own.iterative.n, "seed": 100 + number})
            sampled = {}
            for n, (questions, side, select) in enumerate(self.prompts(self.own.iterative.prompts, first)):
                given = {"questions": questions, "side": side, "select": select}
                sampled[f"round{number}_{n}"] = samples(config, model=model, **given)
            judged = self.scored(sampled)
            score = pd.Series([c["score"] for row in read_feedback(judged) for c in row["candidates"]])
            now = {"round": number, "model": model, "frame": frame, "artifacts": [*made, judged], "reward": score.mean()}
            now["stopped"] = bool(
                last is not None and now["reward"] > last["reward"] and frame.correct.mean() < last["frame"].correct.mean()
            )
            yield now
            if number == self.own.iterative.rounds or (now["stopped"] and self.own.iterative.stop):
                return
            data = pairs(PairConfig(take={"round": 0}, rule="best_worst", max_per_prompt=1, seed=number), round=judged)
            changes = {"seed": number + 1, **self.own.iterative.changes}
            reference = {"reference": initial} if self.own.iterative.reference == "initial" else {}
            model = preference(preference_config(self.profile, arm, **changes), model=model, pairs=data, **reference)
            first += max(self.own.iterative.prompts.values())
            last = now
