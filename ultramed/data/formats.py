"""Tables as people have them: Parquet, JSON (lines, a list, an object of columns, of rows by id, or of splits), CSV, TSV; each
of the text formats also gzipped, with or without a byte order mark."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq

from ultramed.core.errors import UserError
from ultramed.core.memory import collector_paused

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
csv.field_size_limit(1 << 30)


class BadRow(UserError):
    """A row that cannot be used; the message names file, row and field, what was wanted and what came."""


def read_table(path: Path) -> list[dict]:
    """Rows of a file; see above. Raises BadRow for a missing, empty or unreadable one."""
    path = Path(path)
    if not path.is_file():
        raise BadRow(f"{path}: no such file")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        try:
            with collector_paused(), pq.ParquetFile(path) as held:  # the whole table twice would take twice the memory
                rows = [row for batch in held.iter_batches() for row in batch.to_pylist()]
        except (OSError, ValueError) as err:
            raise BadRow(f"{path}: not a readable Parquet file: {err}") from None
    elif suffix in SUFFIXES:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as fh:
                text = fh.read()
        except (OSError, EOFError, UnicodeDecodeError) as err:
            raise BadRow(f"{path}: not readable as UTF-8 text: {err}") from None
        rows = _separated(text, path, suffix) if suffix in (".csv", ".tsv") else _json(text, path)
    else:
        raise BadRow(f"{path}: wanted one of {', '.join(SUFFIXES)} (text formats also .gz), got {suffix or 'no suffix'!r}")
    if not rows:
        raise BadRow(f"{path}: has no rows")
    return rows


def _separated(text: str, path: Path, suffix: str) -> list[dict]:
    """Rows of CSV or TSV. A file with another separator in its header than its name says is read by what stands there."""
    head = text.partition("\n")[0]
    mark = "\t" if suffix == ".tsv" else ","
    if mark not in head:
        mark = max(",\t;", key=head.count)
    try:
        return _delimited(text, path, mark, csv.QUOTE_MINIMAL)
    except csv.Error as err:  # a mark that is not closed would swallow the rows after it
        if mark == "\t":
            return _delimited(text, path, mark, csv.QUOTE_NONE)
        raise BadRow(
            f"{path}: {err}: a value with a quotation mark in it is put into quotation marks, that mark doubled"
        ) from None


def _delimited(text: str, path: Path, mark: str, quoting: int) -> list[dict]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting, strict=True)
    rows = []
    try:
        for number, row in enumerate(table, 2):
            if None in row:
                raise BadRow(f"{path}, line {number}: {len(row[None])} more values than the header has columns")
            rows.append({k.strip(): v for k, v in row.items()})
    except csv.Error as err:
        raise csv.Error(f"line {table.line_num}: {err}") from None
    return _with_first(rows, [name.strip() for name in table.fieldnames or ()])


def _with_first(rows: list[dict], first: list[str]) -> list[dict]:
    """The rows, and the first line among them where it is no header but one more question, as in MMLU's own files: the
    question, its options, the letter of the right one."""
    letters = "ABCDEFGHIJ"[: max(0, len(first) - 2)]
    if len(letters) < 2 or " " not in first[0] or not (first[-1] and first[-1] in letters):  # a header, as nearly always
        return rows
    lines = [first, *([value.strip() for value in row.values() if value is not None] for row in rows)]
    if not all(len(line) == len(first) and line[-1] and line[-1] in letters for line in lines):
        return rows
    return [dict(zip(("question", *letters, "answer"), line, strict=True)) for line in lines]


def _json(text: str, path: Path) -> list[dict]:
    """Rows of JSON lines, or of one JSON value."""
    if text.lstrip()[:1] == "[":
        try:
            return _whole(_value(text), path)
        except ValueError as err:
            raise BadRow(f"{path}: not JSON: {err}") from None
    rows = []
    for number, found in enumerate(re.finditer(r"(.*)\n?", text), 1):  # lines, not all at once
        if not (line := found[1]).strip():
            continue
        try:
            rows.append(_value(line))
        except ValueError as err:
            if rows or not line.lstrip().startswith("{"):
                raise BadRow(f"{path}, row {number}: not JSON: {err}") from None
            try:
                return _whole(_value(text), path)  # one object over several lines
            except ValueError:
                raise BadRow(f"{path}, row {number}: not JSON: {err}") from None
    return _whole(rows[0], path) if len(rows) == 1 and path.name.removesuffix(".gz").endswith(".json") else rows


def _value(text: str):
    """JSON; pandas' NaN is a cell that holds nothing."""
    return json.loads(text, parse_constant=lambda _: None)


def _whole(value, path: Path) -> list[dict]:
    """Rows of one JSON value: a list of rows, an object of columns (lists, or pandas' objects by row number), of rows by id,
    or with one list of rows in it (`data`, `questions`, ...)."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        raise BadRow(f"{path}: wanted rows, got {value!r:.60}")
    held = list(value.values())
    if all(isinstance(v, list) for v in held) and len({len(v) for v in held}) == 1 and not _are_rows(held[0]):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*held, strict=True)]
    if all(isinstance(v, dict) for v in held):
        names = list(held[0])
        columns = all(list(v) == names for v in held) and not any(isinstance(v, dict | list) for v in held[0].values())
        if columns and all(name.isdigit() for name in names):  # pandas' to_json(): column -> row number -> cell
            return [{column: cells[name] for column, cells in value.items()} for name in names]
        return [{"id": name, **row} for name, row in value.items()]
    lists = [name for name, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(lists) == 1:
        return value[lists[0]]
    if len(lists) > 1:
        raise BadRow(f"{path}: holds several tables ({', '.join(lists)}); give a file with one of them")
    return [value]


def _are_rows(cells: list) -> bool:
    """Whether a list holds rows, and not the cells of a column, which may be dictionaries, too (options)."""
    named = {key.lower() for key in cells[0]} if cells and isinstance(cells[0], dict) else set()
    return bool(named & {"question", "query", "prompt", "instruction", "messages", "conversations"})
