"""A profile: every parameter of the book, in sections. Read from params/*.yaml by core/config.py."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ultramed.core.schema import (
    BuildConfig,
    CheckConfig,
    Counts,
    EngineName,
    EvalConfig,
    ExamConfig,
    Merging,
    Method,
    ModelConfig,
    PreferenceConfig,
    QuestionCounts,
    RewardConfig,
    Rows,
    SampleConfig,
    Strict,
    TrainConfig,
)

Domain = Literal["medical", "general"]


@dataclass(frozen=True)
class ChangesTo:
    """A dictionary of changes to another configuration, whose types say how they are merged."""

    model: type[BaseModel]


ChangesToTrain = Annotated[dict[str, Any], ChangesTo(TrainConfig)]
ChangesToEval = Annotated[dict[str, Any], ChangesTo(EvalConfig)]
ChangesToPreference = Annotated[dict[str, Any], ChangesTo(PreferenceConfig)]
QuestionsByDomain = Annotated[dict[Domain, QuestionCounts], Merging(replaced=True)]


class UsmleConfig(Strict):
    """Notebook 11: arms, seeds, learning rates and how many questions of which source each seed is examined on."""

    questions: QuestionCounts  # question source -> questions a seed (disjoint between seeds where there are enough)
    skip: int = Field(0, ge=0)  # test questions of every subset that are left to others
    seeds: list[int] = Field(min_length=1)
    arms: dict[str, ChangesToTrain]
    grid: dict[Method, list[float]]  # learning rates tried, per method, as many for each; none: the arm's own rate, untuned
    main_rate: Literal["tuned", "paper"] = "tuned"  # rate of the main table's arms; the other one is tried beside it
    tuning_fraction: float = Field(1.0, gt=0, le=1)  # part of the rows a tuning run sees
    dev_sources: list[str] = Field(min_length=1)  # whose questions choose a learning rate
    tuning_questions: Rows = Field(100, ge=1)  # dev questions of each of them
    paper_learning_rate: float = 2e-5  # MedAlpaca's one rate for all arms
    other_rate_arms: list[str] | None = None  # arms that are run at the other rate, too; None: all that differ in method only
    further_arms: list[str] | None = None  # arms of the profile's second and later models; None: all
    arm_seeds: dict[str, int] = Field({})  # seeds of an arm, where fewer than all do
    letter_seeds: int = Field(3, ge=0)  # seeds of the letter arms
    letter_arms: list[str] = Field([])  # arms that are also trained in MedAlpaca's form, 'B: text', and asked in its way
    tries_limit: Rows = Field(0, ge=0)  # questions a subset under MedAlpaca's 5-try protocol; 0: all of the seed's
    published_sizes: list[Literal["7b", "13b"] | None] = Field(
        ["7b"]
    )  # for each model, the published rows that it stands beside
    same_scale: bool = False  # whether model and questions are the paper's, so that cells may be compared as numbers

    @property
    def dev_counts(self) -> dict[str, int]:
        """Dev source -> its questions that rates, and the way in which the base is asked, are chosen on."""
        return dict.fromkeys(self.dev_sources, self.tuning_questions)

    @model_validator(mode="after")
    def _fair(self):
        sizes = {k: len(v) for k, v in self.grid.items() if v}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every method must be tuned over as many learning rates as the others, got {sizes}")
        for name in ("letter_arms", "other_rate_arms", "further_arms", "arm_seeds"):
            unknown = set(getattr(self, name) or ()) - set(self.arms)
            if unknown:
                raise ValueError(f"{name} names {sorted(unknown)}, which arms does not have: {sorted(self.arms)}")
        return self


# -------------------------------------------------------------------------------------------------------- UltraMedical


class PoolMember(Strict):
    """Who gives candidates: 'base', the name of a mixture (its SFT policy), 'reference' (the reference answer), or 'guess'."""

    policy: str
    temperature: float = Field(1.0, gt=0)
    n: int = Field(2, ge=1)


class QuestionsSection(Strict):
    """The test questions of notebooks 22 to 26, for each seed (disjoint between seeds where there are enough). `skip`: how many
    of every subset are left to other notebooks."""

    questions: QuestionsByDomain
    skip: int = Field(0, ge=0)


class SftSection(Strict):
    """Supervised policies. `mixtures`: 'ultramed' (medical rows), 'ultramix' (general ones added), and what notebook 23
    compares them with, such as 'ultramed_longer' (as many more medical rows instead); `train`: changes to `train`.

    `model`: what they start from, where it is not the model that tables call the base (the paper fine-tunes Llama-3-8B and
    compares with Llama-3-8B-Instruct).
    """

    mixtures: Annotated[dict[str, Counts], Merging(replaced=True)]
    train: ChangesToTrain = Field({})
    model: ModelConfig | None = None


class CandidatesSection(Strict):
    """The pool of candidates that reward models learn from: who gives them, for which prompts, and when two of them count as
    tied."""

    pool: list[PoolMember] = Field(min_length=1)
    prompts: QuestionsByDomain  # whose candidates are ranked for training
    held_prompts: QuestionsByDomain  # dev questions: for the reward benches, and to choose policies by
    margin: float = Field(0.0, ge=0)  # score difference below which two candidates are tied


class OnPolicy(Strict):
    """Pairs out of the policy's own samples: the annotator's best of them against a random lower one."""

    n: int = Field(8, ge=2)  # samples a prompt; the paper ranks 8 candidates
    temperature: float = Field(1.0, gt=0)
    margin: float = Field(0.0, ge=0)  # as in CandidatesSection


class PreferenceSection(Strict):
    """Preference learning. `source`: 'policy' (its own samples, `on_policy`), 'pool' (candidates of `candidates.pool`), or a
    data set of pairs (UltraMedical-Preference at paper scale). `prompts`: source -> count of them ('pool': of each domain's
    prompts; a data set: pairs), `first`: the first of them in the file. `mixtures`: whose SFT policies learn from pairs; none
    named: all of them, as in the paper. `controls`: policies trained on with the same prompts' reference answers, and with the
    pairs' chosen sides for as many steps; the paper has neither.
    """

    train: PreferenceConfig
    arms: dict[str, ChangesToPreference]
    mixtures: list[str] = Field([])
    source: str = "policy"
    prompts: QuestionsByDomain = Field({})
    first: Rows = Field(0, ge=0)
    on_policy: OnPolicy = OnPolicy()
    controls: bool = False


class RewardSection(Strict):
    """Reward models. `arms`: arm -> domain -> prompts whose pairs it sees (0: all); the paper's sees both domains. `sources`:
    domain -> data sets of pairs and how many prompts of each, instead of the pool's."""

    train: RewardConfig
    arms: Annotated[dict[str, dict[Domain, Rows]], Merging(replaced=True)]
    sources: dict[Domain, Counts] = Field({})
    benches: dict[Domain, str] = Field({})  # domain -> a data set of pairs that tests them, instead of held-out candidates
    start: str = "base"  # what they start from: 'base', or a mixture's SFT policy
    seeds: int = Field(1, ge=1)  # how many of the seeds train reward models
    pairs_per_prompt: int = Field(28, ge=1)  # C(8, 2) at most
    public_pairs: Rows = Field(100, ge=1)  # pairs a section of the public data that notebook 24 adds where it is at hand


