"""Reward models on pairs: Medical RewardBench out of held-out preferences, and anyone's pairs in RewardBench's format."""

import random
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.ledger import Ledger
from ultramed.core.progress import bar as progress_bar
from ultramed.core.schema import ScoringConfig, Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical
from ultramed.data.exam import is_sum
from ultramed.data.messages import as_completion, names_option
from ultramed.evaluate import stats
from ultramed.evaluate.arms import Answers, percent
from ultramed.evaluate.sample import read_feedback
from ultramed.lm import models
from ultramed.lm.architecture import context_length
from ultramed.lm.device import free_memory
from ultramed.lm.templates import TEMPLATES, wording
from ultramed.lm.tokens import encode_rows
from ultramed.train.crew import each, hold, let_go
from ultramed.train.launch import clear
from ultramed.train.reward import load_reward, score_rows

PART = 64  # pairs that are read and written together
TOO_LONG = "too_long"  # of a ledger row: the pair did not fit
PAPER = {"easy": 238, "hard": 196, "length": 180, "human": 163}  # UltraMedical, section 3.3: pairs of its bench
SECTIONS = ("chat", "chat_hard", "safety", "reasoning")  # RewardBench's; its score is the mean of the four


TABLE4_COLUMNS = {  # 'bench: subset' of `by_bench` -> column of UltraMedical's Table 4
    "medical: easy": "um_easy",
    "medical: hard": "um_hard",
    "medical: length": "um_length",
    "medical: human": "um_human",
    "general: chat": "rb_chat",
    "general: chat_hard": "rb_chat_hard",
    "general: safety": "rb_safety",
    "general: reasoning": "rb_reasoning",
}


class BenchConfig(Strict):
    """domain 'medical': easy, hard, length in the paper's proportions; 'general': sections named by `kinds`."""

    domain: str = "medical"
    per_prompt: int = 3  # pairs a prompt gives to one category, at most
    seed: int = 0


def category(chosen: dict, rejected: dict) -> str:
    """Category of a pair of candidates, of which only the first is right; both have `strict`.

    length: the wrong one is at least a quarter longer. hard: both in the asked form, the text that of the letter's
    option, so that only the content tells. easy: the wrong one is not even in that form. The paper sorts by GPT-4's score and by length in the same spirit; its
    "human" pairs have no counterpart without human rankings.
    """
    if len(rejected["text"]) >= 1.25 * len(chosen["text"]) and rejected["strict"]:
        return "length"
    return "hard" if rejected["strict"] else "easy"


def section(row: dict) -> str:
    """RewardBench's section of a bundled general prompt: sums are reasoning, facts are chat."""
    return "reasoning" if is_sum(row["prompt"][-1]["content"]) else "chat"


@stage(version=2)
def bench(out: Path, config: BenchConfig, *, feedback: Artifact) -> dict:
    """Write `pairs.parquet`, subset = category. Medical categories are cut to the paper's proportions of one another."""
    found: dict[str, list[dict]] = {}
    for row in read_feedback(feedback):
        unique = list({c["text"]: c for c in row["candidates"] if c["text"].strip()}.values())
        for c in unique:
            c["strict"] = c["strict"] and names_option(row["prompt"], c["letter"], c["text"])
        right = [c for c in unique if c["letter"] == row["gold"] and c["strict"]]
        wrong = [c for c in unique if c["letter"] != row["gold"]]
        rng, taken = random.Random(f"{config.seed}:{row['id']}"), {}
        pairs = [(a, b) for a in right for b in wrong]
        for a, b in rng.sample(pairs, len(pairs)):
            name = category(a, b) if config.domain == "medical" else section(row)
            if taken.get(name, 0) >= config.per_prompt:
                continue
            taken[name] = taken.get(name, 0) + 1
            texts = {"chosen": as_completion(a["text"]), "rejected": as_completion(b["text"])}
            meta = {"prompt_id": row["id"], "chosen_model": a["model"], "rejected_model": b["model"]}
            pair = {"id": f"{row['id']}#{name}{taken[name]}", "source": config.domain, "subset": name, **texts}
            found.setdefault(name, []).append({**pair, "prompt": row["prompt"], "meta": meta})
    if not found:
        raise ConfigError("no prompt has both a right and a wrong candidate: nothing to compare")
    if config.domain == "medical":
        unit = min(len(found[c]) / PAPER[c] for c in found)
        found = {c: rows[: max(1, round(unit * PAPER[c]))] for c, rows in found.items()}
    made = [row for name in sorted(found) for row in found[name]]
    canonical.write_rows(out / "pairs.parquet", made)
    return {"pairs": len(made), "categories": {k: len(v) for k, v in found.items()}, "row_ids": digest([r["id"] for r in made])}


def composition(pairs: Artifact) -> pd.DataFrame:
    """Pairs by category, the paper's and those of a bench."""
    ours, total = pairs.metrics["categories"], sum(PAPER.values())
    rows = [(name, n, n / total, ours.get(name, 0)) for name, n in PAPER.items()]
    return pd.DataFrame(rows, columns=["category", "paper", "paper, share of all", "ours"])


@stage(version=2, also=wording)
def pair_scores(out: Path, config: ScoringConfig, *, reward: Artifact, pairs: Artifact, template: str | None = None) -> dict:
    """Rewards of both sides of every pair: `scores.jsonl` with chosen, rejected and whether the chosen one won."""
    rows = canonical.read_pairs(pairs / "pairs.parquet")
    score_pairs(reward, rows, out / "scores.jsonl", models.template_of(reward, template), config.batch_tokens)
    frame = read_scores(out)
    return {"pairs": len(frame), "too_long": len(rows) - len(frame), "accuracy": float(frame.correct.mean())}


