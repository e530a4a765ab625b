"""A collection of instructions out of many sources: statistics, filters, contamination, and a folder that `datasets` loads.

UltraMedical (section 2): sources are annotated with a complexity score, near-duplicates and rows close to test questions
are removed, low scores are filtered out, and the rest is one collection with the counts of its Table 1.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.memory import collector_paused, used_up
from ultramed.core.profile import Profile
from ultramed.core.schema import BuildConfig, CheckConfig
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import dedupe
from ultramed.data import rows as canonical
from ultramed.data.catalog import SOURCES, get
from ultramed.data.messages import as_instruction, question_text
from ultramed.data.mixture import source_rows
from ultramed.data.sources import dataset, hub_root, local_files
from ultramed.data.tfidf import Tfidf

SCORES = "scores_"


def text_of(row: dict) -> str:
    """What is asked: the question with its options, or the turns of the user."""
    if "options" in row:
        return question_text(row)
    return "\n".join(m["content"] for m in row["prompt"] if m["role"] != "assistant")


def sources_to_score(profile: Profile) -> dict[str, Artifact]:
    """The sources that the profile wants scored by a language model, name -> data set."""
    section = profile.collection
    wanted = {name: section.sources[name].partition(":")[0] for name in section.score if section.sources.get(name)}
    return {name: dataset(profile, what) for name, what in wanted.items()}


def find_hits(train: list[str], test: list[str], config: CheckConfig) -> list[dedupe.Hit]:
    """Hits of all ways of `config.how`."""
    hits = []
    if "exact" in config.how:
        hits += dedupe.exact_hits(train, test)
    if "ngram" in config.how:
        hits += dedupe.ngram_hits(train, test, config.ngram, config.share)
    if "minhash" in config.how:
        hits += dedupe.minhash_hits(train, test, config.jaccard)
    if rules := [how for how in config.how if how in ("cosine", "ultramedical")]:
        encode = dedupe.minilm_encoder() if config.encoder == "minilm" else Tfidf(test)
        hits += dedupe.embedding_hits(train, test, encode, config.cosine, rules)
    return hits


@stage(version=1)
def contamination(out: Path, config: CheckConfig, *, sources: dict[str, str], tests: list[str], **data: Artifact) -> dict:
    """Which rows of the sources hold test questions of `tests` (names in `data`). Sources are those of `build`.

    Writes `hits.parquet` (source, row id, test set, test id, how, score) and `report.json`: rows hit by source, test set
    and way, with the closest examples.
    """
    train = [(name, row["id"], text_of(row)) for name, what in sources.items() for row in source_rows(what, "train", data)]
    test = [(name, r["id"], text_of(r)) for name in tests for r in canonical.read_rows(data[name] / "test.parquet")]
    hits = find_hits([text for *_, text in train], [text for *_, text in test], config)
    frame = pd.DataFrame(
        [
            {
                "source": train[h.train][0],
                "id": train[h.train][1],
                "test_set": test[h.test][0],
                "test_id": test[h.test][1],
                "how": h.how,
                "score": h.score,
                "train": h.train,
                "test": h.test,
            }
            for h in hits
        ],
        columns=["source", "id", "test_set", "test_id", "how", "score", "train", "test"],
    )
    report = []
    for (source, test_set, how), part in frame.groupby(["source", "test_set", "how"], sort=False):
        best = part.sort_values("score", ascending=False).drop_duplicates("id").head(config.examples)
        shown = [
            {"score": round(b.score, 3), "train": train[b.train][2][:300], "test": test[b.test][2][:300]}
            for b in best.itertuples()
        ]
        rows, questions = int(part.id.nunique()), int(part.test_id.nunique())
        report.append(
            {"source": source, "test_set": test_set, "how": how, "rows": rows, "questions": questions, "examples": shown}
        )
    frame.drop(columns=["train", "test"]).to_parquet(out / "hits.parquet")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    sizes = {"train": dict(Counter(s for s, *_ in train)), "test": dict(Counter(s for s, *_ in test))}
    return {"rows_hit": len(frame[["source", "id"]].drop_duplicates()), "questions_hit": int(frame.test_id.nunique()), **sizes}


def read_report(artifact: Artifact) -> pd.DataFrame:
    """The report as a table; `share` is rows hit of the source's rows."""
    frame = pd.DataFrame(json.loads((artifact / "report.json").read_text()))
    if not frame.empty:
        frame["share"] = frame.rows / frame.source.map(artifact.metrics["train"])
    return frame


REPORT_COLUMNS = ["source", "test_set", "how", "rows", "questions", "share"]


def report_table(checked: Artifact) -> pd.DataFrame:
    """The report without its examples; no rows where nothing was found."""
    report = read_report(checked)
    return report[REPORT_COLUMNS] if len(report) else pd.DataFrame(columns=REPORT_COLUMNS)


