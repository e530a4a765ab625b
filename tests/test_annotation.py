"""Judging and synthesis through a server whose answers are known."""

import json
import re

import numpy as np
import pytest
from faulty import Faulty
from handmade import given, lines, prompt_row

from ultramed.annotate import synthesize
from ultramed.annotate.judge import LLMConfig, combine, complexity, llm_feedback, pairwise
from ultramed.annotate.synthesize import SynthesisConfig, eliminated, evolve, solved, textbook_questions, topic_instructions
from ultramed.data import rows as canonical
from ultramed.data.messages import as_completion
from ultramed.evaluate.sample import read_feedback
from ultramed.evaluate.stats import krippendorff


def asked(body):
    """The first thing that the user says; a request to mend the answer comes later."""
    return next(m["content"] for m in body["messages"] if m["role"] == "user")


def question(name, text, gold="B"):
    options = {"A": "lung", "B": "heart", "C": "liver", "D": "skin"}
    return {"id": name, "question": text, "options": options, "gold": gold, "source": "t", "meta": {"x": 1}}


def test_an_instruction_with_an_input_is_judged_whole():
    row = {"id": "a", "source": "t", "prompt": [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Text."}]}
    with Faulty(answer=lambda body: '{"score": 5}') as server:
        complexity(LLMConfig(server=server.config()), data=given(rows=[{**row, "reference": "", "meta": {"x": 1}}]))
        assert server.bodies[0]["messages"][-1]["content"] == "Sum up.\n\nText."


def test_complexity_is_read_and_what_cannot_be_read_is_none():
    def answer(body):
        return '{"score": 9}' if "rare" in asked(body) else "no idea" if "broken" in asked(body) else '{"score": 2}'

    data = given(rows=[prompt_row("a", "rare disease"), prompt_row("b", "easy"), prompt_row("c", "broken")])
    with Faulty(answer=answer) as server:
        made = complexity(LLMConfig(server=server.config()), data=data)
    scores = [json.loads(line) for line in (made / "scores.jsonl").read_text().splitlines()]
    assert [s["score"] for s in scores] == [9, 2, None]
    assert made.metrics == {"rows": 3, "unparsed": 1, "mean_score": 5.5}


def test_feedback_goes_back_to_the_candidate_it_was_given_for_whatever_the_order_shown():
    texts = ["worst", "best", "middle", "fine"]
    worth = {"worst": 1, "best": 10, "middle": 4, "fine": 7}
    rows = [
        {
            "id": f"q{i}",
            "index": i,
            "subset": "s",
            "concept": "c",
            "gold": "A",
            "reference": "ref",
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "replies": [{"text": t, "letter": None} for t in texts],
        }
        for i in range(6)
    ]

    def answer(body):
        shown = re.findall(r"Reply \d:\n(\w+)", asked(body))
        assert "ref" in body["messages"][0]["content"]
        return json.dumps({"scores": [worth[t] for t in (shown[:3] if "question 5" in asked(body) else shown)]})

    with Faulty(answer=answer) as server:
        made = llm_feedback(LLMConfig(server=server.config()), pool=lines(rows=rows, name="samples.jsonl"))
        orders = {tuple(re.findall(r"Reply \d:\n(\w+)", asked(b))) for b in server.bodies}
    assert len(orders) > 1, "the candidates are shuffled"
    judged = read_feedback(made)
    for row in judged[:5]:
        assert {c["text"]: (c["score"], c["rank"]) for c in row["candidates"]} == {
            "best": (10, 1),
            "fine": (7, 2),
            "middle": (4, 3),
            "worst": (1, 4),
        }
    assert {c["score"] for c in judged[5]["candidates"]} == {None}, "a list of the wrong length ranks nothing"
    assert made.metrics["unread"] == 1


def test_a_pair_is_judged_in_both_orders():
    def pair(name):
        return {
            "id": name,
            "prompt": [{"role": "user", "content": name}],
            "chosen": as_completion("good"),
            "rejected": as_completion("bad"),
            "meta": {"m": 1},
        }

    def answer(body):
        first_is_good = asked(body).index("good") < asked(body).index("bad")
        if "always first" in asked(body):
            return '{"better": "A"}'
        if "broken" in asked(body):
            return "?"
        return json.dumps({"better": "tie" if "tie" in asked(body) else "A" if first_is_good else "B"})

    names = ["honest", "always first", "tie", "broken"]
    with Faulty(answer=answer) as server:
        made = pairwise(LLMConfig(server=server.config()), pairs=given(rows=[pair(n) for n in names], side="pairs"))
    verdicts = [json.loads(line)["verdict"] for line in (made / "verdicts.jsonl").read_text().splitlines()]
    assert verdicts == ["chosen", "inconsistent", "tie", "unread"]
    assert made.metrics["consistency"] == pytest.approx(2 / 3)
    assert combine({"better": "B"}, {"better": "A"}) == "rejected"


def test_krippendorff_by_the_books_example():
    """Krippendorff 2011: four observers, twelve units; nominal 0.743, interval 0.849."""
    n = np.nan
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3]
    c = [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n]
    ratings = np.array([a, b, c, d]).T
    assert krippendorff(ratings) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(ratings, "interval") == pytest.approx(0.849, abs=5e-4)
    assert np.isnan(krippendorff([[1, 1], [1, 1]]))


def test_textbook_questions_are_shuffled_and_bad_ones_named():
    def answer(body):
        text = asked(body)
        item = {"question": f"Which organ pumps blood in case {text}?", "right": "heart", "wrong": ["lung", "liver", "skin"]}
        if text == "p1":
            item["wrong"] = ["lung", "Heart!", "skin"]
        if text == "p2":
            item["question"] = "According to the text, which organ pumps the blood?"
        return json.dumps(item)

    data = given(rows=[prompt_row(f"p{i}", f"p{i}") for i in range(12)])
    with Faulty(answer=answer) as server:
        made = textbook_questions(SynthesisConfig(server=server.config()), data=data)
    rows = canonical.read_questions(made / "train.parquet")
    assert len(rows) == 10
    assert all(r["options"][r["gold"]] == "heart" for r in rows)
    assert len({r["gold"] for r in rows}) > 1, "the right option is not always at the same place"
    assert made.metrics["reasons"] == {"two options are the same": 1, "unparsed": 1}


def test_topics_give_instructions_of_several_kinds():
    with Faulty(answer=lambda body: json.dumps({"instruction": "Explain " + body["messages"][0]["content"][:80]})) as server:
        made = topic_instructions(
            SynthesisConfig(server=server.config(), per_row=2), data=given(rows=[prompt_row("g", "Genomics")])
        )
        kinds = {b["messages"][0]["content"] for b in server.bodies}
    assert len(canonical.read_table(made / "train.parquet")) == 2
    assert len(kinds) == 2


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("what is the heart made of please", "what is the heart made of please?", "unchanged"),
        ("what is the heart", "why", "too short"),
        ("what is the heart", "word " * 200, "too long"),
        ("what is the heart", "here is the new instruction about the heart today", "talks about itself"),
        ("what is the heart", "explain how the heart adapts to long endurance training", None),
    ],
)
def test_elimination(before, after, why):
    assert eliminated(before, after, 60) == why


