"""Named data sets: where they are, how many rows they have, and how their rows become canonical ones.

A data set is read from `ULTRAMED_DATA/<folder>/` if that is there, else from the hub. The artifact holds
`train.parquet`, `dev.parquet`, `test.parquet` (whichever the set has). A count that differs from the known one is an
error: papers' numbers are over known splits.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ultramed.core.errors import ConfigError, UserError
from ultramed.core.ledger import write_lines
from ultramed.core.profile import Profile
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, sha256, stage
from ultramed.data import recognise
from ultramed.data import rows as canonical
from ultramed.data.catalog import Source, get
from ultramed.data.exam import exam
from ultramed.data.formats import BadRow, read_table

log = logging.getLogger(__name__)


class SourceConfig(Strict):
    name: str


def data_root() -> Path | None:
    """The folder that `ULTRAMED_DATA` names, if it is set and there."""
    root = os.environ.get("ULTRAMED_DATA")
    if root and not Path(root).is_dir():
        raise ConfigError(f"ULTRAMED_DATA names {root!r}, which is not a folder")
    return Path(root) if root else None


def names_in(sources: Iterable[str]) -> list[str]:
    """Names of the data sets in 'dataset:subset[0:32]' and its like, each once, sorted."""
    return sorted({source.partition(":")[0].partition("[")[0] for source in sources})


def local_files(name: str) -> dict[str, Path]:
    """side -> file, for the sides that are at hand locally."""
    root = data_root()
    spec = get(name)
    files = {side: root / (spec.folder or name) / file for side, (file, _) in spec.files.items()} if root else {}
    return {side: path for side, path in files.items() if path.is_file()}


def at_hand(name: str) -> Artifact | None:
    """The data set, if it is in ULTRAMED_DATA or the hub gives it; None, with a line in the log why, if not."""
    try:
        return source(SourceConfig(name=name))
    except ConfigError as err:
        log.info("%s", err)
        return None


def _content(config: SourceConfig) -> dict:
    local = local_files(config.name)
    return {side: sha256(path) for side, path in local.items()} or {"hub": sorted(get(config.name).hub.items())}


@stage(version=2, also=_content)
def source(out: Path, config: SourceConfig) -> dict:
    """Canonical rows of one data set, a Parquet file a side. Raises ConfigError where it cannot be had or counts differ.

    A row that cannot be read is set aside in `rejected.jsonl` with file, row and reason.
    """
    spec, local = get(config.name), local_files(config.name)
    if not local and not spec.hub:
        raise ConfigError(
            f"data set {spec.name!r} is not at hand: put {', '.join(f for f, _ in spec.files.values())} into "
            f"$ULTRAMED_DATA/{spec.folder or spec.name}/ ({spec.licence}; {spec.cite})"
        )
    counts, rejected = {}, []
    for side, label, expected, rows in _raw(spec, local):
        if expected is not None and len(rows) != expected:
            raise ConfigError(f"{label}: {len(rows)} rows, {expected} expected; another version of {spec.name}?")
        good, bad = adapt(spec, rows, side, label)
        rejected += bad
        canonical.write_rows(out / f"{side}.parquet", good)
        counts[side] = len(good)
    (out / "rejected.jsonl").write_text("".join(f"{line}\n" for line in rejected))
    return {"counts": counts, "rejected": len(rejected), "licence": spec.licence, "local": bool(local)}


def _raw(spec: Source, local: dict[str, Path]) -> Iterator[tuple[str, str, int | None, list[dict]]]:
    if local:
        for side, path in local.items():
            yield side, str(path), spec.files[side][1], read_table(path)
        return
    from datasets import load_dataset

    for side, (hub_id, name, split, expected) in spec.hub.items():
        try:
            data = load_dataset(hub_id, name, split=split)
        except Exception as err:  # the hub's client raises a dozen kinds; all mean the same here
            raise ConfigError(
                f"data set {spec.name!r}: cannot fetch {hub_id} from the hub: {str(err).splitlines()[0]}"
            ) from None
        yield side, hub_id, expected, data.to_list()


def adapt(spec: Source, rows: list[dict], side: str, label: str) -> tuple[list[dict], list[str]]:
    """(canonical rows, complaints about the rows left out)."""
    model = canonical.KINDS[spec.kind]
    good, bad = [], []
    for i, raw in enumerate(rows):
        try:
            row = {"id": f"{spec.name}:{side}:{i}", **spec.adapt(raw, i), "source": spec.name}
            if spec.kind == "questions":
                row["dataset"] = spec.name
            elif spec.kind == "instructions" and not row["completion"][0]["content"]:
                raise ValueError("the answer is empty")
            good.append(canonical.check_rows(model, [row], label)[0])
        except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
            bad.append(json.dumps({"file": Path(label).name, "row": i + 1, "reason": f"{type(err).__name__}: {err}"}))
    return good, bad


def dataset(profile: Profile, name: str) -> Artifact:
    """The artifact of a data set: 'exam' is the bundled one, anything else is a named source."""
    return exam(profile.exam) if name == "exam" else source(SourceConfig(name=get(name).name))


def user_file(
    path: Path, kind: str = "rows", side: str = "test", limit: int = 0, columns: dict[str, str] | None = None
) -> Artifact:
    """Anyone's file as an artifact with `{side}.parquet` (candidates: `samples.jsonl`). kind: 'questions', 'rows' (any of
    questions, instructions, prompts), 'pairs' or 'candidates'; columns: what is in which column, where the names do not tell
    (data/recognise.py). Raises BadRow, naming file, row and field, for a row that cannot be used."""
    if not Path(path).is_file():
        raise BadRow(f"{path}: no such file")
    return user_rows(Path(path).resolve(), kind=kind, side=side, limit=limit, columns=columns or {})


@stage(version=3, also=lambda path: sha256(path))
def user_rows(out: Path, path: Path, *, kind: str, side: str, limit: int, columns: dict) -> dict:
    rows = recognise.read(path, "rows" if kind == "candidates" else kind, columns)[: limit or None]
    if kind != "candidates":
        canonical.write_rows(out / f"{side}.parquet", rows)
        return {"counts": {side: len(rows)}}
    told = {str(raw.get("id", n)): raw.get("candidates") for n, raw in enumerate(read_table(path), 1)}
    for row in rows:
        given = told[row["id"]]
        if not isinstance(given, list) or len(given) < 2 or not all(isinstance(text, str) for text in given):
            raise BadRow(f"{path}, row {row['id']!r}: candidates: wanted two or more texts, got {given!r:.60}")
    write_lines(
        out / "samples.jsonl",
        (
            {**row, "index": i, "gold": "", "replies": [{"text": text, "letter": None} for text in told[row["id"]]]}
            for i, row in enumerate(rows)
        ),
    )
    return {"counts": {side: len(rows)}}
