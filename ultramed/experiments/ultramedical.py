"""UltraMedical's experiments (notebooks 20 to 27): policies, preferences, reward models, re-ranking and rounds.

Every verb returns artifacts of the store, or answers that carry them, so that a notebook that needs another one's models
finds them there or makes them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from ultramed.annotate.feedback import OracleConfig, feedback, reward_feedback
from ultramed.annotate.pairs import PairConfig, pairs
from ultramed.core.config import changed, known, preference_config
from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile, UltraMedicalConfig
from ultramed.core.schema import ModelConfig, SampleConfig, ScoringConfig, TrainConfig
from ultramed.core.store import Artifact
from ultramed.data.exam import is_sum
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.sources import dataset, names_in
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.arms import Answers, Arms, accuracy_row, better, joined, label
from ultramed.evaluate.reward_bench import BenchConfig, bench, pair_scores, read_scores
from ultramed.evaluate.sample import read_feedback, references, samples
from ultramed.experiments.jobs import Job
from ultramed.lm.models import base_model
from ultramed.train.preference import preference
from ultramed.train.reward import reward
from ultramed.train.sft import sft

DOMAINS = ("medical", "general")
MIXTURES = ("ultramed", "ultramix")  # the paper's two
LIKELIHOOD = {"protocol": "likelihood", "engine": "transformers"}  # needs weights, whoever writes the replies
XPO = ("dpo", "kto")  # what the paper calls xPO; other losses are shown beside and never pooled with them
PUBLISHED_SELECTIONS = {  # arm -> row of the paper's re-ranking
    "greedy": "Llama-3-8B UltraMix SFT / greedy",
    "self_consistency": "Llama-3-8B UltraMix SFT / self-consistency",
    "best_of_n": "Llama-3-8B UltraMix SFT / reward-model sorting",
}
WITHOUT_MODEL = ("reference", "guess")  # members of the pool that need none


@dataclass(frozen=True)
class Round:
    """One round of iterative preference learning; number 0 is the vanilla policy. reward: mean of its samples; stopped:
    the reward has risen while accuracy fell (over-optimisation)."""

    number: int
    model: Artifact
    answers: Answers
    reward: float
    stopped: bool


@dataclass(frozen=True)
class UltraMedical:
    """One base model of a profile with its policies."""

    profile: Profile
    config: ModelConfig

    @classmethod
    def of(cls, profile: Profile) -> "UltraMedical":
        if profile.ultramedical is None:
            raise ConfigError(f"profile {profile.name!r} has no section `ultramedical`")
        return cls(profile, profile.models[0])

    @property
    def settings(self) -> UltraMedicalConfig:
        return self.profile.ultramedical

    @cached_property
    def base(self) -> Artifact:
        """The model that every policy starts from; made or looked up when it is first needed."""
        return base_model(self.config)

    @property
    def preference_arms(self) -> list[str]:
        return list(self.settings.preference.arms)

    def sampling_note(self) -> str:
        """How test questions are sampled, for captions and the scorecard."""
        sample = self.settings.sample
        return f"{self.settings.rerank.n} samples at T {sample.temperature}, top-p {sample.top_p}"

    # ------------------------------------------------------------------------------------------------------- policies

    def sft_config(self, name: str) -> TrainConfig:
        """Of a mixture of the profile, or of 'control'."""
        known(name, [*self.settings.sft.mixtures, "control"], f"profile {self.profile.name!r}, ultramedical.sft.mixtures")
        counts = self.settings.sft.mixtures.get(name)
        if name == "control":
            counts = {f"{source}[0:{count}]": 1.0 for source, count in self.settings.candidates.prompts["medical"].items()}
        changes = {"seed": self.settings.seed, "mixture": counts}
        return changed(self.profile.train, self.settings.sft.train, changes, where="ultramedical.sft.train")

    def training_rows(self, name: str) -> Artifact:
        """The rows of a mixture."""
        counts = self.sft_config(name).mixture
        datasets = {source: dataset(self.profile, source) for source in names_in(counts)}
        form, seed = self.profile.eval.answer_form, self.settings.seed
        return mixture(MixtureConfig(counts=counts, answer_form=form, seed=seed), **datasets)

    def train_sft(self, name: str) -> Artifact:
        """The policy fine-tuned on a mixture of the profile: 'ultramed', 'ultramix', or 'control'.

        'control' is UltraMix trained on with the questions whose answers the medical reward model has seen: without
        it, re-ranking would be praised for what more labelled questions do.
        """
        config = self.sft_config(name)
        start = self.train_sft("ultramix") if name == "control" else self.base
        return sft(config, model=start, data=self.training_rows(name))

    def train_preference(self, mix: str, arm: str, **changes) -> Artifact:
        """Preference learning from the SFT policy `mix`, on medical pairs for UltraMed, on all for UltraMix."""
        config = preference_config(self.profile, arm, **changes)  # a wrong arm should fail before anything is trained
        domains = DOMAINS if mix == "ultramix" else ("medical",)
        return preference(config, model=self.train_sft(mix), pairs=self.make_pairs("best_random", domains))

    def train_policy(self, mix: str, arm: str) -> Artifact:
        """'sft', or an arm of preference learning on top of it."""
        return self.train_sft(mix) if arm == "sft" else self.train_preference(mix, arm)

    # ---------------------------------------------------------------------------------------------------- preferences

    def prompts(self, spec: dict[str, int], first: int = 0, held: bool = False) -> Iterator[dict]:
        """Where a stage finds the questions of 'source -> count', from the `first`-th of each on: questions, side, select."""
        grouped: dict[tuple[str, str], dict] = {}
        for source, count in spec.items():
            name, _, subset = source.partition(":")
            side = "dev" if held else "train"
            if subset == "general":  # the bundled exam keeps general questions in files of their own
                side = "general_test" if held else "general_train"
            grouped.setdefault((name, side), {})[subset] = [first, first + count]
        for (name, side), select in grouped.items():
            yield {"questions": dataset(self.profile, name), "side": side, "select": select}

    def collect_candidates(self, domain: str, held: bool = False) -> dict[str, Artifact]:
        """Samples of every policy in the pool for the domain's prompts; `held` ones are for the reward benches."""
        section, made = self.settings.candidates, {}
        for number, member in enumerate(section.pool):
            config = self._sampling(n=member.n, temperature=member.temperature, seed=number)
            for where in self.prompts((section.held_prompts if held else section.prompts)[domain], held=held):
                if member.policy in WITHOUT_MODEL:
                    made[member.policy] = references(config, **where, guess=member.policy == "guess")
                else:
                    model = self.base if member.policy == "base" else self.train_sft(member.policy)
                    name = f"{member.policy}_t{str(member.temperature).replace('.', '')}"
                    made[name] = samples(config, model=model, **where)
        return made

    def _sampling(self, **changes) -> SampleConfig:
        return self.settings.sample.model_copy(update=changes)

    def rank_candidates(self, domain: str, held: bool = False) -> Artifact:
        """The oracle's ranking of the domain's candidates."""
        return feedback(OracleConfig(), **self.collect_candidates(domain, held))

    def make_pairs(self, rule: str, domains: tuple[str, ...] = ("medical",), share: float = 1.0) -> Artifact:
        """Preference pairs of ranked candidates; with several domains every one gives all its prompts times `share`."""
        ranked = {domain: self.rank_candidates(domain) for domain in domains}
        if rule == "best_random":
            take = {domain: self.settings.preference.prompts.get(domain, 0) for domain in domains}
        else:
            take = {d: round(share * art.metrics["prompts"]) if share < 1 else 0 for d, art in ranked.items()}
        per_prompt = self.settings.reward.pairs_per_prompt if rule == "all" else 1
        config = PairConfig(
            take=take, rule=rule, margin=self.settings.candidates.margin, seed=self.settings.seed, max_per_prompt=per_prompt
        )
        return pairs(config, **ranked)

    # -------------------------------------------------------------------------------------------------- reward models

    def train_reward_model(self, arm: str, **changes) -> Artifact:
        """A reward model trained on the pairs of the arm's domains; equal steps for all arms."""
        section = self.settings.reward
        known(arm, section.arms, f"profile {self.profile.name!r}, ultramedical.reward.arms")
        domains = tuple(section.arms[arm])
        data = self.make_pairs("all", domains, share=1 / len(domains))
        start = self.base if section.start == "base" else self.train_sft(section.start)
        return reward(section.train.model_copy(update=changes), model=start, pairs=data)

    def score(self, sampled: dict[str, Artifact], arm: str | None = None) -> Artifact:
        """A reward model's feedback on samples; by default of the arm that re-ranks."""
        model = self.train_reward_model(arm or self.settings.rerank.reward_arm)
        return reward_feedback(ScoringConfig(), reward=model, **sampled)

    def make_bench(self, domain: str = "medical") -> Artifact:
        """Pairs of right and wrong candidates of held-out prompts, by category (medical) or section (general)."""
        return bench(BenchConfig(domain=domain, seed=self.settings.seed), feedback=self.rank_candidates(domain, held=True))

    def score_pairs(self, arm: str, test_pairs: Artifact, **changes) -> Answers:
        """Whether a reward model prefers the chosen side, a row a pair: id, subset, concept (the prompt), correct, seed,
        scores and lengths of both sides. `changes` are to the model's training."""
        model = self.train_reward_model(arm, **changes)
        scored = pair_scores(ScoringConfig(), reward=model, pairs=test_pairs)
        return Answers(read_scores(scored).assign(seed=0), (model, test_pairs, scored))

    # ----------------------------------------------------------------------------------------------------- evaluation

    def test_prompts(self, domain: str) -> Iterator[dict]:
        """Where a stage finds the test questions: questions, side, select."""
        for where in self.prompts(self.settings.test.questions[domain], self.settings.test.skip):
            yield {**where, "side": where["side"].replace("train", "test")}

    def examine(self, model: Artifact, domain: str = "medical", dev: bool = False, **changes) -> Answers:
        """Answers to the domain's test questions; `changes` are to the profile's `eval`. dev: the held-out dev questions
        instead, to choose a policy by."""
        config, parts = self.profile.eval.model_copy(update=changes), []
        held = self.settings.candidates.held_prompts[domain]
        for where in self.prompts(held, held=True) if dev else self.test_prompts(domain):
            asked = answers(config, model=model, **where)
            frame = read_answers(asked).assign(seed=self.settings.seed, domain=domain)
            parts.append(Answers(frame, (model, asked)))
        whole = joined(parts)
        return Answers(whole.frame.sort_values("subset", kind="stable", ignore_index=True), whole.artifacts)

    def examine_base(self, domain: str = "medical") -> Answers:
        """The base model by the better of two likelihoods (letters, option texts): it was never told the asked form."""
        targets = ("letter", "text")
        tried = Arms({t: self.examine(self.base, domain, likelihood_target=t, **LIKELIHOOD) for t in targets})
        return Answers(tried[better(tried)].frame, tried.artifacts)

    def examine_closed_book(self, model: Artifact) -> Answers:
        """General questions without their options: the option whose text is most likely after the bare question.

        Subsets are sums and cities.
        """
        how = {"likelihood_prompt": "cloze", "likelihood_target": "text"}
        answered = self.examine(model, "general", **how, **LIKELIHOOD)
        return answered.assign(subset=answered.frame.concept.map(is_sum).map({True: "sums", False: "cities"}))

    def sample_test(self, model: Artifact) -> dict[str, Artifact]:
        """`rerank.n` samples of every medical test question."""
        config = self._sampling(n=self.settings.rerank.n, seed=self.settings.seed)
        tests = enumerate(self.test_prompts("medical"))
        return {f"test{number}": samples(config, model=model, **where) for number, where in tests}

    def choose_policy(self, mix: str = "ultramix") -> tuple[str, Arms]:
        """(the arm of `mix` that is best on dev questions, dev answers of all arms). Never chosen on the test questions."""
        arms = Arms({arm: self.examine(self.train_policy(mix, arm), dev=True) for arm in ("sft", *self.preference_arms)})
        return better(arms), arms

    # ------------------------------------------------------------------------------------------------------ iteration

    def train_rounds(self, arm: str, mix: str = "ultramix") -> Iterator[Round]:
        """Iterative preference learning: each round samples the current policy on fresh prompts, the reward model picks
        best and worst, and training goes on from the current policy. Yields the vanilla policy first.

        Stops early when the reward rises while accuracy falls, if the profile says so.
        """
        settings, model = self.settings.iterative, self.train_preference(mix, arm)
        first, last = max(self.settings.candidates.prompts["medical"].values()), None
        for number in range(settings.rounds + 1):
            answered, scored = self.examine(model), self._score_round(model, number, first)
            mean = float(pd.Series([c["score"] for row in read_feedback(scored) for c in row["candidates"]]).mean())
            stopped = last is not None and mean > last.reward and answered.accuracy < last.answers.accuracy
            last = Round(number, model, Answers(answered.frame, (*answered.artifacts, scored)), mean, stopped)
            yield last
            if number == settings.rounds or (stopped and settings.stop):
                return
            model = self._train_round(model, scored, arm, mix, number)
            first += max(settings.prompts.values())

    def _score_round(self, model: Artifact, number: int, first: int) -> Artifact:
        """The reward model's feedback on the policy's samples of fresh prompts, from the `first`-th on."""
        config = self._sampling(n=self.settings.iterative.n, seed=100 + number)
        fresh = enumerate(self.prompts(self.settings.iterative.prompts, first))
        return self.score({f"round{number}_{n}": samples(config, model=model, **where) for n, where in fresh})

    def round_config(self, arm: str, number: int):
        """The arm's configuration in the round that follows round `number`."""
        return preference_config(self.profile, arm, **{"seed": number + 1, **self.settings.iterative.train})

    def _train_round(self, model: Artifact, scored: Artifact, arm: str, mix: str, number: int) -> Artifact:
        data = pairs(PairConfig(take={"round": 0}, rule="best_worst", max_per_prompt=1, seed=number), round=scored)
        reference = {"reference": self.train_sft(mix)} if self.settings.iterative.reference == "initial" else {}
        return preference(self.round_config(arm, number), model=model, pairs=data, **reference)

    # ----------------------------------------------------------------------------------------------------------- plan

    def jobs(self) -> list[Job]:
        """Training and replies of notebooks 21 to 26, with the configurations that the verbs above give the stages."""
        settings, candidates, jobs = self.settings, self.settings.candidates, []
        asked, how = sum(settings.test.questions["medical"].values()), self.profile.eval
        pool = sum(member.n for member in candidates.pool if member.policy not in WITHOUT_MODEL)
        prompts = {domain: sum(spec.values()) for domain, spec in candidates.prompts.items()}
        pair_prompts = {domain: settings.preference.prompts.get(domain) or count for domain, count in prompts.items()}
        for name in [*settings.sft.mixtures, "control"]:
            jobs.append(Job.sft("22", f"SFT {name}", self.sft_config(name)))
            jobs.append(Job.replies("22", f"SFT {name}: answers", asked, how))
        for domain, count in prompts.items():
            held = sum(candidates.held_prompts[domain].values())
            jobs.append(Job.replies("21", f"candidates, {domain}", count + held, settings.sample, pool))
        for mix in MIXTURES:
            count = sum(pair_prompts.values()) if mix == "ultramix" else pair_prompts["medical"]
            for arm in self.preference_arms:
                jobs.append(Job.preference("22", f"{arm} on {mix}", preference_config(self.profile, arm), count))
                jobs.append(Job.replies("22", f"{arm} on {mix}: answers", asked, how))
        for arm, domains in settings.reward.arms.items():
            count = round(sum(prompts[d] for d in domains) / len(domains))
            jobs.append(Job.reward("24", f"reward model, {arm}", settings.reward.train, count, pool))
        jobs.append(Job.replies("25", "samples of every test question", asked, settings.sample, settings.rerank.n))
        fresh = sum(settings.iterative.prompts.values())
        for arm in settings.iterative.arms:
            for number in range(settings.iterative.rounds):
                jobs.append(Job.replies("26", f"iterative {arm}: samples", fresh, settings.sample, settings.iterative.n))
                config = self.round_config(arm, number)
                jobs.append(Job.preference("26", f"iterative {arm}, round {number + 1}", config, fresh))
        return jobs