def test_evolution_keeps_the_right_option_and_ends_lines_that_fail():
    def answer(body):
        text, rubric = asked(body), body["messages"][0]["content"]
        right = rubric.partition("word for word: ")[2].split("\n")[0]
        options = {"A": right, "B": "spleen", "C": "kidney", "D": "thymus"}
        if "lost" in text:
            options["A"] = "something else"
        new = text if "same" in text else f"harder {len(text)} " + text.split("\n")[0] + " with a second finding that matters"
        return json.dumps({"instruction": new.split("\n")[0], "options": options})

    data = given(
        rows=[
            question("ok", "which organ pumps the blood"),
            question("lost", "lost which organ pumps"),
            question("s", "same text as it was before"),
        ]
    )
    with Faulty(answer=answer) as server:
        made = evolve(SynthesisConfig(server=server.config(), rounds=2), data=data)
    rows = canonical.read_questions(made / "train.parquet")
    assert [(r["meta"]["of"], r["meta"]["round"]) for r in rows] == [("ok", 1), ("ok", 2)]
    assert {r["options"][r["gold"]] for r in rows} == {"heart"}
    assert made.metrics["reasons"] == {"the right option was lost": 1, "unchanged": 1}


def test_answers_are_checked_and_tried_again_with_solved_examples():
    rows = [
        question("a", "which organ pumps blood"),
        question("b", "which organ pumps much blood"),
        question("c", "hopeless", "D"),
    ]
    with_examples = []

    def answer(body):
        shown = len(body["messages"]) > 2
        if "much" in body["messages"][-1]["content"]:
            with_examples.append(shown)
            return "Thinking.\nAnswer: B" if shown else "Answer: A"
        return "A. Lungs breathe.\nB. Hearts pump.\nAnswer: B"

    with Faulty(answer=answer) as server:
        made = solved(SynthesisConfig(server=server.config(), tries=2), data=given(rows=rows))
    kept = canonical.read_instructions(made / "train.parquet")
    assert [(r["id"], r["meta"]["try"]) for r in kept] == [("solved:a", 1), ("solved:b", 2)]
    assert with_examples == [False, True]
    assert made.metrics["solved_by_try"] == [1, 1]
    assert made.metrics["reasons"] == {"wrong answer": 1}
    assert set(synthesize.STAGES) == {"textbook", "topic", "evolve", "solve"}
