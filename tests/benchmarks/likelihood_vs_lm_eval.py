"""Seconds for the likelihood of the bench's questions: ours beside lm-evaluation-harness, same model, dtype and cores.

    ULTRAMED_DATA=... python tests/benchmarks/likelihood_vs_lm_eval.py [--task medqa] [--n 1000] [--dtype bfloat16]
        [--batch-size 8] [--target text]

`--task all` asks all nine tasks of UltraMedical's Table 2 in the harness' own prompts, `--n 0` all of their questions (7,045).
Both start from a loaded model. The order is ours, theirs; choices are compared item by item.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from lm_eval import evaluator
from test_lm_eval import harness, tasks_of

from ultramed.core.log import quiet_libraries
from ultramed.core.schema import ModelConfig
from ultramed.evaluate.likelihood import encode_pair, lm_eval_prompt, score
from ultramed.experiments.bench import TASKS, medical_questions
from ultramed.lm import models
from ultramed.lm.device import matrix_gflops, placement

parser = argparse.ArgumentParser()
parser.add_argument("--task", default="medqa", choices=["all", *TASKS])
parser.add_argument("--n", type=int, default=1000, help="questions of a task, 0 for all")
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument(
    "--target", default="letter", choices=["letter", "text"], help="what is scored: ' B' or MedQA's option texts"
)
parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval; ours goes by tokens")
args = parser.parse_args()
if args.target == "text" and args.task != "medqa":
    parser.error("--target text goes with --task medqa: the other tasks of the harness have no such form")
quiet_libraries()
dtype = getattr(torch, args.dtype)
placement()
model = models.base_model(ModelConfig(name="bundled:smollm2-135m", label="x"))
tasks = tasks_of(medical_questions(args.n)[0])
if args.task != "all":
    tasks = {f"local_{args.task}": tasks[f"local_{args.task}"]}


def our_logps(net, tasks) -> dict[str, list[list[float]]]:
    """Task -> log-probabilities (nats) of each question's endings, as one batch of `score`."""
    items = []
    for row in (row for rows in tasks.values() for row in rows):
        context, endings = lm_eval_prompt(row)
        endings = endings if args.target == "letter" else [f" {v}" for v in row["options"].values()]
        pairs = [encode_pair(tokenizer, context, ending) for ending in endings]
        items.append((pairs[0][0], [ending for _, ending in pairs]))
    scores = iter(score(net, tokenizer, items))
    return {name: [next(scores) for _ in rows] for name, rows in tasks.items()}


def their_logps(tasks, dtype) -> dict[str, list[list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        samples = harness(model, tasks, Path(folder), args.batch_size, dtype, args.target)
    return {name: [[response[0] for response in sample["filtered_resps"]] for sample in of] for name, of in samples.items()}


def differing(ours, theirs) -> dict[str, list[dict]]:
    """Task -> rows for which the two choose another option."""
    return {
        name: [row for row, a, b in zip(rows, ours[name], theirs[name], strict=True) if a.index(max(a)) != b.index(max(b))]
        for name, rows in tasks.items()
    }


net, tokenizer = models.load(model, dtype=dtype), models.load_tokenizer(model)
clock = time.perf_counter()
ours = our_logps(net, tasks)
our_seconds = time.perf_counter() - clock
del net

spent, evaluate = [], evaluator.evaluate


def timed(*a, **k):
    start = time.perf_counter()
    result = evaluate(*a, **k)
    spent.append(time.perf_counter() - start)
    return result


evaluator.evaluate = timed  # without loading the model
other = differing(ours, their_logps(tasks, dtype))
print(
    json.dumps(
        {
            "questions": sum(map(len, tasks.values())),
            "target": args.target,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "gflops": round(matrix_gflops()),
            "ultramed_s": round(our_seconds, 1),
            "lm_eval_s": round(spent[0], 1),
            "ratio": round(spent[0] / our_seconds, 2),
            "same_choice": {name.removeprefix("local_"): len(tasks[name]) - len(rows) for name, rows in other.items()},
        }
    ),
    flush=True,
)
# Batches of other shapes round half-precision numbers otherwise, which can turn a near tie: those questions are asked again.
tasks = {name: rows for name, rows in other.items() if rows}
if tasks and dtype != torch.float32:
    ours = our_logps(models.load(model, dtype=torch.float32), tasks)
    left = differing(ours, their_logps(tasks, torch.float32))
    print(json.dumps({"asked_again_in_float32": sum(map(len, tasks.values())), "still_other": sum(map(len, left.values()))}))
