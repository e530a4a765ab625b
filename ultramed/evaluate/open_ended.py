"""Open-ended answers and how they are measured: K-QA, MT-Bench, pairwise wins, BLEU-1.

What needs a judge goes through annotate/judge.py's server; what does not, does not.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from ultramed.core.ledger import Ledger, write_lines
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.evaluate import stats
from ultramed.evaluate.engine import asking
from ultramed.evaluate.generate import Sampling, item_rng
from ultramed.lm.device import placement
from ultramed.lm.templates import wording
from ultramed.train.launch import clear


class ReplyConfig(Strict):
    """Greedy at temperature 0. `limit`: rows, drawn evenly over the file; 0 for all. `turns`: ask a row's later turns, too."""

    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1)
    limit: int = Field(0, ge=0)
    turns: bool = False
    batch_tokens: int = Field(8192, ge=64)
    seed: int = 0


@stage(version=3, also=wording)
def replies(
    out: Path, config: ReplyConfig, *, model: Artifact, data: Artifact, side: str = "test", template: str | None = None
) -> dict:
    """One reply to every prompt of `data` (prompt or instruction rows): `replies.jsonl` with id, prompt, reply, reference,
    meta.

    With `turns` a row whose meta has several turns (MT-Bench) is asked all of them, each after the replies so far; the
    row then has `replies`, one a turn. What does not fit into the model's context has an empty reply and is counted in
    `too_long`. An interrupted run goes on after the last finished reply.
    """
    rows = canonical.spread(canonical.read_rows(data / f"{side}.parquet"), config.limit)
    sampling = Sampling(config.max_new_tokens, config.temperature, 0, config.top_p, None, config.repetition_penalty)
    said: dict[str, list[str]] = {row["id"]: [] for row in rows}
    turns = {row["id"]: list((row.get("meta") or {}).get("turns", [])) if config.turns else [] for row in rows}
    expected = {name: max(1, len(asked)) for name, asked in turns.items()}
    clear(out)
    with Ledger(out / "turns.jsonl", key="key") as ledger:
        for key, entry in ledger.rows.items():
            said[key.rpartition("#")[0]].append(entry["reply"])
        what, opening = (
            (sum(expected.values()), "replies", "reply"),
            {"budget": config.batch_tokens, "dtype": placement().dtype},
        )
        if len(ledger) < sum(expected.values()):
            with asking(ledger, *what, model, template, out, **opening) as (engine, bar):
                for number in range(max(expected.values())):
                    todo = [r for r in rows if len(said[r["id"]]) == number < expected[r["id"]]]
                    conversations = [_conversation(r, turns[r["id"]], said[r["id"]]) for r in todo]
                    rngs = [item_rng(config.seed, r["id"], number) for r in todo] if config.temperature else None

                    def done(batch, made, todo=todo, number=number):
                        for i, reply in zip(batch, made, strict=True):
                            name, text = todo[i]["id"], reply.text.strip()
                            said[name].append(text)
                            ledger.add({"key": f"{name}#{number}", "reply": text, "finished": reply.finished})
                        bar.update(len(batch))

                    def unfit(indices, todo=todo, number=number):
                        for i in indices:
                            said[todo[i]["id"]].append("")
                            entry = {"key": f"{todo[i]['id']}#{number}", "reply": "", "finished": False, "too_long": True}
                            ledger.add(entry)
                        bar.update(len(indices))

                    if todo:
                        engine.replies(conversations, sampling, done, rngs, unfit)
        long = sum("too_long" in entry for entry in ledger.rows.values())
        cut = sum(not entry["finished"] for entry in ledger.rows.values()) - long
    write_lines(
        out / "replies.jsonl",
        (
            {
                "id": r["id"],
                "prompt": r["prompt"],
                "reply": said[r["id"]][0],
                "replies": said[r["id"]],
                "reference": r["completion"][0]["content"] if "completion" in r else r.get("reference", ""),
                "meta": r.get("meta") or {},
            }
            for r in rows
        ),
    )
    return {
        "rows": len(rows),
        "cut_off": cut,
        "too_long": long,
        "mean_words": float(np.mean([len(s[0].split()) for s in said.values()])),
    }


def _conversation(row: dict, turns: list[str], said: list[str]) -> list[dict]:
    messages = list(row["prompt"])
    for k, text in enumerate(said):
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": turns[k + 1]}]
    return messages


def read_replies(artifact: Artifact) -> pd.DataFrame:
    """`replies.jsonl` as a table."""
    return pd.read_json(artifact / "replies.jsonl", lines=True, dtype={"id": str})


# ------------------------------------------------------------------------------------------------------------------ K-QA

Label = Literal["Entailment", "Neutral", "Contradiction"]


def kqa_scores(frame: pd.DataFrame, seed: int = 0) -> dict[str, stats.Estimate]:
    """Completeness and hallucination of labelled statements (Manes et al. 2024, section 4), by question.

    frame: columns question, kind ('must_have' or 'nice_to_have'), label. Completeness is the share of a question's
    must-have statements that the answer entails, hallucination the number of its statements that the answer contradicts;
    both are means over questions, with intervals over questions. Statements without a label (a judge's that could not be read)
    are left out.
    """
    frame = frame.dropna(subset="label")
    must = frame[frame.kind == "must_have"]
    share = (must.label == "Entailment").groupby(must.question).mean()
    wrong = (frame.label == "Contradiction").groupby(frame.question).sum()
    return {
        "completeness": stats.clustered(share, share.index, seed=seed).within(0, 1),
        "hallucination": stats.clustered(wrong, wrong.index, seed=seed).within(0, np.inf),
    }


def kqa_row(frame: pd.DataFrame, scores: dict[str, stats.Estimate]) -> dict:
    """`kqa_scores` as a table shows them: per question, with 95% intervals, and how many questions and statements."""
    shown = {name: f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for name, e in scores.items()}
    return {**shown, "questions": frame.question.nunique(), "statements": len(frame)}


# ---------------------------------------------------------------------------------------------------------------- BLEU-1


def bleu1(candidates: list[str], references: list[str]) -> float:
    """Corpus BLEU with unigrams only (Papineni et al. 2002), in per cent: clipped precision times brevity penalty.

    Worked by hand: 'the the the cat' against 'the cat sat': 2 of 4 words, no penalty, 50.
    """
    words = [re.findall(r"\w+|[^\w\s]", c.casefold()) for c in candidates]
    gold = [re.findall(r"\w+|[^\w\s]", r.casefold()) for r in references]
    total, length = sum(map(len, words)), sum(map(len, gold))
    hits = sum(sum((Counter(w) & Counter(g)).values()) for w, g in zip(words, gold, strict=True))
    penalty = 1.0 if total >= length else math.exp(1 - length / max(1, total))
    return 100 * penalty * hits / total if total else 0.0