def rounds_table(rounds: dict[str, list[Round]]) -> pd.DataFrame:
    """arm, round, accuracy, low, high, n, reward, stop: a row a round of every arm."""
    rows = []
    for arm, made in rounds.items():
        for r in made:
            found = accuracy_row(r.answers.frame)
            numbers = {key: found[key] for key in ("accuracy", "low", "high", "n")}
            rows.append({"arm": label(arm), "round": r.number, **numbers, "reward": r.reward, "stop": r.stopped})
    return pd.DataFrame(rows)


def mixtures_table(experiment: UltraMedical, names: Iterable[str]) -> tuple[pd.DataFrame, list[Artifact]]:
    """(what each mixture is made of and how long its policy was trained, the artifacts)."""
    rows, artifacts = [], []
    for name in names:
        data, policy = experiment.training_rows(name), experiment.train_sft(name)
        trained = {"steps": policy.metrics["steps"], "tokens": policy.metrics["tokens"], "row ids": data.metrics["row_ids"]}
        for source, part in data.metrics["sources"].items():
            rows.append({"mixture": name, "source": source, "rows": part["rows"], "of": part["of"], **trained})
        artifacts += [data, policy]
    return pd.DataFrame(rows), artifacts


def published_rows(size: str) -> dict[str, str]:
    """Arm of notebook 22 -> its row in Table 2, of '8B' or '70B'."""
    segment, rows = f"{size} UltraMedical", {}
    base = {"8B": "~7B / Llama-3-8B-Instruct", "70B": ">40B / Llama-3-70B-Instruct"}[size]
    for mix, name in (("ultramed", "UltraMed"), ("ultramix", "UltraMix")):
        rows[f"{mix}_sft"] = f"{segment} / {name} + SFT"
        rows |= {f"{mix}_{arm}": f"{segment} / {name} + Vanilla {arm.upper()}" for arm in ("dpo", "kto")}
    if size == "8B":  # the paper iterated at this size only
        rows |= {f"ultramix_iterative_{arm}": f"{segment} / UltraMix + Iterative {arm.upper()}" for arm in ("dpo", "kto")}
    return {"base": base, **rows, "best_ensemble": f"{segment} / UltraMix Best (Ens)"}