def closest_pairs(checked: Artifact, width: int = 220) -> str:
    """The closest pair that each way of looking found, as text."""
    report, lines = read_report(checked), []
    if report.empty:
        return "no hits"
    for row in report.sort_values("rows", ascending=False).drop_duplicates("how").itertuples():
        for example in row.examples[:1]:
            train, test = (" ".join(example[side].split())[:width] for side in ("train", "test"))
            lines += [
                f"{row.how}, {row.source} in {row.test_set}, {example['score']}",
                f"  train: {train}",
                f"  test:  {test}",
                "",
            ]
    return "\n".join(lines)


def scores_of(data: dict[str, Artifact]) -> dict[tuple[str, str], float]:
    """(source, row id) -> complexity, of the annotations among `data`: those named 'scores_<source>' (`judge.complexity`)."""
    out = {}
    for name, art in data.items():
        if name.startswith(SCORES):
            frame = pd.read_json(art / "scores.jsonl", lines=True, dtype={"id": str}).dropna()
            out |= {(name.removeprefix(SCORES), i): float(s) for i, s in zip(frame.id, frame.score, strict=True)}
    return out


@stage(version=2)
def build(
    out: Path, config: BuildConfig, *, sources: dict[str, str], checked: Artifact | None = None, **data: Artifact
) -> dict:
    """A collection in `datasets` layout: `data/train.parquet` and `README.md`, its card.

    sources: name -> what is taken of which data set ('dataset', 'dataset:subset', 'dataset:subset[0:100]'). `checked`:
    the contamination of the same sources, whose hits are left out. Every row that goes is counted by the first reason
    that holds: low score (below `min_score`, or not among the source's `top`), contaminated, duplicate, near-duplicate.
    A row's score is its source's own, or that of the artifact 'scores_<source>' among `data`.
    """
    hit = set(map(tuple, pd.read_parquet(checked / "hits.parquet")[["source", "id"]].to_numpy())) if checked else set()
    counts, left, given = defaultdict(Counter), [], scores_of(data)
    for name, what in sources.items():
        left += _wanted(config, name, source_rows(what, "train", data), given, hit, counts[name])
    same = dedupe.duplicates([r["text"] for r in left])
    near = dedupe.near_duplicates([r["text"] for r in left], config.near)
    kept = []
    for i, row in enumerate(left):
        if same[i] != i or near[i] != i:
            counts[row["source"]]["duplicate" if same[i] != i else "near-duplicate"] += 1
        else:
            counts[row["source"]]["retained"] += 1
            kept.append(row)
    if not kept:
        raise ConfigError(f"no row is left of {dict(counts)}")
    (out / "data").mkdir(exist_ok=True)
    columns = {k: [row[k] for row in kept] for k in ("id", "source", "prompt", "completion", "score")}
    pd.DataFrame(columns).to_parquet(out / "data" / "train.parquet", index=False)
    table = {name: dict(part) for name, part in counts.items()}
    (out / "README.md").write_text(card(config, table, checked))
    return {"rows": len(kept), "sources": table, "row_ids": digest([r["id"] for r in kept])}


@collector_paused()
def _wanted(config: BuildConfig, name: str, rows: list[dict], given: dict, hit: set, counts: Counter) -> list[dict]:
    """A source's rows with its name, text and score, without those of a low score and the contaminated ones; `counts` grows."""
    scores = [given.get((name, row["id"]), (row.get("meta") or {}).get("score")) for row in rows]
    known = sorted((s for s in scores if s is not None), reverse=True)
    least = known[config.top - 1] if 0 < config.top < len(known) else 0.0
    left = []
    for row, score in zip(used_up(rows), scores, strict=True):
        counts["original"] += 1
        if score is not None and score < max(config.min_score, least):
            counts["low score"] += 1
        elif (name, row["id"]) in hit:
            counts["contaminated"] += 1
        else:
            left.append({**as_instruction(row, config.answer_form), "source": name, "text": text_of(row), "score": score})
    return left


@dataclass(frozen=True)
class Collected:
    """A profile's collection: what was at hand (`sources`, `tests`, `data`) and `missing`, and what came of it."""

    sources: dict[str, str]
    tests: list[str]
    missing: list[str]
    data: dict[str, Artifact]
    checked: Artifact
    made: Artifact


def collect(profile: Profile, scores: dict[str, Artifact] | None = None) -> Collected:
    """Contamination and build of `profile.collection`, over the bundled exam and what is at hand (or fetched from the hub, if
    the section says so).

    scores: source -> its complexity by a language model (annotate/judge.py), for sources that come without.
    """
    section = profile.collection
    if section is None:
        raise ConfigError(f"profile {profile.name!r} has no section `collection`")

    def there(name: str) -> bool:
        return name == "exam" or bool(local_files(name) or (get(name).hub and (section.fetch or hub_root())))

    wanted = {name: what for name, what in section.sources.items() if what}
    sources = {name: what for name, what in wanted.items() if there(what.partition(":")[0])}
    tests = [name for name in section.tests if there(name)]
    data = {name: dataset(profile, name) for name in sorted({w.partition(":")[0] for w in sources.values()} | set(tests))}
    checked = contamination(section.check, sources=sources, tests=tests, **data)
    scored = {SCORES + name: art for name, art in (scores or {}).items() if name in sources}
    data |= scored
    made = build(section.build, sources=sources, checked=checked, **data)
    return Collected(sources, tests, sorted({*wanted, *section.tests} - {*sources, *tests}), data, checked, made)


