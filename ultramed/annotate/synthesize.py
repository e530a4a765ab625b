"""New training data from a language model: questions out of textbook paragraphs, instructions out of topics, evolved
instructions, and answers that were checked.

What UltraMedical describes in section 2.2, with prompts of this project's own: TextBookQA (paragraph to four-option
question), WikiInstruct (topic to instruction), MedQA-Evol (instruction evolution with elimination), and answers by
chain of thought that are compared with the gold answer and tried again with retrieved examples (dynamic few-shot).
Whatever fails is written to `rejected.jsonl` with its reason.
"""

import random
from pathlib import Path

from pydantic import BaseModel, Field, field_validator

from ultramed.annotate.judge import conversation, request
from ultramed.core.client import Request, ServerConfig, ask
from ultramed.core.ledger import write_lines
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.dedupe import jaccard, normalise, shingles
from ultramed.data.messages import as_completion, question_text
from ultramed.data.tfidf import Tfidf
from ultramed.lm.parsing import parse

LETTERS = "ABCD"

TEXTBOOK = """\
Write one examination question that a reader of the paragraph could answer and that asks for understanding, not for a \
word of the text. Prefer a short clinical or experimental situation. It must be answerable without the paragraph at hand: \
never write "according to the text". Four options of one kind and similar length, exactly one of them right.
Answer with a JSON object: {"question": "...", "right": "...", "wrong": ["...", "...", "..."], "rationale": "why, in one \
or two sentences"}."""

TOPIC = """\
Write one instruction to a biomedical assistant about the topic. Kind: {kind}. It must be self-contained, as somebody \
would really write it, and not name these rules.
Answer with a JSON object: {{"instruction": "..."}}."""

KINDS = (
    "explain a mechanism to a student",
    "work through a case and justify the next step",
    "compare two approaches and say when each is right",
    "design a study or an experiment",
    "summarise evidence for a guideline, with its limits",
    "advise a patient in plain words, with warning signs",
)

EVOLVE = """\
Rewrite the instruction below into one that is harder: {how}. It must stay answerable, on the same biomedical subject, \
and at most {words} words longer. Do not answer it, and do not mention that it was rewritten.{keep}
Answer with a JSON object: {{"instruction": "..."{field}}}."""

WAYS = {
    "open": (
        "add a constraint that a good answer must respect",
        "replace general terms with specific ones",
        "ask for the reasoning that leads to the answer, in several steps",
        "add a complication, such as a second disease, a drug or a contradictory finding",
        "turn it into a rarer question of the same field",
    ),
    "choice": (
        "make two steps of reasoning necessary: first a diagnosis or mechanism, then what is asked",
        "put the decisive fact into findings or laboratory values instead of naming it",
        "add a finding that is true but does not help",
        "make the wrong options what a hurried reader would choose",
    ),
}

SOLVE = "Solve the question step by step, briefly. End with a line: Answer: <letter>."


class TextbookItem(BaseModel):
    question: str = Field(min_length=20)
    right: str = Field(min_length=1)
    wrong: list[str] = Field(min_length=3, max_length=3)
    rationale: str = ""

    @field_validator("question")
    @classmethod
    def _stands_alone(cls, text: str) -> str:
        if any(words in text.lower() for words in ("the paragraph", "the text", "the passage", "above excerpt")):
            raise ValueError("the question refers to the text")
        return text


class Instruction(BaseModel):
    instruction: str = Field(min_length=10)


class EvolvedChoice(Instruction):
    options: dict[str, str] = Field(min_length=4, max_length=4)


class SynthesisConfig(Strict):
    """The language model that writes questions and instructions, and how."""

    server: ServerConfig
    temperature: float = Field(0.7, ge=0)
    max_tokens: int = Field(1024, ge=1)
    seed: int = 0
    per_row: int = Field(1, ge=1)  # instructions a topic
    rounds: int = Field(2, ge=1)  # of evolution
    words: int = Field(60, ge=1)  # that one round may add
    tries: int = Field(3, ge=1)  # of an answer; the later ones with examples
    shots: int = Field(2, ge=0)  # solved examples shown then


def wording(config=None) -> str:
    return repr((TEXTBOOK, TOPIC, KINDS, EVOLVE, WAYS, SOLVE))


class _Rejects:
    """Lines of `rejected.jsonl`; `counts` by reason."""

    def __init__(self, out: Path):
        self.path, self.rows, self.counts = out / "rejected.jsonl", [], {}

    def add(self, name: str, reason: str) -> None:
        self.counts[reason.partition(":")[0]] = self.counts.get(reason.partition(":")[0], 0) + 1
        self.rows.append({"id": name, "reason": reason})

    def write(self) -> dict:
        write_lines(self.path, self.rows)
        return {"rejected": len(self.rows), "reasons": self.counts}


