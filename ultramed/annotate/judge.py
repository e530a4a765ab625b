"""A language model behind a URL as annotator: complexity of instructions, feedback on candidates, one reply or the other.

The rubrics are this project's own words for what UltraMedical describes (sections 2.3 and 3.1). Candidates are shown in
an order drawn with a seed, and two replies are judged in both orders: what a judge prefers for its place is not a
preference.
"""

import random
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from ultramed.annotate.feedback import join, with_scores
from ultramed.core.client import Request, ServerConfig, ask, values
from ultramed.core.ledger import write_lines
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import question_text

COMPLEXITY = """\
You grade how demanding a biomedical instruction is, from 1 to 10.
1-3: a fact that anyone could look up. 4-6: knowledge of one field, applied directly. 7-8: several facts must be brought \
together, or a case must be worked through. 9-10: a specialist would have to think about it.
Judge the instruction, not a possible answer. Length alone does not make it demanding.
Answer with a JSON object: {"reason": "one sentence", "score": a number from 1 to 10}."""

FEEDBACK = """\
You compare replies to the same biomedical question. Give every reply a score from 1 to 10 for, in this order: is it \
medically correct; does it do what was asked; is it complete; is it clear. A wrong statement that could harm a patient \
caps the score at 3. Neither length nor the order of the replies is a merit.{reference}
Answer with a JSON object: {{"scores": [one number for each reply, in the order shown]}}."""

PAIRWISE = """\
Two replies to the same biomedical question. Which is better: medically correct first, then doing what was asked, then \
complete and clear? Neither length nor the order of the replies is a merit.{reference}
Answer with a JSON object: {{"reason": "one sentence", "better": "A", "B" or "tie"}}."""


GENERAL = """\
Two replies to the same instruction. Which would the person who gave it rather have: correct, doing what was asked, complete \
and clear? Neither length nor the order of the replies is a merit.{reference}
Answer with a JSON object: {{"reason": "one sentence", "better": "A", "B" or "tie"}}."""


class Complexity(BaseModel):
    reason: str = ""
    score: float = Field(ge=1, le=10)


class Scores(BaseModel):
    scores: list[float]


class Better(BaseModel):
    reason: str = ""
    better: Literal["A", "B", "tie"]


class LLMConfig(Strict):
    """`see_reference`: show the judge the reference answer, where there is one."""

    server: ServerConfig
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(512, ge=1)
    see_reference: bool = True
    seed: int = 0
    rubric: ClassVar[str] = PAIRWISE  # of pairs


class GeneralConfig(LLMConfig):
    """For pairs of replies to any instruction, not a biomedical one."""

    rubric: ClassVar[str] = GENERAL


def wording(config: LLMConfig) -> str:
    """Of the rubrics, for the keys of the stages."""
    return repr((COMPLEXITY, FEEDBACK, config.rubric))


def request(name: str, rubric: str, text: str, config, **more) -> Request:
    """`text` under the rubric, with the temperature and max_tokens of `config`; `more` goes to the server, too."""
    messages = [{"role": "system", "content": rubric}, {"role": "user", "content": text}]
    return Request(name, messages, {"temperature": config.temperature, "max_tokens": config.max_tokens, **more})


def conversation(messages: list[dict]) -> str:
    """All turns as one text; an instruction that stands in the system turn (Alpaca's, with an input) belongs to it."""
    return "\n\n".join(m["content"] for m in messages)


def _reference(rubric: str, text: str, config: LLMConfig) -> str:
    told = f"\nThe reference answer is: {text}" if config.see_reference and text else ""
    return rubric.format(reference=told)


@stage(version=2, also=wording)
def complexity(out: Path, config: LLMConfig, *, data: Artifact, side: str = "train") -> dict:
    """`scores.jsonl`: id and score (1 to 10, or None where the judge gave none) of every row of `data`."""
    rows = canonical.read_rows(data / f"{side}.parquet")
    asked = [
        request(r["id"], COMPLEXITY, conversation(r["prompt"]) if "prompt" in r else question_text(r), config) for r in rows
    ]
    made = ask(config.server, asked, out / "requests.jsonl", schema=Complexity, desc="complexity")
    given = values(made, "score")
    write_lines(out / "scores.jsonl", ({"id": m["id"], "score": score} for m, score in zip(made, given, strict=True)))
    scores = [score for score in given if score is not None]
    return {"rows": len(rows), "unparsed": len(made) - len(scores), "mean_score": sum(scores) / len(scores) if scores else None}


