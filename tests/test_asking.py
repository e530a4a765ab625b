"""Asking by several processes (CPUs): the files of one process, whatever stops them and however many go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from ultramed.annotate.feedback import reward_feedback
from ultramed.core import config
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.schema import EvalConfig, SampleConfig, ScoringConfig
from ultramed.data.sources import dataset
from ultramed.evaluate.accuracy import answers
from ultramed.evaluate.reward_bench import pair_scores
from ultramed.evaluate.sample import samples
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.lm import models
from ultramed.train import crew, launch

SELECT = {"step1": [0, 20], "step2": [0, 20]}


@pytest.fixture(scope="module")
def one_thread():
    """How many threads add a sum up shows in its last bit, however many processes there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def both(one_thread, monkeypatch, tmp_path):
    """The files of an artifact and its metrics, made by one process and by two."""
    started = []
    real = launch.Workers
    monkeypatch.setattr(launch, "Workers", lambda *given, **more: started.append(given[1]) or real(*given, **more))

    def make(stage, *given, **inputs):
        found = []
        for count in (1, 2):
            monkeypatch.setenv(config.PROCESSES, str(count))
            art = stage(*given, **inputs)
            files = {p.name: p.read_bytes() for p in art.path.iterdir() if p.name != "manifest.json"}
            found.append((files, art.metrics))
            art.path.rename(tmp_path / f"{count}")
        assert started == [2]
        return found

    return make


@pytest.mark.parametrize("protocol", ["likelihood", "medalpaca"])
def test_answers_are_those_of_one_process(medalpaca, exam, both, protocol):
    setting = EvalConfig(protocol=protocol, max_new_tokens=5, tries=2, batch_tokens=512)
    one, two = both(answers, setting, model=medalpaca.base, questions=exam, select=SELECT, dtype="float32")
    assert one == two
    assert list(one[0]) == ["answers.jsonl"]
    assert one[1]["n"] == 40


def test_samples_are_those_of_one_process(medalpaca, exam, both):
    setting = SampleConfig(n=3, max_new_tokens=5, batch_tokens=512)
    one, two = both(samples, setting, model=medalpaca.base, questions=exam, select=SELECT, dtype="float32")
    assert one == two
    assert list(one[0]) == ["samples.jsonl"]
    assert one[1]["samples"] == 120


def test_rewards_are_those_of_one_process(smoke, medalpaca, exam, both):
    study = UltraMedical.of(smoke)
    reward = study.train_reward_model("medical")
    drawn = samples(SampleConfig(n=3, max_new_tokens=5), model=medalpaca.base, questions=exam, select=SELECT)
    one, two = both(reward_feedback, ScoringConfig(batch_tokens=512), reward=reward, drawn=drawn)
    assert one == two
    assert list(one[0]) == ["feedback.jsonl"]
    rows = [json.loads(line) for line in one[0]["feedback.jsonl"].splitlines()]
    assert [len(row["candidates"]) for row in rows] == [3] * 40
    assert len({c["score"] for row in rows for c in row["candidates"]}) > 60


def test_scores_of_pairs_are_those_of_one_process(both, monkeypatch):
    held = {"exam:step1": 16, "exam:step2": 16, "exam:step3": 16}
    study = UltraMedical.of(config.load_profile("smoke", [f"ultramedical.candidates.held_prompts.medical={json.dumps(held)}"]))
    pairs = study.make_bench("medical")
    monkeypatch.setattr("ultramed.evaluate.reward_bench.PART", 4)
    one, two = both(pair_scores, ScoringConfig(), reward=study.train_reward_model("medical"), pairs=pairs)
    assert one == two
    assert list(one[0]) == ["scores.jsonl"]
    assert one[1]["pairs"] >= 2 * crew.WORTH


def test_a_process_has_some_items_to_read(monkeypatch):
    monkeypatch.setenv(config.PROCESSES, "8")
    assert [crew.hands(n) for n in (1, 15, 16, 23, 24, 63, 64, 10_000)] == [1, 1, 2, 2, 3, 7, 8, 8]
    monkeypatch.setattr(launch, "nodes", lambda: 2)
    assert [crew.hands(n) for n in (15, 24, 63, 64)] == [1, 2, 6, 8]  # as many on either node


