"""Memory and speed of training methods, measured with random weights, beside what the estimator says before the run.

    python tests/benchmarks/cost.py [--hidden 768 --layers 12 --words 32000 --rows 8 --length 256]
    python tests/benchmarks/cost.py --shape huggyllama/llama-7b      # where there is a GPU for it

Prints a line for each method: peak memory in GB above the libraries', the estimate and their ratio, tokens per second, and
the share of the device's best matrix product that a step reaches.
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ultramed.core.schema import TrainConfig
from ultramed.lm.device import placement
from ultramed.train.cost import CostConfig, cost, random_model, table
from ultramed.train.estimate import Shape, shape_of

parser = argparse.ArgumentParser()
parser.add_argument("--shape", help="a known model or a local folder, instead of the sizes below")
parser.add_argument("--hidden", type=int, default=768)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--words", type=int, default=32000)
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()
if args.shape:
    config = shape_of(args.shape)
else:
    heads, wide = args.hidden // 64, args.hidden * 8 // 3
    config = Shape(hidden=args.hidden, intermediate=wide, layers=args.layers, heads=heads, kv_heads=heads, words=args.words)
model = random_model(config)
print(f"{model.metrics['parameters'] / 1e6:.0f} M parameters, {args.rows} x {args.length} tokens a step, {placement()}")
base = {"learning_rate": 1e-4, "mixture": {"random": 1}}
arms = {
    "full": {},
    "full, 8-bit Adam": {"optim": "adamw_8bit"},
    "LoRA": {"method": "lora"},
    "8-bit LoRA": {"method": "lora_8bit"},
}
arms |= {"NF4 LoRA": {"method": "lora_4bit"}} if placement().device == "cuda" else {}
arms |= {f"{name}, checkpointing": {**changes, "gradient_checkpointing": True} for name, changes in arms.items()}
trains = {name: TrainConfig(**base, **changes) for name, changes in arms.items()}
setting = CostConfig(shape=config, arms=trains, rows=args.rows, length=args.length, steps=args.steps)
print(table(setting, cost(setting, model=model)).round(2).to_string(index=False))
