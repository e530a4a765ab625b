"""History taking: a model questions a simulated patient and then names up to five diagnoses.

The patient is scripted out of the case: a question that comes near one of its statements gets that statement, any other
question "I am not sure". A language model behind a URL can play the patient instead. Diagnoses are compared by their
words, which is a lower bound: another name of the same disease counts as wrong.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from ultramed.core.client import Request, ServerConfig, ask
from ultramed.core.ledger import Ledger, write_lines
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.dedupe import jaccard, normalise
from ultramed.data.messages import as_completion
from ultramed.data.tfidf import Tfidf
from ultramed.evaluate import stats
from ultramed.evaluate.engine import asking
from ultramed.evaluate.generate import Sampling
from ultramed.lm.device import placement
from ultramed.train.launch import clear

OPENING = """\
You are a doctor and take a patient's history. Ask one short question at a time about symptoms, past illnesses, family \
and habits; do not explain anything.
The patient is a {demographics} and complains of: {complaint}.
Ask your first question."""
NEXT = "{answer}\n\nAsk your next question."
LAST = "{answer}\n\nName the five most likely diagnoses, the most likely first, one a line and nothing else."
PATIENT = """\
You play a patient whom a doctor asks questions. This is all you know about yourself:
{facts}
Answer the doctor's question in one or two short sentences, only with what is written there. If it is not there, say that \
you are not sure. Never name a diagnosis."""
UNSURE = "I am not sure."
STATEMENTS = ("presentation", "physical_history", "family_history", "social_history")


class HistoryConfig(Strict):
    """`limit`: cases, drawn evenly over the file; 0 for all. `patient`: who plays the patient, None for the script."""

    questions: int = Field(6, ge=1)
    max_new_tokens: int = Field(48, ge=1)
    near: float = Field(0.2, gt=0, le=1)  # least cosine of character n-grams of a question and what it is about
    limit: int = Field(0, ge=0)
    patient: ServerConfig | None = None
    batch_tokens: int = Field(8192, ge=64)


def wording(config=None) -> str:
    return repr((OPENING, NEXT, LAST, PATIENT, UNSURE))


def facts(case: dict) -> list[str]:
    """Statements of a vignette (`meta` of its row): sentences of its parts, and each absent finding."""
    told = [s for part in STATEMENTS for s in re.split(r"(?<=[.;])\s+", case[part] or "")]
    absent = re.split(r"[,.;]\s*", case["absent_findings"] or "")
    return [s.strip() for s in [*told, *absent] if len(s.strip()) > 3 and s.strip().casefold() != "none"]


class Script:
    """Which statements of a case a question, or an answer, is about."""

    def __init__(self, cases: list[dict], near: float):
        self.facts = {c["id"]: facts(c["meta"]) for c in cases}
        self.encode = Tfidf([f for statements in self.facts.values() for f in statements])
        self.vectors = {name: self.encode(statements) for name, statements in self.facts.items()}
        self.near = near

    def statement_about(self, name: str, text: str) -> int | None:
        """Index of the statement nearest to `text`, None if none is near."""
        if not self.facts[name] or not text:
            return None
        close = (self.vectors[name] @ self.encode([text]).T).toarray()[:, 0]
        return int(close.argmax()) if close.max() >= self.near else None


@stage(version=2, also=wording)
def histories(
    out: Path, config: HistoryConfig, *, model: Artifact, data: Artifact, side: str = "test", template: str | None = None
) -> dict:
    """`histories.jsonl`: id, gold, questions, answers, found (statements, one index or None a question), statements
    (their number), diagnoses. An interrupted run goes on after the last turn."""
    cases = canonical.spread(canonical.read_rows(data / f"{side}.parquet"), config.limit)
    script, talks = Script(cases, config.near), {c["id"]: [] for c in cases}
    clear(out)
    with Ledger(out / "turns.jsonl") as ledger:
        for row in ledger.rows.values():
            talks[row["id"]].append(row)
        total, opening = len(cases) * (config.questions + 1), {"budget": config.batch_tokens, "dtype": placement().dtype}
        if len(ledger) < total:
            with asking(ledger, total, "histories", "turn", model, template, out, **opening) as (engine, bar):
                for turn in range(config.questions + 1):
                    todo = [c for c in cases if len(talks[c["id"]]) == turn]
                    if todo:
                        _take_turn(engine, todo, turn, talks, script, config, out, ledger)
                        bar.update(len(todo))
    write_lines(
        out / "histories.jsonl",
        (
            {
                "id": c["id"],
                "gold": c["reference"],
                "questions": [t["said"] for t in talks[c["id"]][:-1]],
                "answers": [t["answer"] for t in talks[c["id"]][:-1]],
                "found": [t["found"] for t in talks[c["id"]][:-1]],
                "statements": len(script.facts[c["id"]]),
                "diagnoses": diagnoses(talks[c["id"]][-1]["said"]),
            }
            for c in cases
        ),
    )
    return {"cases": len(cases), "patient": config.patient.model if config.patient else "script"}


