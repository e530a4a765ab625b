"""Profiles: pydantic models of every stage, YAML files with `extends`, and overrides that all go through one door.

`load_profile("laptop", ["train.epochs=2"])` is what the command line's `--set train.epochs=2`, papermill's
`-p overrides '["train.epochs=2"]'` and `-p train__epochs 2`, and a sweep's grid all end in. A key nobody knows is an
error that names the nearest known one.
"""

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Method = Literal["full", "lora", "lora_8bit", "lora_4bit"]
AnswerForm = Literal["content_first", "letter_first"]
Protocol = Literal["likelihood", "greedy", "medalpaca"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what was wanted, what came, and how to mend it."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Strict):
    """Where weights come from and how a conversation becomes its text."""

    name: str  # "bundled:smollm2-135m", "tiny:llama", a hub id, or a local folder
    label: str  # what tables call it
    revision: str | None = None  # of a hub id
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
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
    seed: int = 0


class JudgeConfig(Strict):
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
    likelihood_prompt: Literal["template", "lm_eval"] = "template"
    batch_tokens: int = Field(8192, ge=64)  # padded prompt tokens of one batch
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
        unknown = set(self.letter_arms) - set(self.arms)
        if unknown:
            raise ValueError(f"letter_arms names {sorted(unknown)}, which arms does not have: {sorted(self.arms)}")
        return self


class PoolMember(Strict):
    """A policy that gives candidates: 'base', the name of a mixture (its SFT policy), or 'reference' (the gold answer)."""

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
    pairs_per_prompt: int = Field(28, ge=1)  # for reward models: C(8, 2) at most
    preference: PreferenceConfig
    preference_arms: dict[str, dict[str, Any]]  # arm -> changes to `preference`
    reward: RewardConfig
    reward_arms: dict[str, list[Literal["medical", "general"]]]
    judge_arm: str = "medical"  # the reward model of re-ranking and iteration
    selection_n: int = Field(10, ge=2)
    iterative: IterativeConfig
    same_scale: bool = False  # whether models and data are the paper's, so that cells may be compared as numbers

    @model_validator(mode="after")
    def _known(self):
        known = {"base", "reference", *self.mixtures}
        for name, wanted, have in (
            ("pool", {m.policy for m in self.pool}, known),
            ("mixtures: needs ultramed and ultramix", {"ultramed", "ultramix"}, set(self.mixtures)),
            ("judge_arm", {self.judge_arm}, set(self.reward_arms)),
            ("iterative.arms", set(self.iterative.arms), set(self.preference_arms)),
        ):
            if wanted - have:
                raise ValueError(f"{name}: {sorted(wanted - have)} not among {sorted(have)}")
        return self


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


# ------------------------------------------------------------------------------------------------- files and overrides


def home() -> Path:
    """The repository (or a copy of its `params/` and `notebooks/`) that this process works in."""
    if "ULTRAMED_HOME" in os.environ:
        return Path(os.environ["ULTRAMED_HOME"]).resolve()
    places = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]]
    return next((p for p in places if (p / "params").is_dir() and (p / "notebooks").is_dir()), Path.cwd())


def profiles() -> list[str]:
    """Names of the profiles at hand."""
    return sorted(p.stem for p in (home() / "params").glob("*.yaml"))


WHOLE = {
    "mixture",
    "mixtures",
    "questions",
    "prompts",
    "held_prompts",
    "medical",
    "general",
}  # another mixture is another data set, not an addition to the old one


def merge(base: dict, changes: dict) -> dict:
    """Dictionaries merge key by key; anything else, lists and WHOLE too, is replaced. `null` removes a dictionary."""
    out = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and key not in WHOLE:
            out[key] = merge(out[key], value)
        elif value is None and isinstance(out.get(key), dict):
            del out[key]
        else:
            out[key] = value
    return out


