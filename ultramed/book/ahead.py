"""A book's artifacts made ahead, by processes beside each other; the notebooks then find them in the store.

One small model leaves most of a GPU idle, since starting its many small products takes longer than they do. So the seeds are
shared: each process makes the artifacts of one at a time (experiments/ahead.py), with several GPUs on one of them.
"""

import gc
import multiprocessing
import os
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle

import torch
from rich.console import Console

from ultramed.core.config import load_profile
from ultramed.core.errors import StoreError
from ultramed.core.log import quiet_libraries
from ultramed.core.progress import FILE, bar
from ultramed.core.signals import StopSignals, end_with_parent
from ultramed.experiments.ahead import Task, tasks_of
from ultramed.lm.device import cores
from ultramed.train.launch import PROCESSES

VISIBLE = "CUDA_VISIBLE_DEVICES"
_tasks: list[Task] = []  # of a worker


def make_ahead(numbers: Collection[str], profile: str, overrides: list[str], count: int, console: Console) -> bool:
    """Make what the notebooks with these numbers ('11') will ask for, by `count` processes; True if nothing failed.

    What is made already is not made again. A task that fails is told, and left to its notebook. Ctrl-C and SIGTERM are passed
    on once: training saves a checkpoint, nothing more is begun, and KeyboardInterrupt is raised when all have ended; a second
    one kills. Raises StoreError if a process is killed.
    """
    tasks = tasks_of(load_profile(profile, overrides), numbers)
    if not tasks:
        return True
    count = min(count, len(tasks))
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()  # of each process, in turn
    for _, device in zip(range(count), cycle(_devices()), strict=False):
        devices.put(device)
    threads = min(max(1, cores() // count), int(os.environ.get("OMP_NUM_THREADS") or cores()))
    failed, told, before = [], 0, set(multiprocessing.active_children())
    given = (list(numbers), profile, overrides, threads, devices)
    with StopSignals() as stop, ProcessPoolExecutor(count, context, initializer=_begin, initargs=given) as pool:
        waiting = {pool.submit(_do, number): task for number, task in enumerate(tasks)}
        open_ones = set(waiting)
        with bar(len(tasks), f"ahead, {count} processes", "task") as progress:
            while open_ones:
                ended, open_ones = wait(open_ones, timeout=0.3, return_when=FIRST_COMPLETED)
                if stop.asked > told:
                    told += 1
                    for worker in set(multiprocessing.active_children()) - before:
                        worker.terminate() if told == 1 else worker.kill()
                for future in ended:
                    if isinstance(future.exception(), BrokenProcessPool):
                        continue
                    if error := future.result():
                        failed.append(f"{waiting[future].what}: {error}")
                    progress.update()
        if stop.asked:
            raise KeyboardInterrupt
        if any(isinstance(future.exception(), BrokenProcessPool) for future in waiting):
            raise StoreError(
                f"one of {count} processes came to a sudden end, most likely for want of memory. What was made is kept: run it "
                f"again with --ahead {max(1, count // 2)}"
            )
    for line in failed:
        console.print(f"[yellow]not made ahead[/]  {line}", soft_wrap=True)
    return not failed


def _devices() -> list[str]:
    """What a process may see of the GPUs, for each of them; [''] where there are none."""
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())] or [""]


def _begin(numbers: list[str], profile: str, overrides: list[str], threads: int, devices) -> None:
    global _tasks
    end_with_parent()
    os.setsid()  # a terminal's Ctrl-C is the parent's, which passes it on
    if device := devices.get():
        os.environ[VISIBLE] = device  # read when CUDA is first used, which nothing has done yet
    os.environ |= {PROCESSES: "1", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    os.environ[FILE] = os.devnull  # one bar is enough
    torch.set_num_threads(threads)
    quiet_libraries()
    _tasks = tasks_of(load_profile(profile, overrides), numbers)


def _do(number: int) -> str:
    """Run a task; '' or what went wrong."""
    try:
        _tasks[number].call()
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    except BaseException:  # interrupted, with a checkpoint: the pool would give this process the next task
        os._exit(1)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the others
    return ""
