"""Answers out of text: an ordered cascade of named rules, which never knows the gold answer. What no rule reads is
*unparsed*, never a guess.

A statement of the answer is believed before a mere mention of an option ('Warfarin (C) is contraindicated'), and of several
statements the last one counts, so that a change of mind does. What a reasoning model thinks first is not read. Negations ("not
B") and enumerations ("A or B") are no statements. `strict` marks a reply in exactly the form that was asked for; the share of
such replies is the format compliance.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ultramed.data.messages import FINAL

_TAIL = r"(?![A-Za-z0-9])"
NONE_OF_THEM = r"\b[Nn]one of the (?:above|options|choices|provided|given|listed|answers)\b"
REFUSAL = re.compile(
    r"\b(?:I(?:'m| am) (?:sorry|unable)|I can(?:not|'t| not) (?:answer|assist|help|provide|give|comply|determine)|as an AI\b"
    r"|(?:un)?able to (?:answer|provide)|consult (?:a|your) (?:doctor|physician|healthcare)|content (?:filter|management policy))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Parsed:
    """letter: the option chosen, None if unparsed. rule: name of the rule that read it. strict: in the asked form."""

    letter: str | None
    rule: str
    strict: bool = False


UNPARSED = Parsed(None, "unparsed")
ACCEPTED = re.compile(r"([A-Z])([:.]?) .+")  # MedAlpaca, eval/eval_usmle.py, starts_with_capital_letter


def without_special_ends(text: str) -> str:
    """What is left when everything but ASCII letters and digits is taken from both ends (MedAlpaca, eval/eval_usmle.py)."""
    return re.sub(r"\A[^A-Za-z0-9]+|[^A-Za-z0-9]+\Z", "", text)


def accepted(text: str) -> bool:
    """Whether MedAlpaca's evaluation takes a reply for an answer and asks no more: a capital letter, perhaps ':' or '.', a
    space, and more on the same line. 'I think so' passes, 'B' and 'B) text' do not."""
    return bool(ACCEPTED.match(without_special_ends(text)))


def without_thought(text: str) -> str:
    """What comes after a reasoning model's `</think>`; nothing where the thought was cut off. Templates often write
    `<think>`."""
    if "<think>" in text and "</think>" not in text:
        return ""
    return text.rpartition("</think>")[2]


def squeeze(text: str) -> str:
    """Lower case, markup and outer punctuation gone, one space between words: for comparing option texts."""
    text = re.sub(r"[*_`]+", "", text)
    return re.sub(r"\s+", " ", text).strip(" .,;:!\"'").lower()


def parse(text: str, options: dict[str, str], answer_form: str = "letter_first") -> Parsed:
    """Read the chosen option of a reply.

    options: letter -> text. answer_form: 'letter_first' and 'medalpaca' ('B: text'), 'content_first' ('text (B)'), or
    'reasoned' (a last line 'Answer: text (B)'). Where text and letter disagree, the letter decides in the first two, the text
    in the others, because a small model learns the text before the letter.
    """
    letters = "".join(options)
    by_text = {}
    for letter, option in options.items():  # an option text that stands twice names no letter
        by_text[squeeze(option)] = None if squeeze(option) in by_text else letter
    text = without_thought(text)
    if answer_form != "medalpaca":  # whose evaluation takes the first letter
        text = without_options(text, options)
    plain = re.sub(r"[*`]+", "", text).strip()
    for rule in RULES[answer_form]:
        found = rule(text if rule in ON_MARKUP else plain, letters, by_text)
        if found is not None:
            return Parsed(found.letter, found.rule, found.strict and rule is RULES[answer_form][0])
    return UNPARSED


def without_options(text: str, options: dict[str, str]) -> str:
    """A reply without a repetition of all options in their order ('A) aspirin B) warfarin ...'), which chooses none."""
    if len(options) < 2 or not all(option in text for option in options.values()):  # cheaper than a pattern for each question
        return text
    listed = (rf"[*(]*{letter}[*).:]+\s*{re.escape(option)}" for letter, option in options.items())
    between = r"[\s*.,;]*"
    return re.sub(r"(?<!\w)" + between.join(listed) + rf"(?!\w){between}", "", text)


def unread(text: str, finished: bool) -> str:
    """What became of a reply that no rule read: 'truncated', 'refused' or 'unparsed'."""
    if not finished:
        return "truncated"
    return "refused" if REFUSAL.search(text) else "unparsed"


def unread_by_reason(replies: Iterable[tuple[str, bool]]) -> dict[str, int]:
    """How many of the replies (text, finished) that no rule read were truncated, and how many refused."""
    ways = [unread(*reply) for reply in replies]
    return {name: ways.count(name) for name in ("truncated", "refused")}


# ---------------------------------------------------------------------------------------------------------- asked forms


def _letter(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """'B: text', 'B. text', 'B) text', '(B) text'. Needs the punctuation: 'A patient' and 'I think' are no answers."""
    hit = re.match(rf"\(?([{letters}])(?:\)\s*[:.]?|\s*[:.])(?:\s+|$)(.*)", reply, re.DOTALL)
    if hit is None or (not hit[2] and ":" not in hit[0]):
        return None
    body = squeeze(hit[2].split("\n")[0])
    return Parsed(hit[1], "letter: text", strict=by_text.get(body) == hit[1])


def _content(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """'text (B)' at the start of the reply. The letter decides only if the text is no option at all."""
    hit = re.match(rf"(.+?)\s*\(([{letters}])\)(.*)", reply.split("\n")[0])
    if hit is None or re.search(r"\w", hit[3]):  # a sentence goes on: it is read as one
        return None
    by_content = by_text.get(squeeze(hit[1]))
    if by_content is not None:
        return Parsed(by_content, "text (letter)", strict=by_content == hit[2])
    return None if len(hit[1].split()) > 12 else Parsed(hit[2], "other text (letter)")


def _final_line(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """The last line is 'Answer: text (B)', or less strictly 'Answer: B' or 'Answer: text'."""
    line = reply.rsplit("\n", 1)[-1].strip()
    if not line.startswith(FINAL):
        return None
    rest = line.removeprefix(FINAL).strip()
    found = _content(rest, letters, by_text) or _lone_letter(rest, letters, by_text) or _letter(rest, letters, by_text)
    found = found or _whole_text(rest, letters, by_text)
    if found is None:
        return None
    return Parsed(found.letter, "final line", strict=found.strict and found.rule == "text (letter)")


# ----------------------------------------------------------------------------------------------------------- statements


def _stated(reply: str, letters: str, by_text: dict) -> Parsed | None:
    r"""The last explicit statement: '\boxed{B}', '<answer>B</answer>', '"answer_choice": "B"', 'the answer is (B)', '**B**', or
    an option's own text and letter, 'text (B)'. Unparsed where the last thing stated is that none fits."""
    one = rf"\(?([{letters}])\)?{_TAIL}"
    # What follows must not make the letter one of several: 'A or B', 'A, B', 'A and B', 'A/B'; nor a question: 'is it B?'
    alone = rf"(?!\s*(?:,|/|or|and|&)\s*(?:or\s+|and\s+)?(?:option\s+)?\(?[{letters}]\)?{_TAIL})(?!\s*\?)"
    verb = r"(?:\s+(?:to the question|is|was|should be|would be|must be|therefore|thus))"
    says = rf"(?:(?:[Aa]nswer|ANSWER)(?:[ _]choice)?{verb}*|(?:[Oo]ption|[Cc]hoice|[Dd]iagnosis)(?:{verb}+|(?=\s*[:=])))"
    patterns = {
        "boxed": rf"\\boxed\{{\s*(?:\\text(?:bf)?\{{)?\s*{one}",
        "tag": rf"<(?:answer|final_answer|choice)>\s*(?:[Oo]ption\s+)?{one}",
        "json": rf"[\"'](?:answer|answer_choice|choice|final_answer)[\"']\s*:\s*[\"']{one}",
        "statement": rf"(?<![Ii]f the )(?<!hether the ){says}[\"'*]*\s*[:=]?\s*[\"'*]*(?:[Oo]ption\s+)?{one}{alone}",
        "chosen": rf"\b(?:choose|select|pick|go with|answer with)\s+(?:[Oo]ption\s+|\*+)?{one}{alone}",
        "correct": rf"(?<![A-Za-z(]){one}[\"'*.]*\s+(?:is|would be)\s+(?:the\s+)?(?:most\s+likely\s+|best\s+)?(?:correct|right|answer|best)",
        "bold": rf"\*\*\s*{one}[.:)]?\s*\*\*",
        "bold text": rf"\*\*\s*{one}[.:)][^*\n]*\w[^*\n]*\*\*",
    }
    hits = [(m.start(), rule, next(g for g in m.groups() if g)) for rule, p in patterns.items() for m in re.finditer(p, reply)]
    declared = r"[\"'](?:answer|answer_choice|choice|final_answer)[\"']\s*:\s*[\"'](?!\(?[A-Z]\b)"
    none = declared if any(re.search(NONE_OF_THEM, t.capitalize()) for t in by_text) else rf"{declared}|{NONE_OF_THEM}"
    hits += [(m.start(), "", None) for m in re.finditer(none, reply)]
    texts = _alternatives(by_text)
    if texts:
        # Lower-casing and squeezing keep no positions, so texts are looked for in the reply as it stands.
        own = rf"(?<![A-Za-z0-9])({texts})[\"'*.]*\s*\(([{letters}])\)"
        for m in re.finditer(own, reply, re.IGNORECASE):
            letter = by_text.get(squeeze(m[1]))
            if letter:
                hits.append((m.start(), "text (letter)", letter))
        named = rf"answer(?: is| was| would be| should be)?\s*:?\s*(?:the )?[\"'*]*({texts}){_TAIL}(?![.,]\d)"
        several = rf"(?!\s*(?:,|/|or|and)\s+(?:{texts}))"
        for m in re.finditer(named + several, reply, re.IGNORECASE):
            letter = by_text.get(squeeze(m[1]))
            if letter and m[1].upper() not in letters:
                hits.append((m.start(), "statement of the text", letter))
    if not hits:
        return None
    mentions = [hit for hit in hits if hit[1] in ("bold text", "text (letter)")]
    if len(mentions) < len(hits):  # what is stated comes before what is mentioned
        hits = [hit for hit in hits if hit not in mentions]
    elif len({letter for *_, letter in mentions}) > 1:  # one option after the other is looked at
        return None
    # 'The answer is A catalyst' states a text, not the letter A; a text that is a letter itself is read as the letter.
    _, rule, letter = max(hits, key=lambda hit: (hit[0], hit[1] == "statement of the text"))
    return Parsed(letter, rule) if letter else UNPARSED


