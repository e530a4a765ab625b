"""Pydantic models of every stage's configuration and of a profile, which holds them all. Unknown keys are errors."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["full", "lora", "lora_8bit", "lora_4bit"]
AnswerForm = Literal["content_first", "letter_first"]
Protocol = Literal["likelihood", "greedy", "medalpaca"]
EngineName = Literal["transformers", "openvino"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Strict):
    """Where weights come from and how a conversation becomes its text."""

    name: str  # "bundled:smollm2-135m", "tiny:llama", a hub id, or a local folder
    label: str  # what tables call it
    revision: str | None = None  # of a hub id
    template: str = "chat"  # see prompts.TEMPLATES


class ExamConfig(Strict):
    """The bundled exam (data/bundled.py)."""

    seed: int = 0
    train_per_step: int = Field(6000, ge=1)
    dev_per_step: int = Field(300, ge=1)
    test_per_step: int = Field(1000, ge=1)
    general_train: int = Field(6000, ge=0)
    general_test: int = Field(1000, ge=0)
    open_instructions: int = Field(2000, ge=0)


class LoraSettings(Strict):
    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: list[str] = ["q_proj", "v_proj"]


class OptimConfig(Strict):
    """What every kind of training has. `global_batch_size` is what the optimiser sees; micro-batches are derived."""

    method: Method = "full"
    learning_rate: float = Field(gt=0)
    epochs: float = Field(1, gt=0)
    max_steps: int = Field(-1, ge=-1)  # -1: as many as the epochs need
    global_batch_size: int = Field(16, ge=1)
    micro_batch_tokens: int = Field(2048, ge=16)  # padded tokens of one forward pass on one device
    max_length: int = Field(256, ge=8)  # prompt + completion, in tokens
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit"] = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    lora: LoraSettings = LoraSettings()
    dtype: Dtype = "auto"  # of matrix products; trained weights are kept in fp32 meanwhile. auto: the machine's best
    seed: int = 0
    save_steps: int = Field(0, ge=0)  # optimiser steps between checkpoints; 0: none


class TrainConfig(OptimConfig):
    """One supervised fine-tuning run."""

    mixture: dict[str, int | float] = Field(min_length=1)  # source -> rows (int) or multiples of the source (float)
    answer_form: AnswerForm = "content_first"
    train_on_inputs: bool = False  # loss on the prompt too (MedAlpaca's default)


Loss = Literal["dpo", "ipo", "nca", "kto_pair", "kto", "hinge", "robust", "apo_zero"]


class PreferenceConfig(OptimConfig):
    """One run of preference learning. `global_batch_size` counts pairs."""

    loss: Loss = "dpo"
    beta: float = Field(0.1, gt=0)
    as_released: bool = False  # UltraMedical's malformed template: doubled and dangling assistant headers


class RewardConfig(OptimConfig):
    """One reward model. `global_batch_size` counts prompts, all pairs of a prompt stay together."""

    centre: float = Field(0.0, ge=0)  # weight of the mean-zero term


class SampleConfig(Strict):
    """Several sampled replies a prompt."""

    n: int = Field(10, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_k: int = Field(0, ge=0)  # 0: no limit
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(32, ge=1)
    stop: str | None = None  # regular expression at whose first match a reply ends
    answer_form: AnswerForm = "content_first"
    batch_tokens: int = Field(8192, ge=64)
    engine: EngineName = "transformers"
    seed: int = 0


class ScoringConfig(Strict):
    batch_tokens: int = Field(8192, ge=64)


class EvalConfig(Strict):
    """How answers are asked for and read; all of it is recorded beside every number."""

    protocol: Protocol = "greedy"
    answer_form: AnswerForm = "content_first"  # the form asked for in the prompt, and read strictly
    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(0.4, gt=0)  # medalpaca protocol only, as are the next three
    top_k: int = Field(50, ge=1)
    top_p: float = Field(0.9, gt=0, le=1)
    tries: int = Field(5, ge=1)
    likelihood_target: Literal["letter", "text"] = "letter"  # likelihood protocol: what is scored after the prompt
    likelihood_prompt: Literal["template", "cloze", "lm_eval"] = "template"  # cloze: the question without its options
    batch_tokens: int = Field(8192, ge=64)  # padded prompt tokens of one batch
    engine: EngineName = "transformers"  # who generates here; a model behind a URL has its own
    seed: int = 0


class UsmleConfig(Strict):
    """Notebook 11: arms, seeds, learning rates and how many questions of which source each seed is examined on."""

    questions: dict[str, int]  # question source -> questions a seed (disjoint between seeds where there are enough)
    seeds: list[int] = Field(min_length=1)
    arms: dict[str, dict[str, Any]]  # arm -> changes to `train`
    grid: dict[Method, list[float]]  # learning rates tried, per method; as many for each
    tuning_fraction: float = Field(1.0, gt=0, le=1)  # part of the rows a tuning run sees
    dev_sources: list[str] = Field(min_length=1)  # where the loss that chooses a learning rate is measured
    tuning_questions: int = Field(100, ge=1)  # dev questions of each of them
    paper_learning_rate: float = 2e-5  # MedAlpaca's one rate for all arms
    paper_rate_arms: list[str] | None = None  # arms that are run at it, too; None: all that differ in method
    arm_seeds: dict[str, int] = {}  # seeds of an arm, where fewer than all do
    letter_seeds: int = Field(3, ge=0)  # seeds of the letter-first arms
    letter_arms: list[str] = []
    tries_limit: int = Field(0, ge=0)  # questions a subset under MedAlpaca's 5-try protocol; 0: all of the seed's
    published_size: str = "7b"  # rows of the published table that ours stand beside
    same_scale: bool = False  # whether model and questions are the paper's, so that cells may be compared as numbers

    @model_validator(mode="after")
    def _fair(self):
        sizes = {k: len(v) for k, v in self.grid.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every method must be tuned over as many learning rates as the others, got {sizes}")
        for name in ("letter_arms", "paper_rate_arms"):
            unknown = set(getattr(self, name) or ()) - set(self.arms)
            if unknown:
                raise ValueError(f"{name} names {sorted(unknown)}, which arms does not have: {sorted(self.arms)}")
        return self


class PoolMember(Strict):
    """Who gives candidates: 'base', the name of a mixture (its SFT policy), 'reference' (the gold answer), or 'guess'."""

    policy: str
    temperature: float = Field(1.0, gt=0)
    n: int = Field(2, ge=1)


class IterativeConfig(Strict):
    """Rounds of sample, rank with the reward model, train (the paper ran one)."""

    rounds: int = Field(1, ge=1)
    prompts: dict[str, int]  # fresh ones each round: source -> count
    n: int = Field(4, ge=2)  # samples a prompt
    arms: list[str]  # of preference_arms
    reference: Literal["last", "initial"] = "last"  # the policy as the round starts, or the SFT policy
    stop: bool = True  # when the reward rises while accuracy falls
    changes: dict[str, Any] = {}  # to the arm, such as a smaller learning rate


class UltraMedicalConfig(Strict):
    """Notebooks 21 to 26. Sources are 'dataset:subset'; a domain is 'medical' or 'general'."""

    seed: int = 0
    questions: dict[Literal["medical", "general"], dict[str, int]]  # test questions
    skip: int = Field(0, ge=0)  # test questions of every subset left to other notebooks
    mixtures: dict[str, dict[str, int | float]]  # ultramed, ultramix, and what notebook 23 adds
    sft: dict[str, Any] = {}  # changes to `train`
    pool: list[PoolMember] = Field(min_length=1)
    prompts: dict[Literal["medical", "general"], dict[str, int]]  # whose candidates are ranked for training
    held_prompts: dict[Literal["medical", "general"], dict[str, int]]  # and for the reward benches
    sample: SampleConfig
    margin: float = Field(0.0, ge=0)  # score difference below which two candidates are tied
    preference_prompts: dict[Literal["medical", "general"], int] = {}  # prompts used for preference learning; default all
    pairs_per_prompt: int = Field(28, ge=1)  # for reward models: C(8, 2) at most
    preference: PreferenceConfig
    preference_arms: dict[str, dict[str, Any]]  # arm -> changes to `preference`
    reward: RewardConfig
    reward_arms: dict[str, list[Literal["medical", "general"]]]
    reward_start: str = "base"  # what reward models start from: 'base', or a mixture's SFT policy
    judge_arm: str = "medical"  # the reward model of re-ranking and iteration
    public_pairs: int = Field(100, ge=1)  # pairs a section of the public data that notebook 24 adds where it is at hand
    selection_n: int = Field(10, ge=2)
    iterative: IterativeConfig
    same_scale: bool = False  # whether models and data are the paper's, so that cells may be compared as numbers

    @model_validator(mode="after")
    def _known(self):
        known = {"base", "reference", "guess", *self.mixtures}
        for name, wanted, have in (
            ("pool", {m.policy for m in self.pool}, known),
            ("mixtures: needs ultramed and ultramix", {"ultramed", "ultramix"}, set(self.mixtures)),
            ("reward_start", {self.reward_start}, known - {"reference", "guess"}),
            ("judge_arm", {self.judge_arm}, set(self.reward_arms)),
            ("iterative.arms", set(self.iterative.arms), set(self.preference_arms)),
        ):
            if wanted - have:
                raise ValueError(f"{name}: {sorted(wanted - have)} not among {sorted(have)}")
        return self


How = Literal["exact", "ngram", "minhash", "cosine", "ultramedical"]


class CheckConfig(Strict):
    """How training rows are compared with test questions; `how` in the order of the report."""

    how: list[How] = ["exact", "ngram", "minhash", "cosine", "ultramedical"]
    ngram: int = Field(10, ge=2)  # words in a run
    share: float = Field(0.5, ge=0, le=1)  # of the test question's runs
    jaccard: float = Field(0.5, gt=0, le=1)
    cosine: float = Field(0.9, gt=0, le=1)
    encoder: Literal["tfidf", "minilm"] = "tfidf"
    examples: int = Field(3, ge=0)  # of hits, for each source, test set and way


class BuildConfig(Strict):
    """`min_score`: rows whose complexity is known and lower go; `top`: of each source only so many, the highest (ties stay;
    0: all); `near`: Jaccard similarity from which two are one."""

    name: str = "ultramed-collection"
    min_score: float = Field(0.0, ge=0)
    top: int = Field(0, ge=0)
    near: float = Field(0.8, gt=0, le=1)
    answer_form: AnswerForm = "content_first"


class CollectionConfig(Strict):
    """Notebook 20. Names are of data sets, or ours where the value says what is taken ('exam:open'); what is not at hand
    is left out and listed."""

    sources: dict[str, str | None]  # None leaves one out that a profile beneath names
    tests: list[str]  # data sets whose test side must not be in the collection
    check: CheckConfig = CheckConfig()
    build: BuildConfig = BuildConfig()
    score: list[str] = []  # sources that a language model (`judge`) scores first, because they come without scores
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
    arms: dict[str, dict[str, Any]]  # arm -> changes to `train`


class Profile(Strict):
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
    judge: str = ""  # url#model of an OpenAI-compatible server that scores, judges and writes; '' for none
    limit: int = Field(0, ge=0)  # a quick look: no more rows, questions or prompts than this of any source; 0: as they are
    open_rows: int = Field(40, ge=1)  # rows of each open-ended test (notebooks 27 and 30)
    open_tokens: int = Field(64, ge=1)  # longest reply in them; CURE-Med's own setting is 2,048
