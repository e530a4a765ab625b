"""Seconds for the likelihood of N MedQA questions: ours beside lm-evaluation-harness, same model, dtype and cores.

    ULTRAMED_DATA=... python tests/benchmarks/likelihood_vs_lm_eval.py [--n 1000] [--dtype bfloat16] [--batch-size 8] [--target text]

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
from test_lm_eval import harness

from ultramed.core.log import quiet_libraries
from ultramed.core.schema import ModelConfig
from ultramed.data.rows import read_questions
from ultramed.data.sources import SourceConfig, source
from ultramed.evaluate.likelihood import encode_pair, lm_eval_prompt, score
from ultramed.lm import models
from ultramed.lm.device import placement

parser = argparse.ArgumentParser()
parser.add_argument("--n", type=int, default=1000)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--target", default="letter", choices=["letter", "text"], help="what is scored: ' B' or the option's text")
parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval; ours goes by tokens")
args = parser.parse_args()
quiet_libraries()
dtype = getattr(torch, args.dtype)
placement()
model = models.base_model(ModelConfig(name="bundled:smollm2-135m", label="x"))
rows = read_questions(source(SourceConfig(name="medqa")) / "test.parquet")[: args.n]

net, tokenizer = models.load(model, dtype=dtype), models.load_tokenizer(model)
clock = time.perf_counter()
pairs = []
for row in rows:
    context, endings = lm_eval_prompt(row)
    endings = endings if args.target == "letter" else [f" {v}" for v in row["options"].values()]
    pairs.append([encode_pair(tokenizer, context, e) for e in endings])
scores = score(net, tokenizer, [(p[0][0], [e for _, e in p]) for p in pairs])
ours = time.perf_counter() - clock
del net

with tempfile.TemporaryDirectory() as folder:
    from lm_eval import evaluator

    spent, evaluate = [], evaluator.evaluate

    def timed(*a, **k):
        start = time.perf_counter()
        result = evaluate(*a, **k)
        spent.append(time.perf_counter() - start)
        return result

    evaluator.evaluate = timed  # without loading the model
    result = harness(model, rows, Path(folder), args.batch_size, dtype, args.target)
theirs = spent[0]
samples = sorted(result["samples"]["local_medqa"], key=lambda s: s["doc_id"])
letters = [max(range(4), key=[r[0] for r in s["filtered_resps"]].__getitem__) for s in samples]
same = sum(max(range(4), key=a.__getitem__) == b for a, b in zip(scores, letters, strict=True))
print(
    json.dumps(
        {
            "questions": len(rows),
            "target": args.target,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "ultramed_s": round(ours, 1),
            "lm_eval_s": round(theirs, 1),
            "ratio": round(theirs / ours, 2),
            "same_choice": same,
        }
    )
)
