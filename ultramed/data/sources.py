"""Named data sets: where they are, how many rows they have, and how their rows become canonical ones.

A data set is read from `ULTRAMED_DATA/<folder>/` if that is there, else from the hub. The artifact holds
`train.parquet`, `dev.parquet`, `test.parquet` (whichever the set has). A count that differs from the known one is an
error: papers' numbers are over known splits.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ultramed.config import nearest
from ultramed.data import rows as canonical
from ultramed.schema import ConfigError, Strict
from ultramed.store import sha256, stage


@dataclass(frozen=True)
class Source:
    """`files`: side -> (file under ULTRAMED_DATA/<name>, rows). `hub`: side -> (hub id, config, split, rows)."""

    name: str
    kind: str  # questions or instructions
    licence: str
    cite: str
    adapt: Callable[[dict, int], dict]
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    hub: dict[str, tuple[str, str | None, str, int]] = field(default_factory=dict)
    note: str = ""


def _lettered(options) -> dict[str, str]:
    if isinstance(options, dict):
        return {k: str(v).strip() for k, v in sorted(options.items()) if v is not None}
    return dict(zip("ABCDEFGH", (str(o).strip() for o in options), strict=False))


def _medqa(row: dict, i: int) -> dict:
    return {
        "question": row["question"].strip(),
        "options": _lettered(row["options"]),
        "gold": row["answer_idx"],
        "subset": "medqa",
    }


def _medmcqa(row: dict, i: int) -> dict:
    options = _lettered([row["opa"], row["opb"], row["opc"], row["opd"]])
    return {"question": row["question"].strip(), "options": options, "gold": "ABCD"[int(row["cop"]) - 1], "subset": "medmcqa"}


def _pubmedqa(row: dict, i: int) -> dict:
    options = {"A": "yes", "B": "no", "C": "maybe"}
    return {
        "id": f"pubmedqa:{row['PMID']}", "question": row["QUESTION"], "context": "\n".join(row["CONTEXTS"]),
        "options": options, "gold": {v: k for k, v in options.items()}[row["final_decision"]], "subset": "pubmedqa",
    }  # fmt: skip


def _mmlu(row: dict, i: int) -> dict:
    return {
        "id": f"mmlu:{row['subject']}:{row['index']}", "question": row["question"],
        "options": _lettered([row[k] for k in "ABCD"]), "gold": row["answer"], "subset": row["subject"],
    }  # fmt: skip


def _usmle(row: dict, i: int) -> dict:
    letters = {str(v).strip(): k for k, v in row["options"].items()}
    gold = row.get("answer_idx") or letters.get(str(row.get("answer", "")).strip(), "")
    return {"question": row["question"], "options": _lettered(row["options"]), "gold": gold, "subset": f"step{row['step']}"}


def alpaca_row(row: dict, i: int) -> dict:
    """instruction / input / output (Alpaca, Medical Meadow): the instruction becomes the system turn where there is an input."""
    given = (row.get("input") or "").strip()
    turns = [("system", row["instruction"].strip()), ("user", given)] if given else [("user", row["instruction"].strip())]
    return {
        "prompt": [{"role": r, "content": c} for r, c in turns],
        "completion": [{"role": "assistant", "content": (row["output"] or "").strip()}],
    }  # fmt: skip


def _conversation(row: dict, i: int) -> dict:
    """ShareGPT's `conversations` (UltraMedical): turns of 'human' and 'gpt', the last one is the answer."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[t["from"]], "content": t["value"].strip()} for t in row["conversations"]]
    return {"id": f"ultramedical:{i}:{row['id']}", "prompt": turns[:-1], "completion": turns[-1:]}


def _gsm8k(row: dict, i: int) -> dict:
    return alpaca_row({"instruction": row["question"], "output": row["answer"]}, i)


def _meadow(name: str, part: str, rows: int) -> Source:
    hub = {"train": (f"medalpaca/medical_meadow_{part}", None, "train", rows)}
    return Source(name, "instructions", "see its hub page", "Han et al. 2023, arXiv 2304.08247", alpaca_row, hub=hub)