class RerankSection(Strict):
    """Re-ranking and the ensemble: samples of every test question, the arm of `reward.arms` that scores them, and the mixture
    whose SFT policy is sampled. `temperatures`: at which as many samples of `dev_questions` are drawn, for a curve."""

    n: int = Field(10, ge=2)
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([])
    dev_questions: QuestionCounts = Field({})
    reward_arm: str = "medical"
    mixture: str = "ultramix"
    seeds: int = Field(100, ge=1)  # how many of the seeds are re-ranked; for `control` at least `seeds_to_compare`
    ensemble: bool = True  # of the best UltraMix arm on dev questions, in notebook 22
    control: bool = True  # a policy fine-tuned on the reward model's questions, too

    @model_validator(mode="after")
    def _asked(self):
        if self.temperatures and not self.dev_questions:
            raise ValueError("temperatures are compared on dev_questions, of which there are none")
        return self


class IterativeSection(Strict):
    """Rounds of sample, rank with the reward model, train (the paper ran one). `control`: as many more vanilla steps
    instead."""

    rounds: int = Field(1, ge=1)
    prompts: QuestionCounts  # fresh ones each round: source -> count
    first: Rows = Field(0, ge=0)  # the first of them in the file
    n: int = Field(4, ge=2)  # samples a prompt
    arms: list[str]  # of preference.arms
    mixture: str = "ultramix"
    seeds: int = Field(100, ge=1)  # how many of the seeds are iterated
    reference: Literal["last", "initial"] = "last"  # the policy as the round starts, or the SFT policy
    stop: bool = True  # when the reward rises while accuracy on dev questions falls
    control: bool = False
    train: ChangesToPreference = Field({})  # changes to the arm, such as a smaller learning rate

    def first_of(self, number: int) -> int:
        """Where the prompts of round `number` begin; the model of the last round is scored on those of one round more."""
        return self.first + number * max(self.prompts.values())


