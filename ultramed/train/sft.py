"""Supervised fine-tuning: full, LoRA, 8-bit and 4-bit LoRA through TRL and PEFT."""

import random
import warnings
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import TokenConfig, TrainConfig
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.lm import models
from ultramed.lm.device import free_memory, placement
from ultramed.lm.templates import TEMPLATES, wording
from ultramed.lm.tokens import LABEL_IGNORED, labels, preview
from ultramed.train import launch, training
from ultramed.train.launch import distributed
from ultramed.train.token_rows import encode_instructions, read_tokens, token_rows, tokenizer_of
from ultramed.train.trl_adapter import routes_to_experts, score_labelled_tokens_only, token_budget_trainer
from ultramed.train.weights import load_for_training


class Collator:
    """Right-padded batches, without an attention mask unless `masked`.

    Under causal attention no real token sees the padding to its right, and without a mask PyTorch takes its fast
    attention path; a router's loss, however, counts the tokens that the mask shows. Widths are rounded up to 8, which
    keeps the number of distinct shapes small.
    """

    def __init__(self, pad_token_id: int, masked: bool = False, train_on_inputs: bool = False):
        self.pad, self.masked, self.train_on_inputs = pad_token_id, masked, train_on_inputs

    def __call__(self, rows: list[dict]) -> dict:
        width = -(-max(len(r["input_ids"]) for r in rows) // 8) * 8

        def fill(lists, value):
            return torch.tensor([ids + [value] * (width - len(ids)) for ids in lists])

        position = torch.arange(width).repeat(len(rows), 1)  # an expanded tensor cannot be pinned
        wanted = [labels(r["input_ids"], r["prompt_length"], self.train_on_inputs) for r in rows]
        ids = fill([r["input_ids"] for r in rows], self.pad)
        made = {"input_ids": ids, "labels": fill(wanted, LABEL_IGNORED), "position_ids": position}
        if self.masked:
            made["attention_mask"] = (position < torch.tensor([len(r["input_ids"]) for r in rows])[:, None]).long()
        return made


def split_held_out(rows, config: TrainConfig):
    """(token rows to train on, those held out of them or None): a random fraction `held_out` of the rows, by the seed.

    Raises ConfigError where that leaves nothing on one side.
    """
    if not config.held_out:
        return rows, None
    if len(rows) < 2:
        raise ConfigError(f"held_out {config.held_out:g} of {len(rows)} row(s): there is nothing to hold out")
    # The library's own train_test_split would write the order into the artifact that the rows are read from.
    order = random.Random(f"held out:{config.seed}").sample(range(len(rows)), len(rows))
    held = min(max(1, round(config.held_out * len(rows))), len(rows) - 1)
    return rows.select(order[held:]), rows.select(order[:held])


def make_trainer(net, tokenizer, rows, config: TrainConfig, out: Path, held=None):
    """TRL's trainer over token rows (train/token_rows.py), `held` being those that it is evaluated on: during training where
    the configuration holds rows out, and the best of these evaluations is what remains."""
    from trl import SFTConfig

    micro, _ = training.batch_plan(training.cap_micro_batches(config), max((held or rows)["length"]))
    steps = training.step_count(config, len(rows))
    evaluated = {}
    if config.held_out:
        often = min(config.eval_steps, steps)
        evaluated = {"eval_strategy": "steps", "eval_steps": often, "save_strategy": "steps", "save_steps": often}
        evaluated["load_best_model_at_end"] = True  # by the loss on `held`
    args = SFTConfig(
        **training.settings(config, out, steps, launch.share(config), 1) | evaluated,
        per_device_eval_batch_size=micro,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with warnings.catch_warnings(action="ignore"):
        trainer = token_budget_trainer()(
            net,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id, routes_to_experts(net), config.train_on_inputs),
            train_dataset=rows,
            eval_dataset=held,
            processing_class=tokenizer,
        )
    trainer.micro_batch_tokens = training.cap_micro_batches(config).micro_batch_tokens
    score_labelled_tokens_only(net)
    return trainer


@stage(version=8, also=wording)
def sft(
    out: Path, config: TrainConfig, *, model: Artifact, data: Artifact, dev: Artifact | None = None, template: str | None = None
) -> dict:
    """Fine-tune `model` on the rows of `data` (a mixture); `dev` (another) gives `dev_loss` at the end.

    With `held_out` the weights are those of the evaluation with the lowest loss on the rows held out (`held_out_loss`, at
    step `best_step`); MedAlpaca, medalpaca/train.py.
    With `packing` the rows are concatenated and cut into blocks (token_rows.py), which are what a batch counts.
    Writes a model folder (full) or an adapter folder (LoRA) and `log.jsonl`, the loss curve. Interrupted with Ctrl-C
    or SIGTERM it saves a checkpoint after the step at hand; the next call goes on from there, or from the last of the
    checkpoints made every `save_steps`, and ends with the same weights as an uninterrupted run.
    """
    shape = models.template_of(model, template)
    wanted = TokenConfig(kind="instructions", max_length=config.max_length, packing=config.packing)
    apart = wanted.model_copy(update={"packing": False})  # so that dev losses of packed and unpacked runs compare
    rows, held = (
        token_rows(how, model=tokenizer_of(model), data=each, template=shape.name) if each else None
        for how, each in ((wanted, data), (apart, dev))
    )
    return _train(out, config, model=model, rows=rows, held=held, template=shape.name)


@distributed
def _train(out: Path, config: TrainConfig, *, model: Artifact, rows: Artifact, held: Artifact | None, template: str) -> dict:
    place, tokenizer, counts = placement(config.dtype), models.load_tokenizer(model), dict(rows.metrics)
    torch.manual_seed(config.seed)  # LoRA's A matrices are drawn on attaching
    net = load_for_training(model, config, empty=launch.awaits_weights())
    train_rows, held_out = split_held_out(read_tokens(rows), config)
    dev = read_tokens(held) if held else None
    trainer = make_trainer(net, tokenizer, train_rows, config, out, held_out or dev)
    steps = trainer.args.max_steps
    with warnings.catch_warnings(action="ignore"):
        result = training.run(trainer, steps, f"{config.method} lr {config.learning_rate:g}")
        dev_loss = trainer.evaluate(dev)["eval_loss"] if dev else None
    kept = training.save(net, tokenizer, out, model, config.method, dtype=config.dtype, template=template)
    chosen = {}
    if held_out:
        best = {"held_out_loss": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
        chosen = {"held_out": len(held_out), **best}
        counts |= {"rows": len(train_rows), "tokens": sum(train_rows["length"])}
        counts["completion_tokens"] = counts["tokens"] - sum(train_rows["prompt_length"])
    epochs = steps / -(-counts["rows"] // config.global_batch_size)  # the last batch of an epoch may be short
    seen = {"tokens_per_second": None, "micro_batches": None}  # of the whole run, so not of a part of it
    if not result["resumed"]:
        speed = round(counts["tokens"] * epochs / result["train_seconds"], 1)
        seen = {"tokens_per_second": speed, "micro_batches": trainer.micro_batches}
    del trainer, net
    free_memory()
    completions = counts.pop("completion_tokens")
    return {
        **result,
        **kept,
        "epochs": epochs,
        "dev_loss": dev_loss,
        **chosen,
        **seen,
        **counts,
        "trained_tokens": counts["tokens"] if config.train_on_inputs else completions,
        "template_hash": TEMPLATES[template].fingerprint(tokenizer),
        "device": place.device,
        "dtype": str(place.dtype),
    }


def preview_rows(data: Artifact, model: Artifact, config: TrainConfig, limit: int = 1):
    """The first rows of a mixture as the trainer sees them: tokens that carry the loss in blue. An IPython object."""
    tokenizer = models.load_tokenizer(model)
    rows = canonical.read_instructions(data / "rows.parquet")[:limit]
    made = encode_instructions(rows, tokenizer, models.template_of(model), config.max_length)
    return preview(made, tokenizer, config.train_on_inputs)
