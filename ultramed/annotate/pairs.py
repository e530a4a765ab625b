"""Rankings to preference pairs, as UltraMedical does it: section 3.2 for DPO, all ordered pairs for the reward model."""

import random
from itertools import combinations
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import Field

from ultramed.core.errors import ConfigError
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import as_completion
from ultramed.evaluate.sample import read_feedback


class PairConfig(Strict):
    """`take`: feedback artifact -> prompts used of it (0: all).

    rule: 'best_random' takes the best candidate against a random lower-ranked one; 'best_worst' against the worst;
    'all' takes every ordered pair, the closest `max_per_prompt` of a prompt. Pairs whose scores differ by less than `margin`, or whose texts are equal, are ties
    and give no pair.
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
def pairs(out: Path, config: PairConfig, **feedback: Artifact) -> dict:
    """Write `pairs.parquet` (canonical pair rows, shuffled) and report prompts, pairs and prompts that were all ties."""
    made, report = [], {}
    for name, count in config.take.items():
        if name not in feedback:
            raise ConfigError(f"pairs: `take` names {name!r}, but no such feedback was given: {sorted(feedback)}")
        rows = read_feedback(feedback[name])
        if count > len(rows):
            raise ConfigError(f"pairs: {count} prompts of {name!r} asked for, it has {len(rows)}")
        before, ties = len(made), 0
        rows = random.Random(f"{config.seed}:{name}").sample(rows, count or len(rows))  # of every subset its part
        for row in rows:
            found = ordered_pairs(row, config, random.Random(f"{config.seed}:{row['id']}"))
            ties += not found
            made += [_row(name, row, number, *pair) for number, pair in enumerate(found)]
        report[name] = {"prompts": len(rows), "pairs": len(made) - before, "without_pair": ties}
    if not made:
        raise ConfigError(f"no pair came out of {report}: all candidates are ties; lower `margin` or sample more")
    random.Random(f"order:{config.seed}").shuffle(made)
    canonical.write_rows(out / "pairs.parquet", made)
    longer = sum(len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in made)
    return {
        "pairs": len(made),
        "sources": report,
        "chosen_is_longer": longer / len(made),
        "row_ids": digest([r["id"] for r in made]),
    }


def _row(name: str, row: dict, number: int, chosen: dict, rejected: dict) -> dict:
    meta = {
        "prompt_id": row["id"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "chosen_model": chosen["model"],
        "rejected_model": rejected["model"],
        "chosen_letter": chosen["letter"] or "",
        "rejected_letter": rejected["letter"] or "",
        "gold": row["gold"],
    }
    return {
        "id": f"{name}:{row['id']}#{number}",
        "source": name,
        "subset": row["subset"],
        "prompt": row["prompt"],
        "chosen": as_completion(chosen["text"]),
        "rejected": as_completion(rejected["text"]),
        "meta": meta,
    }


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
