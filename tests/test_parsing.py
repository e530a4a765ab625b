"""Known answers in the styles that models use, and texts that must not be read as answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.lm.parsing import parse

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


def test_recorded_answers_of_large_models_are_read(data):
    """The JSON replies of GPT-3.5 and GPT-4 in MIRAGE: where its strict parse names an option, so do we."""
    from ultramed.data.formats import read_table

    agree = total = 0
    for row in read_table(data / "mirage_answers" / "medqa.jsonl.gz")[:300]:
        for answer in row["answers"]:
            if answer.get("predicted") and answer["predicted"] in row["options"]:
                text = f"The answer is {answer['predicted']}: {row['options'][answer['predicted']]}"
                total += 1
                agree += parse(text, row["options"]).letter == answer["predicted"]
    assert total > 500
    assert agree == total
