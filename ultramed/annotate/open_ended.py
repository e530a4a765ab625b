"""Open-ended answers through a judge: K-QA's statements, MT-Bench's scores, CURE-Med's consistency, wins."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, Field

from ultramed.annotate.judge import LLMConfig, pairwise, request
from ultramed.core.client import Request, ask, values
from ultramed.core.errors import ConfigError
from ultramed.core.ledger import write_lines
from ultramed.core.store import Artifact, sha256, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import as_completion
from ultramed.data.sources import data_root
from ultramed.evaluate import stats
from ultramed.evaluate.arms import Answers
from ultramed.evaluate.open_ended import Label, ReplyConfig, kqa_row, kqa_scores, read_replies, replies

NLI = """\
Does the answer to a patient's question support the statement? Entailment: the answer says or clearly implies it. \
Contradiction: the answer says or clearly implies the opposite. Neutral: neither; missing is neutral, not contradicted.
Answer with a JSON object: {"label": "Entailment", "Neutral" or "Contradiction"}."""

CORRECT = """\
Is the answer to a medical question correct? Compare it with the reference answer: the same meaning counts, whatever the \
words, the length or the language. An answer that leaves the decisive point out, or adds something wrong that matters, is \
not correct.
Answer with a JSON object: {"correct": true or false}."""

CONSISTENT = """\
A question in {language} and a reply to it. Is the reply consistent: all of it in {language}, nothing in any other language, \
no drift away from the question, no needless repetition, and a proper conclusion at its end? Whether it is medically \
correct does not matter here.
Answer with a JSON object: {{"consistent": true or false}}."""

MT_BENCH = """\
Grade the assistant's last reply from 1 to 10: is it correct, helpful, relevant, deep enough and does it follow the \
instruction, given the conversation before it? Neither length nor style alone is a merit.{reference}
Answer with a JSON object: {{"reason": "one sentence", "score": a number from 1 to 10}}."""


LABEL = {"Entailment": 0.0, "Neutral": 1.0, "Contradiction": 2.0}


class Entails(BaseModel):
    label: Label


class Verdict(BaseModel):
    correct: bool


class Consistent(BaseModel):
    consistent: bool


class Grade(BaseModel):
    reason: str = ""
    score: float = Field(ge=1, le=10)


def wording(config=None) -> str:
    return repr((NLI, CORRECT, CONSISTENT, MT_BENCH))


def _entails(name: str, question: str, answer: str, statement: str, config: LLMConfig) -> Request:
    return request(name, NLI, f"Question: {question}\n\nAnswer: {answer}\n\nStatement: {statement}", config)


@stage(version=1, also=wording)
def kqa_labels(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`labels.jsonl`: question, kind, statement and label of every K-QA statement, for replies to K-QA's questions."""
    asked, metadata = [], []
    for row in read_replies(replies).itertuples():
        for kind in ("must_have", "nice_to_have"):
            for number, statement in enumerate(row.meta[kind]):
                name, question = f"{row.id}/{kind}/{number}", row.prompt[-1]["content"]
                asked.append(_entails(name, question, row.reply, statement, config))
                metadata.append({"question": row.id, "kind": kind, "statement": statement})
    made = ask(config.server, asked, out / "requests.jsonl", schema=Entails, desc="K-QA statements")
    labels = values(made, "label")
    write_lines(
        out / "labels.jsonl",
        ({"id": m["id"], **what, "label": label} for m, what, label in zip(made, metadata, labels, strict=True)),
    )
    return {"statements": len(made), "unread": labels.count(None)}