def _take_turn(engine, todo: list[dict], turn: int, talks: dict, script: "Script", config, out: Path, ledger: Ledger) -> None:
    """One question (or, at the end, the diagnoses) of every case in `todo`, and the patient's answer."""
    said, last = {}, turn == config.questions

    def done(batch, replies):
        said.update({todo[i]["id"]: reply.text.strip() for i, reply in zip(batch, replies, strict=True)})

    asked = [conversation(case, talks[case["id"]], config.questions) for case in todo]
    engine.replies(asked, Sampling(96 if last else config.max_new_tokens), done)
    answers = {} if last else _answers(todo, said, script, config, out / "patient.jsonl")
    for case in todo:
        name = case["id"]
        answer, found = answers.get(name, ("", None))
        row = {"key": f"{name}#{turn}", "id": name, "said": said[name], "answer": answer, "found": found}
        ledger.add(row)
        talks[name].append(row)


def conversation(case: dict, talk: list[dict], questions: int) -> list[dict]:
    """What the model sees before its next turn; the last one asks for diagnoses."""
    meta = case["meta"]
    first = OPENING.format(demographics=meta["demographics"], complaint=meta["chief_complaints"])
    messages = [{"role": "user", "content": first}]
    for number, row in enumerate(talk, 1):
        form = LAST if number == questions else NEXT
        messages += [*as_completion(row["said"]), {"role": "user", "content": form.format(answer=row["answer"])}]
    return messages


def _answers(cases, said, script, config, path) -> dict[str, tuple[str, int | None]]:
    """(answer, statement it gives) of the patient of every case."""
    if config.patient is None:
        found = {c["id"]: script.statement_about(c["id"], said[c["id"]]) for c in cases}
        return {name: (UNSURE if i is None else script.facts[name][i], i) for name, i in found.items()}
    requests = [
        Request(
            c["id"],
            [
                {"role": "system", "content": PATIENT.format(facts="\n".join(f"- {f}" for f in script.facts[c["id"]]))},
                {"role": "user", "content": said[c["id"]]},
            ],
            {"temperature": 0.0, "max_tokens": 80},
        )
        for c in cases
    ]
    told = ask(config.patient, requests, path, desc="the patient")
    return {row["id"]: (row["text"].strip(), script.statement_about(row["id"], row["text"])) for row in told}


def diagnoses(text: str) -> list[str]:
    """Up to five, out of lines or of a list, whose preamble is none."""
    listed = re.search(r"(?:^|\s)\d[.)]\s|^[-*•]\s", text, re.MULTILINE)
    text = text[listed.start() :] if listed else re.sub(r"\A[^\n]*:\s*\n", "", text)
    lines = re.split(r"(?:^|\s+)\d[.)]\s|\n+", text)
    return [s for line in lines if (s := re.sub(r"^[\s\-*•]+|[\s.,;:]+$", "", line))][:5]


def same_disease(a: str, b: str) -> bool:
    """Equal words, one name inside the other, or half of the words in common."""
    x, y = normalise(a), normalise(b)
    if not x or not y:
        return False
    return f" {x} " in f" {y} " or f" {y} " in f" {x} " or jaccard(set(x.split()), set(y.split())) >= 0.5


def read_histories(artifact: Artifact) -> pd.DataFrame:
    """`histories.jsonl` with top1 and top5 by `same_disease`."""
    frame = pd.read_json(artifact / "histories.jsonl", lines=True, dtype={"id": str})
    right = [[same_disease(d, gold) for d in given] for given, gold in zip(frame.diagnoses, frame.gold, strict=True)]
    return frame.assign(top1=[any(r[:1]) for r in right], top5=[any(r) for r in right])


def history_scores(frame: pd.DataFrame) -> dict[str, stats.Estimate]:
    """precision: share of the questions that brought a statement not heard before (0 where none was asked); coverage: share of
    the case's statements heard; both per case, intervals over cases; top1, top5: share of the cases."""
    new = [len({i for i in found if i is not None}) for found in frame.found]
    asked = [len(q) for q in frame.questions]
    return {
        "precision": stats.clustered(np.divide(new, np.maximum(asked, 1)), frame.id).within(0, 1),
        "coverage": stats.clustered(np.divide(new, frame.statements.clip(lower=1)), frame.id).within(0, 1),
        "top1": stats.wilson(frame.top1),
        "top5": stats.wilson(frame.top5),
    }
