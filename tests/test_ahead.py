"""Stages made ahead by several processes: the notebooks find all of them, and what goes wrong is told."""

import io
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from rich.console import Console

from ultramed.book.ahead import make_ahead
from ultramed.core.config import load_profile, profiles
from ultramed.core.errors import StoreError
from ultramed.core.store import root
from ultramed.evaluate.rerank import Votes
from ultramed.experiments.ahead import tasks_of
from ultramed.experiments.ultramedical import DOMAINS, UltraMedical

BOOK = ("11", "21", "22", "23", "24", "25", "26")
SHORT = [
    'models=[{name: "tiny:llama", label: tiny, template: chat}]',
    "ultramedical.rerank.temperatures=[0.7]",
    "ultramedical.reward.seeds=2",
    "ultramedical.reward.arms={mixed: {medical: 0, general: 4}}",
]


@pytest.fixture
def store(tmp_path, monkeypatch, places):
    monkeypatch.setenv("ULTRAMED_STORE", str(tmp_path / "store"))


def made() -> set[str]:
    return {path.parent.name for path in root().glob("*/*/manifest.json")}


@pytest.mark.parametrize("name", profiles())
def test_every_profile_has_tasks_and_asks_for_nothing_before_they_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAMED_STORE", str(tmp_path / "store"))
    tasks = tasks_of(load_profile(name), BOOK)
    assert len({(task.notebooks, task.what) for task in tasks}) == len(tasks) > 20
    for number in BOOK:
        assert all(number in task.notebooks for task in tasks_of(load_profile(name), [number]))
    assert [task.what for task in tasks_of(load_profile(name), ["21"])][-1].startswith("pairs of")
    assert not (tmp_path / "store").exists()


def test_a_notebook_finds_what_was_made_ahead(store):
    output = io.StringIO()
    assert make_ahead(["24", "25"], "smoke", SHORT, 2, Console(file=output))
    before, study = made(), UltraMedical.of(load_profile("smoke", SHORT))
    for domain in DOMAINS:
        study.score_pairs("mixed", study.make_bench(domain))
    votes = Votes(
        {seed: study.score(s, seed) for seed, s in study.sample_test(lambda s: study.train_sft("ultramix", s)).items()}
    )
    votes.select_all(like=study.examine_policy("ultramix", seeds=study.rerank_seeds))
    study.examine_policy("control", seeds=study.rerank_seeds)
    study.sample_dev(study.train_sft("ultramix", 0), 0.7)
    assert made() == before
    assert output.getvalue() == ""


def test_what_fails_is_told_and_left_to_its_notebook(store):
    output = io.StringIO()
    many = 'ultramedical.candidates.prompts={medical: {"exam:step1": 4000}, general: {"exam:general": 8}}'
    assert not make_ahead(["21"], "smoke", [*SHORT, many], 2, Console(file=output, width=200))
    told = output.getvalue()
    assert "not made ahead  candidates, medical: ConfigError" in told
    assert "general" not in told, "the others are made"


def workers(pid: int | None = None) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children() if "spawn_main" in " ".join(p.cmdline())]


def when_there_are_workers(call) -> None:
    def watch() -> None:
        while not (found := workers()):
            time.sleep(0.05)
        call(found)

    threading.Thread(target=watch, daemon=True).start()


def test_a_killed_process_is_an_error_that_says_what_to_do(store):
    when_there_are_workers(lambda found: found[0].kill())
    with pytest.raises(StoreError, match=r"most likely for want of memory.* --ahead 1"):
        make_ahead(["24"], "smoke", SHORT, 2, Console(file=io.StringIO()))
    assert not workers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_processes(store, number):
    """In a process of its own: a signal that comes too early would end the tests."""
    command = [sys.executable, "-m", "ultramed", "run", "24", "--profile", "smoke", "--ahead", "2", "--no-report"]
    with subprocess.Popen([*command, *(f"--set={change}" for change in SHORT)], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "ahead, 2 processes" in line:
                break
        begun = workers(process.pid)
        while len(begun) < 2:
            time.sleep(0.05)
            begun = workers(process.pid)
        process.send_signal(number)
        assert process.wait(60) != 0
        assert psutil.wait_procs(begun, timeout=10)[1] == []
