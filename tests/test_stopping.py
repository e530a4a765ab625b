"""Being stopped at any moment: Ctrl-C, SIGTERM, a parent that is gone, a checkpoint that was cut off."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import REPO

from ultramed.core.config import load_profile

# What training does in a kernel: it counts signals, ends its step, and takes its time for a checkpoint.
WORK = """\
import os, time
from pathlib import Path
from ultramed.core.signals import StopSignals
log = Path(os.environ["TEST_LOG"])
def say(words):
    with log.open("a") as file:
        file.write(words + "\\n")
say("{name} begins")
with StopSignals() as stop:
    while not stop.asked:
        time.sleep(0.1)
    for _ in range(40):
        time.sleep(0.1)
    say(f"{name} saved a checkpoint, asked {{stop.asked}} time(s)")
raise KeyboardInterrupt
"""


@pytest.fixture
def running(tmp_path):
    """`ultramed run` over two such notebooks, the first of which is at work: (process, all processes under it, the log)."""
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(REPO / "params", tmp_path / "params")
    for name in ("01_first", "02_second"):
        parameters = nbformat.v4.new_code_cell(
            'profile: str = "smoke"\noverrides: list = []', metadata={"tags": ["parameters"]}
        )
        cells = [parameters, nbformat.v4.new_code_cell(WORK.format(name=name))]
        python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), tmp_path / "notebooks" / f"{name}.ipynb")
    log = tmp_path / "log"
    log.touch()
    env = {**os.environ, "ULTRAMED_HOME": str(tmp_path), "ULTRAMED_STORE": str(tmp_path / "store"), "TEST_LOG": str(log)}
    command = [sys.executable, "-m", "ultramed", "run", "--profile", "smoke", "--no-report"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
    until(lambda: "begins" in log.read_text())
    family = psutil.Process(process.pid).children(recursive=True)
    yield process, family, log
    for each in [*family, process]:
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.wait()


def until(done, seconds: float = 120) -> None:
    clock = time.monotonic()
    while not done():
        assert time.monotonic() - clock < seconds
        time.sleep(0.1)


def alive(family) -> list[int]:
    return [each.pid for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_run_that_is_stopped_saves_a_checkpoint_and_begins_nothing_more(running, number, send):
    """A terminal sends Ctrl-C to the whole group; a batch system sends SIGTERM to the command alone."""
    process, family, log = running
    send(process.pid, number)
    assert process.wait(60) == 130
    assert log.read_text().splitlines() == ["01_first begins", "01_first saved a checkpoint, asked 1 time(s)"]
    until(lambda: not alive(family), 10)


def test_what_runs_ends_with_the_command_that_started_it(running):
    process, family, log = running
    process.kill()
    until(lambda: not alive(family), 30)
    assert log.read_text() == "01_first begins\n"


def test_a_checkpoint_that_was_cut_off_is_left_out_and_the_one_before_is_taken(tmp_path, fresh_store):
    """Killed while the second checkpoint is being written: its weights are there, its optimiser and its state are not."""
    train = """
import os, signal, sys, transformers
from ultramed.core.config import load_profile
from ultramed.experiments.medalpaca import MedAlpaca
save = transformers.Trainer._save_optimizer_and_scheduler
def die(self, folder):
    if self.state.global_step == 2 and "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder)
transformers.Trainer._save_optimizer_and_scheduler = die
changes = ["train.save_steps=1", "train.global_batch_size=8"]
made = MedAlpaca.of(load_profile("smoke", changes)).train_arm("full", 0)
print(made.metrics["resumed"], made.metrics["train_loss"])
"""
    start = [sys.executable, "-c", train]
    assert subprocess.run([*start, "kill"]).returncode == -signal.SIGKILL
    ended = subprocess.run(start, capture_output=True, text=True)
    assert ended.stdout.split()[:1] == ["True"], ended.stderr


def test_a_run_is_done_again_when_a_value_of_its_profile_was_edited(tmp_path):
    from ultramed.book.runner import Job

    source, target = tmp_path / "11.ipynb", tmp_path / "book" / "notebooks" / "11.ipynb"
    target.parent.mkdir(parents=True)
    source.write_text("{}")
    target.write_text("{}")
    values = load_profile("smoke").model_dump(mode="json")
    job = Job("11", source, target, {"profile": "mine"}, values=values)
    job.stamp.write_text(f'{{"key": "{job.key()}"}}')
    assert job.fresh()
    edited = {**values, "train": {**values["train"], "epochs": 7}}
    assert not Job("11", source, target, {"profile": "mine"}, values=edited).fresh()
