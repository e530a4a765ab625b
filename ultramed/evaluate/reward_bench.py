"""Reward models on pairs: Medical RewardBench out of held-out preferences, and anyone's pairs in RewardBench's format."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
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
from ultramed.lm.templates import READ_WITH, wording
from ultramed.lm.tokens import encode_rows
from ultramed.train.crew import each, hold, let_go
from ultramed.train.launch import clear
from ultramed.train.reward import load_reward, score_rows

PART = 64  # pairs that are read and written together
TOO_LONG = "too_long"  # of a ledger row: the pair did not fit
PAPER = {"easy": 238, "hard": 196, "length": 180, "human": 163}  # UltraMedical, section 3.3: pairs of its bench
REWARDBENCH = {  # allenai/reward-bench, rewardbench/constants.py: section -> subset -> its weight, which is its pairs
    "chat": {
        **{"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95},
        **{"mt-bench-easy": 28, "mt-bench-med": 40},
    },
    "chat_hard": {
        **{"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134},
        **{"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    },
    "safety": {
        **{"refusals-dangerous": 100, "refusals-offensive": 100},
        **{"xstest-should-refuse": 250, "xstest-should-respond": 154, "donotanswer": 136},
    },
    "reasoning": {
        "math-prm": 984,  # of 447 pairs: as much as all code together
        **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
    },
}
AVERAGE = "average"
LONGER = 1.25  # a wrong reply that is so many times as long makes a pair one of length


TABLE4_COLUMNS = {  # 'bench: subset' of `by_bench` -> column of UltraMedical's Table 4
    "medical: easy": "um_easy",
    "medical: hard": "um_hard",
    "medical: length": "um_length",
    "medical: human": "um_human",
    "medical: average": "um_avg",
    "general: chat": "rb_chat",
    "general: chat_hard": "rb_chat_hard",
    "general: safety": "rb_safety",
    "general: reasoning": "rb_reasoning",
    "general: average": "rb_avg",
}


class BenchConfig(Strict):
    """domain 'medical': easy, hard, length in the paper's proportions; 'general': sections named by `kinds`."""

    domain: str = "medical"
    per_prompt: int = 3  # pairs a prompt gives to one category, at most
    seed: int = 0


def category(chosen: dict, rejected: dict, wide: float) -> str:
    """Category of a pair of candidates with `text` and the annotator's `score`.

    length: the rejected one is at least a quarter longer. easy: the scores are at least `wide` apart. hard: they are closer.
    UltraMedical (section 3.3) sorts by GPT-4's scores and by length, too, without saying where it cuts: the quarter is chosen,
    and `wide` is the median difference of the bench at hand, because annotators' scales differ (GPT-4's is 1 to 5, the
    oracle's 0 to 10) and the paper has nearly as many hard pairs as easy ones. Its "human" pairs, whose labels experts
    changed, come with the released set only (data set `medical_rewardbench`).
    """
    if len(rejected["text"]) >= LONGER * len(chosen["text"]):
        return "length"
    return "easy" if chosen["score"] - rejected["score"] >= wide else "hard"


def section(row: dict) -> str:
    """RewardBench's section of a bundled general prompt: sums are reasoning, facts are chat."""
    return "reasoning" if is_sum(row["prompt"][-1]["content"]) else "chat"


