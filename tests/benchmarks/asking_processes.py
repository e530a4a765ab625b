"""What a crew of processes costs and gives: seconds for the same answers by one process and by several, starting included.

    python tests/benchmarks/asking_processes.py [--questions 600 --processes 1 2]

The bundled model, greedy and by likelihood, in fp32. On a CPU several processes have no more arithmetic than one: what is
seen there is the price of starting them. On a node with GPUs it is the gain.
"""

import argparse
import os
import tempfile
import time

from ultramed.core.config import PROCESSES, load_profile
from ultramed.core.log import quiet_libraries
from ultramed.core.schema import EvalConfig, ModelConfig
from ultramed.data.sources import dataset
from ultramed.evaluate.accuracy import answers
from ultramed.lm import models


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ULTRAMED_STORE"] = folder
        model = models.base_model(ModelConfig(name="bundled:smollm2-135m", label="SmolLM2-135M"))
        about = {"model": model, "questions": dataset(load_profile("laptop"), "exam"), "dtype": "float32"}
        about["select"] = {f"step{n}": [0, given.questions // 3] for n in (1, 2, 3)}
        for protocol in ("likelihood", "greedy"):
            for count in given.processes:
                os.environ[PROCESSES] = str(count)
                clock = time.perf_counter()
                made = answers(EvalConfig(protocol=protocol, max_new_tokens=16), **about)
                print(
                    f"{protocol:10}  {count} processes  {time.perf_counter() - clock:6.1f} s  accuracy {made.metrics['accuracy']:.4f}"
                )
                made.path.rename(made.path.with_name(f".done-{count}"))  # else the next one would be free


if __name__ == "__main__":
    main()
