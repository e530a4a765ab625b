"""Work over several processes: the stage's process starts `accelerate launch`; in training, its workers run the same function.
Processes that answer (crew.py) are started and ended in the same way.

The process that asked for the artifact keeps the store's lock, shows the bar and publishes; the workers train, and the
first of them writes the files. How many processes there are does not enter the artifact's key: they share out the same
global batches, in the same order.

    @stage(version=1)
    @distributed
    def sft(out, config, *, model, data): ...

Full fine-tuning is sharded (FSDP2, params/accelerate/*.yaml). An adapter's base is frozen, often quantised, and held
whole by every process, which is plain data parallelism. A last batch too short for all workers is filled up with rows
from the beginning of the order (accelerate's `even_batches`).
"""

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from ultramed.core import progress
from ultramed.core.config import PROCESSES, home
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.memory import settle
from ultramed.core.schema import OptimConfig
from ultramed.core.signals import StopSignals
from ultramed.core.store import Artifact, write_json
from ultramed.lm.device import cores

WORKER = "ultramed.train.worker"
JOB = "ULTRAMED_JOB"  # in a worker: the folder with what it is to do
FOLDER, LOG = ".launch", "launch.log"  # in the stage's folder: that folder, and what is kept of it after a failure
GRACE = 3600  # seconds that workers have for the step at hand and a checkpoint, which at 70B is a terabyte


def nodes() -> int:
    """Nodes of the SLURM allocation that this process is the first task of; 1 outside.

    Raises ConfigError in an allocation of several nodes, but not on its first one (a login node with `salloc`).
    """
    count = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if shutil.which("srun") else 1
    if count > 1 and os.environ.get("SLURM_NODEID") != "0":
        raise ConfigError(f"work over {count} nodes starts on the first of them: use sbatch, or `srun -N1 -n1 --overlap`")
    return count


def processes() -> int:
    """How many processes work together: `ULTRAMED_PROCESSES`, else one a GPU of all nodes, else one."""
    given = os.environ.get(PROCESSES)
    if given is not None and not (given.isdigit() and int(given) > 0):
        raise ConfigError(f"{PROCESSES}: wanted a number of processes, got {given!r}")
    return int(given) if given else max(1, torch.cuda.device_count()) * nodes()


def worker() -> bool:
    """Whether this process is one of several that work together."""
    return JOB in os.environ


def world() -> int:
    """Processes that share the batch here and now: 1 outside a worker."""
    return int(os.environ["WORLD_SIZE"]) if worker() else 1


def share(config: OptimConfig, count: int = 0) -> int:
    """Rows of the global batch for each of `count` processes (0: those of now). Raises ConfigError if they do not divide."""
    count = count or world()
    if config.global_batch_size % count:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size} does not divide by {count} processes; give --processes another "
            f"number, or the configuration another batch"
        )
    return config.global_batch_size // count


def main_worker() -> bool:
    """Whether this process writes files: alone, or the first of the workers."""
    return not worker() or os.environ["RANK"] == "0"


def sharded() -> bool:
    """Whether the workers hold parts of the model (FSDP2) and not copies."""
    return worker() and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def awaits_weights() -> bool:
    """Whether this worker gets its part of the weights from the first one, which reads them."""
    return sharded() and not main_worker()


def distributed(fn):
    """Under `@stage`: run the stage's function in `processes()` workers, or here if that is one."""

    @functools.wraps(fn)
    def run(out: Path, config, **inputs) -> dict:
        if worker():
            return fn(out, config, **inputs)
        clear(out)
        if (count := processes()) > 1:
            return _train(fn, count, out, config, inputs)
        _load_libraries()
        return fn(out, config, **inputs)

    return run


@functools.cache
def _load_libraries() -> None:
    """What every training imports, before there is a model: see `settle`."""
    import peft  # noqa: F401
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    settle()


# --------------------------------------------------------------------------------------------- the process that launches


def _train(fn, count: int, out: Path, config, inputs: dict) -> dict:
    share(config, count)  # what cannot be shared out should show before any process is started
    workers = Workers(fn, count, out, config, inputs, what="training", shard=config.method == "full")
    try:
        _watch(workers)
    finally:
        workers.end()
    return workers.result()


