"""What training costs: memory and speed of a method at a shape, measured with random weights in a process of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from pydantic import Field

from ultramed import models
from ultramed.schema import Strict, TrainConfig
from ultramed.store import Artifact, StoreError, find, stage, write_json
from ultramed.train.estimate import Shape, flops_per_token


class CostConfig(Strict):
    """`rows` rows of `length` tokens are one micro-batch and one step; the last quarter of a row has labels."""

    shape: Shape  # with random weights: memory and speed do not depend on what they are
    train: TrainConfig
    rows: int = Field(4, ge=1)
    length: int = Field(256, ge=8)
    steps: int = Field(4, ge=2)  # the first is not timed


@stage(version=1)
def random_model(out: Path, config: Shape) -> dict:
    """Weights drawn with seed 0, in bf16."""
    from transformers import LlamaForCausalLM

    from ultramed.weights import tiny_llama

    torch.manual_seed(0)
    net = LlamaForCausalLM(config.config()).to(torch.bfloat16)
    with models.quiet():
        net.save_pretrained(out)
    tiny_llama()[1].save_pretrained(out)
    write_json(out / "model.json", {"kind": "weights", "name": "random", "template": "chat"})
    return {"parameters": sum(p.numel() for p in net.parameters())}


@stage(version=1)
def cost(out: Path, config: CostConfig, *, model: Artifact) -> dict:
    """Peak memory (bytes, above what the libraries hold), tokens per second, and the share of the device's best matrix
    product that the steps reach. `failed`: 'out of memory' instead, where it did not fit."""
    spec = {"config": config.model_dump(mode="json"), "model": model.key}
    write_json(out / "spec.json", spec)
    done = subprocess.run([sys.executable, "-m", __name__, str(out)], capture_output=True, text=True)
    if not (out / "result.json").exists():
        if done.returncode == -9:  # the kernel's own way of saying so
            return {"failed": "out of memory"}
        raise StoreError(f"the measurement ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads((out / "result.json").read_text())


def best_flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of some."""
    size, best = (8192 if device == "cuda" else 2048), 0.0
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(8):
        clock = time.perf_counter()
        c = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - clock))
    del c
    return best


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(config: CostConfig, model: Artifact, out: Path) -> dict:
    """In this process, which should have done nothing else before."""
    place = models.placement()
    peak_flops = best_flops(place.device, place.dtype)
    small = Shape(hidden=64, intermediate=128, layers=1, heads=2, kv_heads=2, words=2048)
    _train(config.model_copy(update={"shape": small, "rows": 1, "length": 16}), random_model(small), out)  # loads all libraries
    models.free_memory()
    empty = _resident("VmRSS") if place.device == "cpu" else 0
    peak, ends = _train(config, model, out)
    speed = config.rows * config.length * (len(ends) - 1) / (ends[-1] - ends[0])
    flops = flops_per_token(config.shape, config.train, config.length) * speed
    return {
        "peak_bytes": peak - empty, "tokens_per_second": speed, "flops": flops, "best_flops": peak_flops,
        "utilisation": flops / peak_flops, "device": str(place),
    }  # fmt: skip


def _train(config: CostConfig, model: Artifact, out: Path) -> tuple[int, list[float]]:
    """(peak memory, ends of the steps) of a training run on random tokens."""
    from transformers import TrainerCallback

    from ultramed.train.sft import make_trainer

    place = models.placement()
    train = config.train.model_copy(
        update={"global_batch_size": config.rows, "micro_batch_tokens": config.rows * config.length, "max_steps": config.steps}
    )
    tokenizer = models.load_tokenizer(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.shape.words, (config.rows * config.steps, config.length), generator=draw).tolist()
    start = config.length - config.length // 4
    rows = [{"input_ids": r, "labels": [-100] * start + r[start:], "length": len(r)} for r in ids]
    net = models.load_for_training(model, train.method, train.lora, checkpointing=train.gradient_checkpointing)
    trainer, _, _ = make_trainer(net, tokenizer, rows, train, out)
    models.free_memory()
    if place.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, without what loading took
    else:
        torch.cuda.reset_peak_memory_stats()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if place.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return (_resident("VmHWM") if place.device == "cpu" else torch.cuda.max_memory_allocated()), ends


def _main(folder: str) -> None:
    out = Path(folder)
    spec = json.loads((out / "spec.json").read_text())
    try:
        result = measure(CostConfig(**spec["config"]), find(spec["model"]), out)
    except torch.OutOfMemoryError:
        result = {"failed": "out of memory"}
    write_json(out / "result.json", result)


if __name__ == "__main__":
    _main(sys.argv[1])
