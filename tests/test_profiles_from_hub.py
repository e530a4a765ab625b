"""Every profile of the papers' scale, notebook by notebook, from a folder in the hub's layout, with a tiny model in place of
the large one and a few rows of everything: what proves that the way from the hub to the last stage is open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from conftest import REPO

from ultramed.data.overview import FORUMS

TINY = {
    "models": '[{name: "tiny:llama", label: tiny, template: chat}, {name: "tiny:llama-larger", label: larger, template: chat}]',
    "limit": 6,
    "prefer": "hub",
    "train.max_steps": 1,
    "train.warmup_steps": 0,  # a warm-up's first step has no rate
    "eval.max_new_tokens": 4,
    "eval.tries": 2,
    "eval.engine": "transformers",  # paper-70b asks vLLM
    "ultramedical.sample.engine": "transformers",
    "usmle.seeds": "[0]",
    "ultramedical.seeds": "[0]",
    "ultramedical.reward.seeds": 1,
    "usmle.tuning_fraction": 1.0,
    "usmle.further_arms": "[full]",
    "ultramedical.sample.max_new_tokens": 4,
    "ultramedical.preference.train.max_steps": 1,
    "ultramedical.reward.train.max_steps": 1,
    "ultramedical.rerank.n": 2,
    "ultramedical.candidates.margin": 0.0,
    "ultramedical.preference.on_policy.margin": 0.0,
    "ultramedical.eval.max_new_tokens": 4,
    "ultramedical.sft.model": "{name: 'tiny:llama', label: tiny}",
    # a tiny random model never gives a right candidate: the reference and a guesser do
    "ultramedical.candidates.pool": "[{policy: base, n: 1}, {policy: ultramed, n: 1}, {policy: reference, n: 1}, {policy: guess, n: 3}]",
    "exam": "{train_per_step: 6000, dev_per_step: 20, test_per_step: 60, general_train: 1100, general_test: 20, open_instructions: 20}",
    "ultramedical.test.skip": 0,  # the small exam has no questions to leave to other notebooks
    "cost.shape": "{hidden: 64, intermediate: 128, layers: 2, heads: 2, kv_heads: 2, words: 2048}",
    "cost.rows": 2,
    "cost.length": 16,
    "cost.steps": 3,
    "collection.planted": 6,
    "collection.map_rows": 60,
    "collection.clusters": 3,
    "open_rows": 2,
    "open_tokens": 4,
    "bench.max_new_tokens": 4,
}
ALL: list[str] = []
PROFILES = {  # notebooks; of a profile that extends another, those in which it differs
    "gpu": ["11", "20", "22", "90"],
    "medalpaca": ["10", "11", "12", "90"],
    "paper-8b": ALL,
    "paper-70b": ["22", "24", "90"],
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name in ("params", "notebooks"):
        (home / name).symlink_to(REPO / name)
    mirror = hub.build(tmp_path_factory.mktemp("hub"))
    forums = tmp_path_factory.mktemp("data") / "meadow_stackexchange"  # which is nowhere on the hub
    forums.mkdir()
    for forum in FORUMS:
        rows = [{**hub.alpaca(n, forum), "instruction": f"Which organ of {forum} is {n}?"} for n in range(42)]
        (forums / f"{forum}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"ULTRAMED_HOME": home, "ULTRAMED_HUB": mirror, "ULTRAMED_STORE": tmp_path_factory.mktemp("store")}
    return {**os.environ, **{k: str(v) for k, v in places.items()}, "ULTRAMED_DATA": str(forums.parent), "HF_HUB_OFFLINE": "1"}


def run(environment, *arguments, **more):
    changes = [f"--set={key}={value}" for key, value in {**TINY, **more}.items()]
    command = [sys.executable, "-m", "ultramed", "run", *map(str, arguments), *changes]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_dry_run_opens_every_data_set(environment, profile):
    done = run(environment, "--profile", profile, "--dry-run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
    dev = "medmcqa" if profile.startswith("medalpaca") else "medqa"  # MedQA's train rows are in Medical Meadow
    assert f"data {dev}: dev 280, train 1,120, test 42" in done.stdout


def test_a_dry_run_names_what_is_missing(environment, tmp_path):
    done = run({**environment, "ULTRAMED_HUB": str(tmp_path)}, "--profile", "paper-8b", "--dry-run")
    assert done.returncode == 1
    assert "wrong  data ultramedical: data set 'ultramedical': cannot fetch TsinghuaC3I/UltraMedical" in done.stdout
    done = run(environment, "--profile", "gpu", "--dry-run", limit=0)
    assert done.returncode == 1
    assert "wrong  data pubmedqa: 500 rows asked of its train side, it has 21" in done.stdout


def runs_to_its_end(environment, profile):
    """Notebooks that the profile is tried with, and a scorecard."""
    changes = json.dumps([f"{key}={value}" for key, value in TINY.items()])
    command = [sys.executable, str(REPO / "tests" / "one_process.py"), profile, changes, *PROFILES[profile]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (card,) = Path(environment["ULTRAMED_HOME"]).glob(f"figures/{profile}+*/scorecard.json")
    assert json.loads(card.read_text())


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "paper-8b"])  # which has a module of its own
def test_every_notebook_runs_to_its_end(environment, profile):
    runs_to_its_end(environment, profile)