REASONS = ("original", "low score", "contaminated", "duplicate", "near-duplicate", "retained")


def card(config: BuildConfig, counts: dict[str, dict], checked: Artifact | None) -> str:
    """Dataset card: sources with licences, what every filter took, contamination."""
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files: data/train.parquet",
        f"pretty_name: {config.name}",
        "---",
        "",
        f"# {config.name}",
        "",
        f"Built by ultramed {version('ultramed')}. Rows have `id`, `source`, `prompt` and `completion` (messages) and `score` "
        "(complexity, 1 to 10, where it is known). Not for clinical use. Each source keeps its own licence:",
        "",
        "| source | licence | cite |",
        "| --- | --- | --- |",
    ]
    for name in counts:
        spec = SOURCES.get(name)
        lines.append(f"| {name} | {spec.licence if spec else 'see its packages'} | {spec.cite if spec else ''} |")
    lines += ["", "## Counts", "", "| source | " + " | ".join(REASONS) + " |", "| --- |" + " ---: |" * len(REASONS)]
    lines += [f"| {name} | " + " | ".join(str(part.get(r, 0)) for r in REASONS) + " |" for name, part in counts.items()]
    top = f", the {config.top} highest of each source" if config.top else ""
    lines += [
        "",
        f"Filters: complexity at least {config.min_score:g}{top}; near-duplicates from a Jaccard similarity of {config.near:g} "
        "of their word triples.",
        "",
        "## Contamination",
        "",
    ]
    if checked is None:
        lines.append("Not checked.")
    else:
        lines += [
            "Removed rows that hold a test question:",
            "",
            "| source | test set | how | rows | questions |",
            "| --- | --- | --- | ---: | ---: |",
        ]
        lines += [
            f"| {r.source} | {r.test_set} | {r.how} | {r.rows} | {r.questions} |" for r in read_report(checked).itertuples()
        ]
    return "\n".join(lines) + "\n"


def recall_of_planted(collected: Collected, config: CheckConfig, count: int, seed: int = 0) -> pd.DataFrame:
    """What the checks find of copies whose number is known: how, recall by strength of the change, precision, rows found.

    Test questions are copied into training rows with a part of their words changed (dedupe.perturb). Public sets are used
    where they are at hand; the bundled exam writes its questions by form, so that they are alike without being copies.
    """
    rng = random.Random(seed)
    train, questions = _train_texts(collected, rng), _test_texts(collected, rng)
    places = rng.sample(range(len(train)), min(count, len(train) // 2, len(questions)))
    planted: dict[str, set[tuple[int, int]]] = {name: set() for name in dedupe.STRENGTHS}
    for k, (i, j) in enumerate(zip(places, rng.sample(range(len(questions)), len(places)), strict=True)):
        name = list(planted)[k % len(planted)]
        train[i] = dedupe.perturb(questions[j], dedupe.STRENGTHS[name], rng)
        planted[name].add((i, j))
    hits, rows = find_hits(train, questions, config), []
    for how in config.how:
        found = {(h.train, h.test) for h in hits if h.how == how}
        every = dedupe.recall_precision(found, set().union(*planted.values()))
        recall = {f"recall, {name}": dedupe.recall_precision(found, pairs)["recall"] for name, pairs in planted.items()}
        rows.append({"how": how, **recall, "precision": every["precision"], "rows found": every["rows found"]})
    return pd.DataFrame(rows)


def _train_texts(collected: Collected, rng: random.Random, most: int = 5000) -> list[str]:
    public = {name: what for name, what in collected.sources.items() if what.partition(":")[0] != "exam"}
    chosen = (public or collected.sources).values()
    texts = [text_of(row) for what in chosen for row in source_rows(what, "train", collected.data)]
    return rng.sample(texts, min(len(texts), most))


def _test_texts(collected: Collected, rng: random.Random, most: int = 2000, words: int = 15) -> list[str]:
    names = [name for name in collected.tests if name != "exam"] or collected.tests
    texts = [text_of(row) for name in names for row in canonical.read_questions(collected.data[name] / "test.parquet")]
    texts = [text for text in texts if len(text.split()) >= words]
    return rng.sample(texts, min(len(texts), most))


def map_sample(collection: Artifact, rows: int) -> pd.DataFrame:
    """About `rows` rows of a collection, as many of each source: source, text (what the user asks)."""
    kept = pd.read_parquet(collection / "data" / "train.parquet")
    each = max(1, rows // kept.source.nunique())
    parts = [part.sample(min(len(part), each), random_state=0) for _, part in kept.groupby("source")]
    sample = pd.concat(parts, ignore_index=True)
    texts = [" ".join(m["content"] for m in prompt if m["role"] == "user") for prompt in sample.prompt]
    return pd.DataFrame({"text": texts, "source": sample.source})


def filter_counts(collection: Artifact) -> pd.DataFrame:
    """What every filter took of every source."""
    counts = pd.DataFrame([{"source": name, **part} for name, part in collection.metrics["sources"].items()]).fillna(0)
    return counts.astype({column: int for column in counts if column != "source"})
