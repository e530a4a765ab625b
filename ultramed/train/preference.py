"""Preference learning through TRL: DPO and its relatives on pairs, KTO on single replies, pairwise KTO as released."""

import warnings
from pathlib import Path

import torch

from ultramed.core.schema import PreferenceConfig, TokenConfig
from ultramed.core.store import Artifact, stage
from ultramed.lm import models
from ultramed.lm.device import free_memory, placement
from ultramed.lm.templates import RELEASED, wording
from ultramed.train import launch, training
from ultramed.train.launch import distributed
from ultramed.train.token_rows import read_tokens, token_rows, tokenizer_of
from ultramed.train.trl_adapter import pairwise_kto_trainer, score_labelled_tokens_only, with_our_rows
from ultramed.train.weights import blank, load_for_training


def unpair(pairs, shift: int):
    """KTO rows of pairs (datasets of token rows): both replies with their label, and as `KL_completion_ids` the reply of
    another prompt.

    shift: rows to look back for the other reply; two of a pair stand next to each other, so 2 is the least.
    """
    from datasets import concatenate_datasets, interleave_datasets

    def replies(side: str, other: str):
        one = pairs.remove_columns([f"{other}_ids", "prompt_id"]).rename_column(f"{side}_ids", "completion_ids")
        return one.add_column("label", [side == "chosen"] * len(pairs))

    single = interleave_datasets([replies("chosen", "rejected"), replies("rejected", "chosen")])
    others = single.select_columns("completion_ids").rename_column("completion_ids", "KL_completion_ids")
    back = [(i - shift) % len(single) for i in range(len(single))]
    return concatenate_datasets([single, others.select(back)], axis=1)


def _trainer(config: PreferenceConfig):
    """(trainer class, configuration class, its arguments) of a loss."""
    import trl

    if config.loss == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": config.beta, "loss_type": "kto", "train_sampling_strategy": "sequential"}
    if config.loss == "kto_pair":
        return pairwise_kto_trainer(config.kto_detach), trl.DPOConfig, {"beta": config.beta}
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


@stage(version=6, also=wording)
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
    shape = RELEASED if config.as_released else models.template_of(model, template).name
    wanted = TokenConfig(kind="pairs", max_length=config.max_length)
    rows = token_rows(wanted, model=tokenizer_of(model), data=pairs, template=shape)
    return _train(out, config, model=model, rows=rows, reference=reference, template=models.template_of(model, template).name)


@distributed
def _train(
    out: Path, config: PreferenceConfig, *, model: Artifact, rows: Artifact, reference: Artifact | None, template: str
) -> dict:
    tokenizer, data, counts = models.load_tokenizer(model), read_tokens(rows), dict(rows.metrics)
    pairs, longest = counts.pop("rows"), counts.pop("longest")
    torch.manual_seed(config.seed)
    net = load_for_training(model, config, empty=launch.awaits_weights())
    frozen = None
    if config.method == "full" or reference is not None:  # an adapter's own reference is the model without it
        frozen = _frozen(reference or model, config)
    micro, accumulation = training.batch_plan(training.cap_micro_batches(config), 2 * longest)
    if config.loss == "kto":
        data = unpair(data, shift=2)
        micro = 2 * micro  # a pair is two rows there
    steps = training.step_count(config, pairs)
    base, arguments, extra = _trainer(config)
    shared = training.settings(config, out, steps, micro, accumulation)
    args = arguments(**{**shared, **extra}, disable_dropout=True)
    with warnings.catch_warnings(action="ignore"):
        trainer = with_our_rows(base)(net, frozen, args=args, train_dataset=data, processing_class=tokenizer)
        for each in filter(None, (net, frozen)):
            score_labelled_tokens_only(each)
        result = training.run(trainer, steps, f"{config.loss} beta {config.beta:g} lr {config.learning_rate:g}")
    kept = training.save(net, tokenizer, out, model, config.method, dtype=config.dtype, template=template, loss=config.loss)
    del trainer, net, frozen
    free_memory()
    return {**result, **kept, "micro_batch": micro, "accumulation": accumulation, "pairs": pairs, **counts}
