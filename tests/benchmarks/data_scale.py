"""Time and memory of what handles many rows: decontamination and building, annotation through a server, ledgers, pairs.

    python tests/benchmarks/data_scale.py [--part decontaminate annotate ledger pairs] [--rows 100000 300000 1000000]

Rows are made: words of ICD-10-CM drawn by Zipf's law, 60 to 120 a row. For `decontaminate` every hundredth row is a copy of a
made test question with a twentieth of its words changed, another hundredth such a copy of an earlier row; the shares of them
that are found stand beside the times. `annotate` has a server of its own, which answers at once, on the same cores. Every
line is measured in a process of its own; GiB are the largest resident memory of it and its children.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

TESTS = 7_045  # as many as the four public test sets have
ROWS = {
    "decontaminate": [100_000, 300_000, 1_000_000],
    "annotate": [10_000, 30_000, 100_000],
    "ledger": [100_000, 300_000, 1_000_000],
    "pairs": [10_000, 30_000, 100_000],
}


# ---------------------------------------------------------------------------------------------------------------- inputs


def texts(count: int, seed: int, shortest: int = 60, longest: int = 120) -> Iterator[str]:
    """Made questions, a thousand at a time: about 40,000 words, and every fiftieth a number."""
    import simple_icd_10_cm as icd

    common = "the of and in to a is with patient for on was which are that he his at has what her she by from as or who"
    told = (word.strip("(),.;:[]").lower() for code in icd.get_all_codes() for word in icd.get_description(code).split())
    stems = [word for word in dict.fromkeys(told) if word]
    known = list(dict.fromkeys([*common.split(), *sorted(stems[:2000], key=len), *stems]))
    known += [stem + ending for ending in ("s", "ic", "al") for stem in stems]
    share = np.cumsum(1 / (np.arange(len(known)) + 2.7))
    rng, vocabulary = np.random.default_rng(seed), np.array(known, dtype=object)
    for start in range(0, count, 1000):
        lengths = rng.integers(shortest, longest + 1, min(1000, count - start))
        drawn = vocabulary[np.searchsorted(share / share[-1], rng.random(lengths.sum()))]
        numbers = rng.random(len(drawn)) < 0.02
        drawn[numbers] = rng.integers(1, 100_000, numbers.sum()).astype(str)
        for row in np.split(drawn, np.cumsum(lengths)[:-1]):
            yield " ".join(row).capitalize() + "?"


def planted(count: int) -> Iterator[tuple[str, str, str]]:
    """(id, question, answer); the id says whether the row is a changed test question or a changed earlier row."""
    from ultramed.data.dedupe import perturb

    rng, tests, earlier = random.Random(0), list(texts(TESTS, 1, 30, 100)), []
    for n, (asked, answer) in enumerate(zip(texts(count, 0), texts(count, 2, 30, 90), strict=True)):
        if n % 100 == 0:
            yield f"test-{n}", perturb(rng.choice(tests), 0.05, rng), answer
        elif n % 100 == 50 and earlier:
            yield f"near-{n}", perturb(rng.choice(earlier), 0.02, rng), answer
        else:
            earlier += [asked] if n % 1000 == 1 else []
            yield f"own-{n}", asked, answer


def candidate(rng: random.Random, text: str) -> dict:
    score = float(rng.randrange(20)) / 2
    told = {"letter": rng.choice("ABCD"), "rule": "bare", "strict": True, "tokens": 24, "finished": True, "rank": 1}
    return {"model": f"m{rng.randrange(4)}", "text": text, "score": score, **told}


def write_input(part: str, count: int, folder: Path) -> None:
    """What a line measures, made in a process that is not measured."""
    rng = random.Random(0)
    if part == "decontaminate":
        with open(folder / "train.jsonl", "w") as fh:
            fh.writelines(json.dumps({"id": i, "instruction": q, "output": a}) + "\n" for i, q, a in planted(count))
        with open(folder / "test.jsonl", "w") as fh:
            fh.writelines(
                json.dumps({"id": f"t{n}", "instruction": q, "output": "-"}) + "\n"
                for n, q in enumerate(texts(TESTS, 1, 30, 100))
            )
    elif part == "ledger":
        with open(folder / "ledger.jsonl", "w") as fh:
            for n, text in enumerate(texts(count, 0, 10, 20)):
                row = {
                    "key": f"{rng.getrandbits(64):016x}",
                    "id": f"q{n}",
                    "model": "m",
                    "status": "ok",
                    "value": {"score": 7.0, "reason": text},
                }
                fh.write(
                    json.dumps(
                        {
                            **row,
                            "text": json.dumps(row["value"]),
                            "finish_reason": "stop",
                            "requests": 1,
                            "tokens": 200,
                            "completion_tokens": 30,
                        }
                    )
                    + "\n"
                )
    else:
        name, own = ("feedback", "candidates") if part == "pairs" else ("samples", "replies")
        replies = texts(count * (8 if part == "pairs" else 2), 3, 20, 60)
        with open(folder / f"{name}.jsonl", "w") as fh:
            for n, text in enumerate(texts(count, 0, 40, 80)):
                row = {"id": f"q{n}", "index": n, "subset": "s", "concept": f"c{n}", "gold": "A", "reference": "a (A)"}
                given = [candidate(rng, next(replies)) for _ in range(8 if part == "pairs" else 2)]
                fh.write(json.dumps({**row, "prompt": [{"role": "user", "content": text}], own: given}) + "\n")


# ----------------------------------------------------------------------------------------------------------------- parts


def decontaminate(count: int, folder: Path, clock: Callable) -> dict:
    from ultramed.core.schema import BuildConfig, CheckConfig
    from ultramed.data.collection import build, contamination
    from ultramed.data.sources import user_file

    train = clock("read", lambda: user_file(folder / "train.jsonl", side="train"))
    test = user_file(folder / "test.jsonl")
    given = {"sources": {"train": "train"}, "train": train}
    checked = clock("check", lambda: contamination(CheckConfig(), tests=["test"], test=test, **given))
    made = clock("build", lambda: build(BuildConfig(), checked=checked, **given))
    hit = {i.partition("-")[0]: set() for i in ("test", "near", "own")}
    for name in pd.read_parquet(checked / "hits.parquet").id.unique():
        hit[name.partition("-")[0]].add(name)
    counts = made.metrics["sources"]["train"]
    near = counts.get("near-duplicate", 0) + counts.get("duplicate", 0)
    false = len(hit["own"]) + len(hit["near"])
    return {"contaminated_found": len(hit["test"]) / (count // 100), "near_found": near / (count // 100), "false_hits": false}


class Answering(asyncio.Protocol):
    """The least of a server: reads a request's head and body, and answers every one with the same scores."""

    text = json.dumps(
        {
            "choices": [{"message": {"role": "assistant", "content": '{"scores": [7, 4]}'}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320},
        }
    ).encode()
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text)

    def connection_made(self, transport):
        self.transport, self.held = transport, b""

    def data_received(self, data):
        self.held += data
        while (end := self.held.find(b"\r\n\r\n")) >= 0:
            head = self.held[:end].lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self.held) < end + 4 + size:
                return
            self.held = self.held[end + 4 + size :]
            self.transport.write(self.reply)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def annotate(count: int, folder: Path, clock: Callable) -> dict:
    from ultramed.annotate.judge import LLMConfig, llm_feedback
    from ultramed.core.client import ServerConfig
    from ultramed.core.store import Artifact

    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        where = ServerConfig(url=f"http://127.0.0.1:{int(server.stdout.readline())}/v1", model="m")
        made = clock("ask", lambda: llm_feedback(LLMConfig(server=where), pool=Artifact("samples", "0", folder)))
    finally:
        server.kill()
    return {"unread": made.metrics["unread"]}


