"""What supervised, preference and reward training share: batch sizes, trainer settings, an interruptible run, saving."""

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from ultramed.core.errors import StoreError
from ultramed.core.ledger import write_lines
from ultramed.core.progress import bar as progress_bar
from ultramed.core.schema import OptimConfig
from ultramed.core.signals import StopSignals
from ultramed.core.store import Artifact, write_json
from ultramed.lm import models
from ultramed.lm.device import at_most_on_cpu, placement, quietly
from ultramed.lm.merging import cast, update_kept
from ultramed.train import launch

CPU_TOKENS = 4096  # of a micro-batch: larger ones are no faster there, and GPU profiles ask for tens of thousands


def cap_micro_batches(config: OptimConfig) -> OptimConfig:
    """The configuration with micro-batches that a CPU's memory holds. (What else is in its micro-batch counts for a
    pair in reward models and in both kinds of KTO, whose reference points are means over it; elsewhere it does not.)"""
    tokens = at_most_on_cpu(config.micro_batch_tokens, CPU_TOKENS)
    return config.model_copy(update={"micro_batch_tokens": tokens})


def batch_plan(config: OptimConfig, longest: int, processes: int = 0) -> tuple[int, int]:
    """(micro-batch per process, accumulation steps) whose product with the processes is the global batch.

    The micro-batch is the largest divisor that keeps `longest` tokens a row within `micro_batch_tokens`.
    """
    rows = launch.share(config, processes)
    fits = [m for m in range(1, rows + 1) if rows % m == 0 and m * longest <= config.micro_batch_tokens]
    micro = max(fits, default=1)
    return micro, rows // micro


