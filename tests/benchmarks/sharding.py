"""Full fine-tuning by one process and by several (FSDP2): loss curves, memory of a process, time, in one run.

    python tests/benchmarks/sharding.py --processes 2 --steps 12

fp32, so that what differs is the order of sums. On one machine's CPUs the processes share the cores: no speed is gained.
"""

import argparse
import json
import os
import tempfile

from ultramed.core import config
from ultramed.core.log import quiet_libraries
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.sources import dataset
from ultramed.lm import models
from ultramed.train.sft import sft


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", default="laptop")
    given = parser.parse_args()
    quiet_libraries()
    profile = config.load_profile(given.profile, ["train.dtype=float32", "train.micro_batch_tokens=1024"])
    base = models.base_model(profile.models[0])
    rows = given.steps * profile.train.global_batch_size
    exam = dataset(profile, "exam")
    data = mixture(MixtureConfig(counts={"exam:step1": rows}, answer_form=profile.train.answer_form), exam=exam)
    curves, table = [], []
    for count in (1, given.processes):
        os.environ[config.PROCESSES] = str(count)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ULTRAMED_STORE"] = folder  # each trains for itself
            art = sft(profile.train, model=base, data=data)
            log = map(json.loads, (art / "log.jsonl").read_text().splitlines())
            curves.append([row["loss"] for row in log if "loss" in row])
            m = art.manifest
            peak = m["metrics"].get("worker_peak_memory_bytes", m["peak_memory_bytes"])
            table.append((count, art.metrics["train_seconds"], peak / 1e9, curves[-1][0], curves[-1][-1]))
    print("processes  training s  GB a process  first loss  last loss")
    for count, seconds, peak, first, last in table:
        print(f"{count:9}  {seconds:10.1f}  {peak:12.2f}  {first:10.5f}  {last:9.5f}")
    apart = [abs(a - b) for a, b in zip(*curves, strict=True)]
    print(f"{len(apart)} steps: loss curves at most {max(apart):.1e} apart, final losses {apart[-1]:.1e}")


if __name__ == "__main__":
    main()
