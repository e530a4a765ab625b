"""Progress of long work: a bar in a terminal or notebook, or one line in a file that the batch runner watches."""

import contextlib
import os
import time
from pathlib import Path

from tqdm.auto import tqdm

FILE = "ULTRAMED_PROGRESS_FILE"


def bar(total: int, desc: str, unit: str, initial: int = 0):
    """A tqdm bar, or the same interface writing to the file that the runner named (bars bloat executed notebooks)."""
    if FILE in os.environ:
        return _FileBar(Path(os.environ[FILE]), total, desc, unit, initial)
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=1)


class _FileBar:
    def __init__(self, path: Path, total: int, desc: str, unit: str, initial: int):
        self.path, self.total, self.desc, self.unit, self.n = path, total, desc, unit, initial
        self._shown = 0.0
        self._show()

    def _show(self):
        if time.monotonic() - self._shown > 0.3 or self.n >= self.total:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):  # progress is a courtesy; a full disk is reported where it matters
                self.path.write_text(f"{self.desc} {self.n}/{self.total} {self.unit}s")

    def update(self, n: int = 1):
        self.n += n
        self._show()

    def set_postfix_str(self, text: str):
        """Only a bar has room for it."""

    def close(self):
        self._show()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
