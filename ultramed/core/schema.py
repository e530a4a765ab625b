"""Configurations of the stages, as pydantic models. Unknown keys are errors. A profile, which holds them all: profile.py."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True)
class Merging:
    """How a value takes part in profiles (core/config.py), said at its type.

    replaced: a new dictionary takes the place of the old one instead of adding to it, because another mixture is another
    data set. rows: the numbers in it count rows, questions or prompts, which `limit` cuts.
    """

    replaced: bool = False
    rows: bool = False


Counts = Annotated[dict[str, int | float], Merging(replaced=True, rows=True)]  # source -> rows, or multiples of the source
QuestionCounts = Annotated[dict[str, int], Merging(replaced=True, rows=True)]  # source -> questions
Rows = Annotated[int, Merging(rows=True)]

Method = Literal["full", "lora", "lora_8bit", "lora_4bit"]
AnswerForm = Literal["content_first", "letter_first", "medalpaca", "reasoned"]
Protocol = Literal["likelihood", "greedy", "medalpaca", "ultramedical"]
EngineName = Literal["transformers", "openvino", "vllm"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Strict):
    """Where weights come from and how a conversation becomes its text."""

    UNKEYED: ClassVar = {"label"}  # not part of an artifact's key: what tables call a model makes no other model of it
    name: str  # "bundled:smollm2-135m", "tiny:llama", a hub id, or a local folder
    label: str  # what tables call it
    revision: str | None = None  # of a hub id
    tokenizer: str | None = (
        None  # a model with the same vocabulary whose tokenizer is taken: a base model's has no chat template
    )
    template: str = "chat"  # see lm/templates.py


class ExamConfig(Strict):
    """The bundled exam (data/exam.py)."""

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
    warmup_ratio: float = Field(0.1, ge=0, lt=1)  # of all steps
    warmup_steps: int = Field(0, ge=0)  # so many instead; the ratio must be 0 then
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit"] = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    lora: LoraSettings = LoraSettings()
    dtype: Dtype = "auto"  # of matrix products; trained weights are kept in fp32 meanwhile. auto: the machine's best
    seed: int = 0
    save_steps: int = Field(0, ge=0)  # optimiser steps between checkpoints; 0: none

    @model_validator(mode="after")
    def _one_warmup(self):
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio:g} are two warm-ups: set one of them to 0"
            )
        return self


class TrainConfig(OptimConfig):
    """One supervised fine-tuning run.

    With `held_out`, that fraction of the rows is not trained on: the loss on it is measured every `eval_steps` optimiser steps,
    a checkpoint is saved each time, and the weights with the lowest loss are the result (MedAlpaca, train.py). With `packing`,
    `global_batch_size` counts packed rows.
    """

    mixture: Counts = Field(min_length=1)  # source -> rows (int) or multiples of the source (float)
    answer_form: AnswerForm = "content_first"
    train_on_inputs: bool = False  # loss on the prompt too (MedAlpaca's default)
    held_out: float = Field(0.0, ge=0, lt=1)
    eval_steps: int = Field(200, ge=1)  # a shorter run is evaluated once, at its end
    packing: bool = False  # rows one after the other, cut every `max_length` tokens (UltraMedical, run_sft.py)

    @model_validator(mode="after")
    def _makes_sense(self):
        if self.held_out and self.save_steps not in (0, self.eval_steps):
            raise ValueError(
                f"with held_out a checkpoint is saved at every evaluation: save_steps {self.save_steps} must be 0 or "
                f"eval_steps {self.eval_steps}"
            )
        if self.packing and not self.train_on_inputs:
            raise ValueError("packing keeps no border between prompt and completion: it needs train_on_inputs: true")
        return self


Loss = Literal["dpo", "ipo", "nca", "kto_pair", "kto", "hinge", "apo_zero"]


class PreferenceConfig(OptimConfig):
    """One run of preference learning. `global_batch_size` counts pairs."""

    loss: Loss = "dpo"
    beta: float = Field(0.1, gt=0)
    kto_detach: bool = False  # kto_pair without a gradient through its reference points, which the released code had
    as_released: bool = False  # UltraMedical's malformed template: doubled and dangling assistant headers


class RewardConfig(OptimConfig):
    """One reward model. `global_batch_size` counts prompts, all pairs of a prompt stay together."""

    centre: float = Field(0.0, ge=0)  # weight of the mean-zero term


class TokenConfig(Strict):
    """What of a training's configuration decides its tokens."""

    kind: Literal["instructions", "pairs"]
    max_length: int = Field(ge=8)
    packing: bool = False  # of instructions only


class SampleConfig(Strict):
    """Several sampled replies a prompt."""

    UNKEYED: ClassVar = {"tensor_parallel"}  # how many devices share the work is not what comes out
    n: int = Field(10, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_k: int = Field(0, ge=0)  # 0: no limit
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(32, ge=1)
    stop: str | None = None  # regular expression at whose first match a reply ends
    answer_form: AnswerForm = "content_first"
    batch_tokens: int = Field(8192, ge=64)
    engine: EngineName = "transformers"
    tensor_parallel: int = Field(0, ge=0)  # GPUs that share a model with engine vllm; 0: all of the node
    seed: int = 0


class ScoringConfig(Strict):
    """How a reward model reads replies."""

    batch_tokens: int = Field(8192, ge=64)  # padded tokens, prompts and replies, of one batch


class EvalConfig(Strict):
    """How answers are asked for and read; all of it is recorded beside every number."""

    UNKEYED: ClassVar = {"tensor_parallel"}
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
    tensor_parallel: int = Field(0, ge=0)  # GPUs that share a model with engine vllm; 0: all of the node
    seed: int = 0


ASKED = {  # protocol -> how models from outside are asked by it, where nothing else is said
    "likelihood": {"likelihood_prompt": "lm_eval"},
    "greedy": {"answer_form": "letter_first"},
    "ultramedical": {"answer_form": "reasoned", "max_new_tokens": 1024},
    "medalpaca": {"answer_form": "medalpaca", "max_new_tokens": 128},
}


class WordsConfig(Strict):
    """A yardstick of words (evaluate/words.py). Both numbers were chosen on the bundled exam's dev questions (docs/LOG.md)."""

    sees: Literal["question", "options"] = "question"  # options: never the question, so that only habits of the right ones help
    prefix: int = Field(4, ge=1)  # letters of a word that count
    strength: float = Field(10.0, gt=0)  # inverse of the penalty on weights (scikit-learn's C)


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