def step_count(config: OptimConfig, rows: int) -> int:
    """Optimiser steps of the run: `max_steps`, or what the epochs need; the last batch may be short."""
    return config.max_steps if config.max_steps > 0 else max(1, int(-(-rows // config.global_batch_size) * config.epochs))


def settings(config: OptimConfig, out: Path, steps: int, micro: int, accumulation: int) -> dict:
    """Arguments that all of TRL's configurations share."""
    place = placement(config.dtype)
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps or round(config.warmup_ratio * steps),
        "max_steps": steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "seed": config.seed,
        "bf16": place.dtype == torch.bfloat16,
        "fp16": place.dtype == torch.float16,
        "use_cpu": place.device == "cpu",
        "activation_checkpointing": config.gradient_checkpointing,
        # bitsandbytes holds the inputs of its 8-bit products by itself: only reentrant checkpointing lets go of them
        "activation_checkpointing_kwargs": {"use_reentrant": config.method == "lora_8bit"},
        "max_length": None,  # cut already
        "train_sampling_strategy": "group_by_length",  # of the rows' column `length`, by our sampler
        "remove_unused_columns": False,  # which would go otherwise
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": place.device == "cuda",
    }


def trained_in_fp32(model) -> dict:
    """Name -> parameter of what is trained, turned to fp32: TRL keeps adapters of quantised models in bf16, where small updates
    vanish, and which a run without autocast cannot multiply."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.float()
    return trained


def run(trainer, steps: int, desc: str) -> dict:
    """Train with a bar, from the last checkpoint if there is one; `log.jsonl` is written into the stage's folder.

    Ctrl-C or SIGTERM saves a checkpoint after the step at hand and raises KeyboardInterrupt. Raises StoreError if
    training changed nothing. Returns training loss, seconds, moved tensors and whether it went on from a checkpoint.
    """
    from transformers import PrinterCallback

    folder = Path(trainer.args.output_dir)
    with warnings.catch_warnings(action="ignore"):
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_callback(steps, desc))
        trained = trained_in_fp32(trainer.model)
        before = {name: None if launch.awaits_weights() else _total(p) for name, p in trained.items()}
        last = _usable(_last_checkpoint(folder))
        clock = time.perf_counter()
        with _Interruptible(trainer) as stop:
            result = trainer.train(resume_from_checkpoint=last)
        if stop.asked and trainer.state.global_step < steps:
            raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {steps}; run again to go on")
        seconds = time.perf_counter() - clock
        parts = any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        after = {n: _total(p) for n, p in trainer.model.named_parameters() if n in before}
        moved = launch.agreed(sum(after[name] != value for name, value in before.items()))
        if last is None and not moved:
            raise StoreError(f"training changed none of {len(trained)} tensors: it does nothing here")
    if launch.main_worker():
        write_lines(folder.parent / "log.jsonl", trainer.state.log_history)
    metadata = {"processes": launch.world(), "sharded": parts} if launch.worker() else {}
    return metadata | {
        "steps": steps,
        "train_loss": result.training_loss,
        "train_seconds": round(max(seconds, 0.1), 1),  # speeds are made of it
        "resumed": last is not None,
        "trainable_parameters": sum(p.numel() for p in trained.values()),
        "tensors_moved": [moved, len(trained)],
    }


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; those whose writing was cut off are deleted. The trainer writes the state's file
    last, and deletes older checkpoints only then."""
    from transformers.trainer_utils import get_last_checkpoint

    if launch.main_worker():
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text())
            except (OSError, ValueError):
                shutil.rmtree(checkpoint)
    launch.agreed(0)  # nobody looks before the first one has cleaned up
    return get_last_checkpoint(folder) if folder.is_dir() else None


def _usable(checkpoint: str | None) -> str | None:
    """The checkpoint, if this kind of run can go on from it. Raises StoreError for one of sharded training in a single
    process, and the other way round."""
    if checkpoint is not None and any(Path(checkpoint).glob("pytorch_model_fsdp*")) != launch.sharded():
        made, now = ("one", "several") if launch.sharded() else ("several", "one")
        raise StoreError(
            f"{checkpoint} was made by {made} process{'es' * (made == 'several')} and cannot be gone on from by {now}: give "
            f"--processes as before, or delete that folder to begin anew"
        )
    return checkpoint


def _total(parameter: torch.Tensor) -> float:
    """Sum of the absolute values, of a parameter of which this process may hold a part."""
    held = parameter.detach()
    return torch.linalg.vector_norm(held.full_tensor() if hasattr(held, "full_tensor") else held, 1).item()


def save(
    net, tokenizer, out: Path, base: Artifact, method: str, kind: str = "weights", dtype: str = "auto", **metadata
) -> dict:
    """Write a whole model ('weights' or 'reward'), or an adapter that names its base, with `model.json`; checkpoints go.

    Called by all workers, because a sharded model is gathered; the first one writes. Returns `update_kept` of a whole model,
    which is rounded to the run's dtype (lm/merging.py); an adapter stays in fp32 until it is merged.
    """
    name = models.card(base)["name"]
    metadata = {"method": method, "base": base.key, "name": Path(name).name if Path(name).is_dir() else name, **metadata}
    state = launch.gather_state_dict(net) if launch.sharded() else None
    if not launch.main_worker():
        return {}
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if method == "full":
        net.config.use_cache = True
        dtype = placement(dtype).dtype
        kept = update_kept(_before_and_after(base, state or net.state_dict()), dtype)
        with quietly():
            if state is None:
                cast(net, dtype).save_pretrained(out)
            else:
                net.config.dtype = dtype
                untied = {name: value.to(dtype) for name, value in state.items() if name not in net.all_tied_weights_keys}
                net.save_pretrained(out, state_dict=untied)
        tokenizer.save_pretrained(out)
        write_json(out / "model.json", {"kind": kind, **metadata})
        return {"update_kept": round(kept, 4)}
    net.peft_config["default"].base_model_name_or_path = metadata["name"]  # never a path of this machine
    net.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    write_json(out / "model.json", {"kind": "adapter", **metadata})
    return {}


def _before_and_after(base: Artifact, trained: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weights of the base, the same trained), read one after the other."""
    from safetensors import safe_open

    for path in models.folder(base, local=True).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in trained.keys() & set(file.keys()):
                before, after = file.get_tensor(name), trained[name]
                if before.shape == after.shape:
                    yield before.to(after.device), after


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


class _Interruptible(StopSignals):
    """On Ctrl-C or SIGTERM: finish the optimiser step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A worker takes no signals: the process that launched it does, and all workers stop after the same step.
    """

    def __init__(self, trainer):
        from transformers import TrainerCallback

        outer = self
        self.asked = 0

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if launch.worker():
                    outer.asked = launch.stop_asked()
                if outer.asked:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(Stop())

    def __enter__(self):
        return self if launch.worker() else super().__enter__()

    def note(self, number, frame):
        super().note(number, frame)
        if self.asked > 1:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        if not launch.worker():
            super().__exit__()


def training_log(model: Artifact, column: str = "loss") -> pd.DataFrame:
    """The steps of a training run (`log.jsonl`) at which `column` was written."""
    return pd.read_json(model / "log.jsonl", lines=True).dropna(subset=column)
