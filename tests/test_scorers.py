"""Other projects' rules on replies whose reading under them is known from their descriptions."""

import pytest

from ultramed.evaluate.scorers import SCORERS, sensitivity

OPTIONS = {"A": "aspirin", "B": "ibuprofen", "C": "codeine", "D": "no treatment"}
#   ultramed, harness strict, harness flexible, Inspect, HuatuoGPT-o1, medmarks: whether gold B counts as right
CASES = [
    ("It inhibits both enzymes.\nAnswer: ibuprofen (B)", "101011"),  # the bracketed letter; Inspect reads 'ibuprofen'
    ("The answer is B.", "110011"),  # the flexible filter wants brackets, an option's text or ': B'
    ("ANSWER: B", "101111"),
    ("The answer is (B).", "111011"),  # HuatuoGPT-o1's first rule wants the bare letter; its second one finds it
    ("First I thought the answer is A. But no: the answer is B.", "100001"),
    (r"So it is \boxed{B}", "100011"),
    ("ibuprofen", "101001"),
    ("Option A is wrong. ibuprofen it is, I am sure of that.", "101000"),  # medmarks takes 'Option A' for the answer
    ("The answer is not B.", "000010"),  # the second rule of HuatuoGPT-o1 knows no negation
    ("", "000000"),
]


@pytest.mark.parametrize(("reply", "want"), CASES)
def test_known_readings(reply, want):
    got = "".join(str(int(scorer(reply, OPTIONS, "B"))) for scorer in SCORERS.values())
    assert got == want, dict(zip(SCORERS, got, strict=True))


def test_sensitivity_counts_what_is_scored_otherwise():
    table = sensitivity([(reply, OPTIONS, "B") for reply, _ in CASES]).set_index("scorer")
    assert table.loc["ultramed", "accuracy"] == 0.8
    assert table.loc["ultramed", "scored otherwise"] == 0
    assert table.loc["Inspect", "scored otherwise"] == sum(want[0] != want[3] for _, want in CASES)
    assert (table.n == len(CASES)).all()


def test_our_row_reads_the_form_that_was_asked_for():
    """'B: ibuprofen' and then another line with a letter: letter first reads the first, reasoned the last."""
    replies = [("B: ibuprofen\nC: paracetamol", OPTIONS, "B")]
    right = [sensitivity(replies, form).set_index("scorer").accuracy["ultramed"] for form in ("letter_first", "reasoned")]
    assert right == [1.0, 0.0]