def ledger(count: int, folder: Path, clock: Callable) -> dict:
    from ultramed.core.ledger import Ledger

    opened = clock("open", lambda: Ledger(folder / "ledger.jsonl"))
    clock("read", lambda: sum(row["tokens"] for row in opened.rows.values()))
    opened.close()
    return {"file_GiB": (folder / "ledger.jsonl").stat().st_size / 2**30}


def pairs(count: int, folder: Path, clock: Callable) -> dict:
    from ultramed.annotate.pairs import PairConfig, pairs
    from ultramed.core.store import Artifact

    given = Artifact("feedback", "0", folder)
    one = clock("best_random", lambda: pairs(PairConfig(take={"x": 0}), x=given))
    every = clock("all", lambda: pairs(PairConfig(take={"x": 0}, rule="all"), x=given))
    return {"pairs": one.metrics["pairs"], "pairs_all": every.metrics["pairs"]}


PARTS = {"decontaminate": decontaminate, "annotate": annotate, "ledger": ledger, "pairs": pairs}


def one_line(part: str, count: int, folder: Path) -> None:
    """Runs a part and prints its seconds by step, and what it found."""
    os.environ["ULTRAMED_STORE"] = str(folder / "store")
    logging.getLogger("ultramed").setLevel(logging.ERROR)
    seconds = {}

    def clock(step: str, work: Callable):
        start = time.perf_counter()
        made = work()
        seconds[step] = round(time.perf_counter() - start, 2)
        return made

    found = PARTS[part](count, folder, clock)
    print(json.dumps({"seconds": seconds, **{k: round(v, 4) for k, v in found.items()}}))


def watched(command: list[str]) -> tuple[dict, float]:
    """(what the command printed last, largest resident GiB of it and its children)."""
    child, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    own = psutil.Process(child.pid)
    while child.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(p.memory_info().rss for p in (own, *own.children(recursive=True))))
        time.sleep(0.1)
    if child.returncode:
        sys.exit(child.returncode)
    return json.loads(child.stdout.read().splitlines()[-1]), peak / 2**30


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", type=int, nargs="+", help="instead of each part's own")
    parser.add_argument("--folder", type=Path, default=None, help="for what is made; a temporary one, unless it is named")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
    elif args.make:
        write_input(args.part[0], args.rows[0], args.folder)
    elif args.one:
        one_line(args.part[0], args.rows[0], args.folder)
    else:
        from ultramed.lm.device import matrix_gflops

        for part in args.part:
            for count in args.rows or ROWS[part]:
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    again = [sys.executable, __file__, "--part", part, "--rows", str(count), "--folder", folder]
                    subprocess.run([*again, "--make"], check=True)
                    speed = round(matrix_gflops())
                    found, peak = watched([*again, "--one"])
                    total = sum(found["seconds"].values())
                    line = {
                        "part": part,
                        "rows": count,
                        "total_s": round(total, 1),
                        "rows_per_s": round(count / max(total, 0.01)),
                    }
                    print(json.dumps({**line, "GiB": round(peak, 2), "GFLOP/s": speed, **found}), flush=True)
