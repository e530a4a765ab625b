"""Batches read by forks of this process: the weights are there once, and each fork multiplies with one thread.

The small products of growing replies wait for their threads more than they gain from them: two forks write 1.1 to 1.2 times as
many tokens a second as two threads do, and read 0.9 times as many (docs/PERFORMANCE.md). torch's DataLoader makes its workers
in the same way. One thread, because a fork has none of its parent's others, for which OpenMP would wait.
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import psutil
import torch

from ultramed.core.errors import StoreError
from ultramed.core.signals import end_with_parent

PAYS = 50_000_000  # parameters from which on a batch takes longer than starting a fork
MOST = 4  # forks: each has a batch of its own in memory
ROOM = 4  # bytes that a fork's batch may take for each byte of the weights

_held: tuple = ()  # (net, tokenizer) of a fork


def forks(net, tasks: list) -> int:
    """How many forks shall share the tasks: one for each thread, up to `MOST`; 1 where there are fewer tasks than that, where
    forking is impossible (weights on a GPU, systems other than Linux) or does not pay (small models), and where memory is
    short."""
    count = min(torch.get_num_threads(), MOST)
    if net.device.type != "cpu" or sys.platform != "linux" or len(tasks) < count or net.num_parameters() < PAYS:
        return 1
    return count if psutil.virtual_memory().available > count * ROOM * net.get_memory_footprint() else 1


def forked(net, tokenizer, call: Callable, tasks: list[dict], count: int) -> Iterator[Any]:
    """`call(net, tokenizer, **task)` of every task, by `count` forks; in the order of the tasks, so that what ended before an
    earlier one is told after it.

    Raises what `call` raises, and StoreError if a fork is killed.
    """
    before, waiting = set(multiprocessing.active_children()), []
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(net, tokenizer))
    try:
        waiting.extend(pool.submit(_do, call, task) for task in tasks)
        for future in waiting:
            yield future.result()
    except BrokenProcessPool as err:
        raise StoreError(
            f"one of {count} processes that asked the model came to a sudden end, most likely for want of memory. What was "
            "answered is kept: run it again, with OMP_NUM_THREADS=1 if it happens again, under which there is one process"
        ) from err
    finally:
        if len(waiting) < len(tasks) or not all(future.done() for future in waiting):
            for worker in set(multiprocessing.active_children()) - before:  # interrupted: they would go on for nobody
                worker.kill()
        pool.shutdown(cancel_futures=True)


def _begin(net, tokenizer) -> None:
    global _held
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends its forks
    torch.set_num_threads(1)
    _held = net, tokenizer


def _do(call: Callable, task: dict):
    return call(*_held, **task)
