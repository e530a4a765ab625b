"""The columns of anyone's table: found by their usual names, or by what `--map` says."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from ultramed.core.errors import ConfigError
from ultramed.data.formats import BadRow

IDS = ("id", "qid", "question_id", "pmid", "pubid", "realidx", "uid", "idx", "index")
MAPPABLE = {
    "questions": ("question", "context", "options", "gold", "id", "subset", "base"),
    "pairs": ("prompt", "chosen", "rejected", "id"),
}


def parse_map(given: Iterable[str], kind: str = "questions") -> dict[str, str]:
    """['gold=label', 'base=1'] as a dictionary. Raises ConfigError for a name that cannot be mapped."""
    found = {}
    for text in given:
        name, sign, column = text.partition("=")
        if not sign or name not in MAPPABLE[kind]:
            more = " (base=0 or base=1)" if kind == "questions" else ""
            raise ConfigError(f"--map {text!r}: wanted NAME=COLUMN with NAME one of {', '.join(MAPPABLE[kind])}{more}")
        found[name] = column
    return found


@dataclass
class Columns:
    """The columns of a table, and a way to find one by its usual names."""

    where: str
    rows: list[dict]
    given: dict[str, str] = field(default_factory=dict)  # `--map`
    used: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.names = list(dict.fromkeys(name for row in self.rows for name in row))
        unknown = {n: c for n, c in self.given.items() if n not in ("base", "options") and c not in self.names}
        if unknown:
            raise ConfigError(
                f"{self.where}: --map names columns that are not there: {unknown}; there are {', '.join(self.names)}"
            )

    def find(self, what: str, usual: Iterable[str]) -> str | None:
        """The column of that meaning: the mapped one, else the first usual name, spelled so or in other capitals."""
        if what in self.given:
            return self.take(self.given[what])
        for name in usual:
            like = [column for column in self.names if column.lower().replace(" ", "_") == name]
            if like:
                return self.take(name if name in like else like[0])
        return None

    def all(self, usual: Iterable[str]) -> list[str]:
        found = [c for name in usual for c in self.names if c.lower().replace(" ", "_") == name]
        return [
            c for c in dict.fromkeys(found) if c not in self.used and any(row.get(c) not in (None, "") for row in self.rows)
        ]

    def take(self, column: str) -> str:
        self.used.add(column)
        return column


def objects(rows: list, where: str) -> list[dict]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadRow(f"{where}, row {number}: wanted an object with named values, got {row!r:.60}")
    return rows


def plain_meta(rows: list[dict]) -> None:
    """Meta of one type a name, which Parquet can hold: what is neither text nor number, or both, becomes text."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row["meta"].items():
            kinds.setdefault(name, set()).add(type(value))
    for row in rows:
        for name, value in row["meta"].items():
            if kinds[name] - {str} and (len(kinds[name]) > 1 or kinds[name] - {int, float, bool}):
                row["meta"][name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
