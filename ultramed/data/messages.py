"""Rows as conversations: what a question looks like to a model, and what its answer looks like.

Everything that is asked or trained on passes through here, so that a question reads the same everywhere.
"""

import hashlib
import re

FINAL = "Answer:"  # how the last line of a reasoned answer begins

# What the system turn asks for. The base model is told the form of the answer, too.
HINTS = {
    "content_first": "Answer: text (letter).",
    "letter_first": "Answer: letter: text.",
    "medalpaca": "Answer this multiple choice question.",  # MedAlpaca, eval/eval_usmle.py, which names no form
}
# What ends a question that is to be reasoned about: UltraMedical's training format names no form, so this line does.
REASON = 'Think step by step. End with a last line of the form "Answer: text (letter)".'


def hints_wording(config=None) -> str:
    """Hash of what questions ask for, for the keys of stages that make messages of questions and render nothing."""
    return hashlib.sha256(repr(HINTS).encode()).hexdigest()[:12]


def question_text(row: dict, mark: str = ".") -> str:
    """Context (if any), question and lettered options, 'A. text' a line; `mark` stands after the letter."""
    context = f"{row['context']}\n\n" if row.get("context") else ""
    return context + row["question"] + "\n" + "\n".join(f"{k}{mark} {v}" for k, v in row["options"].items())


def question_prompt(row: dict, answer_form: str) -> list[dict]:
    """Messages that ask a multiple-choice question and name the wanted form of the answer.

    'medalpaca' asks as MedAlpaca's eval/eval_usmle.py does: its instruction, and options as 'A: text'.
    'reasoned' is UltraMedical's training format (data/examples.json of its repository: the question, a blank line, an option a
    line, no system turn) and one line that asks for reasons and for a last line that can be read.
    """
    if answer_form == "reasoned":
        context = f"{row['context']}\n\n" if row.get("context") else ""
        lettered = "\n".join(f"{k}. {v}" for k, v in row["options"].items())
        return [{"role": "user", "content": f"{context}{row['question']}\n\n{lettered}\n\n{REASON}"}]
    text = question_text(row, ":" if answer_form == "medalpaca" else ".")
    return [{"role": "system", "content": HINTS[answer_form]}, {"role": "user", "content": text}]


def names_option(prompt: list[dict], letter: str | None, reply: str) -> bool:
    """Whether the reply holds the text that `letter` stands for in the question's list of options."""
    found = re.search(rf"^{letter}[.:] (.+)$", prompt[-1]["content"], re.MULTILINE) if letter else None
    return bool(found) and found[1].casefold() in reply.casefold()


def answer_text(row: dict, answer_form: str) -> str:
    """The gold answer. letter_first and medalpaca are 'B: text'; content_first is what a small model can learn; reasoned
    puts the row's rationale, if it has one, before a last line 'Answer: text (B)'."""
    letter, text = row["gold"], row["options"][row["gold"]]
    if answer_form == "reasoned":
        reasons = (row.get("meta") or {}).get("rationale")
        return f"{reasons}\n{FINAL} {text} ({letter})" if reasons else f"{FINAL} {text} ({letter})"
    return f"{letter}: {text}" if answer_form in ("letter_first", "medalpaca") else f"{text} ({letter})"


def as_completion(text: str) -> list[dict]:
    """A completion: one assistant message."""
    return [{"role": "assistant", "content": text}]


def as_instruction(row: dict, answer_form: str) -> dict:
    """A training row of any canonical row: instruction rows as they are, questions with their gold answer."""
    if "options" not in row:
        return {k: row[k] for k in ("id", "source", "prompt", "completion")}
    answer = as_completion(answer_text(row, answer_form))
    return {"id": row["id"], "source": row["source"], "prompt": question_prompt(row, answer_form), "completion": answer}
