"""Progress of long work: a bar in a terminal or notebook, a line a minute where there is none, or a file that the batch
runner watches."""

import contextlib
import os
import sys
import time
from pathlib import Path

FILE = "ULTRAMED_PROGRESS_FILE"
MINUTE = 60.0  # seconds between two lines


def stop_file(file: Path) -> Path:
    """What lies beside a progress file once the runner that reads it was asked to stop."""
    return file.with_suffix(".stop")


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt if the runner that watches this process was asked to stop: a Ctrl-C that reaches a kernel
    between two cells is lost."""
    if FILE in os.environ and stop_file(Path(os.environ[FILE])).exists():
        raise KeyboardInterrupt


def bar(total: int, desc: str, unit: str, initial: int = 0):
    """Something with `update(n)`, `set_postfix_str` and `close`, to be used in a `with`."""
    if FILE in os.environ:  # bars bloat executed notebooks
        return _FileBar(total, desc, unit, initial)
    if sys.stderr.isatty() or in_notebook():
        from tqdm.auto import tqdm

        return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=1)
    return _LineBar(total, desc, unit, initial)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return "ipykernel" in sys.modules and ipython is not None and ipython.get_ipython() is not None


def plural(unit: str) -> str:
    """'reply' -> 'replies'."""
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 5 min', '9 days' or '46 years'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds > 2 * 86400:
        days = seconds / 86400
        return f"{days:,.0f} days" if days < 730 else f"{days / 365:,.0f} years"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Bar:
    """Counts; `show` is for the subclasses to say."""

    every = 0.3  # seconds between two showings

    def __init__(self, total: int, desc: str, unit: str, initial: int):
        self.total, self.desc, self.unit, self.n = total, desc, unit, initial
        self._first, self._begun, self._shown, self.note = initial, time.monotonic(), float("-inf"), ""
        self._show()

    def _show(self):
        now = time.monotonic()
        if now - self._shown > self.every or self.n >= self.total:
            self._shown = now
            self.show()

    def update(self, n: int = 1):
        self.n += n
        self._show()

    def set_postfix_str(self, text: str):
        """Something that is shown with the next count: tokens so far, why it waits."""
        self.note = text

    def close(self):
        """Nothing to end."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _FileBar(_Bar):
    """One line in a file, written anew."""

    def show(self):
        with contextlib.suppress(OSError):  # progress is a courtesy; a full disk is reported where it matters
            Path(os.environ[FILE]).write_text(f"{self.desc} {self.n}/{self.total} {plural(self.unit)}")


class _LineBar(_Bar):
    """A line at the beginning, one a minute, and one at the end, for logs."""

    every = MINUTE

    def show(self):
        spent, made = time.monotonic() - self._begun, self.n - self._first
        line = f"{self.desc}: {self.n} of {self.total} {plural(self.unit)}"
        if made:
            line += f", {duration(spent)}"
            if self.n < self.total:
                line += f", about {duration(spent / made * (self.total - self.n))} left"
        line += f" ({self.note})" if self.note else ""
        print(line, file=sys.stderr, flush=True)
