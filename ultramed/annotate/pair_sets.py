"""Sets of preference pairs, alone or together, as the one artifact that preference learning and reward models take.

UltraMedical's policies learn from UltraMedical-Preference; its reward model from all of that and general pairs (UltraFeedback,
UltraInteract, UltraSafety), against general ones only.
"""

import random
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from ultramed.core.errors import ConfigError
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical

META = {
    "prompt_id": pa.string(),
    "chosen_score": pa.float64(),
    "rejected_score": pa.float64(),
    "chosen_model": pa.string(),
    "rejected_model": pa.string(),
}


class JoinConfig(Strict):
    """`take`: artifact -> prompts used of it (0: all), drawn with `seed`.

    rule: 'all' takes every pair of a prompt as the set has it; 'best_random' one pair a prompt, the best reply against a random
    lower one, as the paper does for preference learning, which needs scores. `side`: of data sets; artifacts that hold
    `pairs.parquet` have none.
    """

    take: dict[str, int] = Field(min_length=1)
    rule: Literal["all", "best_random"] = "all"
    side: str = "train"
    seed: int = 0


def pairs_from(data: Artifact, side: str = "train", count: int = 0, seed: int = 0, rule: str = "all") -> Artifact:
    """The pairs of `count` prompts (0: all) of a data set of pairs (data/sources.py)."""
    return join_pairs(JoinConfig(take={"data": count}, rule=rule, side=side, seed=seed), data=data)


@stage(version=1)
def join_pairs(out: Path, config: JoinConfig, **sets: Artifact) -> dict:
    """Write `pairs.parquet` of all that `take` names, and report prompts and pairs of each. Of several sets, ids and prompts'
    ids begin with the set's name.

    Raises ConfigError for a name that was not given, a set without that side or without scores, or too few prompts.
    """
    tables, report = [], {}
    for name, count in config.take.items():
        if name not in sets:
            raise ConfigError(f"join_pairs: `take` names {name!r}, but no such pairs were given: {sorted(sets)}")
        whole = _read(sets[name], name, config.side)
        members: dict[str, list[int]] = {}
        for number, prompt in enumerate(whole["meta"].combine_chunks().field("prompt_id").to_pylist()):
            members.setdefault(prompt, []).append(number)
        if count > len(members):
            raise ConfigError(f"join_pairs: {count} prompts of {name!r} asked for, it has {len(members)}")
        prompts = random.Random(f"{config.seed}:{name}").sample(sorted(members), count) if count else list(members)
        if config.rule == "best_random":
            kept = _best_random(whole, name, {prompt: members[prompt] for prompt in prompts}, config.seed)
        else:
            kept = [number for prompt in prompts for number in members[prompt]]
        wanted = set(kept)
        part = whole.filter(pa.array([number in wanted for number in range(len(whole))]))
        tables.append(_named(part, name) if len(config.take) > 1 else part)
        report[name] = {"prompts": len(prompts), "pairs": len(part), "without_pair": 0}
    made = pa.concat_tables(tables)
    canonical.write_table(out / "pairs.parquet", made)
    lengths = {side: pc.utf8_length(pc.struct_field(pc.list_flatten(made[side]), "content")) for side in ("chosen", "rejected")}
    longer = pc.mean(pc.greater(lengths["chosen"], lengths["rejected"]).cast(pa.float64())).as_py()
    subsets = {pair["values"]: pair["counts"] for pair in pc.value_counts(made["subset"]).to_pylist()}
    counts = {"pairs": len(made), "sources": report, "categories": subsets, "chosen_is_longer": longer}
    return counts | {"row_ids": digest(made["id"].to_pylist())}


def _read(artifact: Artifact, name: str, side: str) -> pa.Table:
    """The canonical pairs of an artifact, `meta` having the columns of META; a row without `prompt_id` is its own prompt."""
    path = next((p for p in (artifact / "pairs.parquet", artifact / f"{side}.parquet") if p.is_file()), None)
    if path is None:
        there = sorted(file.stem for file in artifact.path.glob("*.parquet"))
        raise ConfigError(f"join_pairs: {name!r} has no side {side!r}; it has {', '.join(there) or 'no rows'}")
    table = pq.read_table(path)
    if missing := {"prompt", "chosen", "rejected"} - set(table.column_names):
        raise ConfigError(f"join_pairs: {name!r} holds no pairs: {', '.join(sorted(missing))} missing")
    meta = table["meta"].combine_chunks() if "meta" in table.column_names else None
    there = {field.name for field in meta.type} if meta is not None else set()
    empty = {key: pa.nulls(len(table), kind) for key, kind in META.items()}
    columns = {key: meta.field(key).cast(kind) if key in there else empty[key] for key, kind in META.items()}
    columns["prompt_id"] = pc.coalesce(columns["prompt_id"], table["id"].combine_chunks())
    named = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    subset = table["subset"] if "subset" in table.column_names else pa.array(["all"] * len(table))
    kept = {"id": table["id"], "source": pa.array([name] * len(table)), "subset": subset}
    kept |= {key: table[key].cast(_TURNS) for key in ("prompt", "chosen", "rejected")}
    return pa.table({**kept, "meta": named})


_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _named(table: pa.Table, name: str) -> pa.Table:
    """The table with `name` before the ids of rows and prompts."""
    meta = table["meta"].combine_chunks()
    columns = {key: meta.field(key) for key in META}
    columns["prompt_id"] = pc.binary_join_element_wise(name, columns["prompt_id"], ":")
    table = table.set_column(0, "id", pc.binary_join_element_wise(name, table["id"], ":"))
    named = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    return table.set_column(table.column_names.index("meta"), "meta", named)


def _best_random(table: pa.Table, name: str, members: dict[str, list[int]], seed: int) -> list[int]:
    """A row a prompt: among those whose chosen reply has the prompt's highest score, a random one."""
    scores = table["meta"].combine_chunks().field("chosen_score").to_pylist()
    kept = []
    for prompt, numbers in members.items():
        if any(scores[number] is None for number in numbers):
            raise ConfigError(f"join_pairs: rule best_random needs scores, and {name!r} has none for prompt {prompt!r}")
        best = max(scores[number] for number in numbers)
        kept.append(random.Random(f"{seed}:{prompt}").choice([n for n in numbers if scores[n] == best]))
    return kept
