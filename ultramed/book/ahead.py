"""A book's stages made ahead, by processes beside each other; the notebooks then find them in the store.

One small model leaves most of a GPU idle, since starting its many small products takes longer than they do. So the seeds are
shared: each process makes the artifacts of one at a time (experiments/ahead.py), with several GPUs on one of them.
"""

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle

import torch
from rich.console import Console

from ultramed.book.runner import notebooks
from ultramed.core.config import load_profile
from ultramed.core.errors import StoreError
from ultramed.core.log import quiet_libraries
from ultramed.core.progress import FILE, bar
from ultramed.core.signals import end_with_parent
from ultramed.experiments.ahead import Task, tasks_of
from ultramed.lm.device import cores

VISIBLE = "CUDA_VISIBLE_DEVICES"
_tasks: list[Task] = []  # of a worker


def make_ahead(numbers: list[str], profile: str, overrides: list[str], count: int, console: Console) -> bool:
    """Make what the notebooks will ask for, by `count` processes; True if nothing failed. What is made already is not made
    again.

    A task that fails is told, and left to its notebook. Raises StoreError if a process is killed.
    """
    tasks = _tasks_of(numbers, profile, overrides)
    count = min(count, len(tasks))
    if not tasks:
        return True
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()  # of each process, in turn
    for _, device in zip(range(count), cycle(_devices()), strict=False):
        devices.put(device)
    given = (numbers, profile, overrides, max(1, cores() // count), devices)
    failed, before = [], set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=given)
    try:
        waiting = {pool.submit(_do, number): task for number, task in enumerate(tasks)}
        with bar(len(tasks), f"ahead, {count} processes", "task") as progress:
            for future in as_completed(waiting):
                if error := future.result():
                    failed.append(f"{waiting[future].notebook}, {waiting[future].what}: {error}")
                progress.update()
    except BrokenProcessPool as err:
        raise StoreError(
            f"one of {count} processes came to a sudden end, most likely for want of memory. What was made is kept: run it again "
            f"with --ahead {max(1, count // 2)}"
        ) from err
    except BaseException:  # interrupted: they would go on for nobody
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    for line in failed:
        console.print(f"[yellow]not made ahead[/]  {line}", soft_wrap=True)
    return not failed


def _tasks_of(numbers: list[str], profile: str, overrides: list[str]) -> list[Task]:
    return tasks_of(load_profile(profile, overrides), {path.stem[:2] for path in notebooks(numbers)})


def _devices() -> list[str]:
    """What a process may see of the GPUs, for each of them; [''] where there are none."""
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())] or [""]


def _begin(numbers: list[str], profile: str, overrides: list[str], threads: int, devices) -> None:
    global _tasks
    end_with_parent()
    if device := devices.get():
        os.environ[VISIBLE] = device  # read when CUDA is first used, which nothing has done yet
    torch.set_num_threads(threads)
    quiet_libraries()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", FILE: os.devnull}  # one bar is enough
    _tasks = _tasks_of(numbers, profile, overrides)


def _do(number: int) -> str:
    """Run a task; '' or what went wrong."""
    try:
        _tasks[number].call()
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the others
    return ""
