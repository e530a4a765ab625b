"""Training over two processes (gloo on CPUs): the curve of one process, one artifact, errors and interruptions in order."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPO
from safetensors.torch import load_file

from ultramed.core import config, store
from ultramed.core.errors import ConfigError
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.train import launch
from ultramed.train.sft import sft

FP32 = ["train.dtype=float32", "ultramedical.preference.train.dtype=float32", "ultramedical.reward.train.dtype=float32"]
MORE = [
    "train.mixture={'exam:step1': 40, 'exam:step2': 24}",
    "train.micro_batch_tokens=200",
    "ultramedical.preference.prompts={medical: {'exam:step1': 8}}",
    "ultramedical.preference.train.micro_batch_tokens=256",
    "ultramedical.candidates.prompts.medical={'exam:step1': 20, 'exam:step2': 20}",
    "ultramedical.reward.train.micro_batch_tokens=256",
]


@pytest.fixture(scope="module")
def profile(places):
    return config.load_profile("smoke", [*FP32, *MORE])


@pytest.fixture(scope="module")
def pair(profile, tmp_path_factory):
    """Make one artifact twice, by one process and by two: the maker gets a store that has what it starts from."""

    def both(make):
        with pytest.MonkeyPatch.context() as patch:
            made = [make()]
            patch.setenv(config.PROCESSES, "2")
            made[0].path.rename(aside := tmp_path_factory.mktemp("one") / "art")
            made.append(make())
        return store.Artifact(made[0].stage, made[0].key, aside), made[1]

    return both


def curve(art) -> list[float]:
    return [row["loss"] for row in map(json.loads, open(art / "log.jsonl")) if "loss" in row]


def assert_same(one, two, sharded: bool = True):
    assert one.key == two.key  # how many worked on it is not what it is
    assert "processes" not in one.metrics
    assert (two.metrics["processes"], two.metrics["sharded"]) == (2, sharded)
    assert curve(two) == pytest.approx(curve(one), abs=1e-4)
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())
    for name in (p.name for p in one.path.glob("*.safetensors")):
        a, b = load_file(one / name), load_file(two / name)
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
        assert max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-3


def test_full_fine_tuning_is_sharded(profile, pair):
    medalpaca = MedAlpaca.of(profile)
    one, two = pair(lambda: medalpaca.train_arm("full", learning_rate=1e-3))
    assert_same(one, two)
    assert len(curve(two)) == 8
    assert curve(two)[-1] < curve(two)[0] - 0.5


def test_the_best_evaluation_of_sharded_training_is_what_is_published(profile, pair):
    """At a rate at which the loss rises again, one process and two choose the same step and its weights."""
    changes = {"learning_rate": 3e-2, "held_out": 0.25, "eval_steps": 2, "epochs": 6, "lr_scheduler_type": "constant"}
    changes |= {"mixture": {"exam:step1": 12, "exam:step2": 12}, "warmup_ratio": 0.0}
    one, two = pair(lambda: MedAlpaca.of(profile).train_arm("full", **changes))
    assert (two.metrics["processes"], two.metrics["sharded"]) == (2, True)
    assert one.metrics["best_step"] == two.metrics["best_step"] < two.metrics["steps"] == 18
    assert two.metrics["held_out_loss"] == pytest.approx(one.metrics["held_out_loss"], rel=1e-2)
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 3e-2, "a step of Adam is that large"


@pytest.mark.parametrize("arm", ["dpo", "kto"])
def test_preference_learning_is_sharded_reference_and_all(profile, pair, arm):
    assert_same(*pair(lambda: UltraMedical.of(profile).train_preference("ultramed", arm)))


def test_reward_models_are_sharded(profile, pair):
    one, two = pair(lambda: UltraMedical.of(profile).train_reward_model("medical"))
    assert_same(one, two)
    assert "score.weight" in load_file(two / "model.safetensors")


def test_adapters_are_trained_data_parallel(profile, pair):
    medalpaca = MedAlpaca.of(profile)
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]}
    assert_same(*pair(lambda: medalpaca.train_arm("lora", learning_rate=1e-2, lora=lora)), sharded=False)


def test_errors_of_the_workers_are_errors_here(profile, monkeypatch):
    medalpaca = MedAlpaca.of(profile)
    monkeypatch.setenv(config.PROCESSES, "2")
    setting = config.arm_config(profile, "full")
    with pytest.raises(ConfigError, match="NF4 training does nothing on a CPU"):
        sft(setting.model_copy(update={"method": "lora_4bit"}), model=medalpaca.base, data=medalpaca.training_rows(setting))
    with pytest.raises(ConfigError, match="global_batch_size 5 does not divide by 2 processes"):
        sft(setting.model_copy(update={"global_batch_size": 5}), model=medalpaca.base, data=medalpaca.training_rows(setting))
    monkeypatch.setenv(config.PROCESSES, "two")
    with pytest.raises(ConfigError, match="wanted a number of processes, got 'two'"):
        launch.processes()


def started(tmp_path, *more):
    """The command line at work with two processes, and a function that waits until it has made some steps."""
    rows = "train.mixture={'exam:step1': 60, 'exam:step2': 60, 'exam:step3': 60}"
    over = [a for o in [*FP32, rows, "train.epochs=3", "train.save_steps=20"] for a in ("--set", o)]
    env = {**os.environ, "ULTRAMED_PROGRESS_FILE": str(tmp_path / "progress")}
    command = [sys.executable, "-m", "ultramed", "train", "sft", "--profile", "smoke", "--processes", "2", *over, *more]
    child = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def until(step):
        for _ in range(900):
            found = (tmp_path / "progress").read_text() if (tmp_path / "progress").exists() else ""
            if (n := re.search(r"(\d+)/", found)) and int(n[1]) >= step:
                return
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.1)
        raise AssertionError("no step was made")

    return child, until


def only(stage: str):
    (found,) = [a for a in store.artifacts() if a.stage == stage]
    return found


def test_interrupted_it_goes_on_from_its_checkpoint(fresh_store, tmp_path):
    child, until = started(tmp_path)
    until(5)
    os.killpg(child.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "run the same command again" in err
    assert not [a for a in store.artifacts() if a.stage == "sft"]
    (tmp_path / "progress").unlink()
    child, _ = started(tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert only("sft").metrics["resumed"]
    whole = only("sft").path.rename(tmp_path / "interrupted")
    child, _ = started(tmp_path)
    child.communicate(timeout=120)
    a, b = load_file(whole / "model.safetensors"), load_file(only("sft") / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_worker_that_dies_is_reported_and_replaced(fresh_store, tmp_path):
    child, until = started(tmp_path)
    until(25)
    workers = [p for p in psutil.Process(child.pid).children(recursive=True) if p.cmdline()[-1].endswith(launch.WORKER)]
    workers = [p for p in workers if "accelerate.commands.launch" not in p.cmdline()]
    assert len(workers) == 2
    workers[-1].kill()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "training over 2 processes ended with status" in err
    assert "launch.log" in err
    child, _ = started(tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert only("sft").metrics["resumed"]
    assert not (only("sft") / "launch.log").exists()


def test_workers_stop_when_nobody_waits_for_them(fresh_store, tmp_path):
    child, until = started(tmp_path)
    until(5)
    family = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert len(gone) >= 3


@pytest.mark.parametrize(("name", "machines", "count"), [("fsdp_1x8", 1, 8), ("fsdp_8x8", 8, 64)])
def test_accelerate_reads_the_configurations(name, machines, count):
    found = load_config_from_file(str(REPO / "params" / "accelerate" / f"{name}.yaml"))
    assert (found.num_machines, found.num_processes) == (machines, count)
    assert found.fsdp_config["fsdp_version"] == 2
