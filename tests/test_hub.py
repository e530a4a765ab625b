"""Every data set of the catalogue from a folder in the hub's layout, and what is known to go wrong with some of them."""

import json
import re

import hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultramed.core.errors import ConfigError
from ultramed.data.catalog import SOURCES
from ultramed.data.rows import read_pairs, read_questions, read_rows
from ultramed.data.sources import SourceConfig, source

FROM_HUB = sorted(name for name, spec in SOURCES.items() if spec.hub)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return hub.build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def _from_the_mirror(mirror, monkeypatch):
    monkeypatch.setenv("ULTRAMED_HUB", str(mirror))
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)


@pytest.mark.parametrize("name", FROM_HUB)
def test_every_set_is_read_from_the_hubs_own_columns(name):
    art = source(SourceConfig(name=name, prefer="hub"))
    assert set(art.metrics["counts"]) == {*SOURCES[name].hub, *SOURCES[name].held}
    assert all(art.metrics["counts"].values())
    assert art.metrics["rejected"] == 0
    for side in art.metrics["counts"]:
        rows = (read_pairs if SOURCES[name].kind == "pairs" else read_rows)(art / f"{side}.parquet")
        assert all(row["source"] == name for row in rows)


def test_a_pinned_revision_is_a_commit_and_every_set_of_a_repository_has_the_same():
    pinned = {}
    for spec in SOURCES.values():
        for hub_id, *_ in spec.hub.values():
            pinned.setdefault(hub_id, set()).add(spec.revision)
    assert all(len(revisions) == 1 for revisions in pinned.values()), pinned
    commits = [revision for [revision] in pinned.values() if revision]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)
    assert len(commits) == len(set(commits)), "no two repositories share a commit"
    for name in ("medqa", "medmcqa", "pubmedqa", "mmlu_medical", "gsm8k", "medical_rewardbench", "rewardbench"):
        assert SOURCES[name].revision, f"what models are examined on is pinned: {name}"


def test_a_revision_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.delenv("ULTRAMED_HUB")
    with pytest.raises(ConfigError, match=f"cannot fetch openai/gsm8k at revision {SOURCES['gsm8k'].revision} from the hub"):
        source(SourceConfig(name="gsm8k", prefer="hub"))


def test_medqa_holds_its_dev_side_out_of_train():
    art = source(SourceConfig(name="medqa", prefer="hub"))
    sides = {side: {row["question"] for row in read_questions(art / f"{side}.parquet")} for side in ("train", "dev", "test")}
    assert not sides["train"] & sides["dev"]
    assert (len(sides["train"]), len(sides["dev"])) == (1120, 280)


def test_golds_are_counted_from_where_each_copy_counts(mirror):
    for name in ("medmcqa", "mmlu_medical"):
        rows = read_questions(source(SourceConfig(name=name, prefer="hub")) / "test.parquet")
        for row in rows:
            number = int(row["question"].split()[1])
            assert row["gold"] == "ABCD"[number % 4]
    spec = SOURCES["medmcqa"]
    from ultramed.data.sources import adapt

    good, bad = adapt(spec, [hub.medmcqa(n, "x") for n in range(8)], "test", "x", from_hub=False)
    assert (len(good), len(bad)) == (6, 2), "read as if it counted from 1, every fourth is no option"


def test_a_copy_that_counts_otherwise_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "openlifescienceai/medmcqa"
    folder.mkdir(parents=True)
    (tmp_path / "SAMPLE").touch()
    for split in ("train", "validation"):
        rows = [{**hub.medmcqa(n, split), "cop": n % 4 + 1} for n in range(240)]
        (folder / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"data/{split}-00000-of-00001.parquet")
    monkeypatch.setenv("ULTRAMED_HUB", str(tmp_path))
    with pytest.raises(ConfigError, match=r"10 of 48 rows cannot be read, the first: .*cop: 4 is no option of four"):
        source(SourceConfig(name="medmcqa", prefer="hub"))


def test_pubmedqa_is_parted_by_the_official_ids():
    art = source(SourceConfig(name="pubmedqa", prefer="hub"))
    ids = {side: {row["id"].split(":")[1] for row in read_questions(art / f"{side}.parquet")} for side in ("train", "test")}
    assert ids["test"] == set(hub.IDS[:21])
    assert not ids["train"] & set(hub.IDS)
    assert len(hub.IDS) == len(set(hub.IDS)) == 500


def test_preference_prompts_of_the_test_side_are_left_out_of_train():
    art = source(SourceConfig(name="ultramedical_preference", prefer="hub"))
    assert art.metrics["counts"] == {"train": 41, "dev": 42, "test": 42}
    assert {row["subset"] for row in read_pairs(art / "test.parquet")} == {"easy", "hard", "length", "human"}


def test_a_folder_that_changed_is_read_anew(tmp_path, monkeypatch):
    """`datasets` would give the rows of another folder of the same name out of its cache."""
    monkeypatch.setenv("ULTRAMED_HUB", str(hub.build(tmp_path, 9)))
    assert source(SourceConfig(name="rewardbench", prefer="hub")).metrics["counts"] == {"test": 9}


def test_the_usmle_comes_without_its_pictures():
    rows = read_questions(source(SourceConfig(name="usmle_self_assessment", prefer="hub")) / "test.parquet")
    assert {step: sum(row["subset"] == step for row in rows) for step in ("step1", "step2", "step3")} == {
        "step1": 41,
        "step2": 42,
        "step3": 42,
    }


def test_another_number_of_rows_is_an_error_but_in_a_sample(mirror, monkeypatch, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "cais").symlink_to(mirror / "cais")
    monkeypatch.setenv("ULTRAMED_HUB", str(whole))
    with pytest.raises(ConfigError, match="42 rows, 285 expected"):
        source(SourceConfig(name="mmlu", prefer="hub"))


def test_local_files_that_are_a_part_say_so(data, monkeypatch, caplog):
    monkeypatch.setenv("ULTRAMED_DATA", str(data))
    with caplog.at_level("INFO"):
        art = source(SourceConfig(name="ultramedical"))
    assert art.metrics["local"]
    if caplog.text:  # made anew in this run
        assert "50 rows of examples.jsonl.gz stand for the hub's 409593" in caplog.text
    assert not source(SourceConfig(name="ultramedical", prefer="hub")).metrics["local"]


def test_what_is_nowhere_says_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ULTRAMED_HUB", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot fetch GBaker.*or \$ULTRAMED_DATA/medqa/\{"):
        source(SourceConfig(name="medqa", prefer="hub"))
    assert json.dumps(SOURCES["medqa"].where())
