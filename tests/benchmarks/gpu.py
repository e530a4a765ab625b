"""What one GPU does at the papers' shapes, with random weights: training cost, sampling and reward scoring; one JSON file.

    python tests/benchmarks/gpu.py [--out figures/gpu/speed.json] [--parts cost sampling scoring]
    python tests/benchmarks/gpu.py --shapes small tiny:llama --out speed.json      # a try on a CPU

Shapes: MedAlpaca's first (rows of 256 tokens, four and one at a time), then UltraMedical's (one row of 2,048). Sampling: ten
replies a prompt, beside transformers' `generate` with `num_return_sequences`; scoring: eight replies a prompt, beside padded
rows. Random weights hardly ever end a reply, so all are of full length. Every part is written as soon as it is measured.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from ultramed.core.config import load_profile
from ultramed.core.log import quiet_libraries
from ultramed.core.store import environment, write_json
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.lm import models
from ultramed.lm.batches import right_pad
from ultramed.lm.device import free_memory, placement
from ultramed.train.cost import CostConfig, best_gflops, cost, cost_config, random_model, table
from ultramed.train.estimate import shape_of
from ultramed.train.reward import rewards
from ultramed.train.trl_adapter import score_last_tokens

parser = argparse.ArgumentParser()
parser.add_argument("--shapes", nargs=2, default=["huggyllama/llama-7b", "meta-llama/Meta-Llama-3-8B-Instruct"])
parser.add_argument("--parts", nargs="+", default=["cost", "sampling", "scoring"], choices=["cost", "sampling", "scoring"])
parser.add_argument("--prompts", type=int, default=16)
parser.add_argument("--out", type=Path, default=Path("figures/gpu/speed.json"))
args = parser.parse_args()
quiet_libraries()
medalpaca, ultramedical = map(shape_of, args.shapes)
SINGLE = ("LoRA", "8-bit LoRA", "full, 8-bit Adam, checkpointing")  # arms of which a row at a time is measured, too
PEER_PROMPTS = 4  # of `generate`, prompt by prompt: its speed does not depend on how many there are
result = {
    "device": str(placement()),
    "matrix_gflops": round(best_gflops()),
    "date": time.strftime("%Y-%m-%d"),
    "shapes": args.shapes,
    **environment(),
}


def timed(run) -> float:
    """Seconds, the second of two runs: the first one compiles and fills caches."""
    for _ in range(2):
        clock = time.perf_counter()
        run()  # which reads what it made, so that a device has finished
    return time.perf_counter() - clock


def keep(part: str, told) -> None:
    result[part] = told
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(part, json.dumps(told, indent=1), flush=True)


def training(config: CostConfig) -> list[dict]:
    """Rows of notebook 12's table."""
    measured = table(config, cost(config, model=random_model(config.shape)))
    return json.loads(measured.round(3).to_json(orient="records"))


def tokens(count: int, length: int, words: int, seed: int) -> list[list[int]]:
    return torch.randint(words // 2, words, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def sampling(shape, n: int = 10, length: int = 200, new: int = 128) -> dict:
    model = random_model(shape)
    net, tokenizer = models.load(model), models.load_tokenizer(model)
    net.generation_config.eos_token_id = None  # replies of full length on both sides
    prompts = tokens(args.prompts, length, shape.words, 0)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    asked = Sampling(new, temperature=0.7, top_k=0, top_p=0.95)

    def ours():
        rngs = [item_rng(0, i) for i in range(len(repeated))]
        generate(net, tokenizer, repeated, asked, budget=n * args.prompts * (length + new), rngs=rngs)

    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.95, "pad_token_id": 2}

    def theirs():
        for prompt in prompts[:PEER_PROMPTS]:
            ids = torch.tensor([prompt], device=net.device)
            lengths = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new, "max_new_tokens": new}
            net.generate(ids, num_return_sequences=n, **lengths, **drawn).tolist()

    peer = n * PEER_PROMPTS * new / timed(theirs)
    own = len(repeated) * new / timed(ours)
    told = {"prompts": args.prompts, "n": n, "prompt_tokens": length, "new_tokens": new}
    return {**told, "tokens_per_second": round(own), "generate_tokens_per_second": round(peer), "ratio": round(own / peer, 2)}


def scoring(shape, n: int = 8, length: int = 200, reply: int = 128) -> dict:
    from transformers import AutoModelForSequenceClassification

    model = random_model(shape)
    given = {**models.weights_of(model), **models.straight_to_gpu(), "dtype": placement().dtype, "num_labels": 1}
    net, tokenizer = AutoModelForSequenceClassification.from_pretrained(**given).eval(), models.load_tokenizer(model)
    net.config.pad_token_id = 2
    count = args.prompts
    prompts, replies = tokens(count, length, shape.words, 1), tokens(count * n, reply, shape.words, 2)
    batches = [[(prompts[i], r) for r in replies[n * i : n * (i + 1)]] for i in range(count)]

    @torch.inference_mode()
    def padded():
        for batch in batches:
            ids, lengths = right_pad([p + r for p, r in batch], 2, net.device)
            mask = torch.arange(ids.shape[1], device=net.device) < lengths[:, None]
            net(input_ids=ids, attention_mask=mask.long()).logits.float().tolist()

    peer = count * n / timed(padded)
    score_last_tokens(net, tokenizer.pad_token_id)
    own = count * n / timed(lambda: [rewards(net, tokenizer, batch) for batch in batches])
    told = {"prompts": count, "replies": n, "prompt_tokens": length, "reply_tokens": reply}
    return {**told, "replies_per_second": round(own, 1), "padded_per_second": round(peer, 1), "ratio": round(own / peer, 2)}


if "sampling" in args.parts:
    keep("sampling", sampling(medalpaca))
    free_memory()
if "scoring" in args.parts:
    keep("scoring", scoring(medalpaca))
    free_memory()
if "cost" in args.parts:
    profile = load_profile("gpu")
    given = cost_config(profile).model_copy(update={"shape": medalpaca})  # notebook 12's: LLaMA-7B, four rows of 256 tokens
    keep("cost, rows of 256 tokens, four at a time", training(given))
    single = given.model_copy(update={"rows": 1, "arms": {name: given.arms[name] for name in SINGLE}})
    keep("cost, rows of 256 tokens, one at a time", training(single))
    longer = {name: given.arms[name] for name in (*SINGLE, "LoRA, checkpointing", "8-bit LoRA, checkpointing")}
    larger = {"shape": ultramedical, "length": 2048, "arms": longer}
    keep("cost, one row of 2,048 tokens", training(single.model_copy(update=larger)))
