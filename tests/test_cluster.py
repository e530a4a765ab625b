"""Job arrays: the same script by SLURM and without it; a real slurmctld and slurmd where they are installed."""

import sys

import pytest

from ultramed import cluster
from ultramed.schema import ConfigError

SWEEP = """\
profile: smoke
arm: lora
seeds: [0]
grid: {train.learning_rate: [1e-3, 2e-3, 4e-3]}
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
    env = {"ULTRAMED_FIGURES": str(tmp_path / "figures")}
    done = ultramed("sweep", tmp_path / "rates.yaml", "--cluster", "local", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs done" in done.stdout
    assert "has the points 0 to 2" in ultramed("sweep", tmp_path / "rates.yaml", "--only", "7").stderr
