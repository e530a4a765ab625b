"""Every test works in a store and a home of its own; the repository is only read."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

import ultramed  # noqa: F401 (sets what libraries read once, before a test module loads one of them)

REPO = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub is a wrong test
settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing on shared cores
settings.load_profile("any machine")
if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # the cores are shared out among the processes
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // count))
# Modules that start processes, books, servers or real models, the longest first: they begin, so that no process of
# `pytest -n 2 --dist loadfile` ends alone, and `make test FAST=1` leaves them out.
SLOW = (
    *("test_notebooks", "test_lm_eval", "test_profiles_from_hub", "test_paper_8b_from_hub", "test_launch", "test_bench"),
    *("test_asking", "test_plan", "test_cli", "test_server", "test_cli_data", "test_sft", "test_vllm", "test_preference"),
    *("test_cluster", "test_sweep", "test_stopping", "test_held_out", "test_agreement", "test_scale", "test_chat"),
    "test_ahead",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session", autouse=True)
def places(tmp_path_factory):
    """A home with the repository's params and notebooks, and an empty store, for this process and its children."""
    home = tmp_path_factory.mktemp("home")
    for name in ("params", "notebooks"):
        (home / name).symlink_to(REPO / name)
    store = os.environ.get("ULTRAMED_TEST_STORE") or str(tmp_path_factory.mktemp("store"))
    os.environ["ULTRAMED_HOME"], os.environ["ULTRAMED_STORE"] = str(home), store
    return home


@pytest.fixture
def fresh_store(tmp_path, monkeypatch):
    """An empty store for this test alone."""
    monkeypatch.setenv("ULTRAMED_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="session")
def smoke(places):
    from ultramed.core.config import load_profile

    return load_profile("smoke")


@pytest.fixture(scope="session")
def medalpaca(smoke):
    """The tiny model of the smoke profile."""
    from ultramed.core.log import quiet_libraries
    from ultramed.core.memory import settle
    from ultramed.experiments.medalpaca import MedAlpaca

    quiet_libraries()
    settle()
    return MedAlpaca.of(smoke)


@pytest.fixture(scope="session")
def tokenizer(medalpaca):
    from ultramed.lm.models import load_tokenizer

    return load_tokenizer(medalpaca.base)


@pytest.fixture(scope="session")
def exam(smoke):
    from ultramed.data.sources import dataset

    return dataset(smoke, "exam")


@pytest.fixture(scope="session")
def data():
    """The folder of real data sets, or a skip."""
    if not os.environ.get("ULTRAMED_DATA"):
        pytest.skip("ULTRAMED_DATA is not set: no real data sets at hand")
    return Path(os.environ["ULTRAMED_DATA"])
