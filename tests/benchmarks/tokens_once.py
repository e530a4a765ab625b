"""Tokenising as a stage, and what a rank that reads the tokens holds in memory.

    python tests/benchmarks/tokens_once.py [--rows 400000 --words 350]

Rows of about 500 tokens are made from the answers of MedQuAD (ULTRAMED_DATA). Printed: seconds of the stage, largest resident
memory of it with its processes, and, of a process that makes batches from a thousand places of the result as a rank does, its
resident memory before and after.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def make(given, folder: Path):
    """The artifact of a mixture with the rows asked for, written in parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ultramed.core.store import stage

    @stage(version=1)
    def mixture(out, config, *, rows, words, seed=0):
        table = pq.read_table(sorted((Path(os.environ["ULTRAMED_DATA"]) / "medquad").glob("*.parquet"))[0])
        text = " ".join(answer for answer in table["answer"].to_pylist() if answer).split()
        stream, writer = random.Random(seed), None

        def piece(count: int) -> str:
            start = stream.randrange(len(text) - count)
            return " ".join(text[start : start + count])

        for first in range(0, rows, 10_000):
            part = pa.Table.from_pylist(
                [
                    {
                        "id": str(i),
                        "source": "made",
                        "prompt": [{"role": "user", "content": piece(words // 3)}],
                        "completion": [{"role": "assistant", "content": piece(words - words // 3)}],
                    }
                    for i in range(first, min(rows, first + 10_000))
                ]
            )
            writer = writer or pq.ParquetWriter(out / "rows.parquet", part.schema, compression="zstd")
            writer.write_table(part)
        writer.close()
        return {}

    return mixture(None, rows=given.rows, words=given.words)


READER = """
import json, sys, psutil
from pathlib import Path
from ultramed.core.store import Artifact
from ultramed.train.sft import Collator
from ultramed.train.token_rows import read_tokens
before = psutil.Process().memory_info().rss
rows = read_tokens(Artifact("token_rows", "", Path(sys.argv[1])))
lengths, collate = list(rows["length"]), Collator(0)
for step in range(1000):
    collate([rows[(step * 7919 + 8 * i * 12289) % len(rows)] for i in range(8)])
print(json.dumps([before, psutil.Process().memory_info().rss]))
"""


def peak_of_family(stop: list, found: list) -> None:
    own = psutil.Process()
    while not stop:
        total = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        found[0] = max(found[0], total)
        time.sleep(0.5)


def main() -> None:
    import threading

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--words", type=int, default=350)
    given = parser.parse_args()
    from ultramed.core.schema import ModelConfig, TokenConfig
    from ultramed.lm import models
    from ultramed.lm.device import matrix_gflops
    from ultramed.train.token_rows import token_rows

    with tempfile.TemporaryDirectory() as folder:
        os.environ["ULTRAMED_STORE"] = folder
        base = models.base_model(ModelConfig(name="bundled:smollm2-135m", label="x"))
        data = make(given, Path(folder))
        stop, peak = [], [0]
        watch = threading.Thread(target=peak_of_family, args=(stop, peak))
        watch.start()
        clock = time.perf_counter()
        made = token_rows(TokenConfig(kind="instructions", max_length=2048), model=base, data=data, template="chat")
        seconds = time.perf_counter() - clock
        stop.append(True)
        watch.join()
        told = subprocess.run([sys.executable, "-c", READER, str(made.path)], capture_output=True, text=True, check=True)
        before, after = json.loads(told.stdout)
        m = made.metrics
        print(f"{m['rows']} rows, {m['tokens'] / m['rows']:.0f} tokens each; {matrix_gflops():.0f} GFLOP/s")
        print(f"the stage       {seconds:.0f} s, {m['tokens'] / seconds / 1e6:.2f} M tokens/s, peak {peak[0] / 2**30:.2f} GiB")
        print(f"a rank reading  {before / 2**30:.2f} GiB before, {after / 2**30:.2f} GiB after 1,000 batches")


if __name__ == "__main__":
    main()