SOURCES = {
    s.name: s
    for s in (
        Source(
            "medqa", "questions", "MIT", "Jin et al. 2020, arXiv 2009.13081", _medqa,
            {"train": ("train_subset_4opt.parquet", 1047), "dev": ("validation.parquet", 1272), "test": ("test.parquet", 1273)},
            {"train": ("GBaker/MedQA-USMLE-4-options", None, "train", 10178), "test": ("GBaker/MedQA-USMLE-4-options", None, "test", 1273)},
            "US, four options; locally a part of the train split",
        ),
        Source(
            "medmcqa", "questions", "MIT", "Pal et al. 2022, arXiv 2203.14371", _medmcqa,
            {"train": ("train_sample_gpt4exp.parquet", 1000), "test": ("validation.parquet", 4183)},
            note="the validation split is what papers report",
        ),
        Source(
            "pubmedqa", "questions", "MIT", "Jin et al. 2019, arXiv 1909.06146", _pubmedqa,
            {"train": ("train_validation.parquet", 500), "test": ("test.parquet", 500)},
            note="expert-labelled, reasoning required, official test ids",
        ),
        Source(
            "mmlu_medical", "questions", "see hendrycks/test", "Hendrycks et al. 2021, arXiv 2009.03300", _mmlu,
            {"dev": ("dev.parquet", 30), "test": ("test.parquet", 1089)}, note="six medical subjects",
        ),
        Source(
            "usmle_self_assessment", "questions", "not redistributable", "Han et al. 2023, arXiv 2304.08247", _usmle,
            {"test": ("questions.jsonl", 324)},
            note="image-free items of Steps 1-3 (92, 110, 122); bring your own file with a `step` field",
        ),
        Source(
            "medical_meadow", "instructions", "GPL-3.0 (repository)", "Han et al. 2023, arXiv 2304.08247", alpaca_row,
            {"train": ("medical_meadow_small.parquet", 5942)},
            {"train": ("medalpaca/medical_meadow_wikidoc_patient_information", None, "train", 5942)},
            "WikiDoc patient information",
        ),
        _meadow("meadow_flashcards", "medical_flashcards", 33955),
        _meadow("meadow_wikidoc", "wikidoc", 10000),
        _meadow("meadow_mediqa", "mediqa", 2208),
        _meadow("meadow_cord19", "cord19", 821007),
        _meadow("meadow_mmmlu", "mmmlu", 3787),
        _meadow("meadow_health_advice", "health_advice", 8676),
        _meadow("meadow_pubmed_causal", "pubmed_causal", 2446),
        Source(
            "chatdoctor", "instructions", "academic research only", "Li et al. 2023, arXiv 2303.14070", alpaca_row,
            {"train": ("chatdoctor5k_sample5000.parquet", 5000)},
        ),
        Source(
            "alpaca", "instructions", "CC BY-NC 4.0", "Taori et al. 2023", alpaca_row,
            {"train": ("alpaca_early5000.parquet", 5000)}, {"train": ("tatsu-lab/alpaca", None, "train", 52002)},
        ),
        Source(
            "ultramedical", "instructions", "see its hub page", "Zhang et al. 2024, arXiv 2406.03949", _conversation,
            {"train": ("examples.jsonl.gz", 50)}, {"train": ("TsinghuaC3I/UltraMedical", None, "train", 409593)},
            "locally the repository's 50 examples",
        ),
        Source(
            "gsm8k", "instructions", "MIT", "Cobbe et al. 2021, arXiv 2110.14168", _gsm8k,
            {"train": ("train.parquet", 7473), "test": ("test.parquet", 1319)},
            {"train": ("openai/gsm8k", "main", "train", 7473), "test": ("openai/gsm8k", "main", "test", 1319)},
        ),
    )
}  # fmt: skip


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
    files = {side: root / name / file for side, (file, _) in get(name).files.items()} if root else {}
    return {side: path for side, path in files.items() if path.is_file()}


def _content(config: SourceConfig) -> dict:
    local = local_files(config.name)
    return {side: sha256(path) for side, path in local.items()} or {"hub": sorted(get(config.name).hub.items())}


@stage(version=1, also=_content)
def source(out: Path, config: SourceConfig) -> dict:
    """Canonical rows of one data set, a Parquet file a side. Raises ConfigError where it cannot be had or counts differ.

    A row that cannot be read is set aside in `rejected.jsonl` with file, row and reason.
    """
    spec, local = get(config.name), local_files(config.name)
    if not local and not spec.hub:
        raise ConfigError(
            f"data set {spec.name!r} is not at hand: put {', '.join(f for f, _ in spec.files.values())} into "
            f"$ULTRAMED_DATA/{spec.name}/ ({spec.licence}; {spec.cite})"
        )
    counts, rejected = {}, []
    for side, label, expected, rows in _raw(spec, local):
        if len(rows) != expected:
            raise ConfigError(f"{label}: {len(rows)} rows, {expected} expected; another version of {spec.name}?")
        good, bad = adapt(spec, rows, side, label)
        rejected += bad
        canonical.write_rows(out / f"{side}.parquet", good)
        counts[side] = len(good)
    (out / "rejected.jsonl").write_text("".join(f"{line}\n" for line in rejected))
    return {"counts": counts, "rejected": len(rejected), "licence": spec.licence, "local": bool(local)}


def _raw(spec: Source, local: dict[str, Path]) -> Iterator[tuple[str, str, int, list[dict]]]:
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
    model = canonical.Question if spec.kind == "questions" else canonical.Instruction
    good, bad = [], []
    for i, raw in enumerate(rows):
        try:
            row = {"id": f"{spec.name}:{side}:{i}", **spec.adapt(raw, i), "source": spec.name}
            if spec.kind == "questions":
                row["dataset"] = spec.name
            elif not row["completion"][0]["content"]:
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


def own_questions(path: Path, limit: int = 0):
    """Anyone's question file as an artifact. Raises BadRow, naming file, row and field, for a row that cannot be used."""
    if not Path(path).is_file():
        raise canonical.BadRow(f"{path}: no such file")
    return _own(Path(path).resolve(), limit=limit)
