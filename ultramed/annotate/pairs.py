"""Rankings to preference pairs, as UltraMedical does it: section 3.2 for DPO, all ordered pairs for the reward model."""

import random
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field

from ultramed.core.errors import ConfigError
from ultramed.core.memory import collector_paused
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import as_completion
from ultramed.evaluate.sample import read_feedback


class PairConfig(Strict):
    """`take`: feedback artifact -> prompts used of it (0: all).

    rule: 'best_random' takes the best candidate against a random lower-ranked one; 'best_worst' against the worst; 'all' takes
    every ordered pair, the closest `max_per_prompt` of a prompt. Pairs whose scores differ by less than `margin`, or whose
    texts are equal, are ties and give no pair.
    """

    take: dict[str, int] = Field(min_length=1)
    rule: Literal["best_random", "best_worst", "all"] = "best_random"
    margin: float = Field(0.0, ge=0)
    max_per_prompt: int = Field(28, ge=1)
    seed: int = 0


def ordered_pairs(row: dict, config: PairConfig, rng: random.Random) -> list[tuple[dict, dict]]:
    """(chosen, rejected) candidates of one prompt; may be empty, if all are ties or unscored."""
    unique: dict[str, dict] = {}
    for c in row["candidates"]:
        if c["score"] is not None and c["text"].strip():
            unique.setdefault(c["text"], c)
    ranked = sorted(unique.values(), key=lambda c: -c["score"])

    def beats(a, b):
        return a["score"] > b["score"] and a["score"] - b["score"] >= config.margin

    if config.rule == "all":
        pairs = [(a, b) for a, b in combinations(ranked, 2) if beats(a, b)]
        return sorted(pairs, key=lambda p: p[0]["score"] - p[1]["score"])[: config.max_per_prompt]
    lower = [c for c in ranked[1:] if beats(ranked[0], c)]
    if not lower:
        return []
    return [(ranked[0], rng.choice(lower) if config.rule == "best_random" else lower[-1])]


@stage(version=3)
@collector_paused()
def pairs(out: Path, config: PairConfig, **feedback: Artifact) -> dict:
    """Write `pairs.parquet` (canonical pair rows, shuffled) and report prompts, pairs and prompts that were all ties."""
    table, report = PairTable(), {}
    for name, count in config.take.items():
        if name not in feedback:
            raise ConfigError(f"pairs: `take` names {name!r}, but no such feedback was given: {sorted(feedback)}")
        rows = read_feedback(feedback[name])
        if count > len(rows):
            raise ConfigError(f"pairs: {count} prompts of {name!r} asked for, it has {len(rows)}")
        before, ties = len(table.made), 0
        rows = random.Random(f"{config.seed}:{name}").sample(rows, count or len(rows))  # of every subset its part
        for row in rows:
            found = ordered_pairs(row, config, random.Random(f"{config.seed}:{row['id']}"))
            ties += not found
            table.add(name, row, found)
        report[name] = {"prompts": len(rows), "pairs": len(table.made) - before, "without_pair": ties}
    if not table.made:
        raise ConfigError(f"no pair came out of {report}: all candidates are ties; lower `margin` or sample more")
    random.Random(f"order:{config.seed}").shuffle(table.made)
    names = [f"{source}:{row['id']}#" for source, row in table.prompts]
    ids = [f"{names[prompt]}{number}" for prompt, number, *_ in table.made]
    canonical.write_table(out / "pairs.parquet", table.columns(ids))
    lengths = [len(c["text"]) for c in table.replies]
    longer = sum(lengths[chosen] > lengths[rejected] for *_, chosen, rejected in table.made)
    return {"pairs": len(table.made), "sources": report, "chosen_is_longer": longer / len(table.made), "row_ids": digest(ids)}


@stage(version=1)
def chosen_rows(out: Path, config: None = None, *, pairs: Artifact) -> dict:
    """Write `rows.parquet`: the pairs' chosen sides as instruction rows, to fine-tune on what preference learning prefers."""
    made = [
        {"id": row["id"], "source": row["source"], "prompt": row["prompt"], "completion": row["chosen"]}
        for row in canonical.read_pairs(pairs / "pairs.parquet")
    ]
    canonical.write_rows(out / "rows.parquet", made)
    return {"rows": len(made), "row_ids": digest([row["id"] for row in made])}


