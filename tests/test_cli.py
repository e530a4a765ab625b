"""The commands as a user meets them: what they print, how they fail, and that nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUESTION = {"question": "Which organ sees?", "options": {"A": "eye", "B": "ear", "C": "nose", "D": "skin"}, "gold": "A"}


def ultramed(*args, cwd=None, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ultramed", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "160", **env})


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({**QUESTION, "id": f"q{i}"}) + "\n" for i in range(30)))
    return path


def test_help_teaches():
    done = ultramed("--help")
    assert done.returncode == 0
    for command in ("doctor", "run", "sweep", "report", "eval", "chat", "train", "data", "store"):
        assert command in done.stdout
    assert "--set train.epochs=2" in ultramed("run", "--help").stdout


def test_doctor_names_device_and_profiles():
    done = ultramed("doctor")
    assert done.returncode == 0, done.stderr
    assert "runs on" in done.stdout
    assert "laptop" in done.stdout


def test_eval_of_ones_own_questions(medalpaca, questions, tmp_path):
    done = ultramed("eval", "--model", f"base_model/{medalpaca.base.key}", "--questions", questions, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "n = 30, likelihood" in done.stdout
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["n"], result["correct"] + result["wrong"] + result["unparsed"]) == (30, 30)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": None}, "gold: `gold`: row 3 (q2) has none"),
        ({"gold": "E"}, "row 3 (q2): wanted one of A, B, C, D, or the text of one of the options, got 'E'"),
        ({"options": {"A": "x"}}, "row 3 (q2): options: "),
    ],
)
def test_a_bad_question_row(medalpaca, questions, tmp_path, change, message):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[2].update(change)
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = ultramed("eval", "--model", medalpaca.base.key, "--questions", questions, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "11", "--profile", "smoke", "--set", "train.epohcs=1"], "did you mean 'train.epochs'?"),
        (["run", "11", "--profile", "smok"], "did you mean 'smoke'?"),
        (["run", "55", "--profile", "smoke"], "no notebook '55'"),
        (["eval", "--model", "./none", "--questions", "QUESTIONS", "--out", "o"], "no such folder"),
        (["eval", "--model", "tiny:llama", "--questions", "missing.jsonl", "--out", "o"], "missing.jsonl: no such file"),
        (["eval", "--model", "tiny:llama", "--questions", "QUESTIONS", "--out", "o", "--protocol", "luck"], "protocol"),
        (["train", "sft", "--profile", "smoke", "--arm", "ful"], "did you mean 'full'?"),
        (["store", "show", "ffffffffff"], "0 artifacts match"),
        (["data", "read", "pubmedq", "--profile", "smoke"], "did you mean 'pubmedqa'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(questions, args, message):
    done = ultramed(*[questions if a == "QUESTIONS" else a for a in args])
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_question_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    done = ultramed("eval", "--model", "tiny:llama", "--questions", tmp_path / "empty.jsonl", "--out", tmp_path / "o")
    assert (done.returncode, "has no rows" in done.stderr) == (2, True)


def test_store_commands(medalpaca):
    assert medalpaca.base.key in ultramed("store", "ls").stdout
    assert "base_model" in ultramed("store", "show", medalpaca.base.key).stdout
    assert "fine" in ultramed("store", "verify", medalpaca.base.key).stdout
    assert ultramed("store", "gc", "--dry-run").returncode == 0


def test_ctrl_c_during_an_evaluation_loses_nothing(medalpaca, questions, tmp_path):
    """Stopped after some answers; the second call asks the rest, and every question is answered once."""
    questions.write_text("".join(json.dumps({**QUESTION, "id": f"q{i}"}) + "\n" for i in range(3000)))
    store = tmp_path / "store"
    args = ["eval", "--model", "tiny:llama", "--questions", questions, "--out", tmp_path / "out", "--protocol", "greedy"]
    args += ["--set", "batch_tokens=512", "--set", "max_new_tokens=4"]
    env = {**os.environ, "ULTRAMED_STORE": str(store)}
    # A job runner may start this with SIGINT ignored, which children inherit; a user's terminal does not.
    quiet = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([sys.executable, "-m", "ultramed", *map(str, args)], env=env, **quiet) as process:
        deadline = time.monotonic() + 120
        while sum(p.stat().st_size for p in store.glob("answers/.work-*/answers.jsonl")) < 2000:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "run the same command again" in stderr
    kept = len(next(store.glob("answers/.work-*/answers.jsonl")).read_text().splitlines())
    assert 0 < kept < 3000
    done = ultramed(*args, ULTRAMED_STORE=str(store))
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["id"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 3000


def test_a_store_on_a_full_disk(questions, tmp_path):
    """A real full disk (a small tmpfs) where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        args = ["eval", "--model", "tiny:llama", "--questions", questions, "--out", tmp_path / "out"]
        done = ultramed(*args, ULTRAMED_STORE=str(disk))
        assert done.returncode == 2, done.stderr
        assert "no space left on the disk" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_chat_answers(medalpaca):
    command = [sys.executable, "-m", "ultramed", "chat", f"base_model/{medalpaca.base.key}", "--max-new-tokens", "5"]
    done = subprocess.run(command, input="hello\n\n", capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "no medical advice" in done.stdout


def test_data_build_writes_a_collection_that_datasets_reads(tmp_path):
    from datasets import load_dataset

    out = tmp_path / "collection"
    done = ultramed("data", "build", "--profile", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = load_dataset(str(out), split="train")
    assert f"{len(rows)} rows in" in done.stdout
    assert set(rows["source"]) == {"exam", "open", "general"}
    assert "## Contamination" in (out / "README.md").read_text()
    again = ultramed("data", "build", "--profile", "smoke", "--out", out)
    assert again.returncode == 2
    assert "give a new folder" in again.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "a.yaml"),  # extends b.yaml, which extends it
        ("profile", "laptop", "--set", "usmle.seeds.0.x=1"),
        ("sweep", "missing.yaml"),
        ("run", "--profile", "laptop.yaml", "--dry-run"),  # a file of one's own with the name of a profile
        ("eval", "--model", "bundled:tiny", "--questions", "q.jsonl", "--out", "out", "--dtype", "float12"),
        ("chat", "--web", "--port", "99999"),
    ],
)
def test_a_slip_is_one_line_and_no_traceback(tmp_path, command):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\n")
    (tmp_path / "laptop.yaml").write_text("extends: smoke\n")
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n")
    done = ultramed(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_profile_extends_a_file_beside_it_wherever_it_is_read_from(tmp_path):
    (tmp_path / "own.yaml").write_text("extends: smoke\ntrain: {epochs: 7}\n")
    (tmp_path / "more.yaml").write_text("extends: own.yaml\n")
    done = ultramed("profile", tmp_path / "more.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"train\.epochs\s.*7", done.stdout)
