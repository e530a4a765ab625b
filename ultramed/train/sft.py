"""Supervised fine-tuning: full, LoRA, 8-bit and 4-bit LoRA through TRL and PEFT, on tokens that we made ourselves.

TRL's trainer gets `input_ids` and `labels` and does no preparation of its own.
"""

import functools
import json
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import torch

from ultramed import models, prompts
from ultramed.config import ConfigError, TrainConfig
from ultramed.data import rows as canonical
from ultramed.progress import bar as progress_bar
from ultramed.store import Artifact, StoreError, stage, write_json


def batch_plan(config: TrainConfig, longest: int, processes: int = 1) -> tuple[int, int]:
    """(micro-batch per process, accumulation steps) whose product with the processes is the global batch.

    The micro-batch is the largest divisor that keeps `longest` tokens a row within `micro_batch_tokens`.
    """
    if config.global_batch_size % processes:
        raise ConfigError(f"global_batch_size {config.global_batch_size} does not divide by {processes} processes")
    share = config.global_batch_size // processes
    fits = [m for m in range(1, share + 1) if share % m == 0 and m * longest <= config.micro_batch_tokens]
    micro = max(fits, default=1)
    return micro, share // micro


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


@stage(version=1, also=prompts.wording)
def sft(
    out: Path, config: TrainConfig, *, model: Artifact, data: Artifact, dev: Artifact | None = None, template: str = "chat"
) -> dict:
    """Fine-tune `model` on the rows of `data` (a mixture); `dev` (another) gives `dev_loss` at the end.

    Writes a model folder (full) or an adapter folder (LoRA) and `log.jsonl`, the loss curve. Interrupted with Ctrl-C
    or SIGTERM it saves a checkpoint after the step at hand; the next call goes on from there, or from the last of the
    checkpoints made every `save_steps`, and ends with the same weights as an uninterrupted run.
    """
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig

    place, shape = models.placement(), prompts.TEMPLATES[template]
    tokenizer = models.load_tokenizer(model)
    rows, counts = encode_rows(canonical.read_instructions(data / "rows.parquet"), tokenizer, shape, config)
    held = encode_rows(canonical.read_instructions(dev / "rows.parquet"), tokenizer, shape, config)[0] if dev else None
    torch.manual_seed(config.seed)  # LoRA's A matrices are drawn on attaching
    net = models.load_for_training(model, config.method, config.lora, checkpointing=config.gradient_checkpointing)
    micro, accumulation = batch_plan(config, max(r["length"] for r in rows), PartialState().num_processes)
    steps = config.max_steps if config.max_steps > 0 else max(1, int(-(-len(rows) // config.global_batch_size) * config.epochs))
    args = SFTConfig(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(config.warmup_ratio * steps),
        max_steps=steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        bf16=place.dtype == torch.bfloat16,
        fp16=place.dtype == torch.float16,
        use_cpu=place.device == "cpu",
        activation_checkpointing=config.gradient_checkpointing,
        max_length=None,  # cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=place.device == "cuda",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class()(
            net, args, Collator(tokenizer.pad_token_id), Dataset.from_list(rows),
            Dataset.from_list(held) if held else None, processing_class=tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_callback(steps, f"{config.method} lr {config.learning_rate:g}"))
        trained = [p for p in net.parameters() if p.requires_grad]
        for p in trained:  # TRL keeps adapters of quantised models in bf16, where small updates vanish
            p.data = p.data.float()
        before = [p.detach().abs().sum().item() for p in trained]
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        clock = time.perf_counter()
        with _Interruptible(trainer) as stop:
            result = trainer.train(resume_from_checkpoint=last)
        if stop.asked and trainer.state.global_step < steps:
            raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {steps}; run again to go on")
        seconds = time.perf_counter() - clock
        moved = sum(p.detach().abs().sum().item() != b for p, b in zip(trained, before, strict=True))
        if last is None and not moved:
            raise StoreError(f"training changed none of {len(trained)} tensors: method {config.method} does nothing here")
        dev_loss = trainer.evaluate()["eval_loss"] if held else None
    with open(out / "log.jsonl", "w") as fh:
        fh.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
    _save(net, tokenizer, out, model, config, template, place.dtype)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    epochs = steps * config.global_batch_size / len(rows)
    metrics = {
        "steps": steps, "epochs": epochs, "micro_batch": micro, "accumulation": accumulation,
        "train_loss": result.training_loss, "dev_loss": dev_loss, "train_seconds": round(seconds, 1),
        "tokens_per_second": round(counts["tokens"] * epochs / seconds, 1) if last is None else None,
        "trainable_parameters": sum(p.numel() for p in trained), "tensors_moved": [moved, len(trained)],
        "rows": len(rows), "template_hash": shape.fingerprint(tokenizer), **counts, "device": place.device, "dtype": str(place.dtype),
    }  # fmt: skip
    del trainer, net, trained
    models.free_memory()
    return metrics


def _save(net, tokenizer, out: Path, model: Artifact, config: TrainConfig, template: str, dtype: torch.dtype) -> None:
    about = {"template": template, "method": config.method, "base": model.key, "name": models.card(model)["name"]}
    if config.method == "full":
        net.config.use_cache = True
        with models.quiet():
            models.cast(net, dtype).save_pretrained(out)
        tokenizer.save_pretrained(out)
        write_json(out / "model.json", {"kind": "weights", **about})
        return
    net.peft_config["default"].base_model_name_or_path = about["name"]  # never a path of this machine
    net.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    write_json(out / "model.json", {"kind": "adapter", **about})


@functools.cache
def trainer_class():
    """TRL's SFTTrainer with a loss that does not multiply the prompt's tokens with the vocabulary."""
    from trl import SFTTrainer

    class CompletionTrainer(SFTTrainer):
        """On devices without Triton, TRL 1.16 scores every position of the batch, twice, and then masks the prompt.

        Here the model is asked for logits at the columns that have a label in some row, in one pass. On GPUs, and
        where the prompt is trained on too, TRL's own chunked loss is the better one and stays.
        """

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            target = inputs["labels"][:, 1:] != prompts.LABEL_IGNORED
            if return_outputs or inputs["labels"].device.type != "cpu" or target.float().mean() > 0.5:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            columns = target.any(0).nonzero()[:, 0]
            logits = model(
                input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], logits_to_keep=columns, use_cache=False
            ).logits
            keep, labels = target[:, columns], inputs["labels"][:, 1:][:, columns]
            loss = torch.nn.functional.cross_entropy(logits[keep].float(), labels[keep], reduction="sum")
            count = target.sum() if num_items_in_batch is None else num_items_in_batch
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            return loss / count

    return CompletionTrainer


def _callback(steps: int, desc: str):
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        """One bar for all steps of the run."""

        def on_train_begin(self, args, state, control, **_):
            self.bar = progress_bar(steps, desc, "step", initial=state.global_step)

        def on_step_end(self, args, state, control, **_):
            self.bar.update(1)

        def on_train_end(self, args, state, control, **_):
            self.bar.close()

    return Bar()


class _Interruptible:
    """On Ctrl-C or SIGTERM: finish the optimiser step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self, trainer):
        from transformers import TrainerCallback

        outer = self
        self.asked = False

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if outer.asked:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(Stop())

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)
