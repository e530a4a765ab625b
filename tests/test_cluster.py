"""Job arrays: the same script by SLURM and without it; a real slurmctld and two slurmd where they are installed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm

from ultramed.book import cluster
from ultramed.core.errors import ConfigError

SWEEP = """\
profile: smoke
arm: lora
seeds: [0]
grid: {usmle.arms.lora.learning_rate: [1e-3, 2e-3, 4e-3]}
"""


def touch(path, code=0):
    return cluster.shlex.join([sys.executable, "-c", f"open({str(path)!r}, 'a').write('x'); raise SystemExit({code})"])


def test_tasks_and_then_the_last_one(tmp_path):
    fine = cluster.submit(
        "t", [touch(tmp_path / f"{i} a") for i in range(3)], touch(tmp_path / "last"), where="local", folder=tmp_path / "jobs"
    )
    assert fine
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["0 a", "1 a", "2 a", "last"]


def test_after_a_failure_there_is_no_last_one(tmp_path, capfd):
    tasks = [touch(tmp_path / "0"), touch(tmp_path / "1", code=3), touch(tmp_path / "2")]
    assert not cluster.submit("t", tasks, touch(tmp_path / "last"), where="local", folder=tmp_path / "jobs")
    assert (tmp_path / "2").exists()
    assert not (tmp_path / "last").exists()
    assert "task 1 failed (exit status 3)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"where": "pbs"}, "wanted slurm or local"),
        ({"where": "local", "options": ["--partition=gpu"]}, "given as name=value"),
        ({"where": "local", "options": ["time=1\n#SBATCH --x"]}, "given as name=value"),
    ],
)
def test_what_cannot_be_submitted(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        cluster.submit("t", [touch(tmp_path / "0")], touch(tmp_path / "last"), folder=tmp_path / "jobs", **given)


def test_a_sweep_as_tasks_on_this_machine(tmp_path):
    from test_cli import ultramed

    (tmp_path / "rates.yaml").write_text(SWEEP)
    done = ultramed("sweep", tmp_path / "rates.yaml", "--cluster", "local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs done" in done.stdout
    assert "has the points 0 to 2" in ultramed("sweep", tmp_path / "rates.yaml", "--only", "7").stderr


# ------------------------------------------------------------------------------------------------------- a real SLURM


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if slurm.missing:
        pytest.skip(f"SLURM is not installed (Debian: slurmctld slurmd munge); missing: {', '.join(slurm.missing)}")
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def ask_slurm(env, *command) -> str:
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout


def until(holds, seconds=90):
    for _ in range(int(seconds / 0.2)):
        if found := holds():
            return found
        time.sleep(0.2)
    raise AssertionError("it did not come about")


def test_a_sweep_survives_a_cancelled_task_and_a_drained_node(real, tmp_path):
    file = tmp_path / "rates.yaml"
    file.write_text(SWEEP.replace("[1e-3, 2e-3, 4e-3]", str([n * 1e-3 for n in range(1, 13)])))
    command = [sys.executable, "-m", "ultramed", "sweep", str(file), "--cluster", "slurm", "--wait", "-C", "time=10"]
    first = subprocess.Popen(command, env={**os.environ, **real}, stdout=subprocess.PIPE, text=True)
    running = until(lambda: ask_slurm(real, "squeue", "-h", "-t", "R", "-o", "%F_%K").split())
    ask_slurm(real, "scancel", running[-1])
    ask_slurm(real, "scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    assert first.wait(400) == 1
    assert "12 tasks" in first.stdout.read()
    second = subprocess.run(command, env={**os.environ, **real}, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    table = next((Path(os.environ["ULTRAMED_HOME"]) / "figures" / "smoke" / "tables").glob("sweep_rates.csv")).read_text()
    assert table.count(",done,") == 12
    ask_slurm(real, "scontrol", "update", "nodename=n1", "state=resume")


def test_training_over_two_nodes(real, tmp_path):
    """`srun` starts a launcher on every node of the allocation; the job's own process publishes."""
    script = tmp_path / "job.sh"
    over = "--set train.dtype=float32 --set train.micro_batch_tokens=512"
    script.write_text(
        f"#!/bin/bash\nexec {sys.executable} -m ultramed train sft --profile smoke --processes 2 --seed 7 {over}\n"
    )
    log, env = tmp_path / "log", {**os.environ, **real, "ULTRAMED_STORE": str(tmp_path / "store")}
    command = ["sbatch", "--wait", "--nodes=2", f"--output={log}", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + log.read_text()
    (art,) = (tmp_path / "store" / "sft").glob("[0-9a-f]*")
    metrics = json.loads((art / "manifest.json").read_text())["metrics"]
    assert (metrics["processes"], metrics["sharded"]) == (2, True)


def test_at_its_time_limit_a_task_is_told_and_queued_again(real, tmp_path, monkeypatch):
    work = tmp_path / "work.py"
    work.write_text(
        "import pathlib, signal, sys, time\n"
        f"told = pathlib.Path({str(tmp_path / 'told')!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: (told.write_text('checkpoint'), sys.exit(1)))\n"
        "time.sleep(300)\n"
    )
    for name, value in real.items():
        monkeypatch.setenv(name, value)
    tasks = [cluster.shlex.join([sys.executable, str(work)])]
    short = ["time=1", "signal=B:USR1@55"]
    cluster.submit("limit", tasks, touch(tmp_path / "last"), where="slurm", folder=tmp_path / "jobs", options=short)
    until(lambda: (tmp_path / "told").exists())
    shown = until(lambda: [s for s in ask_slurm(real, "scontrol", "show", "job").split("\n\n") if "Restarts=1" in s])
    assert "JobState=PENDING" in shown[0]
    ask_slurm(real, "scancel", "--name=limit,limit-last")