def read_scores(folder: Artifact | Path) -> pd.DataFrame:
    """`scores.jsonl` of a folder, one row a pair that was scored."""
    frame = pd.read_json(folder / "scores.jsonl", lines=True, dtype={"id": str, "concept": str})
    return frame[frame[TOO_LONG].isna()].drop(columns=TOO_LONG) if TOO_LONG in frame else frame


def score_pairs(reward: Artifact, rows: list[dict], path: Path, template, budget: int = 8192) -> None:
    """Score pair rows into the ledger `path`, `template` being one of TEMPLATES; those that are in it already are not scored
    again, and those that do not fit into the model's context are noted and not scored."""
    clear(path.parent)
    with Ledger(path, key="id") as ledger:
        todo = [row for row in rows if row["id"] not in ledger]
        if not todo:
            return
        net, tokenizer = hold(load_reward, reward, len(todo), path.parent, ledger)
        try:
            with progress_bar(len(rows), "pairs", "pair", initial=len(ledger)) as bar:
                parts = [todo[start : start + PART] for start in range(0, len(todo), PART)]
                tasks = [
                    {"pairs": [_turns(row) for row in part], "template": template.name, "budget": budget} for part in parts
                ]
                for number, found in each(net, tokenizer, scored, tasks):
                    long = [row for row, values in zip(parts[number], found, strict=True) if values is None]
                    ledger.add(*({"id": row["id"], "subset": row["subset"], TOO_LONG: True} for row in long))
                    ledger.add(*(_record(row, *values) for row, values in zip(parts[number], found, strict=True) if values))
                    bar.update(len(found))
        finally:
            let_go(net)
        del net
        free_memory()


def _turns(row: dict) -> dict:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def scored(net, tokenizer, pairs: list[dict], template: str, budget: int) -> list[list[float] | None]:
    """[reward of the chosen, reward of the rejected] of every pair; None for one that does not fit."""
    shape, sides = TEMPLATES[template], ("chosen", "rejected")
    rows = [[{"prompt": pair["prompt"], "completion": pair[side]} for side in sides] for pair in pairs]
    fit = [fits(both, net, tokenizer, shape) for both in rows]
    asked = [side for both, good in zip(rows, fit, strict=True) if good for side in both]
    values = iter(score_rows(net, tokenizer, asked, shape, budget=budget))
    return [[next(values), next(values)] if good else None for good in fit]


def fits(sides: list[dict], net, tokenizer, template) -> bool:
    """Whether both sides of a pair fit into the reward model's context."""
    made = encode_rows(sides, tokenizer, template, max_length=10**9)
    return max(len(row["input_ids"]) for row in made) <= context_length(net)


def _record(row: dict, chosen: float, rejected: float) -> dict:
    lengths = {f"{side}_characters": len(row[side][0]["content"]) for side in ("chosen", "rejected")}
    cluster = row["meta"].get("prompt_id", row["id"])
    scores = {"chosen_score": round(chosen, 6), "rejected_score": round(rejected, 6), "correct": chosen > rejected}
    return {"id": row["id"], "subset": row["subset"], "concept": cluster, **scores, **lengths}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by subset with a 95% interval clustered by prompt; a tie counts as wrong. The last row is the mean of subsets."""
    rows = []
    for name, part in frame.groupby("subset", sort=False):
        e = stats.clustered(part.correct, part.concept)
        rows.append({"subset": name, "accuracy": e.value, "low": e.low, "high": e.high, "n": e.n})
    found = pd.DataFrame(rows)
    mean = {"subset": "average", "accuracy": found.accuracy.mean(), "n": int(found.n.sum())}
    return pd.concat([found, pd.DataFrame([mean])], ignore_index=True)


def by_bench(scores: Mapping[tuple[str, str], Answers]) -> pd.DataFrame:
    """`table` of every (arm, bench): columns arm, bench, and those of `table`; subset is 'bench: subset'."""
    parts = [table(answers.frame).assign(arm=arm, bench=bench) for (arm, bench), answers in scores.items()]
    accuracy = pd.concat(parts, ignore_index=True)
    columns = ["arm", "bench", "subset", "accuracy", "low", "high", "n"]
    return accuracy.assign(subset=accuracy.bench + ": " + accuracy.subset)[columns]


def wide(accuracy: pd.DataFrame) -> pd.DataFrame:
    """`by_bench` as a reader wants it: a row an arm; subsets with interval and n, averages last."""
    average = accuracy.subset.str.endswith(": average")
    interval = percent(accuracy).where(~average, (100 * accuracy.accuracy).round(1).astype(str))
    named = accuracy.subset.where(average, accuracy.subset + " (n = " + accuracy.n.astype(str) + ")")
    shown = accuracy.assign(score=interval, column=named, average=average)
    order = list(dict.fromkeys(shown.sort_values("average", kind="stable").column))
    made = shown.pivot_table(index="arm", columns="column", values="score", aggfunc="first", sort=False)
    return made[order].reset_index().rename_axis(columns=None)


def length_correlation(frame: pd.DataFrame) -> float:
    """Spearman correlation of score and length in characters over all replies: how far the model pays for length."""
    score = pd.concat([frame.chosen_score, frame.rejected_score], ignore_index=True)
    length = pd.concat([frame.chosen_characters, frame.rejected_characters], ignore_index=True)
    return float(score.corr(length, method="spearman"))


def rewardbench_result(frame: pd.DataFrame, name: str) -> dict:
    """The per-model dictionary that RewardBench's leaderboard keeps: model, type, template, and accuracy by subset."""
    subsets = {k: float(v) for k, v in frame.groupby("subset").correct.mean().items()}
    return {"model": name, "model_type": "Seq. Classifier", "chat_template": "tokenizer", **subsets}