class Run:
    """`ultramed eval` of 2000 questions at work in a session of its own."""

    def __init__(self, folder, processes: int):
        self.ledgers = folder / "store" / "answers"
        questions = folder / "mine.jsonl"
        given = {"question": "Which vitamin prevents scurvy?", "options": {"A": "A", "B": "C"}, "gold": "B"}
        questions.write_text("".join(json.dumps({**given, "id": f"q{i}"}) + "\n" for i in range(2000)))
        command = [sys.executable, "-m", "ultramed", "eval", "--model", "tiny:llama", "--questions", questions]
        command += ["--out", folder / "out", "--protocol", "greedy", "--processes", processes]
        command += ["--set", "batch_tokens=256", "--set", "max_new_tokens=8"]
        env = {**os.environ, "ULTRAMED_STORE": str(folder / "store")}
        # A job runner may start this with SIGINT ignored, which children inherit; a user's terminal does not.
        quiet = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        self.process = subprocess.Popen([*map(str, command)], env=env, start_new_session=True, **quiet)

    def rows(self) -> list[str]:
        """Finished lines of the ledger."""
        (ledger,) = self.ledgers.glob(".work-*/answers.jsonl")
        text = ledger.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def until(self, rows: int) -> list[psutil.Process]:
        """Wait for so many; all processes at work then."""
        deadline = time.monotonic() + 120
        while not list(self.ledgers.glob(".work-*/answers.jsonl")) or len(self.rows()) < rows:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return psutil.Process(self.process.pid).children(recursive=True)


def at_work(family: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in family if p.cmdline()[-1:] == [launch.WORKER] and "accelerate.commands.launch" not in p.cmdline()]


def test_killed_while_the_others_load_it_leaves_nobody(tmp_path):
    run = Run(tmp_path, 2)
    deadline = time.monotonic() + 60
    while not (family := psutil.Process(run.process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.process.kill()
    launched = {p for parent in family for p in [parent, *parent.children(recursive=True)] if p.is_running()}
    # They load torch first, which takes a while beside other tests, and then give up on the process that started them.
    assert not psutil.wait_procs(launched, timeout=6 * crew.CONNECT)[1]


def test_values_of_any_size_are_handed_over_and_nobody_else_is_listened_to():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno()))
    value = ["ä" * 2_000_000, "x" * 9_000_000, None]
    crew._put(store, "task 1", value)
    assert crew._take(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), "task 1") == value
    assert store.num_keys() <= 1, "taken is gone (the store has a key of its own)"
    with pytest.raises(ConfigError, match="no function of this package"):
        crew._named(["os", "system"])


def test_whatever_stops_it_another_number_of_processes_goes_on(tmp_path):
    run = Run(tmp_path, 2)
    family = run.until(50)
    assert len(at_work(family)) == 2
    os.killpg(run.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert (run.process.wait(60), "run the same command again" in run.process.stderr.read()) == (130, True)
    assert not psutil.wait_procs(family, timeout=30)[1]
    kept = run.rows()
    assert 50 <= len(kept) < 1900

    run = Run(tmp_path, 3)
    workers = at_work(run.until(len(kept) + 50))
    assert len(workers) == 3
    workers[-1].kill()
    assert run.process.wait(60) == 2
    said = run.process.stderr.read()
    assert "asking over 3 processes ended with status" in said
    assert "launch.log" in said
    more = run.rows()
    assert more[: len(kept)] == kept
    assert len(kept) + 50 <= len(more) < 1950

    run = Run(tmp_path, 2)
    family = run.until(len(more) + 20)
    run.process.kill()
    assert not psutil.wait_procs(family, timeout=60)[1], "workers stop when nobody waits for them"
    most = run.rows()
    assert most[: len(more)] == more

    run = Run(tmp_path, 1)
    assert run.process.wait(120) == 0, run.process.stderr.read()
    rows = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert rows[: len(most)] == most, "what is answered is not asked again"
    assert sorted(json.loads(row)["id"] for row in rows) == sorted(f"q{i}" for i in range(2000))
    (folder,) = run.ledgers.glob("[!.]*")
    assert sorted(p.name for p in folder.iterdir()) == ["answers.jsonl", "manifest.json"]


def test_errors_of_a_process_are_told_with_its_log(smoke, fresh_store, monkeypatch):
    model = models.base_model(smoke.models[0])
    (model / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setenv(config.PROCESSES, "2")
    with pytest.raises(
        StoreError, match=r"asking over 2 processes ended with status 1: .*Safetensor.* The whole log: .*launch\.log"
    ):
        answers(EvalConfig(), model=model, questions=dataset(smoke, "exam"), select=SELECT)
    (folder,) = fresh_store.glob("answers/.work-*")
    assert "Traceback" in (folder / "launch.log").read_text()
    assert not (folder / ".launch").exists()
