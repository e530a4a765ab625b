"""One of several processes that train or ask together; `train/launch.py` starts them through `accelerate launch`."""

import importlib
import json
import os
import time
from pathlib import Path

import torch

from ultramed.core import schema
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.log import quiet_libraries
from ultramed.core.store import Artifact, PeakMemory, canonical, write_json
from ultramed.train.launch import JOB, main_worker, sharded
from ultramed.train.trl_adapter import shard_on_cpus


def main() -> None:
    """One worker: run the stage's function; the first worker leaves `result.json`."""
    from accelerate import PartialState

    quiet_libraries()
    job = Path(os.environ[JOB])
    given = json.loads((job / "job.json").read_text())
    if sharded() and not torch.cuda.is_available():
        shard_on_cpus()
    module, name = given["function"]
    function = getattr(importlib.import_module(module), name)
    function = getattr(function, "__wrapped__", function)  # without the store around it
    config = getattr(schema, given["class"]).model_validate(given["config"]) if given["config"] is not None else None
    inputs = {k: Artifact(a["stage"], a["key"], Path(a["path"])) for k, a in given["artifacts"].items()}
    try:
        PartialState()  # this worker's device, before anything is put on one
        with PeakMemory() as memory:
            made = function(Path(given["out"]), config, **inputs, **given["options"])
        result = canonical({**made, "worker_peak_memory_bytes": memory.peak})
    except (ConfigError, StoreError, KeyboardInterrupt) as err:
        result = {"error": type(err).__name__, "message": str(err)}
        # What fails here usually fails in the first worker, too, which tells why. If it does not, it waits for this one:
        # then this one's status ends them all.
        for _ in range(300):
            if main_worker() or (job / "result.json").exists():
                break
            time.sleep(0.1)
        else:
            raise
    if main_worker():
        write_json(job / "result.json", result)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
