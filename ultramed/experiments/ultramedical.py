"""UltraMedical's experiments (notebooks 20 to 27): policies, preferences, reward models, re-ranking and rounds.

Every verb returns artifacts of the store, or answers that carry them, so that a notebook that needs another one's models
finds them there or makes them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ultramed.annotate.feedback import OracleConfig, feedback, reward_feedback
from ultramed.annotate.judge import LLMConfig, llm_feedback
from ultramed.annotate.pair_sets import JoinConfig, join_pairs, pairs_from
from ultramed.annotate.pairs import PairConfig, chosen_rows, pairs
from ultramed.core.client import ServerConfig
from ultramed.core.config import changed, known, preference_config
from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile, UltraMedicalConfig
from ultramed.core.schema import EvalConfig, ModelConfig, RewardConfig, SampleConfig, ScoringConfig, TrainConfig, WordsConfig
from ultramed.core.store import Artifact
from ultramed.data import rows as canonical
from ultramed.data.exam import is_sum
from ultramed.data.mixture import MixtureConfig, mixture_of
from ultramed.data.sources import dataset, names_in
from ultramed.evaluate.accuracy import answers, by_likelihood, read_answers
from ultramed.evaluate.arms import Answers, Arms, better, joined
from ultramed.evaluate.reward_bench import BenchConfig, bench, pair_scores, read_scores
from ultramed.evaluate.sample import references, samples
from ultramed.evaluate.words import can_count, word_answers
from ultramed.lm.models import base_model
from ultramed.train.preference import preference
from ultramed.train.reward import reward
from ultramed.train.sft import sft

DOMAINS = ("medical", "general")
XPO = ("dpo", "kto")  # what the paper calls xPO; other losses are shown beside and never pooled with them
WITHOUT_MODEL = ("reference", "guess")  # members of the pool that need none
CONTROLS = {"same_prompts": "reference answers of the same prompts", "same_steps": "the pairs' chosen sides, as many steps"}


@dataclass(frozen=True)
class UltraMedical:
    """One base model of a profile with its policies. A `seed` is one of `seeds`: it decides a policy's rows, its own samples
    and pairs, and the test questions that it is examined on."""

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

    @property
    def seeds(self) -> list[int]:
        return self.settings.seeds

    @cached_property
    def base(self) -> Artifact:
        """What tables call the base; made or looked up when it is first needed."""
        return base_model(self.config)

    @cached_property
    def start(self) -> Artifact:
        """What SFT starts from: the base, unless the profile names another model."""
        return base_model(self.settings.sft.model) if self.settings.sft.model else self.base

    @property
    def mixtures(self) -> list[str]:
        """Those of the paper's two mixtures that the profile has."""
        return [name for name in ("ultramed", "ultramix") if name in self.settings.sft.mixtures]

    @property
    def preferred(self) -> dict[str, tuple[str, str]]:
        """The policies of preference learning: 'ultramed_dpo' -> its mixture and its arm."""
        section = self.settings.preference
        mixes = [mix for mix in self.mixtures if mix in (section.mixtures or self.mixtures)]
        return {f"{mix}_{arm}": (mix, arm) for mix in mixes for arm in section.arms}

    @property
    def has_words(self) -> bool:
        """Whether the yardstick of words can be had."""
        return can_count(self.settings.test.questions["medical"], self.settings.sft.mixtures[self.mixtures[0]])

    @property
    def rerank_seeds(self) -> list[int]:
        """The seeds whose policies are sampled and re-ranked."""
        return self.seeds[: self.settings.rerank.seeds]

    @property
    def has_ensemble(self) -> bool:
        """Whether notebook 22 samples the best UltraMix arm."""
        return self.settings.rerank.ensemble and "ultramix" in self.mixtures

    @cached_property
    def asking(self) -> EvalConfig:
        """How policies are asked."""
        return changed(self.profile.eval, self.settings.eval, where="ultramedical.eval")

    def sampling_note(self) -> str:
        """How test questions are sampled, for captions and the scorecard."""
        sample = self.settings.sample
        return f"{self.settings.rerank.n} samples at T {sample.temperature}, top-p {sample.top_p}"

    def each_seed(self, asked: Callable[[int], Answers], seeds: Iterable[int] = ()) -> Answers:
        """The answers that `asked` gives for every seed (or the given ones), one after the other."""
        return joined(asked(seed) for seed in seeds or self.seeds)

    # ------------------------------------------------------------------------------------------------------- policies

    def sft_config(self, name: str, seed: int = 0) -> TrainConfig:
        """Of a mixture of the profile, or of 'control'."""
        known(name, [*self.settings.sft.mixtures, "control"], f"profile {self.profile.name!r}, ultramedical.sft.mixtures")
        counts = self.settings.sft.mixtures.get(name)
        if name == "control":
            counts = whole_slices(self.settings.candidates.prompts["medical"])
        changes = {"seed": seed, "mixture": counts, "answer_form": self.asking.answer_form}
        return changed(self.profile.train, changes, self.settings.sft.train, where="ultramedical.sft.train")

    def training_rows(self, name: str, seed: int = 0) -> Artifact:
        """The rows of a mixture."""
        return self._mixture(self.sft_config(name, seed))

    def _mixture(self, config: TrainConfig) -> Artifact:
        made = MixtureConfig(counts=config.mixture, answer_form=config.answer_form, seed=config.seed)
        return mixture_of(self.profile, made)

    def train_sft(self, name: str, seed: int = 0) -> Artifact:
        """The policy fine-tuned on a mixture of the profile, or 'control'.

        'control' is the re-ranked policy trained on with the questions whose answers the medical reward model has seen:
        without it, re-ranking would be praised for what more labelled questions do.
        """
        start = self.train_sft(self.settings.rerank.mixture, seed) if name == "control" else self.start
        return sft(self.sft_config(name, seed), model=start, data=self.training_rows(name, seed))

    def train_preference(self, mix: str, arm: str, seed: int = 0, **changes) -> Artifact:
        """Preference learning from the SFT policy `mix`."""
        # A wrong arm should fail before anything is trained.
        config = preference_config(self.profile, arm, **{"seed": seed, **changes})
        return preference(config, model=self.train_sft(mix, seed), pairs=self.preference_pairs(mix, seed))

    def train_policy(self, mix: str, arm: str, seed: int = 0) -> Artifact:
        """'sft', or an arm of preference learning on top of it."""
        return self.train_sft(mix, seed) if arm == "sft" else self.train_preference(mix, arm, seed)

    def control_config(self, mix: str, control: str, seed: int = 0) -> TrainConfig:
        """Of one of CONTROLS: SFT's, on other rows."""
        section, config = self.settings.preference, self.sft_config(mix, seed)
        if control == "same_prompts":
            return config.model_copy(update={"mixture": whole_slices(section.prompts["medical"], section.first)})
        how = {"epochs": section.train.epochs, "global_batch_size": section.train.global_batch_size}
        return config.model_copy(update={"mixture": {"chosen": 1.0}, **how})

    def train_control(self, mix: str, control: str, seed: int = 0) -> Artifact:
        """What preference learning should beat to be worth its pairs: SFT of the same policy, at SFT's rate, on one of
        CONTROLS."""
        config = self.control_config(mix, control, seed)
        if control == "same_prompts":
            data = self._mixture(config)
        else:
            data = chosen_rows(pairs=self.preference_pairs(mix, seed))
        return sft(config, model=self.train_sft(mix, seed), data=data)

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
            config = self.sampling(n=member.n, temperature=member.temperature, seed=number)
            for place, where in enumerate(self.prompts((section.held_prompts if held else section.prompts)[domain], held=held)):
                several = f"_{place}" if place else ""  # data sets have candidates of their own
                if member.policy in WITHOUT_MODEL:
                    made[f"{member.policy}{several}"] = references(config, **where, guess=member.policy == "guess")
                else:
                    model = self.base if member.policy == "base" else self.train_sft(member.policy, self.seeds[0])
                    name = f"{member.policy}_t{str(member.temperature).replace('.', '')}"
                    made[f"{name}{several}"] = samples(config, model=model, **where)
        return made

    def sampling(self, **changes) -> SampleConfig:
        """The profile's `sample` with changes."""
        return self.settings.sample.model_copy(update=changes)

    def rank_candidates(self, domain: str, held: bool = False) -> Artifact:
        """The annotator's ranking of the pool's candidates."""
        return self._annotated(self.collect_candidates(domain, held))

    def _annotated(self, samples: dict[str, Artifact]) -> Artifact:
        """Feedback by the profile's annotator: the oracle, or, as the paper has it of GPT-4, the profile's judge."""
        if self.settings.annotator == "judge":
            return llm_feedback(LLMConfig(server=ServerConfig.of(self.profile.judge)), **samples)
        return feedback(OracleConfig(), **samples)

    def preference_pairs(self, mix: str, seed: int = 0) -> Artifact:
        """The pairs that preference learning from the SFT policy `mix` uses: the best candidate against a random lower one.
        General prompts are UltraMix's only."""
        section = self.settings.preference
        domains = [d for d in DOMAINS if section.prompts.get(d) and (d == "medical" or mix == "ultramix")]
        if section.source == "policy":
            ranked = {domain: self._rank_own(mix, domain, seed) for domain in domains}
            take, margin = dict.fromkeys(domains, 0), section.on_policy.margin
        elif section.source == "pool":
            ranked = {domain: self.rank_candidates(domain) for domain in domains}
            take = {domain: sum(section.prompts[domain].values()) for domain in domains}
            margin = self.settings.candidates.margin
        else:
            return released_pairs(self.profile, section.prompts, domains, rule="best_random", seed=seed)
        return pairs(PairConfig(take=take, margin=margin, seed=seed), **ranked)

    def _rank_own(self, mix: str, domain: str, seed: int) -> Artifact:
        """The annotator's ranking of the SFT policy's own samples of `preference.prompts`."""
        section, model = self.settings.preference, self.train_sft(mix, seed)
        config = self.sampling(n=section.on_policy.n, temperature=section.on_policy.temperature, seed=1000 + seed)
        asked = self.prompts(section.prompts[domain], section.first)
        return self._annotated(drawn(config, model, asked, mix))

    # -------------------------------------------------------------------------------------------------- reward models

    def reward_pairs(self, arm: str) -> Artifact:
        """Every ordered pair of candidates of the arm's prompts, the closest `pairs_per_prompt` of a prompt; or the pairs of
        the data sets that the profile names."""
        section = self.settings.reward
        known(arm, section.arms, f"profile {self.profile.name!r}, ultramedical.reward.arms")
        if section.sources:
            return released_pairs(self.profile, section.sources, section.arms[arm], seed=self.seeds[0])
        ranked = {domain: self.rank_candidates(domain) for domain in section.arms[arm]}
        config = PairConfig(
            take=section.arms[arm],
            rule="all",
            margin=self.settings.candidates.margin,
            seed=self.seeds[0],
            max_per_prompt=section.pairs_per_prompt,
        )
        return pairs(config, **ranked)

    @property
    def reward_seeds(self) -> list[int]:
        return self.seeds[: self.settings.reward.seeds]

    def reward_config(self, seed: int, **changes) -> RewardConfig:
        """A reward model's, of one of `reward_seeds`, which decides its head and the order of the prompts."""
        return self.settings.reward.train.model_copy(update={"seed": seed, **changes})

    def train_reward_model(self, arm: str, seed: int | None = None, **changes) -> Artifact:
        """A reward model trained on the pairs of the arm's domains."""
        section, seed = self.settings.reward, self.seeds[0] if seed is None else seed
        data = self.reward_pairs(arm)
        start = self.base if section.start == "base" else self.train_sft(section.start, seed)
        return reward(self.reward_config(seed, **changes), model=start, pairs=data)

    @property
    def rankers(self) -> list[int]:
        """The seeds of the reward models that rank the same samples, where one policy is sampled; else none. Of several
        policies each is ranked by its own seed's (`score`), so that their differences hold the reward models', too."""
        return self.reward_seeds if len(self.rerank_seeds) == 1 else []

    def score(self, sampled: dict[str, Artifact], seed: int) -> Artifact:
        """Feedback on samples by the seed's reward model; by the first, where the seed has none."""
        model = self.train_reward_model(self.settings.rerank.reward_arm, seed if seed in self.reward_seeds else self.seeds[0])
        return reward_feedback(ScoringConfig(), reward=model, **sampled)

    def make_bench(self, domain: str = "medical") -> Artifact:
        """Pairs of right and wrong candidates of held-out prompts, by category (medical) or section (general); or the test side
        of the data set that the profile names."""
        if name := self.settings.reward.benches.get(domain):
            return pairs_from(dataset(self.profile, name), side="test")
        return bench(BenchConfig(domain=domain, seed=self.seeds[0]), feedback=self.rank_candidates(domain, held=True))

    def score_pairs(self, arm: str, test_pairs: Artifact, seeds: Iterable[int] = ()) -> Answers:
        """Whether reward models (of all reward seeds, or the given ones) prefer the chosen side, a row a pair and seed: id,
        subset, concept (the prompt), correct, seed, scores and lengths of both sides."""
        parts = []
        for seed in seeds or self.reward_seeds:
            model = self.train_reward_model(arm, seed)
            scored = pair_scores(ScoringConfig(), reward=model, pairs=test_pairs)
            parts.append(Answers(read_scores(scored).assign(seed=seed), (model, test_pairs, scored)))
        return joined(parts)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def test_prompts(self, domain: str, seed: int = 0) -> Iterator[dict]:
        """Where a stage finds a seed's test questions: questions, side, select. A seed for which too few are left has the
        first. The bundled general questions have no dev side: the first of the test side are it."""
        skip, place = self.settings.test.skip, self.seeds.index(seed)
        if domain == "general":
            skip = max([skip, *self.settings.candidates.held_prompts["general"].values()])
        for where in self.prompts(self.settings.test.questions[domain]):
            side = where["side"].replace("train", "test")
            sizes = canonical.subset_sizes(where["questions"] / f"{side}.parquet")
            counts = {subset: stop - start for subset, (start, stop) in where["select"].items()}
            select = {subset: canonical.slice_of_seed(sizes[subset], count, place, skip) for subset, count in counts.items()}
            yield {**where, "side": side, "select": select}

    def examine(self, model: Artifact, seed: int = 0, domain: str = "medical", dev: bool = False, **changes) -> Answers:
        """Answers to the domain's test questions of a seed; `changes` are to the profile's `eval`. dev: the held-out dev
        questions instead, to choose by; they are the same for every seed."""
        config, parts = self.asking.model_copy(update=changes), []
        held = self.settings.candidates.held_prompts[domain]
        for where in self.prompts(held, held=True) if dev else self.test_prompts(domain, seed):
            asked = answers(config, model=model, **where)
            frame = read_answers(asked).assign(seed=seed, domain=domain)
            parts.append(Answers(frame, (model, asked)))
        whole = joined(parts)
        return Answers(whole.frame.sort_values("subset", kind="stable", ignore_index=True), whole.artifacts)

    def examine_policy(self, mix: str, arm: str = "sft", *, seeds: Iterable[int] = (), **how) -> Answers:
        """`examine` of the policies of all seeds (or the given ones); `how` is passed on."""
        return self.each_seed(lambda seed: self.examine(self.train_policy(mix, arm, seed), seed, **how), seeds)

    def examine_control(self, mix: str, control: str, seeds: Iterable[int] = ()) -> Answers:
        """`examine` of a control of preference learning, for all seeds (or the given ones)."""
        return self.each_seed(lambda seed: self.examine(self.train_control(mix, control, seed), seed), seeds)

    def examine_base(self, domain: str = "medical") -> tuple[Answers, str]:
        """The base model's answers to the questions of all seeds, and how it was asked: by the profile's own protocol, or by
        the likelihood of the letters or of the option texts, whichever dev questions favour; it was never told the asked
        form."""
        ways = {"as asked": {}, **{f"likelihood of {target}s": by_likelihood(target) for target in ("letter", "text")}}
        dev = Arms({way: self.examine(self.base, self.seeds[0], domain, dev=True, **how) for way, how in ways.items()})
        best = better(dev)
        found = self.each_seed(lambda seed: self.examine(self.base, seed, domain, **ways[best]))
        return Answers(found.frame, (*found.artifacts, *dev.artifacts)), best

    def examine_closed_book(self, mix: str = "", seeds: Iterable[int] = ()) -> Answers:
        """General questions without their options, asked of the base or of a mixture's SFT policies (of all seeds, or the given
        ones): the option whose text is most likely after the bare question. Subsets are sums and cities."""
        how = {"likelihood_prompt": "cloze", "domain": "general", **by_likelihood("text")}
        policy = (lambda seed: self.train_sft(mix, seed)) if mix else (lambda _: self.base)
        answered = self.each_seed(lambda seed: self.examine(policy(seed), seed, **how), seeds)
        return answered.assign(subset=answered.frame.concept.map(is_sum).map({True: "sums", False: "cities"}))

    def examine_words(self, sees: str) -> Answers:
        """The yardstick of words (evaluate/words.py) on the medical questions of all seeds; of each seed's rows, as SFT."""
        parts = []
        for seed in self.seeds:
            rows = self.training_rows(self.mixtures[0], seed)
            for where in self.test_prompts("medical", seed):
                asked = word_answers(WordsConfig(sees=sees), rows=rows, **where)
                parts.append(Answers(read_answers(asked).assign(seed=seed), (rows, asked)))
        return joined(parts)

    def sample_test(self, policy: Callable[[int], Artifact], seeds: Iterable[int] = ()) -> dict[int, dict[str, Artifact]]:
        """seed (of `rerank_seeds`, or the given ones) -> `rerank.n` samples of every medical test question of the seed, by its
        policy."""
        made = {}
        for seed in seeds or self.rerank_seeds:
            config = self.sampling(n=self.settings.rerank.n, seed=seed)
            made[seed] = drawn(config, policy(seed), self.test_prompts("medical", seed), "test")
        return made

    def sample_dev(self, policy: Artifact, temperature: float) -> dict[str, Artifact]:
        """`rerank.n` samples of `rerank.dev_questions` at a temperature."""
        section = self.settings.rerank
        config = self.sampling(n=section.n, temperature=temperature, seed=self.seeds[0])
        return drawn(config, policy, self.prompts(section.dev_questions, held=True), "dev")

    def choose_policy(self, mix: str = "ultramix") -> tuple[str, Arms]:
        """(the arm of `mix` that is best on dev questions, dev answers of all arms). Never chosen on the test questions."""
        preferred = [arm for of, arm in self.preferred.values() if of == mix]
        arms = Arms({arm: self.examine_policy(mix, arm, dev=True) for arm in ("sft", *preferred)})
        return better(arms), arms


def whole_slices(prompts: dict[str, int], first: int = 0) -> dict[str, float]:
    """A mixture of all rows that prompts are taken from: 'source -> count', from the `first`-th row on."""
    return {f"{source}[{first}:{first + count}]": 1.0 for source, count in prompts.items()}


def drawn(config: SampleConfig, model: Artifact, prompts: Iterable[dict], name: str) -> dict[str, Artifact]:
    """Samples of a policy, an artifact for each of `prompts` (UltraMedical.prompts): 'name0', 'name1' and so on."""
    return {f"{name}{number}": samples(config, model=model, **where) for number, where in enumerate(prompts)}


def released_pairs(profile: Profile, sources: dict[str, dict], domains: Iterable[str], **how) -> Artifact:
    """Pairs of data sets that come with them: domain -> data set -> prompts (0: all); `how`: rule and seed of JoinConfig."""
    counts = {source: count for domain in domains for source, count in sources[domain].items()}
    return join_pairs(JoinConfig(take=counts, **how), **{name: dataset(profile, name) for name in names_in(counts)})