class AbilitiesSection(Strict):
    """What notebook 23 asks besides medicine. Where a model is too small for it, the loss on held-out solutions is what is
    left: `losses` rows of Alpaca and of GSM8K, where they are at hand."""

    gsm8k: Rows | None = None  # problems, 0 for all; null: not asked
    shots: int = Field(0, ge=0)  # of GSM8K; the paper does not say
    mmlu: Rows | None = None  # questions a subject, 0 for all; null: not asked
    losses: Rows = Field(200, ge=1)


class UltraMedicalConfig(Strict):
    """Notebooks 20 to 27. Sources are 'dataset:subset'. Every seed trains its own policies, on rows of its own, and is examined
    on its own questions."""

    seeds: list[int] = Field([0], min_length=1)
    test: QuestionsSection
    eval: ChangesToEval = Field({})  # changes to the profile's `eval`, under which these notebooks ask
    sft: SftSection
    candidates: CandidatesSection
    annotator: Literal["oracle", "judge"] = (
        "oracle"  # who ranks candidates and own samples: a rule that knows the gold, or `judge`
    )
    sample: SampleConfig
    preference: PreferenceSection
    reward: RewardSection
    rerank: RerankSection = RerankSection()
    iterative: IterativeSection | None = None
    abilities: AbilitiesSection = AbilitiesSection()
    published_size: Literal["8B", "70B"] = "8B"  # rows of the published tables that ours stand beside
    same_scale: bool = False  # whether models and data are the paper's, so that cells may be compared as numbers

    @model_validator(mode="after")
    def _known(self):
        policies = {"base", *self.sft.mixtures}
        iterative = self.iterative or IterativeSection(prompts={}, arms=[], mixture="ultramed")
        for name, wanted, have in (
            ("candidates.pool", {member.policy for member in self.candidates.pool}, policies | {"reference", "guess"}),
            ("sft.mixtures: needs ultramed", {"ultramed"}, set(self.sft.mixtures)),
            ("reward.start", {self.reward.start}, policies),
            ("rerank.reward_arm", {self.rerank.reward_arm}, set(self.reward.arms)),
            ("rerank.mixture", {self.rerank.mixture}, set(self.sft.mixtures)),
            ("iterative.arms", set(iterative.arms), set(self.preference.arms)),
            ("preference.mixtures", set(self.preference.mixtures), set(self.sft.mixtures)),
            ("iterative.mixture", {iterative.mixture}, set(self.preference.mixtures or self.sft.mixtures)),
        ):
            if wanted - have:
                raise ValueError(f"{name}: {sorted(wanted - have)} not among {sorted(have)}")
        return self


