"""Open-ended answers through a judge: K-QA's statements, MT-Bench's scores, wins against a baseline."""

from pathlib import Path

import pandas as pd
from pydantic import BaseModel, Field

from ultramed.annotate.llm import LLMConfig
from ultramed.client import Request, ask
from ultramed.data import rows as canonical
from ultramed.evaluate import stats
from ultramed.evaluate.openended import Label, read_replies
from ultramed.ledger import Ledger
from ultramed.prompts import said
from ultramed.schema import ConfigError
from ultramed.store import Artifact, stage

NLI = """\
Does the answer to a patient's question support the statement? Entailment: the answer says or clearly implies it. \
Contradiction: the answer says or clearly implies the opposite. Neutral: neither; missing is neutral, not contradicted.
Answer with a JSON object: {"label": "Entailment", "Neutral" or "Contradiction"}."""

MT_BENCH = """\
Grade the assistant's last reply from 1 to 10: is it correct, helpful, relevant, deep enough and does it follow the \
instruction, given the conversation before it? Neither length nor style alone is a merit.{reference}
Answer with a JSON object: {{"reason": "one sentence", "score": a number from 1 to 10}}."""


class Entails(BaseModel):
    label: Label


class Grade(BaseModel):
    reason: str = ""
    score: float = Field(ge=1, le=10)


def wording(config=None) -> str:
    return repr((NLI, MT_BENCH))


def _options(config: LLMConfig) -> dict:
    return {"temperature": config.temperature, "max_tokens": config.max_tokens}


@stage(version=1, also=wording)
def kqa_labels(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`labels.jsonl`: question, kind, statement and label of every K-QA statement, for replies to K-QA's questions."""
    asked, about = [], []
    for row in read_replies(replies).itertuples():
        for kind in ("must_have", "nice_to_have"):
            for number, statement in enumerate(row.meta[kind]):
                text = f"Question: {row.prompt[-1]['content']}\n\nAnswer: {row.reply}\n\nStatement: {statement}"
                messages = [{"role": "system", "content": NLI}, {"role": "user", "content": text}]
                asked.append(Request(f"{row.id}/{kind}/{number}", messages, _options(config)))
                about.append({"question": row.id, "kind": kind, "statement": statement})
    made = ask(config.server, asked, out / "requests.jsonl", schema=Entails, desc="K-QA statements")
    unread = 0
    with Ledger(out / "labels.jsonl", key="id") as ledger:
        for answer, what in zip(made, about, strict=True):
            label = answer["value"]["label"] if answer["value"] else None
            unread += label is None
            if answer["id"] not in ledger:
                ledger.add({"id": answer["id"], **what, "label": label})
    return {"statements": len(made), "unread": unread}


def physicians(path: Path) -> pd.DataFrame:
    """K-QA's own labelled answers (nli_medical_annotator.parquet): model, question, kind, statement, three labels, majority."""
    frame = pd.read_parquet(path)
    names = {"llm_x": "model", "Question": "question", "claim": "statement", "majority_label": "label", "category_x": "kind"}
    frame = frame.rename(columns=names)
    return frame.assign(kind=frame.kind.str.lower())


def agreement(frame: pd.DataFrame) -> float:
    """Krippendorff's alpha (nominal) of the three physicians."""
    code = {"Entailment": 0.0, "Neutral": 1.0, "Contradiction": 2.0}
    return stats.krippendorff(frame[["label_0", "label_1", "label_2"]].map(code.get).to_numpy(dtype=float))


@stage(version=1, also=wording)
def grades(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`grades.jsonl`: a score from 1 to 10 for every turn of every reply (MT-Bench; the second turn sees the first)."""
    asked, about = [], []
    for row in read_replies(replies).itertuples():
        turns = list(row.meta.get("turns") or [row.prompt[-1]["content"]])
        told = f"\nA good answer is: {row.reference}" if config.see_reference and row.reference else ""
        for number in range(len(row.replies)):
            talk = "\n\n".join(
                f"User: {asked_for}\n\nAssistant: {reply}"
                for asked_for, reply in zip(turns[: number + 1], row.replies[: number + 1], strict=True)
            )
            messages = [{"role": "system", "content": MT_BENCH.format(reference=told)}, {"role": "user", "content": talk}]
            asked.append(Request(f"{row.id}#{number}", messages, _options(config)))
            about.append({"question": row.id, "turn": number + 1, "category": row.meta.get("category", "all")})
    made = ask(config.server, asked, out / "requests.jsonl", schema=Grade, desc="grades")
    with Ledger(out / "grades.jsonl", key="id") as ledger:
        for answer, what in zip(made, about, strict=True):
            if answer["id"] not in ledger:
                ledger.add({"id": answer["id"], **what, "score": answer["value"]["score"] if answer["value"] else None})
    scores = [m["value"]["score"] for m in made if m["value"]]
    return {"turns": len(made), "unread": len(made) - len(scores), "mean": sum(scores) / len(scores) if scores else None}


@stage(version=1)
def as_pairs(out: Path, config=None, *, ours: Artifact, baseline: Artifact) -> dict:
    """Replies of two models to the same prompts as pairs for `llm.pairwise`: chosen is ours, rejected the baseline's."""
    a, b = read_replies(ours).set_index("id"), read_replies(baseline).set_index("id")
    rows = [
        {
            "id": name, "source": "replies", "subset": "all", "prompt": a.prompt[name], "chosen": said(a.reply[name]),
            "rejected": said(b.reply[name]), "meta": {"reference": a.reference[name]},
        }
        for name in a.index.intersection(b.index)
        if a.reply[name] and b.reply[name] and a.reply[name] != b.reply[name]
    ]  # fmt: skip
    if not rows:
        raise ConfigError("no prompt has two different replies: nothing to compare")
    canonical.write_rows(out / "pairs.parquet", rows)
    return {"pairs": len(rows), "same": len(a.index.intersection(b.index)) - len(rows)}


def win_rate(verdicts: Artifact, same: int = 0) -> stats.Estimate:
    """Share of prompts won, ties and inconsistent verdicts as half a win; `same`: prompts with equal replies, ties, too."""
    frame = pd.read_json(verdicts / "verdicts.jsonl", lines=True)
    worth = (
        frame.verdict.map({"chosen": 1.0, "rejected": 0.0, "tie": 0.5, "inconsistent": 0.5}).dropna().tolist() + [0.5] * same
    )
    return stats.clustered(worth, range(len(worth)))
