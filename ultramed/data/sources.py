"""Named data sets: where they are, how many rows they have, and how their rows become canonical ones.

A data set is read from `ULTRAMED_DATA/<folder>/` if that is there, else from the hub (or the other way round, see
`prefer`), or from a folder that is laid out as the hub (`ULTRAMED_HUB`). The artifact holds
`train.parquet`, `dev.parquet`, `test.parquet` (whichever the set has). A count that differs from the known one is an
error: papers' numbers are over known splits.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

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
from ultramed.data.knowledge import uniform_hash

log = logging.getLogger(__name__)


class SourceConfig(Strict):
    """`prefer`: where a set is read from if both have it: 'local' (ULTRAMED_DATA), or the 'hub', of which local files may be a
    sample."""

    name: str
    prefer: Literal["local", "hub"] = "local"


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


def at_hand(name: str, fetch: bool = False) -> Artifact | None:
    """The data set, if it is in ULTRAMED_DATA or ULTRAMED_HUB; with `fetch` also from the hub, which is not asked otherwise.
    None, with a line in the log why, if it cannot be had."""
    if not (local_files(name) or fetch or (get(name).hub and hub_root())):
        return None
    try:
        return _read(SourceConfig(name=name))
    except ConfigError as err:
        log.info("%s", err)
        return None


def hub_root() -> Path | None:
    """A folder laid out as the hub (`ULTRAMED_HUB`): <hub id>/ with the files of the repository. For machines without network,
    and for tests; with a file SAMPLE in it, it holds a part of every set and rows are not counted."""
    root = os.environ.get("ULTRAMED_HUB")
    if root and not Path(root).is_dir():
        raise ConfigError(f"ULTRAMED_HUB names {root!r}, which is not a folder")
    return Path(root) if root else None


def _local(config: SourceConfig) -> dict[str, Path]:
    """The files to read, none if the hub is to be asked."""
    return local_files(config.name) if config.prefer == "local" or not get(config.name).hub else {}


def _content(config: SourceConfig) -> dict:
    spec, local, mirror = get(config.name), _local(config), hub_root()
    if local:
        return {side: sha256(path) for side, path in local.items()}
    told = {"hub": sorted(spec.hub.items()), "held": spec.held, "chosen": spec.chosen, "revision": spec.revision}
    if mirror:
        told["sample"] = (mirror / "SAMPLE").exists()
        folders = sorted({mirror / entry[0] for entry in spec.hub.values()})
        told["files"] = {f"{p.parent.name}/{p.name}": sha256(p) for f in folders for p in sorted(f.rglob("*")) if p.is_file()}
    return told


@stage(version=4, also=_content)
def source(out: Path, config: SourceConfig) -> dict:
    """Canonical rows of one data set, a Parquet file a side. Raises ConfigError where it cannot be had or counts differ.

    A row that cannot be read is set aside in `rejected.jsonl` with file, row and reason; many of them are an error, because
    then the columns are not what this expects. Training pairs whose prompt is in the test side, too, are left out.
    """
    spec, local = get(config.name), _local(config)
    if not local and not spec.hub:
        note = f". {spec.note}" if spec.note else ""
        raise ConfigError(f"data set {spec.name!r} is not at hand: {spec.where()} ({spec.licence}; {spec.cite}){note}")
    counts, rejected, kept = {}, [], {}
    for side, label, rows in _raw(spec, local):
        good, bad = adapt(spec, rows, side, label, from_hub=not local)
        if len(bad) > max(5, 0.05 * len(rows)) or (bad and not good):
            raise ConfigError(f"{label}, {side}: {len(bad)} of {len(rows)} rows cannot be read, the first: {bad[0]}")
        rejected, kept[side] = rejected + bad, good
    if spec.kind == "pairs" and {"train", "test"} <= kept.keys():
        tested = {_asked(row) for row in kept["test"]}
        kept["train"] = [row for row in kept["train"] if _asked(row) not in tested]
    for side, rows in kept.items():
        _no_letter_missing(spec, side, rows)
        canonical.write_rows(out / f"{side}.parquet", rows)
        counts[side] = len(rows)
    (out / "rejected.jsonl").write_text("".join(f"{line}\n" for line in rejected))
    return {"counts": counts, "rejected": len(rejected), "licence": spec.licence, "local": bool(local)}


def _asked(row: dict) -> str:
    return " ".join(row["prompt"][-1]["content"].casefold().split())


def _no_letter_missing(spec: Source, side: str, rows: list[dict]) -> None:
    """Raises ConfigError if, among many questions, some letter is never the answer: the answers are counted wrongly then."""
    if spec.kind != "questions" or len(rows) < 200:
        return
    gold = {row["gold"] for row in rows}
    if missing := [k for k in min((row["options"] for row in rows), key=len) if k not in gold]:
        raise ConfigError(f"{spec.name}, {side}: {', '.join(missing)} is the answer of none of {len(rows)} questions")


def _counted(spec: Source, side: str, label: str, rows: list[dict], expected: int | None) -> list[dict]:
    """The rows. Raises ConfigError if there are not as many as expected."""
    if expected is not None and len(rows) != expected:
        raise ConfigError(f"{label}, {side}: {len(rows)} rows, {expected} expected; another version of {spec.name}?")
    return rows


def _raw(spec: Source, local: dict[str, Path]) -> Iterator[tuple[str, str, list[dict]]]:
    """(side, where it is from, raw rows) of every side."""
    if local:
        for side, path in local.items():
            yield side, str(path), _counted(spec, side, str(path), read_table(path), spec.files[side][1])
        return
    sample = (hub_root() or Path("/nowhere")).joinpath("SAMPLE").exists()
    for side, (hub_id, _, _, expected) in spec.hub.items():
        rows = _from_hub(spec, side)
        if spec.keep:
            rows = [row for row in rows if all(row[column] in values for column, values in spec.keep.items())]
        if spec.chosen:
            names = {s: set(files("ultramed.data").joinpath(f).read_text().split()) for s, f in spec.chosen.items()}
            there = names.get(side) or set().union(*names.values())
            rows = [row for row in rows if (str(row["pubid"]) in there) == (side in names)]
        _counted(spec, side, hub_id, rows, None if sample else expected)
        for other, (whole, count) in spec.held.items():
            if whole == side:
                order = sorted(range(len(rows)), key=lambda i: uniform_hash("held", rows[i]["question"]))
                first = set(order[: min(count, len(rows) // 5)])
                yield other, hub_id, [rows[i] for i in sorted(first)]
                rows = [row for i, row in enumerate(rows) if i not in first]
        yield side, hub_id, rows


def _from_hub(spec: Source, side: str) -> list[dict]:
    """Raw rows of one split; `steps` are the USMLE's files, questions and solutions apart."""
    hub_id, name, split, _ = spec.hub[side]
    mirror = hub_root()
    try:
        if split == "steps":
            return _steps(spec)
        from datasets import load_dataset

        if mirror:  # `datasets` names its cache by the repository's name and card, not by what the files hold
            with TemporaryDirectory() as cache:
                return load_dataset(str(mirror / hub_id), name, split=split, cache_dir=cache).to_list()
        return load_dataset(hub_id, name, split=split, revision=spec.revision).to_list()
    except Exception as err:  # the hub's client raises a dozen kinds; all mean the same here
        why = str(err).splitlines()[0] if str(err) else type(err).__name__
        place = f"{hub_id} at revision {spec.revision}" if spec.revision else hub_id
        raise ConfigError(f"data set {spec.name!r}: cannot fetch {place} from the hub ({why}). {spec.where()}") from None


