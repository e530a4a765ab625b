"""A stage is a function from a configuration to a folder; ask twice and the second time is free.

    @stage(version=1)
    def sft(out: Path, config: TrainConfig, *, model: Artifact, data: Artifact) -> dict:
        ...write files below `out`, return metrics...

    art = sft(config, model=base, data=rows)      # Artifact: art.path, art.key, art.manifest

The key is a hash of stage name, stage version, configuration and the inputs' keys. While a stage works, its files are
in `.work-<key>`, which survives an interruption and is handed to the next attempt (checkpoints, ledgers). When it is
done, every file is hashed, `manifest.json` is written last, and one rename publishes the folder. A lock makes a second
process that asks for the same key wait for the first.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel

from ultramed.core.config import home
from ultramed.core.errors import StoreError
from ultramed.core.progress import stop_if_asked

log = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "numpy")
MANIFEST = "manifest.json"


def root() -> Path:
    """Where artifacts live: `ULTRAMED_STORE`, else `store/` in the repository."""
    return Path(os.environ.get("ULTRAMED_STORE") or home() / "store").resolve()


@dataclass(frozen=True)
class Artifact:
    """A published folder. `key` names its content, `manifest` says how it came about."""

    stage: str
    key: str
    path: Path

    @property
    def manifest(self) -> dict:
        return json.loads((self.path / MANIFEST).read_text())

    @property
    def metrics(self) -> dict:
        return self.manifest["metrics"]

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def lineage(self) -> list[dict]:
        """This artifact's manifest and those of everything it was made from, nearest first, each once."""
        seen, queue = {}, [self]
        while queue:
            art = queue.pop(0)
            if art.key not in seen:
                seen[art.key] = art.manifest
                queue += [find(ref["key"]) for ref in art.manifest["inputs"].values()]
        return list(seen.values())


def canonical(value: Any) -> Any:
    """Plain JSON data of anything a stage may be configured with."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude=getattr(type(value), "UNKEYED", None))
    if isinstance(value, Artifact):
        return {"stage": value.stage, "key": value.key}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage cannot be configured with a {type(value).__name__}: {value!r:.80}")


def digest(value: Any) -> str:
    """16 hex digits of the canonical form; the same for equal values, whatever the order of their keys."""
    text = json.dumps(canonical(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with open(path, "rb") as fh:
        return hashlib.file_digest(fh, "sha256").hexdigest()


def stage(version: int, *, also=None):
    """Turn `fn(out, config, **inputs) -> metrics` into a memoised stage.

    Raise `version` whenever the code changes what comes out. `also(config)` may add facts to the key that are not in
    the configuration, such as a template's text or a file's hash.
    """

    def decorate(fn):
        name = fn.__name__

        @functools.wraps(fn)
        def run(config=None, **inputs) -> Artifact:
            refs = {k: v for k, v in inputs.items() if isinstance(v, Artifact)}
            plain = {k: v for k, v in inputs.items() if not isinstance(v, Artifact)}
            recipe = {"stage": name, "version": version, "config": canonical(config), "options": canonical(plain)}
            if also is not None:
                recipe["also"] = canonical(also(config))
            key = digest({**recipe, "inputs": {k: v.key for k, v in refs.items()}})
            final = root() / name / key
            art = Artifact(name, key, final)
            if _usable(final):
                os.utime(final)  # `store gc --unused-for` goes by this
                return art
            stop_if_asked()
            final.parent.mkdir(parents=True, exist_ok=True)
            with _lock(final.parent / f".lock-{key}", name):
                if not _usable(final):  # another process may have finished while this one waited
                    _make(fn, art, config, inputs, {**recipe, "inputs": canonical(refs)})
            return art

        run.__wrapped__ = fn
        return run

    return decorate


def _lock(path: Path, name: str):
    """The lock, to be released by a `with`."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        log.warning("another process is working on this %s; waiting for it", name)
        return lock.acquire()


def _usable(path: Path) -> bool:
    """Whether a published artifact is there and whole. A damaged one is moved aside, so that it is made again."""
    if not path.exists():
        return False
    known = _verified(path)
    problems = check(path, known)
    if not problems:
        _note_verified(path, known)
        return True
    aside = path.with_name(f".corrupt-{path.name}-{time.time_ns()}")
    log.warning("%s/%s is damaged (%s); moved to %s and made again", path.parent.name, path.name, problems[0], aside.name)
    path.rename(aside)
    return False


def _stat(file: Path) -> list[int]:
    """What a change of a file's content changes, too."""
    facts = file.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def _note_path(path: Path) -> Path:
    return root() / ".verified" / f"{path.parent.name}-{path.name}.json"


def _verified(path: Path) -> dict[str, list[int]]:
    """file -> `_stat` of it when its content was last compared with the manifest."""
    try:
        return json.loads(_note_path(path).read_text())
    except (OSError, ValueError):
        return {}


