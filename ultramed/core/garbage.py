"""What a store holds and nobody needs: unfinished work, damaged artifacts, and what was not asked for lately."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ultramed.core.store import artifacts, root, size


def garbage(unused_days: float | None = None) -> list[Path]:
    """Folders that `gc` would delete: unfinished work, damaged artifacts, and what nobody asked for in `unused_days`.

    An unfinished folder whose lock is held is somebody's running work and is left alone; so is an input of an artifact
    that stays.
    """
    out = list(root().glob("*/.corrupt-*"))
    for work in root().glob("*/.work-*"):
        with _unclaimed(work) as free:
            out += [work] if free else []
    if unused_days is not None:
        edge, every = time.time() - unused_days * 86400, {a.key: a for a in artifacts()}
        keep, queue = set(), [key for key, a in every.items() if a.path.stat().st_mtime >= edge]
        while queue:
            key = queue.pop()
            if key in every and key not in keep:  # an input may be gone
                keep.add(key)
                queue += [ref["key"] for ref in every[key].manifest["inputs"].values()]
        out += [a.path for key, a in every.items() if key not in keep]
    return out


@contextmanager
def _unclaimed(path: Path):
    """Whether nobody works in the folder, and nobody can begin to while the block runs."""
    if not path.name.startswith(".work-"):
        yield True
        return
    try:
        with FileLock(path.with_name(path.name.replace(".work-", ".lock-"))).acquire(timeout=0):
            yield path.exists()
    except Timeout:
        yield False


def gc(unused_days: float | None = None, dry_run: bool = False) -> tuple[list[Path], int]:
    """Delete garbage; (folders, bytes freed)."""
    gone, freed = [], 0
    for path in garbage(unused_days):
        with _unclaimed(path) as free:  # somebody may have taken it up since
            if free:
                gone, freed = [*gone, path], freed + size(path)
                if not dry_run:
                    shutil.rmtree(path)
    return gone, freed