@stage(version=2, also=wording)
def textbook_questions(out: Path, config: SynthesisConfig, *, data: Artifact, side: str = "train") -> dict:
    """Four-option questions of textbook paragraphs (prompt rows): `train.parquet`, options shuffled with the seed."""
    rows, rejects, made = canonical.read_rows(data / f"{side}.parquet"), _Rejects(out), []
    asked = [request(r["id"], TEXTBOOK, conversation(r["prompt"]), config) for r in rows]
    for answer in ask(config.server, asked, out / "requests.jsonl", schema=TextbookItem, desc="textbook questions"):
        name, item = answer["id"], answer["value"]
        if item is None:
            rejects.add(name, f"unparsed: {answer['reason']}")
            continue
        texts = [item["right"], *item["wrong"]]
        if len({normalise(t) for t in texts}) < 4:
            rejects.add(name, "two options are the same")
            continue
        random.Random(f"{config.seed}:{name}").shuffle(texts)
        gold = LETTERS[texts.index(item["right"])]
        made.append(
            {
                "id": f"textbook:{name}",
                "source": "textbook",
                "dataset": "textbook",
                "subset": "textbook",
                "gold": gold,
                "question": item["question"],
                "options": dict(zip(LETTERS, texts, strict=True)),
                "meta": {"paragraph": name, "rationale": item["rationale"]},
            }
        )
    return _publish(out, canonical.Question, made, rejects)


@stage(version=2, also=wording)
def topic_instructions(out: Path, config: SynthesisConfig, *, data: Artifact, side: str = "train") -> dict:
    """Instructions about topics (prompt rows), `per_row` of each, of kinds that take turns: `train.parquet`, prompt rows."""
    rows, rejects, made = canonical.read_rows(data / f"{side}.parquet"), _Rejects(out), []
    asked = [
        request(f"{r['id']}#{k}", TOPIC.format(kind=KINDS[(i + k) % len(KINDS)]), conversation(r["prompt"]), config, seed=k)
        for i, r in enumerate(rows)
        for k in range(config.per_row)
    ]
    for answer in ask(config.server, asked, out / "requests.jsonl", schema=Instruction, desc="topic instructions"):
        if answer["value"] is None:
            rejects.add(answer["id"], f"unparsed: {answer['reason']}")
        else:
            made.append(_prompt_row(f"topic:{answer['id']}", "topic", answer["value"]["instruction"]))
    return _publish(out, canonical.Prompt, made, rejects)


def _prompt_row(name: str, source: str, text: str, **meta) -> dict:
    return {"id": name, "source": source, "prompt": [{"role": "user", "content": text}], "reference": "", "meta": meta}


def eliminated(before: str, after: str, words: int) -> str | None:
    """Why an evolved instruction is dropped, or None: unchanged, empty of content, too long, or it talks about itself."""
    a, b = normalise(before), normalise(after)
    if not b or len(b.split()) < 5:
        return "too short"
    if jaccard(shingles(a), shingles(b)) > 0.9:
        return "unchanged"
    if len(b.split()) > len(a.split()) + 2 * words:
        return "too long"
    if any(phrase in b for phrase in ("rewritten", "given prompt", "original instruction", "new instruction", "as an ai")):
        return "talks about itself"
    return None


@stage(version=2, also=wording)
def evolve(out: Path, config: SynthesisConfig, *, data: Artifact, side: str = "train") -> dict:
    """Instructions (prompt rows) or questions, made harder in `rounds` rounds: `train.parquet` with every surviving round.

    A failed evolution ends its line: the next round goes on only from what survived. Options may be rewritten, the
    right one must stay right: its text is kept and its place drawn anew.
    """
    rows, rejects, made = canonical.read_rows(data / f"{side}.parquet"), _Rejects(out), []
    current = [{**row, "meta": {**(row.get("meta") or {}), "of": row["id"], "round": 0}} for row in rows]
    for number in range(1, config.rounds + 1):
        choice = "options" in current[0] if current else False
        asked = []
        for row in current:
            way = random.Random(f"{config.seed}:{row['id']}:{number}").choice(WAYS["choice" if choice else "open"])
            keep = "\nThe right option must stay right, word for word: " + row["options"][row["gold"]] if choice else ""
            rubric = EVOLVE.format(
                how=way,
                words=config.words,
                keep=keep,
                field=', "options": {"A": "...", "B": "...", "C": "...", "D": "..."}' if choice else "",
            )
            text = question_text(row) if choice else conversation(row["prompt"])
            asked.append(request(f"{row['meta']['of']}~{number}", rubric, text, config))
        shape = EvolvedChoice if choice else Instruction
        answers = ask(config.server, asked, out / f"requests-{number}.jsonl", schema=shape, desc=f"evolution, round {number}")
        after = []
        for row, answer in zip(current, answers, strict=True):
            reason = f"unparsed: {answer.get('reason')}" if answer["value"] is None else None
            before = row["question"] if choice else conversation(row["prompt"])
            reason = reason or eliminated(before, answer["value"]["instruction"], config.words)
            new = None if reason else _evolved(row, answer, number, config.seed)
            if new is None:
                rejects.add(answer["id"], reason or "the right option was lost")
            else:
                after.append(new)
        made += after
        current = after
    return _publish(out, canonical.Question if made and "options" in made[0] else canonical.Prompt, made, rejects)