def _steps(spec: Source) -> list[dict]:
    """The USMLE self-assessment: step1.json to step3.json (no, question, options), and a file of solutions by number for each;
    questions that `question_with_images.json` lists are left out."""
    hub_id, found = spec.hub["test"][0], []

    def fetch(name: str) -> Path:
        if mirror := hub_root():
            return mirror / hub_id / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub_id, name, repo_type="dataset", revision=spec.revision))

    try:
        pictures = json.loads(fetch("question_with_images.json").read_text())
    except Exception:
        pictures = {}  # an earlier revision has no such file
    for step in (1, 2, 3):
        solutions = json.loads(fetch(f"step{step}_solutions.json").read_text())
        with_image = {str(n) for n in pictures.get(f"step{step}", [])}
        for row in json.loads(fetch(f"step{step}.json").read_text()):
            number = str(row["no"])
            if number in solutions and number not in with_image:
                found.append({**row, "step": step, "answer_idx": solutions[number]})
    return found


def adapt(spec: Source, rows: list[dict], side: str, label: str, from_hub: bool = False) -> tuple[list[dict], list[str]]:
    """(canonical rows, complaints about the rows left out). An adapter may make several rows of one."""
    model, make = canonical.KINDS[spec.kind], spec.adapt(from_hub)
    good, bad = [], []
    for i, raw in enumerate(rows):
        try:
            made = make(raw, i)
            for one in made if isinstance(made, list) else [made]:
                row = {"id": f"{spec.name}:{side}:{i}", **one, "source": spec.name}
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
    return exam(profile.exam) if name == "exam" else _read(SourceConfig(name=get(name).name, prefer=profile.prefer))


def _read(config: SourceConfig) -> Artifact:
    _say_what_stands_for_more(config.name, config.prefer)
    return source(config)


@cache
def _say_what_stands_for_more(name: str, prefer: str) -> None:
    """In the log, once a process."""
    for side, (rows, whole) in stands_for(name, prefer).items():
        log.info("%s, %s: %d local rows stand for the hub's %d", name, side, rows, whole)


def stands_for(name: str, prefer: str = "local") -> dict[str, tuple[int, int]]:
    """side -> (rows of the local file, rows on the hub), of those sides that are read from fewer rows than the hub has."""
    spec = get(name)
    here = {side: spec.files[side][1] or 0 for side in _local(SourceConfig(name=name, prefer=prefer))}
    whole = {side: rows for side, (*_, rows) in spec.hub.items() if rows}
    return {side: (rows, whole[side]) for side, rows in here.items() if rows < whole.get(side, 0)}


def user_file(
    path: Path, kind: str = "rows", side: str = "test", limit: int = 0, columns: dict[str, str] | None = None
) -> Artifact:
    """Anyone's file as an artifact with `{side}.parquet` (candidates: `samples.jsonl`). kind: 'questions', 'rows' (any of
    questions, instructions, prompts), 'pairs' or 'candidates'; columns: what is in which column, where the names do not tell
    (data/recognise.py). Raises BadRow, naming file, row and field, for a row that cannot be used."""
    if not Path(path).is_file():
        raise BadRow(f"{path}: no such file")
    return user_rows(Path(path).resolve(), kind=kind, side=side, limit=limit, columns=columns or {})


@stage(version=6, also=lambda path: sha256(path))
def user_rows(out: Path, path: Path, *, kind: str, side: str, limit: int, columns: dict) -> dict:
    """Canonical rows of anyone's file (data/recognise.py), as one side."""
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