def nearest(word: str, known) -> str:
    """'; did you mean X?' or a list of what there is."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def read_yaml(path: Path) -> dict:
    try:
        data = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML: {err}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: wanted a mapping of keys to values, got {type(data).__name__}")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key be written twice and keeps the last: in a parameter file that is a mistake. And 2e-5 is a number."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is written twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(  # YAML 1.1 reads 2e-5 as text; everybody else as a number
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def raw_profile(name: str, _seen: tuple = ()) -> dict:
    """The profile as a plain dictionary, its `extends` chain merged."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else home() / "params" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no profile {name!r} (looked for {path}){nearest(name, profiles())}")
    if path in _seen:
        raise ConfigError(f"{path}: `extends` goes round in a circle")
    data = read_yaml(path)
    parent = data.pop("extends", None)
    data = merge(raw_profile(parent, (*_seen, path)), data) if parent else data
    return {**data, "name": path.stem}


def parse_override(text: str) -> tuple[list[str], Any]:
    """'train.epochs=2' -> (['train', 'epochs'], 2). The value is read as YAML."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override {text!r}: wanted key=value, as in train.epochs=2")
    return key.strip().split("."), yaml.load(value, Loader=_UniqueKeys)


def apply_override(data: dict, keys: list[str], value: Any) -> dict:
    """A copy of `data` with the value at the dotted path set; list items are addressed by number."""
    head, *rest = keys
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise ConfigError(f"override: {head!r} is not an index into a list of {len(data)}")
        new = list(data)
        new[int(head)] = apply_override(data[int(head)], rest, value) if rest else value
        return new
    if rest and not isinstance(data.get(head, {}), dict | list):
        raise ConfigError(f"override {'.'.join(keys)}: {head!r} is a value, not a section")
    return {**data, head: apply_override(data.get(head, {}), rest, value) if rest else value}


def load_profile(name: str = "laptop", overrides: list[str] | tuple[str, ...] = ()) -> Profile:
    """Profile `name` with overrides applied and checked. Raises ConfigError on anything unknown or impossible."""
    data = raw_profile(name)
    for text in overrides:
        data = apply_override(data, *parse_override(text))
    source = f"profile {name!r}" + (f" with {list(overrides)}" if overrides else "")
    profile = validate(Profile, data, source)
    for arm in profile.usmle.arms:
        arm_config(profile, arm)  # an impossible arm should fail now, not an hour into the run
    own = profile.ultramedical
    for arm, changes in (own.preference_arms if own else {}).items():
        validate(PreferenceConfig, merge(own.preference.model_dump(mode="json"), changes), f"{source}, preference_arms.{arm}")
    return profile


def arm_config(profile: Profile, arm: str, **changes) -> TrainConfig:
    """The training configuration of one arm of notebook 11: `train`, the arm's changes, then `changes`."""
    if arm not in profile.usmle.arms:
        raise ConfigError(f"no arm {arm!r} in profile {profile.name!r}{nearest(arm, profile.usmle.arms)}")
    data = merge(merge(profile.train.model_dump(mode="json"), profile.usmle.arms[arm]), changes)
    return validate(TrainConfig, data, f"profile {profile.name!r}, usmle.arms.{arm}")


def validate(model: type[BaseModel], data: dict, source: str):
    """`model(**data)`, with pydantic's complaints turned into sentences that name the key and the nearest known one."""
    try:
        return model.model_validate(data)
    except ValidationError as err:
        lines = []
        for e in err.errors():
            path = ".".join(str(p) for p in e["loc"])
            if e["type"] == "extra_forbidden":
                prefix = e["loc"][:-1]
                fields = _fields_at(model, prefix)
                known = [".".join([*map(str, prefix), f]) for f in fields]
                lines.append(f"unknown key {path!r}{nearest(path, known)}")
            elif e["type"] == "missing":
                lines.append(f"{path!r} is missing")
            else:
                lines.append(f"{path or 'value'!s}: {e['msg']} (got {e['input']!r:.80})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _fields_at(model: type[BaseModel], loc) -> list[str]:
    """Field names of the (nested) model that an error location points into."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((t for t in _unwrap(annotation) if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return list(model.model_fields)


def _unwrap(annotation):
    if typing.get_origin(annotation) in (list, dict, typing.Union, types.UnionType):
        for arg in typing.get_args(annotation):
            yield from _unwrap(arg)
    else:
        yield annotation
