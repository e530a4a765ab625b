"""Supervised fine-tuning: full, LoRA, 8-bit and 4-bit LoRA through TRL and PEFT."""

import warnings
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import TrainConfig
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.lm import models
from ultramed.lm.device import free_memory, placement
from ultramed.lm.templates import Template, wording
from ultramed.lm.tokens import LABEL_IGNORED, encode_row, lint, preview
from ultramed.train import launch, training
from ultramed.train.launch import distributed
from ultramed.train.trl_adapter import routes_to_experts, score_labelled_tokens_only, token_budget_trainer
from ultramed.train.weights import load_for_training


def encode_rows(rows: list[dict], tokenizer, template: Template, config: TrainConfig) -> tuple[list[dict], dict]:
    """Token rows, linted, and counts of what was truncated or dropped."""
    out, counts = [], {"truncated": 0, "dropped": 0, "tokens": 0, "trained_tokens": 0}
    for row in rows:
        tokens = encode_row(row, tokenizer, template, config.max_length, config.train_on_inputs)
        if tokens is None:
            counts["dropped"] += 1
            continue
        lint(tokens["input_ids"], tokens["completion_mask"], tokenizer, tokens["truncated"])
        counts["truncated"] += tokens["truncated"]
        counts["tokens"] += len(tokens["input_ids"])
        counts["trained_tokens"] += sum(label != LABEL_IGNORED for label in tokens["labels"])
        out.append({"input_ids": tokens["input_ids"], "labels": tokens["labels"], "length": len(tokens["input_ids"])})
    if not out:
        raise ConfigError(f"no row's prompt fits into max_length {config.max_length}: nothing to train on")
    return out, counts


class Collator:
    """Right-padded batches, without an attention mask unless `masked`.

    Under causal attention no real token sees the padding to its right, and without a mask PyTorch takes its fast
    attention path; a router's loss, however, counts the tokens that the mask shows. Widths are rounded up to 8, which
    keeps the number of distinct shapes small.
    """

    def __init__(self, pad_token_id: int, masked: bool = False):
        self.pad, self.masked = pad_token_id, masked

    def __call__(self, rows: list[dict]) -> dict:
        width = -(-max(len(r["input_ids"]) for r in rows) // 8) * 8

        def fill(name, value):
            return torch.tensor([list(r[name]) + [value] * (width - len(r[name])) for r in rows])

        position = torch.arange(width).expand(len(rows), width)
        ids, labels = fill("input_ids", self.pad), fill("labels", LABEL_IGNORED)
        made = {"input_ids": ids, "labels": labels, "position_ids": position}
        if self.masked:
            made["attention_mask"] = (position < torch.tensor([len(r["input_ids"]) for r in rows])[:, None]).long()
        return made


def make_trainer(net, tokenizer, rows: list[dict], config: TrainConfig, out: Path, held: list[dict] | None = None):
    """TRL's trainer over token rows."""
    from datasets import Dataset
    from trl import SFTConfig

    micro, _ = training.batch_plan(training.cap_micro_batches(config), max(r["length"] for r in held or rows))
    args = SFTConfig(
        **training.settings(config, out, training.step_count(config, len(rows)), launch.share(config), 1),
        per_device_eval_batch_size=micro,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = token_budget_trainer()(
            net,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id, masked=routes_to_experts(net)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held) if held else None,
            processing_class=tokenizer,
        )
    trainer.micro_batch_tokens = training.cap_micro_batches(config).micro_batch_tokens
    score_labelled_tokens_only(net)
    return trainer


@stage(version=6, also=wording)
@distributed
def sft(
    out: Path, config: TrainConfig, *, model: Artifact, data: Artifact, dev: Artifact | None = None, template: str | None = None
) -> dict:
    """Fine-tune `model` on the rows of `data` (a mixture); `dev` (another) gives `dev_loss` at the end.

    Writes a model folder (full) or an adapter folder (LoRA) and `log.jsonl`, the loss curve. Interrupted with Ctrl-C
    or SIGTERM it saves a checkpoint after the step at hand; the next call goes on from there, or from the last of the
    checkpoints made every `save_steps`, and ends with the same weights as an uninterrupted run.
    """
    place, shape = placement(config.dtype), models.template_of(model, template)
    tokenizer = models.load_tokenizer(model)
    rows, counts = encode_rows(canonical.read_instructions(data / "rows.parquet"), tokenizer, shape, config)
    held = encode_rows(canonical.read_instructions(dev / "rows.parquet"), tokenizer, shape, config)[0] if dev else None
    torch.manual_seed(config.seed)  # LoRA's A matrices are drawn on attaching
    net = load_for_training(model, config, empty=launch.awaits_weights())
    trainer = make_trainer(net, tokenizer, rows, config, out, held)
    steps = trainer.args.max_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = training.run(trainer, steps, f"{config.method} lr {config.learning_rate:g}")
        dev_loss = trainer.evaluate()["eval_loss"] if held else None
    training.save(net, tokenizer, out, model, config.method, dtype=config.dtype, template=shape.name)
    epochs = steps / -(-len(rows) // config.global_batch_size)  # the last batch of an epoch may be short
    seen = {"tokens_per_second": None, "micro_batches": None}  # of the whole run, so not of a part of it
    if not result["resumed"]:
        speed = round(counts["tokens"] * epochs / result["train_seconds"], 1)
        seen = {"tokens_per_second": speed, "micro_batches": trainer.micro_batches}
    del trainer, net
    free_memory()
    return {
        **result,
        "epochs": epochs,
        "dev_loss": dev_loss,
        **seen,
        "rows": len(rows),
        "template_hash": shape.fingerprint(tokenizer),
        **counts,
        "device": place.device,
        "dtype": str(place.dtype),
    }


def preview_rows(data: Artifact, model: Artifact, config: TrainConfig, limit: int = 1):
    """The first rows of a mixture as the trainer sees them: tokens that carry the loss in blue. An IPython object."""
    tokenizer = models.load_tokenizer(model)
    rows = canonical.read_instructions(data / "rows.parquet")[:limit]
    return preview(encode_rows(rows, tokenizer, models.template_of(model), config)[0], tokenizer, limit)