@stage(version=3)
def bench(out: Path, config: BenchConfig, *, feedback: Artifact) -> dict:
    """Write `pairs.parquet` of right against wrong candidates, subset = category. Medical categories are cut to the paper's
    proportions of one another. Candidates without a score are left out."""
    pairs = list(_right_and_wrong(read_feedback(feedback), config.seed))
    if not pairs:
        raise ConfigError("no prompt has both a right and a wrong candidate: nothing to compare")
    wide = float(np.median([a["score"] - b["score"] for _, a, b in pairs]))
    found: dict[str, list[dict]] = {}
    taken: Counter = Counter()
    for row, a, b in pairs:
        name = category(a, b, wide) if config.domain == "medical" else section(row)
        if taken[row["id"], name] >= config.per_prompt:
            continue
        taken[row["id"], name] += 1
        texts = {"chosen": as_completion(a["text"]), "rejected": as_completion(b["text"])}
        meta = {"prompt_id": row["id"], "chosen_model": a["model"], "rejected_model": b["model"]}
        meta |= {"chosen_score": a["score"], "rejected_score": b["score"]}
        pair = {"id": f"{row['id']}#{name}{taken[row['id'], name]}", "source": config.domain, "subset": name, **texts}
        found.setdefault(name, []).append({**pair, "prompt": row["prompt"], "meta": meta})
    if config.domain == "medical":
        unit = min(len(found[c]) / PAPER[c] for c in found)
        found = {c: rows[: max(1, round(unit * PAPER[c]))] for c, rows in found.items()}
    made = [row for name in sorted(found) for row in found[name]]
    canonical.write_rows(out / "pairs.parquet", made)
    counts = {"pairs": len(made), "categories": {k: len(v) for k, v in found.items()}, "median_gap": wide}
    return counts | {"row_ids": digest([r["id"] for r in made])}


def _right_and_wrong(rows: list[dict], seed: int) -> Iterator[tuple[dict, dict, dict]]:
    """(row, right candidate in the asked form, wrong candidate) of every prompt, in an order drawn for each."""
    for row in rows:
        scored = [c for c in row["candidates"] if c["text"].strip() and c["score"] is not None]
        unique = list({c["text"]: c for c in scored}.values())
        meant = {c["text"] for c in unique if c["strict"] and names_option(row["prompt"], c["letter"], c["text"])}
        right = [c for c in unique if c["letter"] == row["gold"] and c["text"] in meant]
        wrong = [c for c in unique if c["letter"] != row["gold"]]
        pairs = [(a, b) for a in right for b in wrong]
        for a, b in random.Random(f"{seed}:{row['id']}").sample(pairs, len(pairs)):
            yield row, a, b


def composition(pairs: Artifact) -> pd.DataFrame:
    """Pairs by category, the paper's and those of a bench."""
    ours, total = pairs.metrics["categories"], sum(PAPER.values())
    rows = [(name, n, n / total, ours.get(name, 0)) for name, n in PAPER.items()]
    return pd.DataFrame(rows, columns=["category", "paper", "paper, share of all", "ours"])


@stage(version=3, also=wording)
def pair_scores(out: Path, config: ScoringConfig, *, reward: Artifact, pairs: Artifact, template: str | None = None) -> dict:
    """Rewards of both sides of every pair: `scores.jsonl` with chosen, rejected and whether the chosen one won."""
    rows = canonical.read_pairs(pairs / "pairs.parquet")
    score_pairs(reward, rows, out / "scores.jsonl", models.reward_template(reward, template), config.batch_tokens)
    frame = read_scores(out)
    return {"pairs": len(frame), "too_long": len(rows) - len(frame), "accuracy": float(frame.correct.mean())}


def read_scores(folder: Artifact | Path) -> pd.DataFrame:
    """`scores.jsonl` of a folder, one row a pair that was scored."""
    frame = pd.read_json(folder / "scores.jsonl", lines=True, dtype={"id": str, "concept": str})
    return frame[frame[TOO_LONG].isna()].drop(columns=TOO_LONG) if TOO_LONG in frame else frame


def score_pairs(reward: Artifact, rows: list[dict], path: Path, template, budget: int = 8192) -> None:
    """Score pair rows into the ledger `path`, `template` being one of READ_WITH; those that are in it already are not scored
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
    shape, sides = READ_WITH[template], ("chosen", "rejected")
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
    cluster = canonical.prompt_id(row)
    scores = {"chosen_score": round(chosen, 6), "rejected_score": round(rejected, 6), "correct": chosen > rejected}
    return {"id": row["id"], "subset": row["subset"], "concept": cluster, **scores, **lengths}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by subset with a 95% interval over prompts and the seeds of several reward models (column `seed`); a tie counts
    as wrong. The last row is the mean of subsets, of RewardBench's subsets that of its sections, which have rows of their own
    before it (`official`)."""
    section, within = official(frame.subset)

    def line(name: str, part: pd.DataFrame, weights=None) -> dict:
        e = stats.clustered(part.correct, part.concept, part.get("seed"), weights=weights).within(0, 1)
        return {"subset": name, **e.row()}

    rows = [line(name, part) for name, part in frame.groupby("subset", sort=False)]
    if within is not None:
        rows += [line(name, frame[section == name], within[section == name]) for name in REWARDBENCH if (section == name).any()]
    return pd.DataFrame([*rows, line(AVERAGE, frame, stats.task_weights(section, frame.get("seed"), within))])


