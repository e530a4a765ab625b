"""Supervised fine-tuning: full, LoRA, 8-bit and 4-bit LoRA through TRL and PEFT."""

import warnings
from pathlib import Path

import torch

from ultramed import models, prompts
from ultramed.data import rows as canonical
from ultramed.schema import ConfigError, TrainConfig
from ultramed.store import Artifact, stage
from ultramed.train import loop
from ultramed.train.launch import distributed


def encode_rows(rows: list[dict], tokenizer, template: prompts.Template, config: TrainConfig) -> tuple[list[dict], dict]:
    """Token rows, linted, and counts of what was truncated or dropped."""
    out, counts = [], {"truncated": 0, "dropped": 0, "tokens": 0, "trained_tokens": 0}
    for row in rows:
        tokens = prompts.encode(row, tokenizer, template, config.max_length, config.train_on_inputs)
        if tokens is None:
            counts["dropped"] += 1
            continue
        prompts.lint(tokens["input_ids"], tokens["completion_mask"], tokenizer, tokens["truncated"])
        counts["truncated"] += tokens["truncated"]
        counts["tokens"] += len(tokens["input_ids"])
        counts["trained_tokens"] += sum(label != prompts.LABEL_IGNORED for label in tokens["labels"])
        out.append({"input_ids": tokens["input_ids"], "labels": tokens["labels"], "length": len(tokens["input_ids"])})
    if not out:
        raise ConfigError(f"no row's prompt fits into max_length {config.max_length}: nothing to train on")
    return out, counts


class Collator:
    """Right-padded batches without an attention mask.

    Under causal attention no real token sees the padding to its right, and without a mask PyTorch takes its fast
    attention path. Widths are rounded up to 8, which keeps the number of distinct shapes small.
    """

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, rows: list[dict]) -> dict:
        width = -(-max(len(r["input_ids"]) for r in rows) // 8) * 8

        def fill(name, value):
            return torch.tensor([list(r[name]) + [value] * (width - len(r[name])) for r in rows])

        position = torch.arange(width).expand(len(rows), width)
        ids, labels = fill("input_ids", self.pad), fill("labels", prompts.LABEL_IGNORED)
        return {"input_ids": ids, "labels": labels, "position_ids": position}


def make_trainer(net, tokenizer, rows: list[dict], config: TrainConfig, out: Path, held: list[dict] | None = None):
    """(TRL's trainer over token rows, rows of a micro-batch, accumulation steps)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    micro, accumulation = loop.batch_plan(config, max(r["length"] for r in rows))
    args = SFTConfig(
        **loop.settings(config, out, loop.step_count(config, len(rows)), micro, accumulation),
        activation_checkpointing=config.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = loop.own_tokens(SFTTrainer)(
            net, args, Collator(tokenizer.pad_token_id), Dataset.from_list(rows),
            Dataset.from_list(held) if held else None, processing_class=tokenizer,
        )  # fmt: skip
    loop.labelled_head(net)
    return trainer, micro, accumulation


@stage(version=5, also=prompts.wording)
@distributed
def sft(
    out: Path, config: TrainConfig, *, model: Artifact, data: Artifact, dev: Artifact | None = None, template: str = "chat"
) -> dict:
    """Fine-tune `model` on the rows of `data` (a mixture); `dev` (another) gives `dev_loss` at the end.

    Writes a model folder (full) or an adapter folder (LoRA) and `log.jsonl`, the loss curve. Interrupted with Ctrl-C
    or SIGTERM it saves a checkpoint after the step at hand; the next call goes on from there, or from the last of the
    checkpoints made every `save_steps`, and ends with the same weights as an uninterrupted run.
    """
    place, shape = models.placement(config.dtype), prompts.TEMPLATES[template]
    tokenizer = models.load_tokenizer(model)
    rows, counts = encode_rows(canonical.read_instructions(data / "rows.parquet"), tokenizer, shape, config)
    held = encode_rows(canonical.read_instructions(dev / "rows.parquet"), tokenizer, shape, config)[0] if dev else None
    torch.manual_seed(config.seed)  # LoRA's A matrices are drawn on attaching
    net = models.load_for_training(model, config)
    trainer, micro, accumulation = make_trainer(net, tokenizer, rows, config, out, held)
    steps = trainer.args.max_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = loop.run(trainer, steps, f"{config.method} lr {config.learning_rate:g}")
        dev_loss = trainer.evaluate()["eval_loss"] if held else None
    loop.save(net, tokenizer, out, model, config.method, dtype=config.dtype, template=template)
    epochs = steps * config.global_batch_size / len(rows)
    speed = None if result["resumed"] else round(counts["tokens"] * epochs / result["train_seconds"], 1)
    del trainer, net
    models.free_memory()
    return {
        **result, "epochs": epochs, "micro_batch": micro, "accumulation": accumulation, "dev_loss": dev_loss,
        "tokens_per_second": speed, "rows": len(rows), "template_hash": shape.fingerprint(tokenizer), **counts,
        "device": place.device, "dtype": str(place.dtype),
    }  # fmt: skip
