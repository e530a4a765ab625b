"""Preference learning through TRL: DPO and its relatives on pairs, KTO on single replies, pairwise KTO as released."""

import warnings
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import PreferenceConfig
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.lm import models
from ultramed.lm.device import free_memory, placement
from ultramed.lm.templates import RELEASED, TEMPLATES, Template, wording
from ultramed.lm.tokens import encode_row, lint
from ultramed.train import launch, training
from ultramed.train.launch import distributed
from ultramed.train.trl_adapter import pairwise_kto_trainer, score_labelled_tokens_only, with_our_rows
from ultramed.train.weights import blank, load_for_training


def encode_pairs(rows: list[dict], tokenizer, template: Template, max_length: int) -> tuple[list[dict], dict]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, linted, and `length`, the longer one's with its prompt.

    Pairs that do not fit whole are dropped and counted: cutting a completion would make a reply without an end the
    better one.
    """
    out, counts = [], {"dropped": 0, "tokens": 0}
    for row in rows:
        ids = {}
        for side in ("chosen", "rejected"):
            made = encode_row({"prompt": row["prompt"], "completion": row[side]}, tokenizer, template, max_length)
            if made is None or made["truncated"]:
                break
            if template.name != RELEASED:
                lint(made["input_ids"], made["completion_mask"], tokenizer)
            start = made["completion_mask"].index(1)
            ids["prompt_ids"], ids[f"{side}_ids"] = made["input_ids"][:start], made["input_ids"][start:]
            counts["tokens"] += len(made["input_ids"])
        if "rejected_ids" in ids:
            length = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
            out.append({**ids, "length": length})
        else:
            counts["dropped"] += 1
    if not out:
        raise ConfigError(f"no pair fits into max_length {max_length}: nothing to train on")
    return out, counts


def unpair(rows: list[dict], shift: int) -> list[dict]:
    """KTO rows of pairs: both replies with their label, and as `KL_completion_ids` the reply of another prompt.

    shift: rows to look back for the other reply; two of a pair stand next to each other, so 2 is the least.
    """
    single = [
        {"prompt_ids": r["prompt_ids"], "completion_ids": r[f"{side}_ids"], "label": side == "chosen", "length": r["length"]}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    return [{**r, "KL_completion_ids": single[i - shift]["completion_ids"]} for i, r in enumerate(single)]


def _trainer(config: PreferenceConfig):
    """(trainer class, configuration class, its arguments) of a loss."""
    import trl

    if config.loss == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": config.beta, "loss_type": "kto", "train_sampling_strategy": "sequential"}
    if config.loss == "kto_pair":
        return pairwise_kto_trainer(), trl.DPOConfig, {"beta": config.beta}
    name = {"dpo": "sigmoid", "nca": "nca_pair"}.get(config.loss, config.loss)
    return trl.DPOTrainer, trl.DPOConfig, {"beta": config.beta, "loss_type": [name]}


def _frozen(model: Artifact, config: PreferenceConfig):
    """The reference: in fp32 as the policy, whose rounding autocast does for both; sharded in the dtype of the products."""
    from transformers import AutoModelForCausalLM

    dtype = placement(config.dtype).dtype
    if not launch.sharded():
        return models.load(model, dtype=torch.float32 if config.method == "full" else dtype).requires_grad_(False)
    if launch.awaits_weights():
        net = blank(AutoModelForCausalLM, model, dtype)
    else:
        net = models.load(model, dtype=dtype, device="cpu")
    return launch.shard_frozen(net.eval().requires_grad_(False))


@stage(version=5, also=wording)
@distributed
def preference(
    out: Path,
    config: PreferenceConfig,
    *,
    model: Artifact,
    pairs: Artifact,
    reference: Artifact | None = None,
    template: str | None = None,
) -> dict:
    """Train `model` on `pairs`. The reference is `reference`, or a frozen copy of `model` as it starts.

    Writes a model (or adapter) folder and `log.jsonl` with log-probabilities, rewards, margins and accuracy by step.
    `as_released` renders the pairs with UltraMedical's malformed template.
    """
    from datasets import Dataset

    trained_with = models.template_of(model, template)
    shape = TEMPLATES[RELEASED] if config.as_released else trained_with
    tokenizer = models.load_tokenizer(model)
    rows, counts = encode_pairs(canonical.read_pairs(pairs / "pairs.parquet"), tokenizer, shape, config.max_length)
    torch.manual_seed(config.seed)
    net = load_for_training(model, config, empty=launch.awaits_weights())
    frozen = None
    if config.method == "full" or reference is not None:  # an adapter's own reference is the model without it
        frozen = _frozen(reference or model, config)
    longest = max(r["length"] for r in rows)
    micro, accumulation = training.batch_plan(training.cap_micro_batches(config), 2 * longest)
    data = rows
    if config.loss == "kto":
        data = unpair(rows, shift=2)
        micro = 2 * micro  # a pair is two rows there
    steps = training.step_count(config, len(rows))
    base, arguments, extra = _trainer(config)
    shared = training.settings(config, out, steps, micro, accumulation)
    args = arguments(**{**shared, **extra}, disable_dropout=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = with_our_rows(base)(net, frozen, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
        for each in filter(None, (net, frozen)):
            score_labelled_tokens_only(each)
        result = training.run(trainer, steps, f"{config.loss} beta {config.beta:g} lr {config.learning_rate:g}")
    training.save(net, tokenizer, out, model, config.method, dtype=config.dtype, template=trained_with.name, loss=config.loss)
    del trainer, net, frozen
    free_memory()
    return {**result, "micro_batch": micro, "accumulation": accumulation, "pairs": len(rows), **counts}
