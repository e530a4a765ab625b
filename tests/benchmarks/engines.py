"""Engines side by side on a CPU: seconds for the same greedy answers and samples, and how many answers flip.

    python tests/benchmarks/engines.py [--questions 150 --samples 10]

The fine-tuned laptop policy (the arm `full` of notebook 11; trained first if it is not in the store). Loading, and for
OpenVINO writing and compiling the model, is counted.
"""

import argparse
import os
import tempfile
import time

from ultramed.core import config
from ultramed.core.log import quiet_libraries
from ultramed.data.sources import dataset
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.agreement import flips
from ultramed.evaluate.arms import percent
from ultramed.evaluate.sample import samples
from ultramed.experiments.medalpaca import MedAlpaca

WAYS = {
    "transformers, bf16": ("transformers", "bfloat16"),
    "transformers, fp32": ("transformers", "float32"),
    "OpenVINO, bf16": ("openvino", "bfloat16"),
    "OpenVINO, fp32": ("openvino", "float32"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--samples", type=int, default=10)
    given = parser.parse_args()
    quiet_libraries()
    profile = config.load_profile("laptop")
    policy, exam = MedAlpaca.of(profile).train_arm("full", 0), dataset(profile, "exam")
    about = {"model": policy, "questions": exam}
    each = given.questions // 3
    sample = profile.ultramedical.sample.model_copy(update={"n": given.samples})
    frames, times, speeds = {}, {}, {}
    for name, (engine, dtype) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ULTRAMED_STORE"] = folder  # nothing is remembered from another run
            select = {f"step{n}": [0, each] for n in (1, 2, 3)}
            clock = time.perf_counter()
            frames[name] = read_answers(
                answers(profile.eval.model_copy(update={"engine": engine}), **about, select=select, dtype=dtype)
            )
            times[name] = time.perf_counter() - clock
            clock = time.perf_counter()
            made = samples(
                sample.model_copy(update={"engine": engine}), **about, select={"step1": [0, each]}, dtype=dtype
            ).metrics
            speeds[name] = (time.perf_counter() - clock, 100 * made["mean_sample_accuracy"])
    table = flips(frames)
    print(f"{'':20} answers s  samples s  sample accuracy  accuracy           changed")
    for row, right in zip(table.itertuples(), percent(table), strict=True):
        seconds, accuracy = speeds[row.variant]
        print(
            f"{row.variant:20} {times[row.variant]:9.1f}  {seconds:9.1f}  {accuracy:15.1f}  {right:18} {100 * row.changed:.1f}% "
            f"(lost {row.lost}, won {row.won})"
        )


if __name__ == "__main__":
    main()