def clear(out: Path) -> None:
    """Remove what an attempt that was killed or failed has left in `out`: it is no part of what is published."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    (out / LOG).unlink(missing_ok=True)


class Workers:
    """`count` processes that run `fn(out, config, **inputs)`, from now on until `end`. `what`: what they do, for messages;
    `shard`: whether they share the weights out among themselves (FSDP2)."""

    def __init__(self, fn, count: int, out: Path, config, inputs: dict, *, what: str, shard: bool):
        self.job, self.count, self.what = out / FOLDER, count, what
        self._family: set[psutil.Process] = set()
        self._looked = float("-inf")
        clear(out)
        art = {k: {"stage": v.stage, "key": v.key, "path": str(v.path)} for k, v in inputs.items() if isinstance(v, Artifact)}
        write_json(
            self.job / "job.json",
            {
                "function": [fn.__module__, fn.__name__],
                "config": config,
                "class": type(config).__name__,
                "artifacts": art,
                "options": {k: v for k, v in inputs.items() if k not in art},
                "out": str(out),
                "parent": [os.getpid(), psutil.Process().create_time()],
            },
        )
        command, extra = _command(count, shard)
        told = {JOB: str(self.job), progress.FILE: os.environ.get(progress.FILE, str(self.job / "progress"))}
        with open(self.job / "log.txt", "w") as log:
            # A session of its own: Ctrl-C in the terminal reaches this process alone, which asks the workers to stop.
            self._child = subprocess.Popen(
                command, env={**os.environ, **extra, **told}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def at_work(self) -> bool:
        """Whether the launcher is alive. To be asked often: what it has started is found out meanwhile, to be ended with it."""
        if time.monotonic() > self._looked + 2:
            self._looked = time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                self._family.update(psutil.Process(self._child.pid).children(recursive=True))
        return self._child.poll() is None

    def end(self, patience: float = 0) -> None:
        """Wait so many seconds for all to end by themselves, then end what is left of the launcher and of all that it started:
        the next attempt must have the folder to itself."""
        self._looked = float("-inf")
        if self.at_work() and patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(patience)
        if self._child.poll() is None:
            self._child.terminate()  # srun and torch's launcher end theirs in turn
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(15)
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil sees to it that the number is still that process's
        self._child.kill()
        self._child.wait()

    def result(self) -> dict:
        """What the first worker's function returned, or raised. Raises StoreError if they ended without either."""
        try:
            result = json.loads((self.job / "result.json").read_text())
        except OSError:
            lines = (self.job / "log.txt").read_text(errors="replace").splitlines()
            told = [line for line in lines if re.search(r"\b\w*(Error|Exception|OutOfMemory)\b.*:|Killed|Signal", line)]
            kept = self.job.with_name(LOG)
            os.replace(self.job / "log.txt", kept)
            raise StoreError(
                f"{self.what} over {self.count} processes ended with status {self._child.returncode}: "
                f"{(told or lines or ['no output'])[0].strip()} The whole log: {kept}. The same command goes on where it stopped."
            ) from None
        shutil.rmtree(self.job)
        if "error" in result:
            raise told_error(result)
        return result


def told_error(result: dict) -> BaseException:
    """The error that a worker has told of."""
    kinds = {"ConfigError": ConfigError, "StoreError": StoreError, "KeyboardInterrupt": KeyboardInterrupt}
    return kinds[result["error"]](result["message"])


def _command(count: int, shard: bool) -> tuple[list[str], dict[str, str]]:
    """The launching command and what it needs in its environment."""
    machines = nodes()
    if count % machines:
        raise ConfigError(f"{count} processes do not divide by {machines} nodes")
    file = home() / "params" / "accelerate" / ("fsdp_1x8.yaml" if machines == 1 else "fsdp_8x8.yaml")
    # Several trainings of one job need ports of their own; which ones are free on the other nodes cannot be seen.
    port = free_port() if machines == 1 else 20000 + (int(os.environ["SLURM_JOB_ID"]) * 17 + os.getpid()) % 20000
    given = [f"--num_processes={count}", f"--num_machines={machines}", f"--main_process_port={port}"]
    given += [f"--config_file={file}"] if shard else ["--multi_gpu", "--dynamo_backend=no", "--mixed_precision=no"]
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        threads = max(1, cores() // (count // machines))
        threads = min(threads, int(os.environ.get("OMP_NUM_THREADS", threads)))
        env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, "-m", "accelerate.commands.launch", *given]
    if machines == 1:
        return [*line, "-m", WORKER], env
    line += [f"--main_process_ip={socket.gethostname()}", "--machine_rank=$SLURM_NODEID", "-m", WORKER]
    spread = ["srun", f"--nodes={machines}", f"--ntasks={machines}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*spread, "bash", "-c", "exec " + " ".join(line)], env


def free_port() -> int:
    """A port that nobody on this machine uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _watch(workers: Workers) -> None:
    """Wait for the workers, show their progress, hand them a request to stop."""
    bar, asked = None, None
    with StopSignals() as stop:
        while workers.at_work():
            time.sleep(0.2)
            bar = _show(workers.job / "progress", bar)
            if stop.asked and asked is None:
                (workers.job / "stop").touch()
                asked = time.monotonic()
            if asked is not None and (stop.asked > 1 or time.monotonic() - asked > GRACE):
                raise KeyboardInterrupt
    if bar is not None:
        bar.close()


def _show(file: Path, bar):
    """The workers' progress file as a bar of this process (nothing to do where the runner reads that file itself)."""
    with contextlib.suppress(OSError):
        found = re.fullmatch(r"(.*) (\d+)/(\d+) (\w+)s", file.read_text())
        if found:
            desc, n, total, unit = found.groups()
            if bar is None:
                bar = progress.bar(int(total), desc, unit, initial=int(n))
            bar.update(int(n) - bar.n)
    return bar


# ------------------------------------------------------------------------------------------------------------ the workers


def stop_asked() -> bool:
    """Whether the workers shall stop after this step: the same answer in all of them, from the first one's view."""
    job = Path(os.environ[JOB])
    stop = False
    if main_worker():
        pid, created = json.loads((job / "job.json").read_text())["parent"]
        try:
            stop = (job / "stop").exists() or psutil.Process(pid).create_time() != created
        except psutil.NoSuchProcess:
            stop = True  # nobody would publish what is made here
    return bool(agreed(int(stop)))


def agreed(value: int) -> int:
    """The first worker's value, in all of them; outside workers the value itself."""
    if not worker():
        return value
    told = torch.tensor([value], device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.broadcast(told, 0)
    return int(told.item())


def gather_state_dict(net) -> dict[str, torch.Tensor] | None:
    """The model's state dict, gathered on the first worker; None on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if main_worker() else None


def shard_frozen(net):
    """Shard a model that is only read (a reference), layer by layer, over all workers. Its weights are those of the first
    worker; the others give a blank one.

    TRL shards a reference as one piece, so that every process holds all of it during its forward pass.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    weights = {} if awaits_weights() else net.state_dict()
    for layer in net.base_model.layers:
        fully_shard(layer)
    net = fully_shard(net)
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return net
