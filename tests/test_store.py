import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.core import garbage, store
from ultramed.core.errors import StoreError
from ultramed.core.garbage import gc
from ultramed.core.schema import ModelConfig, Strict
from ultramed.core.store import Artifact, check, digest, find, stage


class Size(Strict):
    n: int = 3
    label: str = "x"


CALLS: list[int] = []


@stage(version=1)
def numbers(out: Path, config: Size) -> dict:
    CALLS.append(config.n)
    (out / "numbers.txt").write_text("\n".join(map(str, range(config.n))))
    return {"sum": sum(range(config.n))}


@stage(version=1)
def doubled(out: Path, config: Size, *, source: Artifact) -> dict:
    text = (source / "numbers.txt").read_text().split()
    (out / "doubled.txt").write_text(" ".join(str(2 * int(t)) for t in text))
    return {}


@stage(version=1)
def slow(out: Path, config: Size) -> dict:
    with open(out.parent / "calls.txt", "a") as fh:
        fh.write("x")
    time.sleep(1)
    (out / "done.txt").write_text("done")
    return {}


@stage(version=1)
def fragile(out: Path, config: Size) -> dict:
    seen = (out / "seen.txt").read_text() if (out / "seen.txt").exists() else ""
    (out / "seen.txt").write_text(seen + "x")
    if len(seen) < 2:
        raise KeyboardInterrupt
    return {"attempts": len(seen) + 1}


def test_asking_twice_works_once(fresh_store):
    CALLS.clear()
    first, second = numbers(Size()), numbers(Size())
    assert first == second
    assert CALLS == [3]
    assert first.metrics == {"sum": 3}
    assert numbers(Size(n=4)).key != first.key


def test_manifest_says_how_it_came_about(fresh_store):
    m = numbers(Size()).manifest
    assert m["config"] == {"n": 3, "label": "x"}
    assert set(m) >= {"versions", "git", "wall_seconds", "peak_memory_bytes", "files", "started", "inputs", "key"}
    assert m["versions"]["torch"].startswith("2.13.0")
    assert m["peak_memory_bytes"] > 1e6
    assert str(Path.home()) not in json.dumps(m)