class CollectionConfig(Strict):
    """Notebook 20. Names are of data sets, or ours where the value says what is taken ('exam:open'); what is not at hand
    is left out and listed."""

    sources: dict[str, str | None]  # None leaves one out that a profile beneath names
    tests: list[str]  # data sets whose test side must not be in the collection
    fetch: bool = False  # whether what is not at hand is fetched from the hub
    check: CheckConfig = CheckConfig()
    build: BuildConfig = BuildConfig()
    score: list[str] = Field([])  # sources that a language model (`judge`) scores first, because they come without scores
    planted: int = Field(300, ge=3)  # perturbed test questions, to see what the checks find
    map_rows: int = Field(1200, ge=20)  # rows of the topic map, drawn evenly from the sources
    clusters: int = Field(12, ge=2)


class CostSection(Strict):
    """Notebook 12: what training costs at a shape. `shape`: a model whose shape is known, or sizes (train/estimate.py);
    `rows` rows of `length` tokens are one step, `epoch_rows` an epoch."""

    shape: str | dict[str, int | bool]
    epoch_rows: int = Field(6000, ge=1)
    rows: int = Field(8, ge=1)
    length: int = Field(256, ge=8)
    steps: int = Field(6, ge=3)  # the first two are not timed
    arms: dict[str, ChangesToTrain]


class BenchSection(Strict):
    """`ultramed bench` and notebook 40. `models`: by key, folder, hub id or url#model; empty: the profile's first."""

    models: list[str] = Field([])
    protocol: Literal["likelihood", "ultramedical", "greedy"] = "likelihood"
    limit: Rows = Field(0, ge=0)  # questions of each task; 0: all
    samples: int = Field(0, ge=0)  # with protocol ultramedical: the majority of so many samples; 0: the greedy reply
    shuffle: int = Field(0, ge=0)  # other orders of the options
    general: bool = False  # notebook 40 asks the general suite, too
    judge: str = ""  # url#model that grades MT-Bench in the general suite
    fetch: bool = False  # take tasks from the hub that are not in ULTRAMED_DATA
    max_new_tokens: int = Field(1024, ge=1)  # of a reasoned reply
    batch_tokens: int = Field(8192, ge=64)
    engine: EngineName = "transformers"  # of replies; likelihoods need transformers

    @model_validator(mode="after")
    def _reasons(self):
        if self.samples and self.protocol != "ultramedical":
            raise ValueError(f"samples are of reasoned replies: protocol ultramedical, not {self.protocol}")
        return self


class Profile(Strict):
    """A file of `params/`, resolved (core/config.py): what both papers' notebooks train, ask and show."""

    name: str
    description: str
    hardware: str
    models: list[ModelConfig] = Field(min_length=1)
    exam: ExamConfig = ExamConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    usmle: UsmleConfig
    ultramedical: UltraMedicalConfig | None = None
    collection: CollectionConfig | None = None
    cost: CostSection | None = None
    prefer: Literal["local", "hub"] = "local"  # where a data set is read from if both ULTRAMED_DATA and the hub have it
    bench: BenchSection = BenchSection()
    judge: str = ""  # url#model of an OpenAI-compatible server that scores, judges and writes; '' for none
    seeds_to_compare: int = Field(1, ge=1)  # over fewer seeds two trained models are shown and not compared
    limit: int = Field(0, ge=0)  # a quick look: no more rows, questions or prompts than this of any source; 0: as they are
    open_rows: Rows = Field(40, ge=1)  # rows of each open-ended test (notebooks 27 and 30)
    open_tokens: int = Field(64, ge=1)  # longest reply in them; CURE-Med's own setting is 2,048

    @model_validator(mode="after")
    def _judge_is_named(self):
        if self.ultramedical and self.ultramedical.annotator == "judge" and not self.judge:
            raise ValueError(
                "ultramedical.annotator: 'judge' needs a server; set judge to url#model, http://localhost:8000/v1#m"
            )
        return self
