"""Seconds for N sampled answers to each question: ours beside transformers' `generate`, same model, dtype, parameters.

    python tests/benchmarks/sampling_vs_generate.py [--questions 100] [--n 10] [--model KEY] [--sizes 16 32 64]

Peers: `generate(num_return_sequences=N)` prompt by prompt, and plain `generate` at fixed batch sizes (left padding,
sorted by length), of which the best counts. Replies are read by the same parser; accuracies should agree within noise.
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from ultramed.core.config import load_profile
from ultramed.core.log import quiet_libraries
from ultramed.data.messages import question_prompt
from ultramed.data.rows import read_questions
from ultramed.evaluate.accuracy import select_rows
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.evaluate.stats import clustered
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.lm import models
from ultramed.lm.parsing import parse
from ultramed.lm.templates import TEMPLATES

parser = argparse.ArgumentParser()
parser.add_argument("--questions", type=int, default=100)
parser.add_argument("--n", type=int, default=10)
parser.add_argument("--model", help="artifact key; the profile's UltraMix SFT policy if none")
parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64], help="batch sizes of plain generate")
args = parser.parse_args()
quiet_libraries()
profile = load_profile("laptop")
experiment = UltraMedical.of(profile)
model = models.resolve(args.model) if args.model else experiment.train_sft("ultramed")
rows = []
for where in experiment.test_prompts("medical"):
    rows += select_rows(read_questions(where["questions"] / f"{where['side']}.parquet"), where["select"])
rows = rows[:: max(1, len(rows) // args.questions)][: args.questions]
tokenizer, net, own = models.load_tokenizer(model), models.load(model), profile.ultramedical.sample
template = TEMPLATES[profile.models[0].template]
texts = [template.render(question_prompt(r, own.answer_form), tokenizer) for r in rows]
ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
repeated = [i for i in range(len(rows)) for _ in range(args.n)]
sampling = {
    "do_sample": True,
    "temperature": own.temperature,
    "top_p": own.top_p,
    "top_k": 0,
    "max_new_tokens": own.max_new_tokens,
}


def accuracy(replies: list[str]) -> str:
    right = [
        parse(t, rows[i]["options"], own.answer_form).letter == rows[i]["gold"] for i, t in zip(repeated, replies, strict=True)
    ]
    return str(clustered(right, repeated))


def ours() -> list[str]:
    rngs = [item_rng(0, i, k) for k, i in enumerate(repeated)]
    asked, sampling = [ids[i] for i in repeated], Sampling(own.max_new_tokens, own.temperature, 0, own.top_p)
    made = generate(net, tokenizer, asked, sampling, rngs=rngs, budget=own.batch_tokens)
    return [r.text for r in made]


@torch.inference_mode()
def plain(batch: list[int], copies: int) -> list[list[str]]:
    width = max(len(ids[i]) for i in batch)
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in batch])
    mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch])
    made = net.generate(
        padded, attention_mask=mask, num_return_sequences=copies, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return [texts[k * copies : (k + 1) * copies] for k in range(len(batch))]


def prompt_by_prompt() -> list[str]:
    return [text for i in range(len(rows)) for text in plain([i], args.n)[0]]


def fixed(size: int) -> list[str]:
    order = sorted(range(len(repeated)), key=lambda k: -len(ids[repeated[k]]))
    replies = [""] * len(repeated)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        for k, (text,) in zip(part, plain([repeated[k] for k in part], 1), strict=True):
            replies[k] = text
    return replies


def measure(run) -> dict:
    torch.manual_seed(0)
    clock = time.perf_counter()
    replies = run()
    return {"seconds": round(time.perf_counter() - clock, 1), "accuracy": accuracy(replies)}


generate(net, tokenizer, ids[:2], Sampling(4))  # warm
result = {"ultramed": measure(ours), "generate, prompt by prompt": measure(prompt_by_prompt)}
result |= {f"generate, batches of {size}": measure(lambda size=size: fixed(size)) for size in args.sizes}
best = min(v["seconds"] for k, v in result.items() if "batches" in k)
result["ratio, prompt by prompt"] = round(result["generate, prompt by prompt"]["seconds"] / result["ultramed"]["seconds"], 2)
result["ratio, best batch size"] = round(best / result["ultramed"]["seconds"], 2)
print(json.dumps({"questions": len(rows), "n": args.n, "threads": torch.get_num_threads(), **result}, indent=1))