@stage(version=1, also=wording)
def correctness(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`verdicts.jsonl`: whether each reply says what its reference says (CURE-Med; the reference is always shown), None
    where the judge could not be read."""
    rows = list(read_replies(replies).itertuples())
    asked = [
        request(r.id, CORRECT, f"Question: {r.prompt[-1]['content']}\n\nReference: {r.reference}\n\nAnswer: {r.reply}", config)
        for r in rows
    ]
    made = ask(config.server, asked, out / "requests.jsonl", schema=Verdict, desc="correctness")
    right = values(made, "correct")
    write_lines(out / "verdicts.jsonl", ({"id": m["id"], "correct": c} for m, c in zip(made, right, strict=True)))
    return {"replies": len(right), "unread": right.count(None), "correct": right.count(True)}


@stage(version=1, also=wording)
def consistency(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`verdicts.jsonl`: whether each reply is in the language of its question throughout and ends properly, None where the
    judge could not be read. CURE-Med's definition (evaluating_language_of_generated_solutions.py, beside UltraMedical's
    replies, which gpt-4o-mini judged); `meta.language` of a row names the language."""
    rows = list(read_replies(replies).itertuples())
    asked = [
        request(r.id, CONSISTENT.format(**r.meta), f"Question: {r.prompt[-1]['content']}\n\nReply: {r.reply}", config)
        for r in rows
    ]
    made = ask(config.server, asked, out / "requests.jsonl", schema=Consistent, desc="language consistency")
    kept = values(made, "consistent")
    write_lines(out / "verdicts.jsonl", ({"id": m["id"], "consistent": c} for m, c in zip(made, kept, strict=True)))
    return {"replies": len(kept), "unread": kept.count(None), "consistent": kept.count(True)}


def physicians_file() -> Path:
    """K-QA's labelled answers in `ULTRAMED_DATA`; ConfigError if they are not there."""
    path = (data_root() or Path()) / "k_qa" / "nli_medical_annotator.parquet"
    if not path.is_file():
        raise ConfigError("the physicians' labels are ULTRAMED_DATA/k_qa/nli_medical_annotator.parquet (K-QA's repository)")
    return path


def physicians() -> pd.DataFrame:
    """K-QA's own labelled answers: model, question, answer, kind, statement, three labels, their majority as label."""
    frame = pd.read_parquet(physicians_file())
    names = {"llm_x": "model", "Question": "question", "claim": "statement", "majority_label": "label", "category_x": "kind"}
    frame = frame.rename(columns=names)
    return frame.assign(kind=frame.kind.str.lower())


def agreement(frame: pd.DataFrame) -> float:
    """Krippendorff's alpha (nominal) of the three physicians."""
    return stats.krippendorff(frame[["label_0", "label_1", "label_2"]].map(LABEL.get).to_numpy(dtype=float))


@stage(version=1, also=lambda config: [wording(), sha256(physicians_file())])
def judge_labels(out: Path, config: LLMConfig) -> dict:
    """`labels.jsonl`: the judge's label of every statement that physicians labelled. alpha: Krippendorff's, of the judge
    and the physicians' majority; `physicians`: of the three among themselves, as a scale."""
    frame = physicians()
    asked = [_entails(str(i), r.question, r.answer, r.statement, config) for i, r in enumerate(frame.itertuples())]
    made = ask(config.server, asked, out / "requests.jsonl", schema=Entails, desc="labels beside physicians'")
    labels = values(made, "label")
    both = pd.DataFrame({"judge": labels, "physicians": frame.label})
    write_lines(out / "labels.jsonl", both.to_dict("records"))
    read = both.dropna()
    return {
        "statements": len(both),
        "unread": labels.count(None),
        "same": float((read.judge == read.physicians).mean()),
        "alpha": stats.krippendorff(both.map(LABEL.get).to_numpy(dtype=float)),
        "physicians": agreement(frame),
    }


@stage(version=1, also=wording)
def grades(out: Path, config: LLMConfig, *, replies: Artifact) -> dict:
    """`grades.jsonl`: a score from 1 to 10 for every turn of every reply (MT-Bench; the second turn sees the first)."""
    asked, metadata = [], []
    for row in read_replies(replies).itertuples():
        turns = list(row.meta.get("turns") or [row.prompt[-1]["content"]])
        told = f"\nA good answer is: {row.reference}" if config.see_reference and row.reference else ""
        for number in range(len(row.replies)):
            talk = "\n\n".join(
                f"User: {asked_for}\n\nAssistant: {reply}"
                for asked_for, reply in zip(turns[: number + 1], row.replies[: number + 1], strict=True)
            )
            asked.append(request(f"{row.id}#{number}", MT_BENCH.format(reference=told), talk, config))
            metadata.append({"question": row.id, "turn": number + 1, "category": row.meta.get("category", "all")})
    made = ask(config.server, asked, out / "requests.jsonl", schema=Grade, desc="grades")
    given = values(made, "score")
    write_lines(
        out / "grades.jsonl", ({"id": m["id"], **what, "score": s} for m, what, s in zip(made, metadata, given, strict=True))
    )
    scores = [s for s in given if s is not None]
    return {"turns": len(made), "unread": len(made) - len(scores), "mean": sum(scores) / len(scores) if scores else None}


@stage(version=2)
def as_pairs(out: Path, config=None, *, ours: Artifact, baseline: Artifact | None = None) -> dict:
    """Replies of two models to the same prompts as pairs for `judge.pairwise`: chosen is ours, rejected the baseline's (the
    prompts' own references, if none is given). What needs no judge is counted: equal replies, and those that only we (`lost`)
    or only they (`won`) left empty."""
    a = read_replies(ours).set_index("id")
    b = read_replies(baseline).set_index("id") if baseline else a.assign(reply=a.reference)[a.reference != ""]
    names = a.index.intersection(b.index)
    rows = [
        {
            "id": name,
            "source": "replies",
            "subset": "all",
            "prompt": a.prompt[name],
            "chosen": as_completion(a.reply[name]),
            "rejected": as_completion(b.reply[name]),
            "meta": {"reference": a.reference[name]},
        }
        for name in names
        if a.reply[name] and b.reply[name] and a.reply[name] != b.reply[name]
    ]
    if not rows:
        raise ConfigError("no prompt has two different replies: nothing to compare")
    canonical.write_rows(out / "pairs.parquet", rows)
    return {
        "pairs": len(rows),
        "same": sum(a.reply[name] == b.reply[name] for name in names),
        "lost": sum(not a.reply[name] and bool(b.reply[name]) for name in names),
        "won": sum(bool(a.reply[name]) and not b.reply[name] for name in names),
    }


def agreement_with_people(verdicts: Artifact) -> dict:
    """Of `judge.pairwise` over pairs that people ranked: share of pairs where the judge agrees with them, of those where
    it decided, and the share that it judged alike in both orders (consistency)."""
    counts = verdicts.metrics
    decided = [1] * counts["chosen"] + [0] * counts["rejected"]
    return {
        "pairs": counts["pairs"],
        "decided": len(decided),
        "consistency": counts["consistency"],
        "agrees": str(stats.wilson(decided)) if decided else "nothing decided",
    }


def outcomes(verdicts: Artifact, pairs: Artifact) -> pd.DataFrame:
    """A row a prompt that could be judged: `worth` (1 won, 0 lost, a half for ties and for verdicts that change with the
    order) and `longer`, by how many characters our reply is longer."""
    frame = pd.read_json(verdicts / "verdicts.jsonl", lines=True, dtype={"id": str})
    length = {
        r["id"]: len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"])
        for r in canonical.read_pairs(pairs / "pairs.parquet")
    }
    worth = frame.verdict.map({"chosen": 1.0, "rejected": 0.0, "tie": 0.5, "inconsistent": 0.5})
    return frame.assign(worth=worth, longer=frame.id.map(length)).dropna(subset="worth")


def win_rate(judged: pd.DataFrame, same: int = 0, lost: int = 0, won: int = 0) -> stats.Estimate:
    """Share of prompts won: of the `judged` ones (`outcomes`), and of those that needed no judge (`as_pairs`); equal replies
    are half a win."""
    worth = [*judged.worth, *[0.5] * same, *[0.0] * lost, *[1.0] * won]
    return stats.clustered(worth, range(len(worth))).within(0, 1)


def trust(judge: LLMConfig, ranked: Artifact) -> tuple[pd.DataFrame, list[Artifact]]:
    """How far a judge can be trusted: against physicians' labels (K-QA), an expert's ranking (`ranked` pairs) and itself
    with the places swapped. (against, n, measure, judge, people among themselves; artifacts)."""
    labels, verdicts = judge_labels(judge), pairwise(judge, pairs=ranked)
    found, people = labels.metrics, agreement_with_people(verdicts)
    rows = [
        ("physicians' labels (K-QA)", found["statements"], "Krippendorff's alpha", found["alpha"], found["physicians"]),
        ("an expert's ranking (MEDIQA)", people["decided"], "pairs decided as the expert did, %", people["agrees"], None),
        ("itself, places swapped", people["pairs"], "pairs with the same verdict", people["consistency"], None),
    ]
    columns = ["against", "n", "measure", "judge", "people among themselves"]
    return pd.DataFrame(rows, columns=columns), [labels, verdicts]


def physicians_table() -> pd.DataFrame:
    """K-QA's measures by the physicians' own labels, a row a model."""
    models = physicians().groupby("model")
    return pd.DataFrame([{"answers by": name, **kqa_row(part, kqa_scores(part))} for name, part in models])


@dataclass(frozen=True)
class Judged:
    """One policy's answers through the judge: K-QA statements (by question: complete and contradicting shares), MT-Bench."""

    row: dict
    scores: dict[str, stats.Estimate]  # kqa_scores, and mt_bench from 1 to 10
    kqa: Answers
    contradicts: Answers
    replies: Artifact


def judge_policy(
    judge: LLMConfig, name: str, policy: Artifact, kqa: Artifact, talks: Artifact, limit: int, max_new_tokens: int
) -> Judged:
    """K-QA's statements and MT-Bench's turns of a policy, through the judge."""
    asked = ReplyConfig(limit=limit, max_new_tokens=max_new_tokens)
    answered = replies(asked, model=policy, data=kqa)
    talked = replies(asked.model_copy(update={"turns": True}), model=policy, data=talks)
    labels, marks = kqa_labels(judge, replies=answered), grades(judge, replies=talked)
    frame = pd.read_json(labels / "labels.jsonl", lines=True)
    scores = kqa_scores(frame)
    row = {"answers by": name, **kqa_row(frame, scores), "unread": int(frame.label.isna().sum())}
    row |= {"MT-Bench": marks.metrics["mean"], "turns": marks.metrics["turns"]}
    row["cut off"] = answered.metrics["cut_off"] + talked.metrics["cut_off"]
    graded = pd.read_json(marks / "grades.jsonl", lines=True).dropna(subset="score")
    if len(graded):
        scores["mt_bench"] = stats.clustered(graded.score, graded.question).within(1, 10)
    artifacts = (policy, answered, labels, marks)
    must = frame[frame.kind == "must_have"]
    return Judged(
        row, scores, _statements(must, "Entailment", artifacts), _statements(frame, "Contradiction", artifacts), answered
    )


def _statements(frame: pd.DataFrame, label: str, artifacts: tuple[Artifact, ...]) -> Answers:
    """Statements as answers, right where they have the label; a question's statements belong together."""
    frame = frame.dropna(subset="label")  # a label that cannot be read says nothing of the answer
    made = pd.DataFrame({"id": frame.id, "concept": frame.question, "subset": "K-QA", "seed": 0})
    return Answers(made.assign(correct=(frame.label == label).astype(int), letter=frame.label, strict=True), artifacts)


def wins(judge: LLMConfig, ours: Artifact, baseline: Artifact) -> stats.Estimate:
    """Share of prompts that our replies win against the baseline's, judged in both orders; ties are half a win."""
    made = as_pairs(None, ours=ours, baseline=baseline)
    settled = {name: made.metrics[name] for name in ("same", "lost", "won")}
    return win_rate(outcomes(pairwise(judge, pairs=made), made), **settled)


PUBLISHED_ROWS = {  # policy and measure -> row of the paper's general-domain table
    "base/completeness": "Llama-3-8B-Instruct / K-QA / completeness",
    "ultramix/completeness": "Llama-3-8B UltraMedical / K-QA / completeness",
    "base/hallucination": "Llama-3-8B-Instruct / K-QA / hallucination",
    "ultramix/hallucination": "Llama-3-8B UltraMedical / K-QA / hallucination",
    "base/mt_bench": "Llama-3-8B-Instruct / MT-Bench / score",
    "ultramix/mt_bench": "Llama-3-8B UltraMedical / MT-Bench / score",
}


def as_cells(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """Results of `judge_policy` as cells: arm, subset, value, low, high, n (K-QA's by question, as it defines them)."""
    found = [(f"{name}/{measure}", e) for name, result in judged.items() for measure, e in result.scores.items()]
    return pd.DataFrame([{"arm": arm, "subset": "value", **e.row("value")} for arm, e in found])
