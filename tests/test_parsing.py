"""Known answers in the styles that models use, and texts that must not be read as answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.lm.parsing import UNPARSED, Parsed, accepted, parse, squeeze, unread

OPTIONS = {"A": "aspirin", "B": "ibuprofen", "C": "aspirin with codeine", "D": "no treatment"}
YESNO = {"A": "yes", "B": "no", "C": "maybe"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B: ibuprofen", "B"),
        ("B. ibuprofen", "B"),
        ("B) ibuprofen", "B"),
        ("(B) ibuprofen", "B"),
        ("(B)", "B"),
        ("B", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B:", "B"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("The correct answer is B: ibuprofen, because ...", "B"),
        ("So I first thought the answer is A, but the answer is B.", "B"),
        (r"\boxed{B}", "B"),
        ("ibuprofen", "B"),
        ("Ibuprofen.", "B"),
        ("The answer is ibuprofen", "B"),
        ("The answer is: aspirin with codeine", "C"),
        ("I would give ibuprofen to this patient", "B"),
        ("aspirin with codeine", "C"),
        ("no treatment", "D"),
        ("C: aspirin with codeine\n\nQuestion: next", "C"),
    ],
)
def test_answers_are_read(text, letter):
    assert parse(text, OPTIONS, "letter_first").letter == letter


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("A: aspirin", True),
        ("A. aspirin", True),
        ("A aspirin", True),
        ("\n (B: ibuprofen)", True),  # special characters go from both ends
        ("**C. aspirin**", True),
        ("é A: x", True),  # so do letters that are not ASCII
        ("I think so", True),
        ("A: (aspirin)\nmore", True),
        ("A", False),
        ("A:", False),
        ("(A) aspirin", False),
        ("A) aspirin", False),
        ("A:aspirin", False),
        ("A:  ", False),
        ("A: \naspirin", False),  # the text must stand on the letter's line
        ("a: aspirin", False),
        ("The answer is A: aspirin", False),
        ("", False),
        ("***", False),
    ],
)
def test_what_medalpacas_evaluation_accepts(text, yes):
    """eval/eval_usmle.py: strip_special_chars, then starts_with_capital_letter."""
    assert accepted(text) is yes


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("B: ibuprofen", "B", "letter: text"),
        (" B ibuprofen", "B", "only option mentioned"),
        ("B something else", "B", "letter text"),
        ('"C: something', "C", "letter text"),
        ("A patient with fever", None, "unparsed"),
        ("I think so", None, "unparsed"),
        ("E: paracetamol", None, "unparsed"),
        ("D something, but the answer is B", "B", "statement"),
    ],
)
def test_how_medalpacas_replies_are_read(text, letter, rule):
    assert parse(text, OPTIONS, "medalpaca") == Parsed(letter, rule, text == "B: ibuprofen")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I think it is a difficult question",
        "A patient with fever should rest",
        "The answer is a disease of the heart",
        "Dear doctor",
        "aspirin or ibuprofen",
        "not ibuprofen",
        "E: paracetamol",
        "The answer is E",
        "Both are possible.",
        "Because",
        "C A B",
    ],
)
def test_what_is_no_answer_stays_unparsed(text):
    assert parse(text, OPTIONS, "letter_first").letter is None


def test_in_content_first_the_text_decides_and_in_letter_first_the_letter():
    assert parse("ibuprofen (D)", OPTIONS, "content_first").letter == "B"
    assert not parse("ibuprofen (D)", OPTIONS, "content_first").strict
    assert parse("D: ibuprofen", OPTIONS, "letter_first").letter == "D"
    assert not parse("D: ibuprofen", OPTIONS, "letter_first").strict


def test_a_text_that_is_no_option_leaves_the_letter():
    found = parse("paracetamol (D)", OPTIONS, "content_first")
    assert (found.letter, found.rule, found.strict) == ("D", "other text (letter)", False)


def test_yes_no_maybe():
    assert parse("Yes.", YESNO).letter == "A"
    assert parse("maybe", YESNO).letter == "C"
    assert parse("The answer is no.", YESNO).letter == "B"


def test_an_option_that_stands_twice_cannot_be_chosen_by_its_text():
    assert parse("same", {"A": "same", "B": "same"}).letter is None
    assert parse("It is the same thing", {"A": "same", "B": "same"}) == UNPARSED


option_texts = st.lists(
    st.text(alphabet="abcdefghij ", min_size=3, max_size=20).map(lambda s: " ".join(s.split())).filter(lambda s: len(s) > 2),
    min_size=4,
    max_size=4,
    unique=True,
)


@given(option_texts, st.sampled_from("ABCD"), st.sampled_from(["letter_first", "content_first"]))
def test_the_right_form_is_always_read_and_strict(texts, gold, form):
    options = dict(zip("ABCD", texts, strict=True))
    reply = f"{gold}: {options[gold]}" if form == "letter_first" else f"{options[gold]} ({gold})"
    found = parse(reply, options, form)
    assert (found.letter, found.strict) == (gold, True)


@given(st.text(max_size=200), st.sampled_from(["letter_first", "content_first"]))
def test_any_text_gives_an_option_or_nothing(text, form):
    found = parse(text, OPTIONS, form)
    assert found.letter is None or found.letter in OPTIONS
    assert (found.letter is None) == (found.rule == "unparsed")


def test_every_gold_answer_of_the_exam_grades_right_and_a_wrong_one_wrong(exam):
    from ultramed.data.messages import answer_text
    from ultramed.data.rows import read_questions

    for row in read_questions(exam / "test.parquet"):
        for form in ("letter_first", "content_first"):
            assert parse(answer_text(row, form), row["options"], form).letter == row["gold"]
            wrong = {**row, "gold": next(k for k in row["options"] if k != row["gold"])}
            assert parse(answer_text(wrong, form), row["options"], form).letter != row["gold"]


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("It blocks both enzymes.\nAnswer: ibuprofen (B)", "B", "final line"),
        ("Reasons.\nAnswer: B", "B", "final line"),
        ("Many.\nGood.\nReasons.\nAnswer: B", "B", "final line"),
        ("Reasons.\nAnswer: B. ibuprofen", "B", "final line"),
        ("Reasons.\nAnswer: B. something else", "B", "final line"),
        ("It must be IBUPROFEN (B), I am sure", "B", "text (letter)"),
        ("The ANSWER is Ibuprofen, I am sure", "B", "statement of the text"),
        ("The answer is aspirin  with\ncodeine.", "C", "statement of the text"),
        ("Many.\nGood.\nReasons.\nB. ibuprofen", "B", "last line"),
        ("Many.\nGood.\nReasons.\nibuprofen", "B", "option text"),
        ("Reasons.\nAnswer: Ibuprofen.", "B", "final line"),
        ("Answer: aspirin (A) is tempting.\nAnswer: ibuprofen (B)", "B", "final line"),
        ("A is a form of B, which concerns aspirin. ibuprofen (B)", "B", "text (letter)"),
        ("So the answer is A. No, wait: the answer is B.", "B", "statement"),
        ("The answer is A.\n\\\\boxed{B}".replace("\\\\", "\\"), "B", "boxed"),
        (r"\boxed{\text{B}}", "B", "boxed"),
        (r"\boxed{A} no, the answer is B", "B", "statement"),
        ("<answer>B</answer>", "B", "tag"),
        ("<think>maybe A</think><answer>Option B</answer>", "B", "tag"),
        ('{"step_by_step_thinking": "The answer is A?", "choice": "B"}', "B", "json"),
        ("Therefore, **B. ibuprofen** fits best.", "B", "bold text"),
        ("**A. aspirin** is weak, so I say **B**", "B", "bold"),
        ("I would choose option B here.", "B", "chosen"),
        ("Option B is correct because it blocks both.", "B", "correct"),
        ("B is the most likely answer.", "B", "correct"),
        ("The answer is ibuprofen, as A is contraindicated", "B", "statement of the text"),
        ("The answer is aspirin with codeine", "C", "statement of the text"),
        ("Many reasons.\n\nB", "B", "last line"),
        ("Many reasons.\n(B)", "B", "last line"),
        ("B", "B", "last line"),
        ("B: ibuprofen\nbecause it blocks both", "B", "letter: text"),
        ("ibuprofen\nbecause", "B", "option text"),
        ("I would give ibuprofen to this patient", "B", "only option mentioned"),
    ],
)
def test_reasoned_replies_and_the_rules_that_read_them(text, letter, rule):
    found = parse(text, OPTIONS, "reasoned")
    assert (found.letter, found.rule) == (letter, rule)
    assert found.strict == (text.endswith("Answer: ibuprofen (B)"))


@pytest.mark.parametrize(
    "text",
    [
        "The answer is A or B.",
        "The answer is A, B.",
        "The answer is B/C",
        "The answer is A and B",
        "The answer is not B.",
        "Is the answer B?",
        "If the answer is B, the patient dies.",
        "We do not know whether the answer is B",
        "The answer is aspirin or ibuprofen",
        "Option C describes neutrophils.",
        '{"reasons": "The answer would be B if so", "answer_choice": "None of the above"}',
        "I first thought the answer is B. None of the options fits.",
        "A patient with fever.\nI do not know",
        "Reasons.\nAnswer: unclear",
        "X",
        '{"reasons": "The answer is B", "answer_choice": "Insufficient information"}',
        "First aspirin (A), but then ibuprofen (B) is better.",  # which is meant, only the sense tells
        "<think>The answer is B. Let me check",
    ],
)
def test_negations_enumerations_and_abstentions_are_no_answers(text):
    assert parse(text, OPTIONS, "reasoned") == UNPARSED


@pytest.mark.parametrize("form", ["letter_first", "content_first"])
@pytest.mark.parametrize(
    ("text", "letter", "rule", "strict"),
    [
        ("B: ibuprofen", "B", "letter: text", "letter_first"),
        ("B: aspirin", "B", "letter: text", ""),
        ("B: ibuprofen\nbecause", "B", "letter: text", "letter_first"),
        ("B:", "B", "letter: text", ""),
        ("B:\nibuprofen", "B", "letter: text", "letter_first"),
        ("**B**: ibuprofen", "B", "letter: text", "letter_first"),
        ("ibuprofen (B)", "B", "text (letter)", "content_first"),
        ("ibuprofen (B)\nbecause", "B", "text (letter)", "content_first"),
        ("none at all of these (D)", "D", "other text (letter)", ""),
        (" ".join("abcdefghijkl") + " (D)", "D", "other text (letter)", ""),
        ("\\boxed{B}", "B", "boxed", ""),
        ("(B)", "B", "lone letter", ""),
        ("B.", "B", "lone letter", ""),
        ("no treatment", "D", "option text", ""),
        ("no treatment.\nRest will do", "D", "option text", ""),
        ("aspirin with codeine helps", "C", "only option mentioned", ""),
        (" ".join("abcdefghijklm") + " (D)", None, "unparsed", ""),
        ("B", "B", "lone letter", ""),
    ],
)
def test_every_rule_by_its_name(text, letter, rule, strict, form):
    found = parse(text, OPTIONS, form)
    assert (found.letter, found.rule, found.strict) == (letter, rule, form == strict)


def test_a_reply_without_an_answer_is_truncated_refused_or_unparsed():
    assert unread("The patient has", finished=False) == "truncated"
    assert unread("I'm sorry, but I cannot give medical advice.", finished=True) == "refused"
    assert unread("A difficult question.", finished=True) == "unparsed"


def test_an_option_inside_a_longer_one_is_not_mentioned():
    options = {"A": "codeine", "B": "aspirin with codeine"}
    assert parse("I would give aspirin with codeine now", options, "reasoned") == Parsed("B", "only option mentioned")
    assert squeeze("X-ray") == "x-ray"


def test_squeezing_twice_changes_nothing():
    assert squeeze(' **Aortic  stenosis** ."; ') == squeeze(squeeze(' **Aortic  stenosis** ."; ')) == "aortic stenosis"


@pytest.mark.parametrize(("name", "count"), [("medqa", 5086), ("pubmedqa", 2000)])
def test_recorded_answers_of_large_models_are_read(data, name, count):
    """Raw replies of GPT-3.5 and GPT-4 in MIRAGE. Where its strict parse names an option, so do we, the same one; the two
    replies that only we read say 'the answer to the question is: C. maybe' and 'the answer choice is B. no'."""
    from ultramed.data.formats import read_table

    seen, differ = 0, []
    for row in read_table(data / "mirage_answers" / f"{name}.jsonl.gz"):
        options = row["options"] or YESNO
        for answer in row["answers"]:
            seen += 1
            letter = parse(answer["raw"], options, "reasoned").letter
            if letter != answer["predicted"]:
                differ.append((row["id"], answer["predicted"], letter))
    assert seen == count
    assert differ == ([] if name == "medqa" else [("22453060", None, "C"), ("23571528", None, "B")])


def test_ultramedicals_own_answers_are_read(data):
    """All 25 multiple-choice answers among the 50 examples of its repository, whose answer is recorded beside them."""
    import re

    from ultramed.data.formats import read_table

    read = 0
    for row in read_table(data / "ultramedical" / "examples.jsonl.gz"):
        options = dict(re.findall(r"(?m)^([A-J])[.)] (.+)$", row["conversations"][0]["value"]))
        if options and row["answer"]:
            assert parse(row["conversations"][-1]["value"], options, "reasoned").letter == row["answer"].strip()[0]
            read += 1
    assert read == 25


DRUGS = {"A": "Aspirin", "B": "Heparin", "C": "Warfarin", "D": "None of the above"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B. Warfarin (C) is contraindicated.", "B"),
        ("The correct answer is B.\n\nExplanation: Heparin acts at once. Warfarin (C) takes days.", "B"),
        ("The answer is B.\n\n**Why not the others**\n- **A. Aspirin**: weak.\n- **C. Warfarin**: slow.", "B"),
        ("The answer is D. None of the above.", "D"),
        ("The answer is B. Option D (None of the above) is wrong.", "B"),
        ("Perhaps C? <think>The answer is A.</think>The answer is B.", "B"),
        ("The answer is A.</think>\n\nAnswer: Heparin (B)", "B"),
    ],
)
def test_what_is_stated_comes_before_what_is_mentioned(text, letter):
    assert parse(text, DRUGS, "reasoned").letter == letter


@pytest.mark.parametrize("form", ["letter_first", "content_first", "medalpaca"])
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is either (A) or (C).", None),
        ("Options (A) and (B) are wrong; the answer is (C).", "C"),
        ("Not (A). The answer is (C).", "C"),
        ("Aspirin (A) is wrong. The correct answer is Warfarin (C).", "C"),
        ("Heparin (B).", "B"),
    ],
)
def test_a_letter_in_brackets_in_the_middle_of_a_sentence_is_no_answer(text, letter, form):
    assert parse(text, DRUGS, form).letter == letter


@pytest.mark.parametrize("form", ["letter_first", "content_first", "reasoned"])
@pytest.mark.parametrize(
    ("rest", "letter"),
    [
        ("", None),
        ("\nThe answer is C.", "C"),
        ("\n\nB) heparin", "B"),
        ("\nAnswer: aspirin (A)", "A"),
        (" Which one is it?", None),
    ],
)
def test_a_repetition_of_all_options_chooses_none(form, rest, letter):
    for template in ("{}) {}", "{}. {}", "({}) {},", "**{}.** {}", "{}: {};"):
        listed = [template.format(*item) for item in DRUGS.items()]
        for between in ("\n", " "):
            assert parse(between.join(listed) + rest, DRUGS, form).letter == letter
    said = "A: aspirin\n" + "\n".join(f"{letter}: {text} is wrong" for letter, text in list(DRUGS.items())[1:])
    assert parse(said, DRUGS, "letter_first").letter == "A"


@pytest.mark.parametrize("form", ["letter_first", "content_first", "medalpaca", "reasoned"])
def test_an_options_text_that_begins_like_a_letter_and_numbers_that_go_on(form):
    options = {"A": "Cofactor", "B": "A catalyst", "C": "D-dimer", "D": "Substrate"}
    assert parse("The answer is A catalyst.", options, form).letter == "B"
    assert parse("The correct answer is D-dimer.", options, form).letter == "C"
    assert parse("The answer is 1.5", {"A": "1", "B": "2"}, form).letter is None
    assert parse("She was given 12.5 mg", {"A": "5 mg", "B": "10 mg"}, form).letter is None


def test_the_thinking_of_large_models_is_read_as_they_concluded(data):
    """MIRAGE's MedQA: the reasons that GPT-3.5 and GPT-4 gave, without the letter that they gave apart. Six are read as
    another letter than that; before statements came first they were 18."""
    from ultramed.data.formats import read_table

    same, other = 0, 0
    for row in read_table(data / "mirage_answers" / "medqa.jsonl.gz"):
        for answer in row["answers"]:
            try:
                thinking = json.loads(answer["raw"])["step_by_step_thinking"]
            except (ValueError, KeyError, TypeError):
                continue
            if answer["setting"] == "cot" and answer["predicted"] and isinstance(thinking, str):
                letter = parse(thinking, row["options"], "reasoned").letter
                same, other = same + (letter == answer["predicted"]), other + (letter not in (None, answer["predicted"]))
    assert same > 1000
    assert other <= 6
