"""Append-only JSON lines, one per finished item: kill the process at any moment and nothing is lost or done twice."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ultramed.core.errors import StoreError
from ultramed.core.memory import collector_paused
from ultramed.core.store import write_text


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Rows as JSON lines, all at once: for what is computed in one go out of a ledger."""
    with open(path, "w", encoding="utf-8") as fh:
        fh.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict]:
    """What `write_lines` or a ledger wrote. (`str.splitlines` would also cut at the line separators inside a text.)"""
    with open(path, encoding="utf-8") as fh:
        return [json.loads(line) for line in fh]


def _parsed_together(lines: list[bytes]) -> list:
    """The value of each line, or None for all where one is damaged. Rows that are parsed at once share the names of their
    fields, which saves half of the time and of the memory."""
    try:
        values = json.loads(b"[%s]" % b",".join(lines))
    except ValueError:
        values = []
    return values if len(values) == len(lines) else [None] * len(lines)


class Ledger:
    """Results by item key, kept in a file that only grows.

    A line torn by a kill or a full disk is cut off on opening, so that the next line starts clean; a damaged line in
    the middle is an error, because it means that something other than this class wrote the file.
    """

    def __init__(self, path: Path, key: str = "key"):
        self.path, self._field, self.rows = path, key, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        good = self._read() if path.exists() else 0
        self._file = open(path, "ab")  # noqa: SIM115 (kept open; close() and `with` end it)
        if self._file.tell() != good:
            self._file.truncate(good)

    @collector_paused()
    def _read(self) -> int:
        """Fill `rows` from the file; the number of bytes up to the end of its last whole line."""
        good = read = 0
        with open(self.path, "rb") as fh:
            while lines := fh.readlines(1 << 20):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                for number, (line, row) in enumerate(zip(lines, _parsed_together(lines), strict=True), read + 1):
                    try:
                        row = json.loads(line) if row is None else row
                        self.rows[row[self._field]] = row
                    except (ValueError, KeyError, TypeError):
                        raise StoreError(
                            f"{self.path}, line {number}: not a ledger row (JSON object with {self._field!r}); move the file "
                            "away to start over"
                        ) from None
                good, read = good + sum(map(len, lines)), read + len(lines)
        return good

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, *rows: dict) -> None:
        """Append rows and flush them to the operating system; a key that is there already is an error."""
        for row in rows:
            if row[self._field] in self.rows:
                raise ValueError(f"{self.path}: {row[self._field]!r} is in the ledger already")
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows.update((row[self._field], row) for row in rows)

    def reorder(self, keys: list[str]) -> None:
        """Write the rows anew in the order of `keys`, which are all of them; the old file stays until the new one is whole."""
        if keys == list(self.rows):
            return
        rows = {key: self.rows[key] for key in keys}
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
        self._file.close()
        self.rows = rows
        self._file = open(self.path, "ab")  # noqa: SIM115

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
