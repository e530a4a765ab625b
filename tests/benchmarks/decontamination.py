"""Planted paraphrases found, and minutes taken, when many instructions are compared with the medical test questions.

    ULTRAMED_DATA=... python tests/benchmarks/decontamination.py [--rows 10000 30000 100000] [--encoder tfidf] [--embed 10000]

Train rows are real ones (ChatDoctor, MedQuAD, Alpaca, Medical Meadow, MedMCQA, …); beyond their number, perturbed copies
of them. Test rows are MedQA, MedMCQA, PubMedQA and MMLU. Into each size 600 perturbed test questions are planted, 200 of
each strength. Precision counts every row that was not planted as a false one. Real rows that do hold a test question are shown
first and left out: MinHash at 0.5 finds four among 39,682, and read by eye each of them is one (MedQA and MedMCQA repeat a
few of their own test questions in their train splits).
"""

import argparse
import json
import os
import random
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ultramed.core.schema import CheckConfig
from ultramed.data import dedupe
from ultramed.data.collection import find_hits, text_of
from ultramed.data.mixture import source_rows
from ultramed.data.rows import read_questions
from ultramed.data.sources import SourceConfig, source

TRAIN = ["chatdoctor", "medquad", "alpaca", "wikidoc_patient_information", "medmcqa_open", "gsm8k", "medqa", "medmcqa"]
TEST = ["medqa", "medmcqa", "pubmedqa", "mmlu_medical"]

COSINES = (0.6, 0.75, 0.9)

parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
parser.add_argument("--encoder", default="tfidf")
parser.add_argument("--embed", type=int, default=10_000, help="largest size that embeddings are run at")
args = parser.parse_args()

rng = random.Random(0)
real = [text_of(row) for name in TRAIN for row in source_rows(name, "train", {name: source(SourceConfig(name=name))})]
test = [text_of(row) for name in TEST for row in read_questions(source(SourceConfig(name=name)) / "test.parquet")]
leaks = {h.train: h for h in find_hits(real, test, CheckConfig(how=["minhash"], jaccard=0.5))}
for hit in leaks.values():
    print(f"real leak, {hit.score:.2f}: {real[hit.train][:150]!r} is {test[hit.test][:150]!r}")
real = [text for i, text in enumerate(real) if i not in leaks]
rng.shuffle(real)
for size in args.rows:
    rows = real[:size] + [dedupe.perturb(rng.choice(real), 0.5, rng) for _ in range(size - len(real))]
    places, targets = rng.sample(range(size), 600), rng.sample(range(len(test)), 600)
    planted: dict[str, set[tuple[int, int]]] = {name: set() for name in dedupe.STRENGTHS}
    for k, (i, j) in enumerate(zip(places, targets, strict=True)):
        name = list(dedupe.STRENGTHS)[k % 3]
        rows[i] = dedupe.perturb(test[j], dedupe.STRENGTHS[name], rng)
        planted[name].add((i, j))
    every = set().union(*planted.values())
    ways = [CheckConfig(how=["exact"]), CheckConfig(how=["ngram"], ngram=8, share=0.2)]
    ways += [CheckConfig(how=["minhash"], jaccard=t) for t in (0.3, 0.5, 0.7)]
    if size <= args.embed:  # both rules in one go; higher thresholds are read off the scores
        ways += [CheckConfig(how=["cosine", "ultramedical"], cosine=COSINES[0], encoder=args.encoder)]
    for config in ways:
        start = time.perf_counter()
        hits = find_hits(rows, test, config)
        seconds = time.perf_counter() - start
        about = {"ngram": config.share, "minhash": config.jaccard}.get(config.how[0])
        shown = [(config.how[0], about, hits)]
        if config.how[0] == "cosine":
            near = [h for h in hits if h.how == "cosine"]
            shown = [(f"{args.encoder}, cosine", t, [h for h in near if h.score >= t]) for t in COSINES]
            shown += [(f"{args.encoder}, ultramedical", None, [h for h in hits if h.how == "ultramedical"])]
        for how, threshold, part in shown:
            found = {(h.train, h.test) for h in part}
            recall = {name: round(len(found & pairs) / len(pairs), 3) for name, pairs in planted.items()}
            precision = dedupe.recall_precision(found, every)["precision"]
            print(
                json.dumps(
                    {
                        "rows": size,
                        "test": len(test),
                        "how": how,
                        "threshold": threshold,
                        "seconds": round(seconds, 1),
                        "recall": recall,
                        "precision": precision and round(precision, 4),
                    }
                ),
                flush=True,
            )