def _alternatives(by_text: dict) -> str:
    """The options' texts as one pattern, the longest first, so that 'aspirin with codeine' is not read as 'aspirin'."""
    return "|".join(re.escape(t).replace(r"\ ", r"\s+") for t in sorted(by_text, key=len, reverse=True) if t)


# ------------------------------------------------------------------------------------------------------------- mentions


def _lone_letter(reply: str, letters: str, by_text: dict) -> Parsed | None:
    hit = re.fullmatch(rf"\(?([{letters}])[).:]*", reply)
    return Parsed(hit[1], "lone letter") if hit else None


def _whole_text(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """The first line, the last one, or the whole reply is the text of one option."""
    for part in (reply, reply.split("\n")[0], reply.rsplit("\n", 1)[-1]):
        if by_text.get(squeeze(part)):
            return Parsed(by_text[squeeze(part)], "option text")
    return None


def _last_line(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """The last line alone is 'B', '(B)', 'B. text' or 'text (B)'."""
    line = reply.rsplit("\n", 1)[-1].strip()
    found = _lone_letter(line, letters, by_text) or _letter(line, letters, by_text)
    return Parsed(found.letter, "last line") if found else None


def _only_mention(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """Exactly one option's text occurs in the reply, and nothing denies it. Texts inside longer ones do not count."""
    flat, found = squeeze(reply), set()
    for option in sorted(by_text, key=len, reverse=True):
        if option and re.search(rf"(?<![a-z0-9])(?<!\d[.,]){re.escape(option)}(?![a-z0-9])(?![.,]\d)", flat):
            found.add(option)
            flat = flat.replace(option, "\0")
    if len(found) != 1 or re.search(r"\b(not|isn't|never|neither|cannot|can't|except|rather than)\b", squeeze(reply)):
        return None
    letter = by_text[found.pop()]
    return Parsed(letter, "only option mentioned") if letter else None


def _accepted(reply: str, letters: str, by_text: dict) -> Parsed | None:
    """'B text', which MedAlpaca's evaluation accepts. 'A' and 'I' alone begin sentences, so they need their ':' or '.'."""
    hit = ACCEPTED.match(without_special_ends(reply))
    if hit is None or hit[1] not in letters or (hit[1] in "AI" and not hit[2]):
        return None
    return Parsed(hit[1], "letter text")


RULES = {
    "letter_first": (_letter, _content, _stated, _lone_letter, _whole_text, _only_mention),
    "medalpaca": (_letter, _content, _stated, _lone_letter, _whole_text, _only_mention, _accepted),
    "content_first": (_content, _letter, _stated, _lone_letter, _whole_text, _only_mention),
    "reasoned": (_final_line, _stated, _last_line, _lone_letter, _letter, _whole_text, _only_mention),
}
ON_MARKUP = {_stated}  # reads asterisks
