"""Several processes that each hold a whole model and read batches: one a GPU of a node, or of an allocation's nodes.

The stage's process makes the batches, as it would for itself, hands them out one at a time, and alone writes the ledger. A
batch has the same rows whoever reads it and however many there are, so results do not depend on the number of processes;
whatever kills them loses the batches at hand and no more.

    net, tokenizer = hold(load_reward, model, items, out, ledger)
    for number, values in each(net, tokenizer, rewards, tasks): ...
"""

import importlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.ledger import Ledger
from ultramed.core.store import Artifact
from ultramed.lm import models
from ultramed.train import launch

WORTH = 8  # items that each process must have for starting it to pay
AHEAD = 2  # batches handed out for each process: one that it reads, one that waits
PATIENCE = 60  # seconds that idle processes have to end by themselves


def hands(items: int) -> int:
    """How many processes shall read so many items: `launch.processes()`, or fewer where each would have hardly any."""
    if items < 2 * WORTH or launch.worker():
        return 1
    count, machines = min(launch.processes(), items // WORTH), launch.nodes()
    return max(1, count - count % machines)


def hold(load: Callable, model: Artifact, items: int, out: Path, ledger: Ledger, **options):
    """(net, tokenizer) of `load(model, **options)`, in this process or, where there are `items` enough, in a crew.

    `out`: the stage's folder, for the crew's log. ledger: see `Crew`.
    """
    count = hands(items)
    return (
        load(model, **options) if count == 1 else (Crew(load, model, count, out, ledger, options), models.load_tokenizer(model))
    )


def let_go(net) -> None:
    """End the processes, if `net` is a crew; weights of this process go when nobody names them any more."""
    if isinstance(net, Crew):
        net.close()


def each(net, tokenizer, call: Callable, tasks: list[dict]) -> Iterator[tuple[int, Any]]:
    """(number, `call(net, tokenizer, **task)`) of every task, in whichever order they end if `net` is a crew.

    Arguments and results are plain JSON data, and `call` is at the top of a module, so that another process can find it.
    """
    if isinstance(net, Crew):
        yield from net.each(call, tasks)
    else:
        for number, task in enumerate(tasks):
            yield number, call(net, tokenizer, **task)


class Crew:
    """Stands where the weights stand: `config` as theirs, and `each` for what is read with them.

    `ledger`: where the caller puts results as they come. Rows of one `each` end up in the order of its tasks, which is the
    order that one process would have written them in.
    """

    def __init__(self, load: Callable, model: Artifact, count: int, out: Path, ledger: Ledger, options: dict):
        from transformers import AutoConfig

        self.config, self.ledger, self.count = AutoConfig.from_pretrained(**models.location(model)), ledger, count
        host = "127.0.0.1" if launch.nodes() == 1 else socket.gethostname()
        master, secret = TCPStore(host, 0, is_master=True, wait_for_workers=False), secrets.token_hex(16)
        # Such a store listens on all interfaces and asks nobody who he is: without the prefix nobody can hand out work.
        self._store = PrefixStore(secret, master)
        self._given = self._got = 0
        inputs = {"model": model, "load": _name(load), "options": options, "address": [host, master.port, secret]}
        self._workers = launch.Workers(work, count, out, None, inputs, what="asking", shard=False)

    def each(self, call: Callable, tasks: list[dict]) -> Iterator[tuple[int, Any]]:
        """See `each` above."""
        waiting, start, turn = iter(enumerate(tasks)), len(self.ledger), {}
        for _ in range(AHEAD * self.count):
            self._hand_out(call, waiting)
        for _ in tasks:
            number, result = self._next()
            self._hand_out(call, waiting)
            before = len(self.ledger)
            yield number, result
            turn |= dict.fromkeys(list(self.ledger.rows)[before:], number)
        keys = list(self.ledger.rows)
        self.ledger.reorder(keys[:start] + sorted(keys[start:], key=turn.__getitem__))

    def ask(self, call: Callable, **task) -> Any:
        """The result of one task."""
        [(_, result)] = self.each(call, [task])
        return result

    def _hand_out(self, call: Callable, waiting: Iterator[tuple[int, dict]]) -> None:
        for number, task in waiting:
            self._given += 1
            self._store.set(f"task {self._given}", json.dumps([number, _name(call), task]))
            return

    def _next(self) -> tuple[int, Any]:
        key = f"made {self._got + 1}"
        while not self._store.check([key]):
            if not self._workers.at_work():
                self._workers.result()
            time.sleep(0.005)
        number, result, error = json.loads(self._store.get(key))
        self._store.delete_key(key)
        self._got += 1
        if error:
            raise launch.told_error(error)
        return number, result

    def close(self) -> None:
        """End the processes: those with nothing to do by themselves, so that the devices are free afterwards."""
        idle = 0 < self._got == self._given
        for number in range(self.count if idle else 0):
            self._store.set(f"task {self._given + number + 1}", "null")
        self._workers.end(PATIENCE if idle else 0)
        shutil.rmtree(self._workers.job, ignore_errors=True)


def _name(function: Callable) -> list[str]:
    return [function.__module__, function.__name__]


def _named(name: list[str]) -> Callable:
    module, function = name
    if not module.startswith("ultramed."):
        raise ConfigError(f"asked to call {module}.{function}, which is no function of this package")
    return getattr(importlib.import_module(module), function)


def work(out: Path, config: None, *, model: Artifact, load: list[str], options: dict, address: list) -> dict:
    """One of the processes: take the next task until there are no more. Ends with an error when nobody hands them out."""
    net, tokenizer = _named(load)(model, **options)
    host, port, secret = address
    master = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(days=365))
    store = PrefixStore(secret, master)
    while True:
        key = f"task {store.add('taken', 1)}"
        task = json.loads(store.get(key))  # waits until there is one
        store.delete_key(key)
        if task is None:
            return {}
        (number, call, given), result, error = task, None, None
        try:
            result = _named(call)(net, tokenizer, **given)
        except (ConfigError, StoreError) as err:
            error = {"error": type(err).__name__, "message": str(err)}
        store.set(f"made {store.add('finished', 1)}", json.dumps([number, result, error]))
