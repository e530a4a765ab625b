"""What training costs: memory and speed of a method at a shape, measured with random weights in a process of its own."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from pydantic import Field

from ultramed.core.config import changed, validate
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.ledger import Ledger
from ultramed.core.profile import Profile
from ultramed.core.schema import Strict, TrainConfig
from ultramed.core.store import Artifact, find, stage, write_json
from ultramed.lm import models
from ultramed.lm.device import free_memory, matrix_gflops, placement, quietly
from ultramed.train.estimate import Shape, flops_per_token, memory, shape_of
from ultramed.train.training import trained_in_fp32
from ultramed.train.weights import load_for_training

log = logging.getLogger(__name__)
UNTIMED = 2  # steps; the optimiser has its states in the second
LLAMA_7B = shape_of("huggyllama/llama-7b")
PUBLISHED_ARMS = {  # arm -> row of MedAlpaca's cost table
    "8-bit LoRA": "LLaMA 7b / True / True / True / False / False",
    "LoRA": "LLaMA 7b / False / True / True / False / False",
    "full, checkpointing": "LLaMA 7b / False / False / False / True / True",
}
CPU_PARAMETERS = 1e9  # a step of a larger model takes minutes on a CPU, where it fits at all


class CostConfig(Strict):
    """`rows` rows of `length` tokens are one micro-batch and one step; the last quarter of a row has labels."""

    shape: Shape  # with random weights: memory and speed do not depend on what they are
    arms: dict[str, TrainConfig] = Field(min_length=1)
    rows: int = Field(4, ge=1)
    length: int = Field(256, ge=8)
    steps: int = Field(6, ge=3)  # the first two are not timed: memory is measured there

    @property
    def labels(self) -> int:
        """Labelled tokens of a row."""
        return self.length // 4


def cost_config(profile: Profile) -> CostConfig:
    """The section `cost` of a profile; on a CPU a small shape stands in for one of billions of parameters."""
    section = profile.cost
    if section is None:
        raise ConfigError(f"profile {profile.name!r} has no section `cost`")
    shape = shape_of(section.shape) if isinstance(section.shape, str) else validate(Shape, section.shape, "cost.shape")
    if placement().device == "cpu" and shape.parameters > CPU_PARAMETERS:
        log.warning("no GPU: %.1f billion parameters are not measured here, a small shape is", shape.parameters / 1e9)
        shape = shape_of("small")
    whole = {"held_out": 0.0}  # an evaluation on the way is not a step
    arms = {name: changed(profile.train, whole, change, where=f"cost.arms.{name}") for name, change in section.arms.items()}
    return CostConfig(shape=shape, arms=arms, rows=section.rows, length=section.length, steps=section.steps)


@stage(version=1)
def random_model(out: Path, config: Shape) -> dict:
    """Weights drawn with seed 0, in bf16; on a GPU where there is one, since a CPU draws billions of them in minutes."""
    from transformers import LlamaForCausalLM

    from ultramed.lm.weights import tiny_llama

    torch.manual_seed(0)
    with torch.device(placement().device):
        net = LlamaForCausalLM(config.config()).to(torch.bfloat16)
    with quietly():
        net.save_pretrained(out)
    tiny_llama()[1].save_pretrained(out)
    write_json(out / "model.json", {"kind": "weights", "name": "random", "template": "chat"})
    return {"parameters": sum(p.numel() for p in net.parameters())}


@stage(version=4)
def cost(out: Path, config: CostConfig, *, model: Artifact) -> dict:
    """For each arm the most bytes that tensors hold at once, on a CPU also what the process holds above the libraries'
    (`resident_bytes`), tokens per second, and the share of the device's best matrix product that the steps reach;
    `failed`, with the reason, where it did not fit or cannot be.

    The arms run one after the other in a process of their own; if one is too large for it, the next ones get another.
    """
    write_json(out / "spec.json", {"config": config.model_dump(mode="json"), "model": model.key})
    while True:
        done = subprocess.run([sys.executable, "-m", __name__, str(out)], capture_output=True, text=True)
        with Ledger(out / "results.jsonl", key="arm") as ledger:
            left = [name for name in config.arms if name not in ledger]
            if not left:
                return {"arms": ledger.rows}
            if done.returncode != -9:  # the kernel's own way of saying that memory is short
                raise StoreError(f"measuring {left[0]!r} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            ledger.add({"arm": left[0], "failed": "out of memory"})


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def best_gflops() -> float:
    """GFLOP/s of this device's best matrix product, at a size that fills it."""
    return matrix_gflops(8192 if placement().device == "cuda" else 2048)


def measure(config: CostConfig, model: Artifact, out: Path) -> None:
    """Append a line for each arm that `results.jsonl` lacks. In this process, which should have done nothing else."""
    place = placement()
    peak_flops = 1e9 * best_gflops()
    small = Shape(hidden=64, intermediate=128, layers=1, heads=2, kv_heads=2, words=2048)
    tiny, first = config.model_copy(update={"shape": small, "rows": 1, "length": 16}), next(iter(config.arms.values()))
    _train(tiny, first, random_model(small), out)  # loads all libraries
    with Ledger(out / "results.jsonl", key="arm") as ledger:
        for name in [name for name in config.arms if name not in ledger]:
            free_memory()
            empty = _resident("VmRSS") if place.device == "cpu" else 0
            try:
                peak, resident, ends = _train(config, config.arms[name], model, out)
            except (torch.OutOfMemoryError, ConfigError) as err:
                failed = str(err).partition(":")[0] if isinstance(err, ConfigError) else "out of memory"
                ledger.add({"arm": name, "failed": failed})
                continue
            held = {"resident_bytes": resident - empty} if place.device == "cpu" else {}
            speed = config.rows * config.length * (len(ends) - UNTIMED) / (ends[-1] - ends[UNTIMED - 1])
            flops = flops_per_token(config.shape, config.arms[name], config.length) * speed
            ledger.add(
                {
                    "arm": name,
                    "peak_bytes": peak,
                    **held,
                    "tokens_per_second": speed,
                    "flops": flops,
                    "best_flops": peak_flops,
                    "utilisation": flops / peak_flops,
                    "device": str(place),
                }
            )