def _note_verified(path: Path, known: dict[str, list[int]] | None = None) -> None:
    """Remember that the files are as published, so that the next process need not read them to know it."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    seen = {name: _stat(path / name) for name in files}
    if seen != known:
        write_text(_note_path(path), json.dumps(seen))


def _make(fn, art: Artifact, config, inputs: dict, recipe: dict) -> None:
    work = art.path.with_name(f".work-{art.key}")
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        work.mkdir(exist_ok=True)
        with PeakMemory() as memory:
            metrics = fn(work, config, **inputs) or {}
        files = {
            str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(work.rglob("*"))
            if p.is_file() and p.name != MANIFEST
        }
        manifest = {
            **recipe,
            "key": art.key,
            "metrics": canonical(metrics),
            "files": files,
            "started": started.isoformat(),
            "wall_seconds": round(time.perf_counter() - clock, 2),
            "peak_memory_bytes": memory.peak,
            **environment(),
            "machine": machine(),
        }
        write_json(work / MANIFEST, manifest)
        os.rename(work, art.path)
        _fsync(art.path.parent)
        _note_verified(art.path)
    except Exception as err:
        if _disk_full(err):
            raise StoreError(
                f"no space left on the disk that holds the store ({root()}) while making {art.stage}. Nothing that was "
                "published is touched, and this stage goes on where it stopped once there is room: free some "
                "(`ultramed store gc`) or point ULTRAMED_STORE at another disk, then run the same command again."
            ) from err
        raise


def _disk_full(err: Exception) -> bool:
    """Whether the error is a full disk; Rust libraries say so in words instead of as an OSError."""
    return getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(err)


class PeakMemory:
    """Largest resident memory of this process while the block ran, in bytes, sampled five times a second."""

    def __enter__(self):
        self._process, self._stop, self.peak = psutil.Process(), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            if self._stop.wait(0.2):
                return

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


@functools.cache
def environment() -> dict:
    """Versions, commit and machine, for the manifest. No paths, no host name, no environment variables."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git": git_commit(), "machine": f"{platform.system()} {platform.machine()}"}


def machine() -> str:
    """System and processor, and the GPU where this process has used one."""
    torch = sys.modules.get("torch")  # not imported for this
    gpu = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_initialized() else ""
    return environment()["machine"] + gpu


def git_commit() -> str | None:
    """Commit of the repository, with '+changes' when tracked files differ from it; None outside one."""

    def git(*args):
        return subprocess.run(["git", "-C", str(home()), *args], capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        # Products are not code: a figure drawn again does not make the code another one.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!figures").stdout.strip()
        return head.stdout.strip() + ("+changes" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def file_name(name: str) -> str:
    """A name as it may stand on any disk."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


def write_json(path: Path, data: Any) -> None:
    """Write and flush to disk under another name, then rename: a reader never sees half a file."""
    write_text(path, json.dumps(canonical(data), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as fh:
            fh.write(text)
            fh.flush()
            os.fsync(fh.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------------- looking after the store


def check(path: Path, known: dict[str, list[int]] | None = None) -> list[str]:
    """What is wrong with a published folder: nothing, if the list is empty.

    Every byte is read, except of files that are as `known` says (size, time and inode of when they were last read).
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["manifest.json is missing or unreadable"]
    problems = []
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, the manifest says {facts['bytes']}")
        elif (known or {}).get(name) != _stat(file) and sha256(file) != facts["sha256"]:
            problems.append(f"{name} does not have the content that was published (sha256 differs)")
    return problems


def artifacts() -> list[Artifact]:
    """Everything published, by stage, newest first."""
    found = [
        Artifact(p.parent.name, p.name, p)
        for p in root().glob("*/*")
        if p.is_dir() and not p.name.startswith(".") and (p / MANIFEST).exists()
    ]
    return sorted(found, key=lambda a: (a.stage, -a.path.stat().st_mtime))


def find(prefix: str) -> Artifact:
    """The one artifact whose key starts with `prefix` (or stage/prefix). Raises StoreError for none, several, or a damaged
    one."""
    stage_name, _, key = prefix.rpartition("/")
    hits = [a for a in artifacts() if a.key.startswith(key) and stage_name in ("", a.stage)]
    if len(hits) != 1:
        some = ", ".join(f"{a.stage}/{a.key}" for a in hits[:5])
        raise StoreError(
            f"{len(hits)} artifacts match {prefix!r}{': ' + some if some else f' in {root()}; `ultramed store ls` names them'}"
        )
    if not _usable(hits[0].path):
        raise StoreError(f"{hits[0].stage}/{hits[0].key} is damaged and was set aside; run again what made it")
    return hits[0]


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
