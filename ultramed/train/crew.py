"""Several processes that each hold a whole model and read batches: one a GPU of a node, or of an allocation's nodes.

The stage's process makes the batches, as it would for itself, hands them out one at a time, and alone writes the ledger. A
batch has the same rows whoever reads it and however many there are, so results do not depend on the number of processes;
whatever kills them loses the batches at hand and no more.

    net, tokenizer = hold(load_reward, model, items, out, ledger)
    for number, values in each(net, tokenizer, rewards, tasks): ...
"""

import importlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.ledger import Ledger
from ultramed.core.store import Artifact
from ultramed.lm import models
from ultramed.lm.forked import forked, forks
from ultramed.train import launch

WORTH = 8  # items that each process must have for starting it to pay
AHEAD = 2  # batches handed out for each process: one that it reads, one that waits
CONNECT = 30  # seconds for a process to find the one that started it
PIECE = 1 << 22  # characters of a value that travel together
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


def each(net, tokenizer, call: Callable, tasks: list[dict], small: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, `call(net, tokenizer, **task)`) of every task, in whichever order they end if `net` is a crew. small: the call
    multiplies few rows at a time, so that on a CPU forks of this process shall share the tasks (lm/forked.py).

    Arguments and results are plain JSON data, and `call` is at the top of a module, so that another process can find it.
    """
    if isinstance(net, Crew):
        yield from net.each(call, tasks)
    elif small and not launch.worker() and (count := forks(net, tasks)) > 1:
        yield from enumerate(forked(net, tokenizer, call, tasks, count))
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
        alone = launch.nodes() == 1
        host = "127.0.0.1" if alone else socket.gethostname()
        # Bound here, because by itself such a store, which asks nobody who he is, listens on all interfaces. On several nodes
        # it trusts the cluster's network, as torch's launcher does.
        with socket.create_server((host if alone else "", 0)) as listening:
            port = listening.getsockname()[1]
            listen = {"wait_for_workers": False, "master_listen_fd": os.dup(listening.fileno())}
            self._store = TCPStore(host, port, is_master=True, **listen)
        self._given = self._got = 0
        inputs = {"model": model, "load": _name(load), "options": options, "address": [host, port]}
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
            turn |= dict.fromkeys(islice(reversed(self.ledger.rows), len(self.ledger) - before), number)
        keys = list(self.ledger.rows)
        self.ledger.reorder(keys[:start] + sorted(keys[start:], key=turn.__getitem__))  # of a turn in the order of arrival

    def ask(self, call: Callable, **task) -> Any:
        """The result of one task."""
        [(_, result)] = self.each(call, [task])
        return result

    def _hand_out(self, call: Callable, waiting: Iterator[tuple[int, dict]]) -> None:
        for number, task in waiting:
            self._given += 1
            _put(self._store, f"task {self._given}", [number, _name(call), task])
            return

    def _next(self) -> tuple[int, Any]:
        key = f"made {self._got + 1}"
        while not self._store.check([key]):
            if not self._workers.at_work():
                self._workers.result()
            time.sleep(0.005)
        number, result, error = _take(self._store, key)
        self._got += 1
        if error:
            raise launch.told_error(error)
        return number, result

    def close(self) -> None:
        """End the processes: those with nothing to do by themselves, so that the devices are free afterwards."""
        idle = 0 < self._got == self._given
        for number in range(self.count if idle else 0):
            _put(self._store, f"task {self._given + number + 1}", None)
        self._workers.end(PATIENCE if idle else 0)
        shutil.rmtree(self._workers.job, ignore_errors=True)


def _put(store: TCPStore, key: str, value) -> None:
    """JSON data under a key, in pieces that the store takes (8 MiB at most); the key itself, their number, comes last."""
    text = json.dumps(value)
    pieces = [text[k : k + PIECE] for k in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces):
        store.set(f"{key}, {number}", piece)
    store.set(key, str(len(pieces)))


def _take(store: TCPStore, key: str):
    """What was `_put` there, once it is there; it is gone afterwards."""
    parts = [f"{key}, {number}" for number in range(int(store.get(key)))]
    text = b"".join(store.get(part) for part in parts)
    for name in (key, *parts):
        store.delete_key(name)
    return json.loads(text)


def _name(function: Callable) -> list[str]:
    return [function.__module__, function.__name__]


def _named(name: list[str]) -> Callable:
    module, function = name
    if not module.startswith("ultramed."):
        raise ConfigError(f"asked to call {module}.{function}, which is no function of this package")
    return getattr(importlib.import_module(module), function)


def work(out: Path, config: None, *, model: Artifact, load: list[str], options: dict, address: list) -> dict:
    """One of the processes: take the next task until there are no more. Ends with an error when nobody hands them out."""
    # Before the weights are read: whoever started this may be gone by then, and is not waited for.
    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT))
    net, tokenizer = _named(load)(model, **options)
    store.set_timeout(timedelta(days=365))
    while True:
        task = _take(store, f"task {store.add('taken', 1)}")  # waits until there is one
        if task is None:
            return {}
        (number, call, given), result, error = task, None, None
        try:
            result = _named(call)(net, tokenizer, **given)
        except (ConfigError, StoreError) as err:
            error = {"error": type(err).__name__, "message": str(err)}
        _put(store, f"made {store.add('finished', 1)}", [number, result, error])