def _evolved(row: dict, answer: dict, number: int, seed: int) -> dict | None:
    meta = {"of": row["meta"]["of"], "round": number}
    value = answer["value"]
    if "options" not in row:
        return _prompt_row(answer["id"], "evolved", value["instruction"], **meta)
    right, texts = row["options"][row["gold"]], list(value["options"].values())
    if sum(normalise(t) == normalise(right) for t in texts) != 1:
        return None
    random.Random(f"{seed}:{answer['id']}").shuffle(texts)
    options = dict(zip(LETTERS, texts, strict=True))
    gold = next(letter for letter, text in options.items() if normalise(text) == normalise(right))
    fresh = {"id": answer["id"], "question": value["instruction"], "options": options, "gold": gold, "meta": meta}
    return {**{k: row[k] for k in ("dataset", "subset")}, "source": "evolved", **fresh}


@stage(version=5, also=wording)
def solved(out: Path, config: SynthesisConfig, *, data: Artifact, side: str = "train") -> dict:
    """Answers by chain of thought to questions, kept only if they reach the gold option: `train.parquet`, instruction rows.

    First without examples; what was wrong is tried again with the `shots` most similar solved questions (UltraMedical's
    dynamic few-shot), up to `tries` times in all.
    """
    rows, rejects, made = canonical.read_questions(data / f"{side}.parquet"), _Rejects(out), {}
    encode = Tfidf([r["question"] for r in rows])
    vectors, left = encode([r["question"] for r in rows]), list(range(len(rows)))
    reasons: dict[int, str] = {}
    for attempt in range(config.tries):
        shots = {i: _nearest(vectors, i, list(made), config.shots) if attempt else [] for i in left}
        asked = [_solve(rows[i], [made[j] for j in shots[i]], config, attempt) for i in left]
        answers = ask(config.server, asked, out / f"requests-{attempt}.jsonl", desc=f"answers, try {attempt + 1}")
        for i, answer in zip(list(left), answers, strict=True):
            found = parse(answer["text"], rows[i]["options"], "reasoned")
            if found.letter == rows[i]["gold"]:
                made[i] = _instruction_row(rows[i], answer["text"], attempt)
                left.remove(i)
            else:
                reasons[i] = "no answer found" if found.letter is None else "wrong answer"
    for i in left:
        rejects.add(rows[i]["id"], reasons[i])
    by_try = [sum(r["meta"]["try"] == k + 1 for r in made.values()) for k in range(config.tries)]
    return {**_publish(out, canonical.Instruction, [made[i] for i in sorted(made)], rejects), "solved_by_try": by_try}


def _nearest(vectors, i: int, among: list[int], count: int) -> list[int]:
    if not among or not count:
        return []
    close = (vectors[among] @ vectors[i].T).toarray()[:, 0]
    return [among[k] for k in close.argsort()[::-1][:count]]


def _solve(row: dict, examples: list[dict], config: SynthesisConfig, attempt: int) -> Request:
    messages = [{"role": "system", "content": SOLVE}]
    for shown in examples:
        messages += [*shown["prompt"], *shown["completion"]]
    messages.append({"role": "user", "content": question_text(row)})
    options = {
        "temperature": config.temperature if attempt else 0.0,
        "max_tokens": config.max_tokens,
        "seed": config.seed + attempt,
    }
    return Request(row["id"], messages, options)


def _instruction_row(row: dict, text: str, attempt: int) -> dict:
    return {
        "id": f"solved:{row['id']}",
        "source": row["source"],
        "completion": as_completion(text.strip()),
        "prompt": [{"role": "user", "content": question_text(row)}],
        "meta": {"gold": row["gold"], "try": attempt + 1},
    }


def _publish(out: Path, model: type[BaseModel], made: list[dict], rejects: _Rejects) -> dict:
    result = {"rows": len(made), **rejects.write()}
    if made:
        canonical.write_rows(out / "train.parquet", canonical.check_rows(model, made, "synthesis"))
    return result


STAGES = {"textbook": textbook_questions, "topic": topic_instructions, "evolve": evolve, "solve": solved}