def test_the_manifest_names_the_gpu_that_was_used(fresh_store, monkeypatch):
    import torch

    assert "," not in numbers(Size()).manifest["machine"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert numbers(Size(n=4)).manifest["machine"].endswith(", NVIDIA H200")


def test_lineage_goes_back_to_the_first_input(fresh_store):
    a = numbers(Size())
    b = doubled(Size(), source=a)
    assert [m["stage"] for m in b.lineage()] == ["doubled", "numbers"]
    assert doubled(Size(), source=numbers(Size(n=5))).key != b.key


def test_two_processes_one_works_the_other_waits(fresh_store):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=slow, args=(Size(),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    assert (fresh_store / "slow" / "calls.txt").read_text() == "x"


def test_interrupted_work_is_kept_and_goes_on(fresh_store):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fragile(Size())
    assert not list(fresh_store.glob("fragile/[!.]*")), "nothing half-done is published"
    assert fragile(Size()).metrics == {"attempts": 3}


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_artifact_is_noticed_and_made_again(fresh_store, damage):
    CALLS.clear()
    art = numbers(Size())
    target = art / ("manifest.json" if damage == "manifest" else "numbers.txt")
    if damage == "delete":
        target.unlink()
    else:
        target.write_text("{" if damage == "manifest" else "0")
    assert check(art.path)
    again = numbers(Size())
    assert CALLS == [3, 3]
    assert not check(again.path)
    assert list(art.path.parent.glob(".corrupt-*")), "the damaged folder is kept aside"


def test_a_flipped_byte_of_the_same_length_is_noticed_and_made_again(fresh_store):
    CALLS.clear()
    art = numbers(Size())
    (art / "numbers.txt").write_text("0\n1\n9")
    assert "sha256" in check(art.path)[0]
    with pytest.raises(StoreError, match="damaged and was set aside"):
        store.find(art.key)
    assert numbers(Size()).manifest["files"] == art.manifest["files"]
    assert CALLS == [3, 3]
    (art / "numbers.txt").write_text("0\n1\n9")
    numbers(Size())
    assert CALLS == [3, 3, 3]


def test_content_is_read_once_while_files_stay_as_they_are(fresh_store, monkeypatch):
    read = []
    art = numbers(Size())
    monkeypatch.setattr(store, "sha256", lambda path: read.append(path.name) or art.manifest["files"][path.name]["sha256"])
    numbers(Size())
    assert not read, "its hash was taken when it was made"
    os.utime(art / "numbers.txt")
    for _ in range(3):
        numbers(Size())
    assert read == ["numbers.txt"]


def test_what_a_model_is_called_makes_no_other_model_of_it():
    a, b = (ModelConfig(name="tiny:llama", label=label) for label in ("mine", "theirs"))
    assert store.digest(a) == store.digest(b) != store.digest(ModelConfig(name="tiny:other", label="mine"))
    assert a.model_dump()["label"] == "mine"


def test_full_disk_is_one_sentence_and_loses_nothing(fresh_store, monkeypatch):
    kept = numbers(Size(n=7))

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(StoreError, match=r"no space left.*goes on where it stopped.*ULTRAMED_STORE"):
        numbers(Size(n=8))
    monkeypatch.undo()
    assert not check(kept.path)
    assert not list((kept.path.parent).glob("[!.]*8"))


def test_find_by_prefix(fresh_store):
    art = numbers(Size())
    assert find(art.key[:6]) == art == find(f"numbers/{art.key}")
    with pytest.raises(StoreError, match="0 artifacts match"):
        find("ffffffff")


def test_gc_deletes_leftovers_and_leaves_what_is_used(fresh_store):
    source = numbers(Size())
    kept = doubled(Size(), source=source)
    with pytest.raises(KeyboardInterrupt):
        fragile(Size())
    paths, _ = gc(dry_run=True)
    assert [p.name for p in paths] == [f".work-{k}" for k in [paths[0].name.removeprefix(".work-")]]
    gc()
    assert not list(fresh_store.glob("fragile/.work-*"))
    import os

    old = time.time() - 10 * 86400
    os.utime(source.path, (old, old))  # old, but an input of something young
    assert gc(unused_days=5)[0] == []
    os.utime(kept.path, (old, old))
    assert len(gc(unused_days=5)[0]) == 2


def test_a_stage_refuses_what_it_cannot_hash():
    with pytest.raises(TypeError, match="cannot be configured"):
        digest(object())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_keys_do_not_depend_on_the_order_of_a_dictionary(data):
    assert digest(data) == digest(dict(reversed(list(data.items()))))


@given(json_values, json_values)
def test_different_values_have_different_keys(a, b):
    if json.dumps(store.canonical(a), sort_keys=True) != json.dumps(store.canonical(b), sort_keys=True):
        assert digest(a) != digest(b)


def test_gc_leaves_work_that_somebody_has_taken_up_meanwhile(fresh_store, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fragile(Size())
    (work,) = gc(dry_run=True)[0]
    lock = store.FileLock(work.with_name(work.name.replace(".work-", ".lock-")), is_singleton=False)
    found = garbage.garbage()
    monkeypatch.setattr(garbage, "garbage", lambda days: found)  # looked at before, deleted after
    with lock:
        assert gc() == ([], 0)
        assert work.exists()
    assert gc()[0] == [work]


def test_gc_by_age_goes_on_where_an_input_is_gone(fresh_store):
    source = numbers(Size())
    kept = doubled(Size(), source=source)
    import shutil

    shutil.rmtree(source.path)
    assert gc(unused_days=1)[0] == []
    assert kept.path.exists()
