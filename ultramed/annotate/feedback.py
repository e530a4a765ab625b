"""Who says which of several replies is best: an annotator scores every candidate of a prompt, and the scores rank them.

`feedback.jsonl` has a row a prompt, whoever scored it: prompt messages and candidates with model, text, letter, score
and rank (1 is best; equal scores share a rank).
"""

from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd

from ultramed.core.ledger import Ledger
from ultramed.core.progress import bar as progress_bar
from ultramed.core.schema import ScoringConfig, Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data.messages import as_completion, names_option
from ultramed.evaluate import stats
from ultramed.evaluate.sample import read_feedback, read_samples
from ultramed.lm import models
from ultramed.lm.device import free_memory
from ultramed.lm.templates import Template, wording
from ultramed.train.crew import hold, let_go
from ultramed.train.launch import clear
from ultramed.train.reward import load_reward, score_rows


def oracle(row: dict, c: dict) -> float:
    """Score of a candidate by who sees the reference answer: 6 points for the right option, 2 for the asked form, 1 for an
    end, up to half a point each for being short and for looking like the reference, which orders the wrong ones.

    A reply whose text is not that of the option its letter stands for ("kidney stones (B)" where B is the heart) was
    not meant: it has half the points of a right letter, and none for its form.
    Deterministic. Stands in for the paper's GPT-4 feedback where no judge is at hand; scores are on its scale, 0 to 10.
    """
    meant = names_option(row["prompt"], c["letter"], c["text"])
    right = (6.0 if meant else 3.0) if c["letter"] == row["gold"] else 0.0
    short, alike = min(1.0, 12 / max(c["tokens"], 1)), SequenceMatcher(None, c["text"], row["reference"]).ratio()
    return round(right + 2.0 * (c["strict"] and meant) + 1.0 * c["finished"] + 0.5 * short + 0.5 * alike, 3)


def ranks(scores: list[float | None]) -> list[int | None]:
    """Competition ranks, 1 for the highest score; equal scores share one. None stays None."""
    given = [s for s in scores if s is not None]
    return [None if s is None else 1 + sum(o > s for o in given) for s in scores]


class OracleConfig(Strict):
    annotator: str = "oracle"


@stage(version=2)
def feedback(out: Path, config: OracleConfig, **samples: Artifact) -> dict:
    """Candidates of all `samples` artifacts (name -> artifact), joined by prompt and scored by the oracle."""
    joined = join(samples)
    with Ledger(out / "feedback.jsonl", key="id") as ledger:
        scored = (with_scores(row, [oracle(row, c) for c in row["candidates"]]) for row in joined if row["id"] not in ledger)
        ledger.add(*scored)
    return {"prompts": len(joined), "candidates": sum(len(r["candidates"]) for r in joined), "annotator": config.annotator}


@stage(version=3, also=wording)
def reward_feedback(
    out: Path, config: ScoringConfig, *, reward: Artifact, template: str | None = None, **samples: Artifact
) -> dict:
    """The same, scored by a reward model. Equal texts of a prompt are scored once."""
    joined = join(samples)
    clear(out)
    with Ledger(out / "feedback.jsonl", key="id") as ledger:
        todo = [row for row in joined if row["id"] not in ledger]
        if todo:
            found = _rewards(out, config, reward, models.reward_template(reward, template), todo)
            ledger.add(*(with_scores(r, [found[i, c["text"]] for c in r["candidates"]]) for i, r in enumerate(todo)))
    (out / "rewards.jsonl").unlink(missing_ok=True)  # all of it is in feedback.jsonl
    return {"prompts": len(joined), "candidates": sum(len(r["candidates"]) for r in joined), "annotator": reward.key}


def _rewards(out: Path, config: ScoringConfig, reward: Artifact, shape: Template, todo: list[dict]) -> dict:
    """(number of the row, text) -> reward. An interrupted run goes on after the last batch (`rewards.jsonl`)."""
    unique = [(i, text) for i, row in enumerate(todo) for text in dict.fromkeys(c["text"] for c in row["candidates"])]
    names = [f"{todo[i]['id']}#{digest(text)}" for i, text in unique]
    with Ledger(out / "rewards.jsonl") as made:
        asked = [n for n, name in enumerate(names) if name not in made]
        if asked:
            net, tokenizer = hold(load_reward, reward, len(asked), out, made)
            rows = [{"prompt": todo[i]["prompt"], "completion": as_completion(text)} for i, text in (unique[n] for n in asked)]
            try:
                with progress_bar(len(names), "rewards", "reply", initial=len(made)) as bar:

                    def done(batch: list[int], scores: list[float]) -> None:
                        made.add(*({"key": names[asked[n]], "score": s} for n, s in zip(batch, scores, strict=True)))
                        bar.update(len(batch))

                    score_rows(net, tokenizer, rows, shape, budget=config.batch_tokens, done=done)
            finally:
                let_go(net)
            del net
            free_memory()
        return {pair: made.rows[name]["score"] for pair, name in zip(unique, names, strict=True)}


def join(samples: dict[str, Artifact]) -> list[dict]:
    """One row a prompt with the candidates of every artifact, in the order of the names."""
    rows: dict[str, dict] = {}
    for name, artifact in samples.items():
        for row in read_samples(artifact):
            mine = rows.setdefault(row["id"], {**{k: v for k, v in row.items() if k != "replies"}, "candidates": []})
            mine["candidates"] += [{"model": name, **reply} for reply in row["replies"]]
    return list(rows.values())


def with_scores(row: dict, scores: list[float | None]) -> dict:
    """The row with a score and a rank (1 is best, equal scores share one) at each of its candidates."""
    marks = zip(row["candidates"], scores, ranks(scores), strict=True)
    return {**row, "candidates": [{**c, "score": s, "rank": r} for c, s, r in marks]}


def pool_table(ranked: dict[str, Artifact]) -> pd.DataFrame:
    """Candidates by domain and policy: their number, the share that is right, the share in the asked form, mean score and
    rank. ranked: domain -> feedback."""
    rows = [
        {"domain": domain, "right": candidate["letter"] == row["gold"], **candidate}
        for domain, artifact in ranked.items()
        for row in read_feedback(artifact)
        for candidate in row["candidates"]
    ]
    means = {"right": "right", "in_form": "strict", "mean_score": "score", "mean_rank": "rank"}
    columns = {"candidates": ("text", "size"), **{name: (column, "mean") for name, column in means.items()}}
    return pd.DataFrame(rows).groupby(["domain", "model"], sort=False).agg(**columns).reset_index()


def varied_prompt(ranked: Artifact, texts: int = 3) -> dict:
    """The first prompt with more than so many different candidates, to be looked at."""
    return next(row for row in read_feedback(ranked) if len({c["text"] for c in row["candidates"]}) > texts)


def score_agreement(first: Artifact, second: Artifact) -> float:
    """Krippendorff's alpha (interval) of two annotators' scores of the same candidates; 0 is chance. NaN of one with itself,
    which would agree whatever it is worth."""
    if first.key == second.key:
        return float("nan")
    both = [
        [a["score"], b["score"]]
        for mine, theirs in zip(read_feedback(first), read_feedback(second), strict=True)
        for a, b in zip(mine["candidates"], theirs["candidates"], strict=True)
    ]
    return stats.krippendorff(np.array(both, dtype=float), "interval")