def _train(config: CostConfig, train: TrainConfig, model: Artifact, out: Path) -> tuple[int, int, list[float]]:
    """(most bytes of tensors at once, of the process, ends of the steps) of a training run on random tokens."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from ultramed.train.sft import make_trainer

    on_cpu = placement().device == "cpu"
    train = train.model_copy(
        update={"global_batch_size": config.rows, "micro_batch_tokens": config.rows * config.length, "max_steps": config.steps}
    )
    tokenizer = models.load_tokenizer(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.shape.words, (config.rows * config.steps, config.length), generator=draw).tolist()
    start = config.length - config.labels
    rows = Dataset.from_list([{"input_ids": r, "prompt_length": start, "length": len(r)} for r in ids])
    net = load_for_training(model, train)
    trainer = make_trainer(net, tokenizer, rows, train, out)
    trained_in_fp32(trainer.model)  # as training has them
    free_memory()
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, without what loading took
    else:
        torch.cuda.reset_peak_memory_stats()
    watch, ends = _Tensors(net) if on_cpu else None, []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if on_cpu and len(ends) == UNTIMED - 1:
                watch.profiler.stop()
            elif not on_cpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    resident = _resident("VmHWM") if on_cpu else 0  # before the profile is read, which takes memory, too
    return watch.most(out / "memory.json") if on_cpu else torch.cuda.max_memory_allocated(), resident, ends


class _Tensors:
    """Counts the bytes of tensors on a CPU, as CUDA does by itself, from now until `profiler` is stopped."""

    def __init__(self, net):
        storages = [t.untyped_storage() for t in (*net.parameters(), *net.buffers())]
        self.model = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def most(self, path: Path) -> int:
        """Held at once, with the model's. path: of a file to come and go."""
        self.profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
        path.unlink()
        totals = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]  # PyTorch never sets it to 0
        return self.model + max(totals) - totals[0]


def foretold(shape: Shape, published: pd.DataFrame, length: int, rows: tuple[int, ...] = (1, 4)) -> pd.DataFrame:
    """MedAlpaca's measured memory beside the estimate for a GPU with micro-batches of so many `rows` (it does not say).

    published: rows with train_8bit, lora, fp16, bf16, gradient_checkpointing, vram_gb ('OOM': more than 80 GB). Its full
    fine-tuning kept 16-bit weights and moments of Adam, ours keeps fp32 ones: the estimate is of ours.
    """
    out = []
    for row in published.itertuples():
        method = "full" if not row.lora else "lora_8bit" if row.train_8bit else "lora"
        checkpointing = bool(row.gradient_checkpointing)
        train = TrainConfig(mixture={"-": 1}, learning_rate=1e-4, method=method, gradient_checkpointing=checkpointing)
        metadata = {
            "arm": method + ", checkpointing" * checkpointing,
            "numbers": "fp16" if row.fp16 else "bf16" if row.bf16 else "fp32",
        }
        guesses = {
            f"estimate GB, {n} row{'s' * (n > 1)}": memory(shape, train, n, length, labelled=n * length // 2, device="cuda")[
                "total"
            ]
            / 1e9
            for n in rows
        }
        out.append({**metadata, "published GB": row.vram_gb, **guesses})
    return pd.DataFrame(out)


def table(config: CostConfig, measured: Artifact, epoch_rows: int = 6000) -> pd.DataFrame:
    """One row an arm: measured and estimated peak in GB, tokens per second, minutes for `epoch_rows` rows, share of the
    device's peak."""
    out = []
    for name, m in measured.metrics["arms"].items():
        train = config.arms[name]
        place, labelled = placement(train.dtype), config.rows * config.labels
        run = {"accumulation": 1, "labelled": labelled, "device": place.device, "dtype": place.dtype}
        guess = memory(config.shape, train, config.rows, config.length, **run)["total"] / 1e9
        state = m.get("failed", "measured")
        peak, speed = (m.get(key, float("nan")) for key in ("peak_bytes", "tokens_per_second"))
        out.append(
            {
                "arm": name,
                "peak GB": peak / 1e9,
                "estimate GB": guess,
                "estimate / measured": guess * 1e9 / peak,
                "process GB": m.get("resident_bytes", float("nan")) / 1e9,
                "tokens/s": speed,
                "minutes an epoch": epoch_rows * config.length / speed / 60,
                "of peak": m.get("utilisation"),
                "state": state,
            }
        )
    return pd.DataFrame(out).round({"tokens/s": 0}).astype({"tokens/s": "Int64"})


def as_cells(measured: pd.DataFrame) -> pd.DataFrame:
    """`table` as cells of MedAlpaca's cost table: arm, subset (vram_gb, minutes_per_epoch), value."""
    columns = {"peak GB": "vram_gb", "minutes an epoch": "minutes_per_epoch"}
    long = measured.rename(columns=columns).melt("arm", list(columns.values()), var_name="subset", value_name="value")
    return long.round(2)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    spec = json.loads((folder / "spec.json").read_text())
    measure(CostConfig(**spec["config"]), find(spec["model"]), folder)
