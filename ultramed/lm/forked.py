"""Batches read by forks of this process: the weights are there once, and each fork multiplies with a thread of its own.

The small products of growing replies wait for their threads more than they gain from them: two forks with a thread each write
1.2 times as many tokens a second as two threads do (docs/PERFORMANCE.md). torch's DataLoader makes its workers in the same way,
and leaves them one thread, too: OpenMP's others do not exist in a fork.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ultramed.core.errors import StoreError
from ultramed.core.signals import end_with_parent

PAYS = 50_000_000  # parameters from which on a batch takes longer than starting a fork

_held: tuple = ()  # (net, tokenizer) of a fork


def forks(net, tasks: list) -> int:
    """How many forks shall share the tasks: one a thread, or fewer where there are not as many tasks; 1 where forking cannot be
    or hardly pays (weights on a GPU, systems other than Linux, small models, most threads without a task)."""
    threads = torch.get_num_threads()
    if net.device.type != "cpu" or sys.platform != "linux" or net.num_parameters() < PAYS or 2 * len(tasks) < threads:
        return 1
    return min(threads, len(tasks))


def forked(net, tokenizer, call: Callable, tasks: list[dict], count: int) -> Iterator[Any]:
    """`call(net, tokenizer, **task)` of every task, in their order, by `count` forks.

    Raises what `call` raises, and StoreError if a fork is killed.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(net, tokenizer))
    waiting = [pool.submit(_do, call, task) for task in tasks]
    workers = set(multiprocessing.active_children()) - before
    try:
        for future in waiting:
            yield future.result()
    except BrokenProcessPool as err:
        raise StoreError(
            f"one of {count} processes that asked the model was ended from outside, most likely for want of memory. What was "
            "answered is kept: run it again, with smaller batch_tokens or with OMP_NUM_THREADS=1, under which there is one process"
        ) from err
    finally:
        if not all(future.done() for future in waiting):  # interrupted: they would finish their batches for nobody
            for worker in workers:
                worker.kill()
        pool.shutdown(cancel_futures=True)


def _begin(net, tokenizer) -> None:
    global _held
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends its forks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns that it was forked
    torch.set_num_threads(1)
    _held = net, tokenizer


def _do(call: Callable, task: dict):
    return call(*_held, **task)
