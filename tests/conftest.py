"""Every test works in a store and a home of its own; the repository is only read."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub is a wrong test


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
    from ultramed.experiments.medalpaca import MedAlpaca

    quiet_libraries()
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
