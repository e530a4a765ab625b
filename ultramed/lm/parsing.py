"""Answers out of text: an ordered cascade of named rules. What no rule reads is *unparsed*, never a guess.

The order matters: a reply that states a final answer is believed before one that merely mentions an option.
`strict` marks a reply in exactly the form that was asked for; the share of such replies is the format compliance.
"""

import re
from dataclasses import dataclass

_TAIL = r"(?![A-Za-z0-9])"


@dataclass(frozen=True)
class Parsed:
    """letter: the option chosen, None if unparsed. rule: name of the rule that read it. strict: in the asked form."""

    letter: str | None
    rule: str
    strict: bool = False


UNPARSED = Parsed(None, "unparsed")


def squeeze(text: str) -> str:
    """Lower case, markup and outer punctuation gone, one space between words: for comparing option texts."""
    text = re.sub(r"[*_`]+", "", text)
    return re.sub(r"\s+", " ", text).strip().strip(".,;:!\"'").lower()


def parse(text: str, options: dict[str, str], answer_form: str = "letter_first") -> Parsed:
    """Read the chosen option of a reply.

    options: letter -> text. answer_form: 'letter_first' ('B: text') or 'content_first' ('text (B)'); in the second the
    text decides where text and letter disagree, because a small model learns the text before the letter.
    """
    letters = "".join(options)
    by_text = {}
    for letter, option in options.items():  # an option text that stands twice names no letter
        by_text[squeeze(option)] = None if squeeze(option) in by_text else letter
    reply = re.sub(r"[*`]+", "", text).strip()
    rules = (_content, _letter) if answer_form == "content_first" else (_letter, _content)
    for rule in (*rules, _statement, _lone_letter, _whole_text, _only_mention):
        found = rule(reply, letters, by_text)
        if found is not None:
            strict = found.strict and rule is rules[0]
            return Parsed(found.letter, found.rule, strict)
    return UNPARSED


def _letter(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """'B: text', 'B. text', 'B) text', '(B) text'. Needs the punctuation: 'A patient' and 'I think' are no answers."""
    hit = re.match(rf"\(?([{letters}])(?:\)\s*[:.]?|\s*[:.])(?:\s+|$)(.*)", reply, re.S)
    if hit is None or (not hit[2] and ":" not in hit[0]):
        return None
    body = squeeze(hit[2].split("\n")[0])
    return Parsed(hit[1], "letter: text", strict=by_text.get(body) == hit[1])


def _content(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """'text (B)' at the start of the reply. The letter decides only if the text is no option at all."""
    hit = re.match(rf"(.+?)\s*\(([{letters}])\)", reply.split("\n")[0])
    if hit is None:
        return None
    by_content = by_text.get(squeeze(hit[1]))
    if by_content is not None:
        return Parsed(by_content, "text (letter)", strict=by_content == hit[2])
    return None if len(hit[1].split()) > 12 else Parsed(hit[2], "other text (letter)")


def _statement(reply: str, letters: str, by_text: dict) -> Parsed | None:
    r"""'the answer is B', 'Answer: (B)', '\boxed{B}': the last such statement, so that a change of mind counts."""
    pattern = (
        rf"(?:answer|option|choice)(?:\s+(?:to the question|is|should be|would be))*\s*[:=]?\s*\(?([{letters}])\)?{_TAIL}"
        rf"|\\boxed\{{\s*(?:\\text\{{)?\s*([{letters}])\b"
    )
    # The letter is matched as written: the article in "the answer is a disease" is not option A.
    hits = [h[1] or h[2] for h in re.finditer(pattern, reply.replace("Answer", "answer").replace("Option", "option"))]
    if hits:
        return Parsed(hits[-1], "statement")
    texts = "|".join(sorted((re.escape(t) for t in by_text if t), key=len, reverse=True))
    named = re.findall(rf"answer(?: is| would be)?\s*:?\s*(?:the )?\"?({texts}){_TAIL}", squeeze(reply)) if texts else []
    return Parsed(by_text[named[-1]], "statement of the text") if named and by_text[named[-1]] else None


def _lone_letter(reply: str, letters: str, by_text: dict) -> Parsed | None:
    hit = re.fullmatch(rf"\(?([{letters}])[).:]?", reply)
    return Parsed(hit[1], "lone letter") if hit else None


def _whole_text(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """The first line, or the whole reply, is the text of one option."""
    for part in (reply, reply.split("\n")[0]):
        if by_text.get(squeeze(part)):
            return Parsed(by_text[squeeze(part)], "option text")
    return None


def _only_mention(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """Exactly one option's text occurs in the reply, and nothing denies it. Texts inside longer ones do not count."""
    flat, found = squeeze(reply), set()
    for option in sorted(by_text, key=len, reverse=True):
        if option and re.search(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])", flat):
            found.add(option)
            flat = flat.replace(option, "\0")
    if len(found) != 1 or re.search(r"\b(not|isn't|never|neither|cannot|can't|except|rather than)\b", squeeze(reply)):
        return None
    letter = by_text[found.pop()]
    return Parsed(letter, "only option mentioned") if letter else None
