"""Canonical rows, checked once on the way in: a bad row is an error that names file, row and field."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ultramed.core.memory import collector_paused, used_up
from ultramed.data.formats import BadRow, read_table


class Question(BaseModel):
    """A multiple-choice question. `options`: letter -> text; `gold`: one of its letters."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    id: str
    question: str = Field(min_length=1)
    context: str | None = None
    options: dict[str, str] = Field(min_length=2)
    gold: str
    dataset: str = "own"
    subset: str = "all"
    source: str = "own"
    meta: dict = {}

    @model_validator(mode="after")
    def _gold_is_an_option(self):
        wrong = [k for k in self.options if len(k) != 1 or not "A" <= k <= "Z"]
        if wrong:
            raise ValueError(f"options: letters must be A to Z, got {wrong}")
        if self.gold not in self.options:
            raise ValueError(f"gold: wanted one of {', '.join(self.options)}, got {self.gold!r}")
        return self


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class Instruction(BaseModel):
    """A training row: messages up to the answer, and the answer."""

    model_config = ConfigDict(extra="forbid")
    id: str
    source: str
    prompt: list[Message] = Field(min_length=1)
    completion: list[Message] = Field(min_length=1, max_length=1)
    meta: dict = {}


class Prompt(BaseModel):
    """Something to answer, for which there is no training answer; `reference` is what a judge may look at."""

    model_config = ConfigDict(extra="forbid")
    id: str
    source: str
    prompt: list[Message] = Field(min_length=1)
    reference: str = ""
    meta: dict = {}


class Pair(BaseModel):
    """Two completions of one prompt, the better one named. `meta`: scores, models, and the prompt's id."""

    model_config = ConfigDict(extra="forbid")
    id: str
    source: str = "own"
    subset: str = "all"
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)
    meta: dict = {}

    @model_validator(mode="after")
    def _differ(self):
        if self.chosen[0].content == self.rejected[0].content:
            raise ValueError("rejected: the same text as chosen; such a pair prefers nothing")
        return self


KINDS: dict[str, type[BaseModel]] = {"questions": Question, "instructions": Instruction, "prompts": Prompt, "pairs": Pair}


@collector_paused()
def check_rows(model: type[BaseModel], rows: Iterable[dict], where: str) -> list[dict]:
    """Every row validated; ids must be unique."""
    out, seen = [], {}
    for number, row in enumerate(rows, 1):
        try:
            out.append(model.model_validate(row).model_dump())
        except ValidationError as err:
            first = err.errors()[0]
            field = "".join(f"{part}." for part in first["loc"]).rstrip(".")
            what = f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
            came = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r:.60})"
            label = f" ({row['id']})" if isinstance(row, dict) and row.get("id") else ""
            raise BadRow(f"{where}, row {number}{label}: {what}{came}") from None
        if out[-1]["id"] in seen:
            raise BadRow(f"{where}, row {number}: id {out[-1]['id']!r} is that of row {seen[out[-1]['id']]}, too")
        seen[out[-1]["id"]] = number
    return out


def read_questions(path: Path) -> list[dict]:
    """Canonical question rows of a file; rows without an id are numbered."""
    return _questions(read_table(path), path)


def subset_sizes(path: Path) -> dict[str, int]:
    """Questions of every subset of a canonical file, in the order of the file."""
    return dict(Counter(pq.read_table(path, columns=["subset"])["subset"].to_pylist()))


def slice_of_seed(available: int, count: int, place: int, skip: int = 0) -> list[int]:
    """[start, stop] of the `count` questions of the seed at `place`, after the first `skip`: seeds have questions of their own,
    and one for which too few are left has the first ones."""
    start = skip + place * count
    start = start if start + count <= available else skip
    return [start, start + count]


def _questions(rows: list[dict], path: Path) -> list[dict]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            row.setdefault("id", str(number))
            for field in ("options", "meta"):
                if isinstance(row.get(field), dict):  # Parquet fills the letters that other rows have with null
                    row[field] = {k: v for k, v in row[field].items() if v is not None}
    return check_rows(Question, used_up(rows), str(path))


def read_instructions(path: Path) -> list[dict]:
    """Canonical instruction rows of a file."""
    return check_rows(Instruction, used_up(read_table(path)), str(path))


def read_rows(path: Path) -> list[dict]:
    """Canonical rows of a file of any kind but pairs: questions, instructions or prompts, as its columns say."""
    rows = read_table(path)
    if "options" in rows[0]:
        return _questions(rows, path)
    return check_rows(Instruction if "completion" in rows[0] else Prompt, used_up(rows), str(path))


def read_pairs(path: Path) -> list[dict]:
    """Canonical pair rows of a file."""
    return check_rows(Pair, used_up(read_table(path)), str(path))


def prompt_id(pair: dict) -> str:
    """Of a canonical pair: pairs of one prompt belong together."""
    return (pair.get("meta") or {}).get("prompt_id") or pair["id"]


def spread(rows: list, limit: int) -> list:
    """`limit` rows, evenly over the whole; all of them if it is 0."""
    return [rows[i * len(rows) // limit] for i in range(limit)] if 0 < limit < len(rows) else rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Parquet with nested columns kept."""
    if not any(r.get("meta") for r in rows):  # Parquet has no empty structs
        rows = [{k: v for k, v in r.items() if k != "meta"} for r in rows]
    write_table(path, pa.Table.from_pylist(rows))


def write_table(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")