@stage(version=2, also=wording)
def llm_feedback(out: Path, config: LLMConfig, **samples: Artifact) -> dict:
    """`feedback.jsonl` as `feedback` (annotate/feedback.py) writes it, with the model's scores; None for all candidates of a
    prompt whose judgement could not be read. The candidates are shuffled with the seed before they are shown."""
    joined, asked, orders = join(samples), [], {}
    for row in joined:
        order = list(range(len(row["candidates"])))
        random.Random(f"{config.seed}:{row['id']}").shuffle(order)
        orders[row["id"]] = order
        shown = "\n\n".join(f"Reply {n}:\n{row['candidates'][i]['text']}" for n, i in enumerate(order, 1))
        rubric = _reference(FEEDBACK, row.get("reference", ""), config)
        asked.append(request(row["id"], rubric, f"Question:\n{conversation(row['prompt'])}\n\n{shown}", config))
    made = ask(config.server, asked, out / "requests.jsonl", schema=Scores, desc="feedback")
    scores = [_in_order(answer["value"], orders[row["id"]]) for row, answer in zip(joined, made, strict=True)]
    write_lines(out / "feedback.jsonl", (with_scores(row, given) for row, given in zip(joined, scores, strict=True)))
    unread = sum(None in given for given in scores)
    candidates = sum(len(row["candidates"]) for row in joined)
    return {"prompts": len(joined), "candidates": candidates, "unread": unread, "annotator": config.server.model}


def _in_order(value: dict | None, order: list[int]) -> list[float | None]:
    """Scores of the candidates out of those given in the order shown; None for all if there are not as many."""
    given = value["scores"] if value else []
    if len(given) != len(order):
        return [None] * len(order)
    return [given[order.index(i)] for i in range(len(order))]


@stage(version=2, also=wording)
def pairwise(out: Path, config: LLMConfig, *, pairs: Artifact) -> dict:
    """`verdicts.jsonl`: each pair judged in both orders.

    verdict is 'chosen', 'rejected' or 'tie' where both orders agree, 'inconsistent' where they do not, and 'unread'
    where one could not be read. Returns their counts and the consistency: agreeing pairs among those read twice.
    """
    rows = canonical.read_pairs(pairs / "pairs.parquet")
    asked = []
    for row in rows:
        rubric = _reference(config.rubric, row["meta"].get("reference", ""), config)
        for first, second in (("chosen", "rejected"), ("rejected", "chosen")):
            shown = f"Reply A:\n{row[first][0]['content']}\n\nReply B:\n{row[second][0]['content']}"
            text = f"Question:\n{conversation(row['prompt'])}\n\n{shown}"
            asked.append(request(f"{row['id']}/{first}", rubric, text, config))
    made = ask(config.server, asked, out / "requests.jsonl", schema=Better, desc="pairs, both orders")
    verdicts = [combine(forth["value"], back["value"]) for forth, back in zip(made[::2], made[1::2], strict=True)]
    write_lines(
        out / "verdicts.jsonl",
        ({"id": r["id"], "subset": r["subset"], "verdict": v} for r, v in zip(rows, verdicts, strict=True)),
    )
    counts = {v: verdicts.count(v) for v in ("chosen", "rejected", "tie", "inconsistent", "unread")}
    read = len(rows) - counts["unread"]
    return {"pairs": len(rows), **counts, "consistency": (read - counts["inconsistent"]) / read if read else None}


def combine(forth: dict | None, back: dict | None) -> str:
    """Verdict of two judgements, `forth` with chosen as A, `back` with chosen as B."""
    if forth is None or back is None:
        return "unread"
    one = {"A": "chosen", "B": "rejected", "tie": "tie"}[forth["better"]]
    two = {"B": "chosen", "A": "rejected", "tie": "tie"}[back["better"]]
    return one if one == two else "inconsistent"
