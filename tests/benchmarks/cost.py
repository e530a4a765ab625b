"""Memory and speed of training methods, measured with random weights, beside what the estimator says before the run.

    python tests/benchmarks/cost.py [--hidden 768 --layers 12 --words 32000 --rows 8 --length 256]
    python tests/benchmarks/cost.py --shape huggyllama/llama-7b      # where there is a GPU for it

Prints a line for each method: peak memory in GB above the libraries', the estimate and their ratio, tokens per second, and
the share of the device's best matrix product that a step reaches.
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ultramed import models
from ultramed.schema import TrainConfig
from ultramed.train.cost import CostConfig, cost, random_model
from ultramed.train.estimate import Shape, memory, shape_of

parser = argparse.ArgumentParser()
parser.add_argument("--shape", help="a known model or a local folder, instead of the sizes below")
parser.add_argument("--hidden", type=int, default=768)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--words", type=int, default=32000)
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()
if args.shape:
    config = shape_of(args.shape)
else:
    heads, wide = args.hidden // 64, args.hidden * 8 // 3
    config = Shape(hidden=args.hidden, intermediate=wide, layers=args.layers, heads=heads, kv_heads=heads, words=args.words)
model = random_model(config)
device = models.placement().device
print(f"{model.metrics['parameters'] / 1e6:.0f} M parameters, {args.rows} x {args.length} tokens a step, {models.placement()}")
print(f"{'method':<12} {'checkpointing':<14} {'peak GB':>8} {'estimate':>9} {'ratio':>6} {'tokens/s':>9} {'of peak':>8}")
arms = [
    ("full", "adamw_torch_fused"),
    ("full", "adamw_8bit"),
    ("lora", "adamw_torch_fused"),
    ("lora_8bit", "adamw_torch_fused"),
]
arms += [("lora_4bit", "adamw_torch_fused")] if device == "cuda" else []
for method, optim in arms:
    for again in (False, True):
        given = {
            "method": method,
            "optim": optim,
            "gradient_checkpointing": again,
            "learning_rate": 1e-4,
            "mixture": {"random": 1},
        }
        train = TrainConfig(**given)
        setting = CostConfig(shape=config, train=train, rows=args.rows, length=args.length, steps=args.steps)
        m = cost(setting, model=model).metrics
        labelled = args.rows * (args.length // 4)
        guess = memory(config, train, args.rows, args.length, labelled=labelled, device=device)["total"]
        name = method + (" 8-bit Adam" if optim == "adamw_8bit" else "")
        if "failed" in m:
            print(f"{name:<12} {again!s:<14} {m['failed']:>8} {guess / 1e9:>9.2f}", flush=True)
            continue
        peak = m["peak_bytes"]
        print(f"{name:<12} {again!s:<14} {peak / 1e9:>8.2f} {guess / 1e9:>9.2f} {guess / peak:>6.2f} {m['tokens_per_second']:>9.0f} {m['utilisation']:>8.2f}", flush=True)  # fmt: skip
