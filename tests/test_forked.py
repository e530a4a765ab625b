"""Batches that forks of the process read: the same results in the same order, and nobody left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from ultramed.core.errors import ConfigError, StoreError
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.lm import forked, models
from ultramed.train.crew import each

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is forking on Linux only")


@pytest.fixture(scope="module")
def held(medalpaca):
    return models.load(medalpaca.base, dtype=torch.float32, device="cpu"), models.load_tokenizer(medalpaca.base)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(forked, "PAYS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    assert not multiprocessing.active_children()


def prompts(tokenizer, count: int) -> list[list[int]]:
    return [tokenizer("word " * (k + 1) + "and then", add_special_tokens=False)["input_ids"] for k in range(count)]


def test_forks_write_what_one_thread_writes_in_its_order(held, monkeypatch):
    net, tokenizer = held
    given, sampling = prompts(tokenizer, 12), Sampling(8, temperature=1.0)

    def written() -> tuple:
        told = []
        rngs = [item_rng(0, k) for k in range(len(given))]
        made = generate(
            net, tokenizer, given, sampling, budget=64, rngs=rngs, done=lambda batch, _: told.append((batch, os.getpid()))
        )
        return made, told

    started = []
    real = multiprocessing.get_context("fork").Process.start
    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", lambda self: (started.append(self), real(self)))
    made = written()
    assert len(started) == 2
    torch.set_num_threads(1)
    assert made == written()
    assert len(started) == 2, "one thread needs no forks"


def where(net, tokenizer, number: int) -> list:
    return [number, os.getpid(), torch.get_num_threads()]


def test_a_fork_has_one_thread_and_little_work_stays_in_the_process(held, monkeypatch):
    net, tokenizer = held
    tasks = [{"number": number} for number in range(3)]
    for threads in (2, 3):
        torch.set_num_threads(threads)
        told = list(each(net, tokenizer, where, tasks, small=True))
        assert [number for number, _ in told] == [0, 1, 2]
        assert {threads for _, (_, _, threads) in told} == {1}
        assert os.getpid() not in {pid for _, (_, pid, _) in told}
    torch.set_num_threads(2)
    assert {pid for _, (_, pid, _) in each(net, tokenizer, where, tasks)} == {os.getpid()}, (
        "large products are better off with threads"
    )
    torch.set_num_threads(4)
    assert forked.forks(net, tasks) == 1, "a thread would have no task"
    torch.set_num_threads(12)
    assert forked.forks(net, [*tasks, {}]) == forked.MOST
    with monkeypatch.context() as short:
        short.setattr(forked.psutil, "virtual_memory", lambda: SimpleNamespace(available=7 * net.get_memory_footprint()))
        torch.set_num_threads(2)
        assert forked.forks(net, tasks) == 1
    monkeypatch.setattr(forked, "PAYS", net.num_parameters() + 1)
    assert {pid for _, (_, pid, _) in each(net, tokenizer, where, tasks, small=True)} == {os.getpid()}


def fails(net, tokenizer, how: str) -> str:
    assert multiprocessing.parent_process(), "only in a fork"
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(600)
    if how != "well":
        raise ConfigError(how)
    return how


def test_what_a_fork_raises_is_raised_here(held):
    found = each(*held, fails, [{"how": "well"}, {"how": "no such thing"}], small=True)
    assert next(found) == (0, "well")
    with pytest.raises(ConfigError, match="no such thing"):
        next(found)


def test_a_killed_fork_is_told_with_what_to_do(held):
    with pytest.raises(StoreError, match=r"want of memory.*OMP_NUM_THREADS"):
        list(each(*held, fails, [{"how": "killed"}, {"how": "slow"}], small=True))


def test_whoever_stops_asking_leaves_nobody(held):
    clock = time.perf_counter()
    found = each(*held, fails, [{"how": "well"}, {"how": "slow"}, {"how": "slow"}], small=True)
    next(found)
    found.close()
    assert time.perf_counter() - clock < 60
    assert not multiprocessing.active_children()


ALONE = """
import time, torch
from types import SimpleNamespace
from ultramed.lm import forked
forked.PAYS = 0
torch.set_num_threads(2)
net = SimpleNamespace(device=torch.device("cpu"), num_parameters=lambda: 1, get_memory_footprint=lambda: 1)
def slow(net, tokenizer): time.sleep(600)
list(forked.forked(net, None, slow, [{}, {}], forked.forks(net, [{}, {}])))
"""


def test_forks_end_with_a_parent_that_is_killed():
    parent = psutil.Popen([sys.executable, "-c", ALONE], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(parent.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = parent.children()
    assert len(children) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