def official(subset: pd.Series) -> tuple[pd.Series, pd.Series | None]:
    """(RewardBench's section of every pair, weights under which within a section its subsets count by their official sizes);
    the subsets themselves and no weights where one is none of its."""
    names = {name: section for section, members in REWARDBENCH.items() for name in members}
    sizes = {name: size for members in REWARDBENCH.values() for name, size in members.items()}
    section = subset.map(names)
    return (subset, None) if section.isna().any() else (section, subset.map(sizes) / subset.map(subset.value_counts()))


def sections(subsets: pd.DataFrame) -> pd.DataFrame:
    """RewardBench's sections and their mean, its score (last row, 'average'), of accuracies by subset.

    subsets: columns subset, accuracy, n and se, the standard error. A section is the mean of its subsets weighted by their
    official sizes; subsets and sections that are not there are left out, not taken for zero. No rows if `subsets` names
    others than RewardBench's. Intervals are normal ones: subsets share no prompts.
    """
    columns = ["subset", "accuracy", "low", "high", "n", "se"]
    if set(subsets.subset) - {name for members in REWARDBENCH.values() for name in members}:
        return pd.DataFrame(columns=columns)
    rows = []
    for name, members in REWARDBENCH.items():
        part = subsets[subsets.subset.isin(members)]
        if len(part):
            weight = part.subset.map(members)
            rows.append(_weighted(name, part, weight / weight.sum()))
    rows.append(_weighted(AVERAGE, found := pd.DataFrame(rows), pd.Series(1 / len(found), found.index)))
    return pd.DataFrame(rows, columns=columns)


def _weighted(name: str, part: pd.DataFrame, share: pd.Series) -> dict:
    """Mean of independent accuracies by shares that sum to one, with its 95% interval."""
    value, se = float((part.accuracy * share).sum()), float(((part.se * share) ** 2).sum() ** 0.5)
    interval = {"low": max(0.0, value - 1.96 * se), "high": min(1.0, value + 1.96 * se)}
    return {"subset": name, "accuracy": value, **interval, "n": int(part.n.sum()), "se": se}


def by_section(answers: Answers) -> Answers:
    """The same, `subset` and `weight` being `official`; for comparisons whose sides are RewardBench's score."""
    section, within = official(answers.frame.subset)
    return answers if within is None else answers.assign(subset=section, weight=within)


def by_bench(scores: Mapping[tuple[str, str], Answers]) -> pd.DataFrame:
    """`table` of every (arm, bench): columns arm, bench, and those of `table`; subset is 'bench: subset'."""
    parts = [table(answers.frame).assign(arm=arm, bench=bench) for (arm, bench), answers in scores.items()]
    accuracy = pd.concat(parts, ignore_index=True)
    columns = ["arm", "bench", "subset", "accuracy", "low", "high", "n"]
    return accuracy.assign(subset=accuracy.bench + ": " + accuracy.subset)[columns]


def wide(accuracy: pd.DataFrame) -> pd.DataFrame:
    """`by_bench` as a reader wants it: a row an arm, with intervals; subsets with n, averages last."""
    average = accuracy.subset.str.endswith(f": {AVERAGE}")
    named = accuracy.subset.where(average, accuracy.subset + " (n = " + accuracy.n.astype(str) + ")")
    shown = accuracy.assign(score=percent(accuracy), column=named, average=average)
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