class PairTable:
    """Canonical pair rows column by column: what many pairs of a prompt share is held once.

    `made`: (prompt, number among its pairs, chosen, rejected), indices of `prompts` (source and row) and `replies`.
    """

    def __init__(self):
        self.prompts: list[tuple[str, dict]] = []
        self.replies: list[dict] = []
        self.made: list[tuple[int, int, int, int]] = []

    def add(self, source: str, row: dict, found: list[tuple[dict, dict]]) -> None:
        """The pairs of one prompt."""
        places: dict[int, int] = {}
        for candidate in (c for pair in found for c in pair):
            if id(candidate) not in places:
                places[id(candidate)] = len(self.replies)
                self.replies.append(candidate)
        self.made += [
            (len(self.prompts), n, places[id(chosen)], places[id(rejected)]) for n, (chosen, rejected) in enumerate(found)
        ]
        if found:
            self.prompts.append((source, row))

    def columns(self, ids: list[str]) -> pa.Table:
        """The rows in the order of `made`, whose ids are given."""
        prompt, _, chosen, rejected = np.array(self.made).T
        rows, replies = [row for _, row in self.prompts], self.replies
        model, letter = pa.array([c["model"] for c in replies]), pa.array([c["letter"] or "" for c in replies])
        meta = {
            "prompt_id": pa.array([row["id"] for row in rows]).take(prompt),
            "chosen_score": pa.array([replies[k]["score"] for k in chosen.tolist()]),
            "rejected_score": pa.array([replies[k]["score"] for k in rejected.tolist()]),
            "chosen_model": model.take(chosen),
            "rejected_model": model.take(rejected),
            "chosen_letter": letter.take(chosen),
            "rejected_letter": letter.take(rejected),
            "gold": pa.array([row["gold"] for row in rows]).take(prompt),
        }
        completion = pa.array([as_completion(c["text"]) for c in replies])
        return pa.table(
            {
                "id": pa.array(ids),
                "source": pa.array([source for source, _ in self.prompts]).take(prompt),
                "subset": pa.array([row["subset"] for row in rows]).take(prompt),
                "prompt": _in_parts(pa.array([row["prompt"] for row in rows]), prompt),
                "chosen": _in_parts(completion, chosen),
                "rejected": _in_parts(completion, rejected),
                "meta": pa.StructArray.from_arrays(list(meta.values()), names=list(meta)),
            }
        )


def _in_parts(values: pa.Array, places: np.ndarray, part: int = 1 << 16) -> pa.ChunkedArray:
    """The values at the places; an array of texts holds no more than 2 GiB, several one after the other do."""
    return pa.chunked_array([values.take(pa.array(places[k : k + part])) for k in range(0, len(places), part)])


def pairs_table(made: dict[str, Artifact]) -> pd.DataFrame:
    """Prompts, prompts without a pair, pairs, and the share of pairs whose chosen reply has more characters.

    made: what the pairs are for -> artifact of `pairs`.
    """
    rows = []
    for name, artifact in made.items():
        sources = artifact.metrics["sources"].values()
        rows.append(
            {
                "for": name,
                "rule": artifact.manifest["config"]["rule"],
                "domains": " and ".join(artifact.metrics["sources"]),
                "prompts": sum(s["prompts"] for s in sources),
                "without a pair": sum(s["without_pair"] for s in sources),
                "pairs": artifact.metrics["pairs"],
                "chosen is longer": artifact.metrics["chosen_is_longer"],
            }
        )
    return pd.DataFrame(rows)


def pairs_shown(artifact: Artifact, count: int = 6) -> pd.DataFrame:
    """The first pairs with scores and models, to be looked at."""
    rows = canonical.read_pairs(artifact / "pairs.parquet")[:count]
    texts = [{side: row[side][0]["content"] for side in ("chosen", "rejected")} for row in rows]
    metadata = ("chosen_score", "rejected_score", "chosen_model", "rejected_model")
    return pd.DataFrame(
        [{**text, **{key: row["meta"][key] for key in metadata}} for text, row in zip(texts, rows, strict=True)]
    )
