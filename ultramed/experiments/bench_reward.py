"""Reward benches for anyone's reward model: Medical RewardBench, RewardBench with its sections, RewardBench 2's best of
four."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from pydantic import Field

from ultramed.annotate.judge import GeneralConfig, LLMConfig, pairwise
from ultramed.annotate.pair_sets import pairs_from
from ultramed.core.client import ServerConfig
from ultramed.core.errors import ConfigError
from ultramed.core.schema import ScoringConfig, Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.catalog import get
from ultramed.data.public_pairs import PublicConfig, public_pairs
from ultramed.data.sources import at_hand
from ultramed.evaluate import stats
from ultramed.evaluate.reward_bench import length_correlation, pair_scores, read_scores
from ultramed.experiments.bench import Load, numbers
from ultramed.lm import models

REWARD_BENCHES = ("medical_rewardbench", "rewardbench", "rewardbench2")


class FirstConfig(Strict):
    prompts: int = Field(ge=1)  # of each subset


@stage(version=1)
def first_prompts(out: Path, config: FirstConfig, *, pairs: Artifact) -> dict:
    """The pairs of the first prompts of each subset, for a quick look."""
    rows, prompts = canonical.read_pairs(pairs / "pairs.parquet"), {}
    for row in rows:
        prompts.setdefault(row["subset"], {}).setdefault(canonical.prompt_id(row))
    taken = {(subset, name) for subset, every in prompts.items() for name in list(every)[: config.prompts]}
    canonical.write_rows(out / "pairs.parquet", [row for row in rows if (row["subset"], canonical.prompt_id(row)) in taken])
    return {"prompts": len(taken)}


def reward_pairs(fetch: bool = False, limit: int = 0) -> tuple[dict[str, Artifact], list[str]]:
    """(bench -> pairs at hand, what is missing). Public preference data stands in where RewardBench is not at hand. limit:
    prompts of each subset, 0 for all."""
    found, missing = {}, []
    for name in REWARD_BENCHES:
        if data := at_hand(name, fetch):
            found[name] = pairs_from(data, side="test")
            if name == "rewardbench2":
                missing.append("rewardbench2: Ties is left out, whose score is not of best of four")
        else:
            missing.append(get(name).where())
    if "rewardbench" not in found:
        try:
            found["public_pairs"] = public_pairs(PublicConfig(count=500))
        except ConfigError as err:
            missing.append(str(err))
    if not found:
        raise ConfigError("no reward bench is at hand: " + "; ".join(missing))
    if limit:
        found = {name: first_prompts(FirstConfig(prompts=limit), pairs=pairs) for name, pairs in found.items()}
    return found, missing


def estimate(pairs: Mapping[str, Artifact], model: Artifact) -> Load:
    """Four characters a token. A reward model reads the prompt with either reply; a judge all three, in both orders, and writes
    a verdict each time."""
    judged = models.card(model)["kind"] == "server"
    count = prompts = sides = 0
    for row in (row for artifact in pairs.values() for row in canonical.read_pairs(artifact / "pairs.parquet")):
        count += 1
        prompts += sum(len(turn["content"]) for turn in row["prompt"])
        sides += sum(len(turn["content"]) for turn in (*row["chosen"], *row["rejected"]))
    read = 2 * (prompts + sides) if judged else 2 * prompts + sides
    written = 2 * count * LLMConfig.model_fields["max_tokens"].default if judged else 0
    return Load(count, round(read / 4), written)


def score_reward(name: str, model: Artifact, pairs: Artifact, batch_tokens: int = 8192) -> tuple[pd.DataFrame, dict, Artifact]:
    """(accuracy by subset, biases, artifact) of a reward model on the bench `name`. Ties count half and are shown.

    A model behind a URL judges every pair in both orders; where the orders disagree it is a tie, and an unread one is lost. In
    RewardBench 2, where one reply stands against three, a prompt's pairs are won together or not at all; a prompt of which a
    pair is too long for the model is left out, and counted.
    """
    if models.card(model)["kind"] == "server":
        frame, biases, scored = _judged(model, pairs, LLMConfig if name == "medical_rewardbench" else GeneralConfig)
    else:
        scored = pair_scores(ScoringConfig(batch_tokens=batch_tokens), reward=model, pairs=pairs)
        frame = read_scores(scored.path)
        tie = frame.chosen_score == frame.rejected_score
        frame = frame.assign(credit=frame.correct.astype(float).where(~tie, 0.5), tie=tie)
        biases = {"length correlation": length_correlation(frame), "too long": scored.metrics["too_long"]}
    biases["ties"] = int(frame.tie.sum())
    counted = frame
    if name == "rewardbench2":
        wanted = Counter(canonical.prompt_id(row) for row in canonical.read_pairs(pairs / "pairs.parquet"))
        by_prompt = frame.groupby(["subset", "concept"], sort=False, as_index=False)
        counted = by_prompt.agg(credit=("credit", "min"), tie=("tie", "max"), pairs=("credit", "size"))
        counted = counted[counted.pairs == counted.concept.map(wanted)]
        biases["prompts left out"] = len(wanted) - len(counted)
    rows = []
    for subset, part in counted.groupby("subset", sort=False):
        e = stats.clustered(part.credit, part.concept).within(0, 1)
        rows.append({"subset": subset, **numbers(e), "ties": int(part.tie.sum())})
    return pd.DataFrame(rows), biases, scored


def _judged(model: Artifact, pairs: Artifact, rubric: type[LLMConfig]) -> tuple[pd.DataFrame, dict, Artifact]:
    card = models.card(model)
    made = pairwise(rubric(server=ServerConfig(url=card["url"], model=card["model"])), pairs=pairs)
    frame = pd.read_json(made / "verdicts.jsonl", lines=True, dtype={"id": str})
    tie = frame.verdict.isin(["tie", "inconsistent"])
    prompts, longer = {}, {}
    for row in canonical.read_pairs(pairs / "pairs.parquet"):
        prompts[row["id"]] = canonical.prompt_id(row)
        longer[row["id"]] = max(("chosen", "rejected"), key=lambda side: len(row[side][0]["content"]))
    frame = frame.assign(
        tie=tie, concept=frame.id.map(prompts), credit=(frame.verdict == "chosen").astype(float).where(~tie, 0.5)
    )
    decided = frame[frame.verdict.isin(["chosen", "rejected"])]
    biases = {
        "orders agree": made.metrics["consistency"] or 0.0,
        "not read": made.metrics["unread"],
        "longer reply preferred": float((decided.verdict == decided.id.map(longer)).mean()),  # nan where none is decided
    }
    return frame, biases, made
