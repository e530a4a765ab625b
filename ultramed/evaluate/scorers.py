"""Stored replies scored again by other projects' rules: how much of a difference between two papers is the parser?

Written from the descriptions of the projects' scorers; no model is asked. Each takes reply, options (letter -> text) and the
gold letter, which only medmarks looks at, and says whether the reply counts as right.
"""

import functools
import re
from collections.abc import Callable, Iterable

import pandas as pd

from ultramed.evaluate.stats import wilson
from ultramed.lm.parsing import parse

Scorer = Callable[[str, dict[str, str], str], bool]


def ours(reply: str, options: dict[str, str], gold: str, answer_form: str = "reasoned") -> bool:
    """The cascade of lm/parsing.py."""
    return parse(reply, options, answer_form).letter == gold


def harness_strict(reply: str, options: dict[str, str], gold: str) -> bool:
    """lm-evaluation-harness, zero-shot chain of thought, strict: what stands after the first 'answer is' up to the line's last
    character must be the letter, apart from case and punctuation."""
    found = re.search(r"(?:[Tt]he answer is |answer is |The answer: |The final answer: )(.*).", reply)
    said = re.sub(r"[^\w\s]", "", found[1]).strip().lower() if found else ""
    return said == gold.lower()


def harness_flexible(reply: str, options: dict[str, str], gold: str) -> bool:
    """lm-evaluation-harness, flexible: the last letter in brackets; else the last option text; else the last ': B'."""
    if bracketed := re.findall(r"\(([A-Z])\)", reply):
        return bracketed[-1] == gold

    def bare(text: str) -> str:
        return re.sub(r"[^\w\s]", "", text.lower())

    texts = {bare(text.strip()): letter for letter, text in options.items()}
    if named := re.findall("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)), bare(reply)):
        return texts.get(named[-1]) == gold
    letters = re.findall(rf":\s*([{''.join(options)}])", reply)
    return bool(letters) and letters[-1] == gold


def inspect(reply: str, options: dict[str, str], gold: str) -> bool:
    """Inspect's multiple_choice: the first 'ANSWER: B', in any case; more than one letter is wrong, and so is any other
    form."""
    found = re.search(r"ANSWER\s*:\s*([A-Za-z ,]+)(?:\W|$)", reply, re.IGNORECASE)
    return found is not None and re.sub(r"[ ,]", "", found[1]).upper() == gold


def huatuo(reply: str, options: dict[str, str], gold: str) -> bool:
    """HuatuoGPT-o1: after '## Final Response', the first 'answer is B'; else the first letter that stands alone (an article 'A'
    before a word does not count)."""
    text = reply.rsplit("## Final Response", 1)[-1]
    said = re.findall(r"answer is\s*([A-N])", text) or re.findall(rf"(?:^|\W)(?![aA] )([{''.join(options)}])(?:\W|$)", text)
    return bool(said) and said[0] == gold


_ANCHOR = re.compile(
    r"\b(?:final answer|answer|ans|choice|option|selected|i choose|i pick|therefore|thus|so)\s*[:\-–—]?\s*(?:is\s*)?"
    r"(not\s+|isn['’]t\s+)?[*_`~\s]*\(?\s*([a-z]|\d{1,2})\s*\)?\s*[).:]?\s*[*_`~\s]*(?![\w+\-/])",
    re.IGNORECASE,
)


def medmarks(reply: str, options: dict[str, str], gold: str) -> bool:
    """medmarks: the reply is the letter, or begins with it; the last 'answer', 'option', 'so', ... before a letter; without one
    the last letter of the last sentence, or the gold option's text near the beginning or the end. Knows the gold answer."""
    text = re.sub(r"(?s).*</think>", "", reply).strip()
    begins = re.match(r"[*_`>\s-]*\(?([A-Za-z])[).:]", text)
    if text.upper() == gold or (begins and begins[1].upper() == gold):
        return True
    anchored = list(_ANCHOR.finditer(text))
    if anchored and not anchored[-1][1]:
        return anchored[-1][2].upper() == gold
    if begins:
        return False
    tail = [part for part in re.split(r"[.!?]\s+|\n+", text) if part.strip()][-1:] or [""]
    alone = [m for m in re.finditer(r"(?<![\w+\-/])\(?([A-Za-z])[).:]?(?![\w+\-/])", tail[0]) if m[1].upper() in options]
    denied = [
        m
        for m in alone
        if re.search(r"\b(not|isn't)\b", tail[0][: m.start()]) or re.match(r"\s*is (incorrect|wrong)", tail[0][m.end() :])
    ]
    kept = [m for m in alone if m not in denied]
    if kept and kept[-1][1].upper() == gold:
        return True
    words, want = text.lower().split(), options[gold].lower()
    room = len(want.split()) + 8
    return any(
        (found := re.search(rf"(?<!\w){re.escape(want)}(?!\w)", part)) is not None
        and not re.search(r"\bnot\b", part[: found.start()])
        for part in (" ".join(words[:room]), " ".join(words[-room:]))
    )


SCORERS: dict[str, Scorer] = {
    "ultramed": ours,
    "lm-evaluation-harness, strict": harness_strict,
    "lm-evaluation-harness, flexible": harness_flexible,
    "Inspect": inspect,
    "HuatuoGPT-o1": huatuo,
    "medmarks": medmarks,
}


def sensitivity(replies: Iterable[tuple[str, dict[str, str], str]], answer_form: str = "reasoned") -> pd.DataFrame:
    """Accuracy with a 95% interval of the same replies (text, options, gold) by every scorer, and the replies that it scores
    otherwise than ours, which reads the form that was asked for."""
    replies = list(replies)
    scorers = SCORERS | {"ultramed": functools.partial(ours, answer_form=answer_form)}
    right = {name: [scorer(*reply) for reply in replies] for name, scorer in scorers.items()}
    rows = []
    for name, marks in right.items():
        e = wilson(marks)
        others = sum(a != b for a, b in zip(marks, right["ultramed"], strict=True))
        rows.append({"scorer": name, **e.row(), "scored otherwise": others})
    return pd.DataFrame(rows)
