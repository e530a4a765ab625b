"""Named data sets: where they are, how many rows they have, and how their rows become canonical ones.

A data set is read from `ULTRAMED_DATA/<folder>/` if that is there, else from the hub. The artifact holds
`train.parquet`, `dev.parquet`, `test.parquet` (whichever the set has). A count that differs from the known one is an
error: papers' numbers are over known splits.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ultramed.config import nearest
from ultramed.data import rows as canonical
from ultramed.data.bundled import exam
from ultramed.data.catalog import SOURCES, Source
from ultramed.schema import ConfigError, Profile, Strict
from ultramed.store import Artifact, sha256, stage


class SourceConfig(Strict):
    name: str


def data_root() -> Path | None:
    """The folder that `ULTRAMED_DATA` names, if it is set and there."""
    root = os.environ.get("ULTRAMED_DATA")
    if root and not Path(root).is_dir():
        raise ConfigError(f"ULTRAMED_DATA names {root!r}, which is not a folder")
    return Path(root) if root else None


def get(name: str) -> Source:
    if name not in SOURCES:
        raise ConfigError(f"no data set {name!r}{nearest(name, SOURCES)}")
    return SOURCES[name]


def local_files(name: str) -> dict[str, Path]:
    """side -> file, for the sides that are at hand locally."""
    root = data_root()
    spec = get(name)
    files = {side: root / (spec.folder or name) / file for side, (file, _) in spec.files.items()} if root else {}
    return {side: path for side, path in files.items() if path.is_file()}


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
            yield side, str(path), spec.files[side][1], canonical.read_table(path)
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
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
            bad.append(json.dumps({"file": Path(label).name, "row": i + 1, "reason": f"{type(err).__name__}: {err}"}))
    return good, bad


@stage(version=1, also=lambda path: sha256(path))
def _own(out: Path, path: Path, *, limit: int = 0) -> dict:
    rows = canonical.read_questions(path)[: limit or None]
    canonical.write_rows(out / "test.parquet", rows)
    return {"counts": {"test": len(rows)}}


def dataset(profile: Profile, name: str) -> Artifact:
    """The artifact of a data set: 'exam' is the bundled one, anything else is a named source."""
    return exam(profile.exam) if name == "exam" else source(SourceConfig(name=name))


def own_questions(path: Path, limit: int = 0):
    """Anyone's question file as an artifact. Raises BadRow, naming file, row and field, for a row that cannot be used."""
    if not Path(path).is_file():
        raise canonical.BadRow(f"{path}: no such file")
    return _own(Path(path).resolve(), limit=limit)
