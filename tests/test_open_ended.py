"""Open-ended replies and their measures, by hand and through a server whose verdicts are known."""

import json
import re

import pandas as pd
import pytest
from faulty import Faulty
from handmade import given, lines, prompt_row

from ultramed.annotate.human import HumanConfig, human_pairs
from ultramed.annotate.judge import LLMConfig, pairwise
from ultramed.annotate.open_ended import (
    agreement,
    agreement_with_people,
    as_pairs,
    correctness,
    grades,
    judge_labels,
    kqa_labels,
    outcomes,
    physicians,
    win_rate,
)
from ultramed.data import rows as canonical
from ultramed.data.sources import SourceConfig, source
from ultramed.evaluate.open_ended import ReplyConfig, bleu1, kqa_scores, read_replies, replies


def test_replies_to_all_turns_and_none_is_asked_twice(medalpaca, monkeypatch):
    rows = [
        prompt_row("a", "first question", turns=["first question", "and then?"]),
        prompt_row("b", "other", turns=["other", "why?"]),
    ]
    made = replies(ReplyConfig(max_new_tokens=5, turns=True), model=medalpaca.base, data=given(rows=rows, side="test"))
    frame = read_replies(made)
    assert [len(r) for r in frame.replies] == [2, 2]
    assert list(frame.reference) == ["gold", "gold"]
    single = read_replies(replies(ReplyConfig(max_new_tokens=5), model=medalpaca.base, data=given(rows=rows, side="test")))
    assert list(single.reply) == list(frame.reply), "the first turn does not depend on the second"


def test_the_second_turn_sees_the_first_reply(exam):
    from ultramed.lm import models

    seen = []

    def answer(body):
        seen.append([m["content"] for m in body["messages"]])
        return f"reply to {body['messages'][-1]['content']}"

    with Faulty(answer=answer) as server:
        model = models.resolve(f"{server.config().url}#m")
        made = replies(
            ReplyConfig(turns=True), model=model, data=given(rows=[prompt_row("t", "one", turns=["one", "two"])], side="test")
        )
    assert seen == [["one"], ["one", "reply to one", "two"]]
    assert read_replies(made).replies[0] == ["reply to one", "reply to two"]


def test_kqa_scores_by_hand():
    rows = [
        ("q1", "must_have", "Entailment"),
        ("q1", "must_have", "Neutral"),
        ("q1", "nice_to_have", "Contradiction"),
        ("q2", "must_have", "Entailment"),
        ("q2", "nice_to_have", "Neutral"),
    ]
    scores = kqa_scores(pd.DataFrame(rows, columns=["question", "kind", "label"]))
    assert scores["completeness"].value == pytest.approx((0.5 + 1.0) / 2)
    assert scores["hallucination"].value == pytest.approx((1 + 0) / 2)
    assert scores["completeness"].n == 2
    unread = pd.DataFrame([*rows, ("q1", "must_have", None)], columns=["question", "kind", "label"])
    assert kqa_scores(unread) == scores, "a label that cannot be read says nothing of the answer"


def test_the_physicians_labels_of_kqa(data):
    frame = physicians()
    assert len(frame) == 399
    assert set(frame.kind) == {"must_have", "nice_to_have"}
    assert 0.3 < agreement(frame) < 1
    scores = {model: kqa_scores(part) for model, part in frame.groupby("model")}
    assert scores["gpt4"]["completeness"].n <= 15


def test_a_judge_is_measured_beside_people(data):
    labelled = physicians().set_index("statement")

    def answer(body):
        statement = re.search(r"Statement: (.*)", body["messages"][-1]["content"], re.DOTALL)[1]
        label = labelled.label.get(statement.strip())
        return json.dumps({"label": label if isinstance(label, str) else "Neutral"})

    with Faulty(answer=answer) as server:
        made = judge_labels(LLMConfig(server=server.config()))
    assert made.metrics["statements"] == 399
    assert made.metrics["same"] > 0.7  # it copies the majority wherever a statement occurs once
    assert made.metrics["alpha"] > 0.5
    assert made.metrics["physicians"] == pytest.approx(agreement(physicians()))


def test_correctness_is_asked_with_the_reference():
    rows = [
        {**prompt_row(f"q{i}", f"question {i}"), "reply": reply, "replies": [reply]} for i, reply in enumerate(("yes", "no"))
    ]

    def answer(body):
        text = body["messages"][-1]["content"]
        assert "Reference: gold" in text
        return json.dumps({"correct": "Answer: yes" in text})

    with Faulty(answer=answer) as server:
        made = correctness(LLMConfig(server=server.config()), replies=lines(rows=rows, name="replies.jsonl"))
    assert made.metrics == {"replies": 2, "unread": 0, "correct": 1}


def test_agreement_with_an_experts_ranking(data):
    pairs = human_pairs(HumanConfig(side="validation", words=20), per_prompt=2)
    better = {r["chosen"][0]["content"] for r in canonical.read_pairs(pairs / "pairs.parquet")}

    def answer(body):
        first, second = re.search(r"Reply A:\n(.*?)\n\nReply B:\n(.*)", body["messages"][-1]["content"], re.DOTALL).groups()
        return json.dumps({"better": "A" if first in better and second not in better else "B"})

    with Faulty(answer=answer) as server:
        found = agreement_with_people(pairwise(LLMConfig(server=server.config()), pairs=pairs))
    assert found["pairs"] == 50
    assert 0 < found["decided"] <= 50
    assert found["agrees"].startswith("100.0")


def test_statements_are_judged_one_by_one(data, medalpaca):
    kqa = source(SourceConfig(name="k_qa"))
    made = replies(ReplyConfig(max_new_tokens=4, limit=3), model=medalpaca.base, data=kqa)
    count = sum(len(m["must_have"]) + len(m["nice_to_have"]) for m in read_replies(made).meta)

    def answer(body):
        statement = re.search(r"Statement: (.*)", body["messages"][-1]["content"])[1]
        return json.dumps({"label": "Entailment" if len(statement) % 2 else "Neutral"})

    with Faulty(answer=answer) as server:
        labelled = kqa_labels(LLMConfig(server=server.config()), replies=made)
    assert labelled.metrics == {"statements": count, "unread": 0}
    frame = pd.read_json(labelled / "labels.jsonl", lines=True)
    assert all((len(r.statement) % 2 == 1) == (r.label == "Entailment") for r in frame.itertuples())


def test_an_empty_reply_loses_without_a_judge():
    """Ours says nothing to two prompts, the baseline to one; one pair of replies is equal, both are empty once."""
    said = {"a": ("x", "y"), "b": ("", "y"), "c": ("", "y"), "d": ("x", ""), "e": ("same", "same"), "f": ("", "")}
    ours, other = (
        lines(
            None, name="replies.jsonl", rows=[{**prompt_row(n, "?"), "reference": "", "reply": r[i]} for n, r in said.items()]
        )
        for i in (0, 1)
    )
    counts = as_pairs(None, ours=ours, baseline=other).metrics
    assert counts == {"pairs": 1, "same": 2, "lost": 2, "won": 1}
    rate = win_rate(pd.DataFrame({"worth": [0.0]}), same=counts["same"], lost=counts["lost"], won=counts["won"])
    assert (rate.value, rate.n) == (pytest.approx((0 + 1 + 0 + 1) / 6), 6)


def test_grades_and_wins():
    rows = [prompt_row(f"q{i}", f"question {i}", turns=[f"question {i}", "go on"]) for i in range(4)]
    ours, other = (
        lines(
            name="replies.jsonl",
            rows=[{**row, "reply": f"{who} {row['id']}", "replies": [f"{who} {row['id']}", "more"]} for row in rows],
        )
        for who in ("good", "bad")
    )
    with Faulty(answer=lambda body: '{"score": 8}' if "go on" in body["messages"][-1]["content"] else '{"score": 6}') as server:
        made = grades(LLMConfig(server=server.config()), replies=ours)
    assert made.metrics["mean"] == 7.0
    assert made.metrics["turns"] == 8
    pairs = as_pairs(None, ours=ours, baseline=other)
    mine = {c for r in canonical.read_pairs(pairs / "pairs.parquet") for c in [r["chosen"][0]["content"]]}

    def answer(body):
        first = re.search(r"Reply A:\n(.*?)\n\nReply B:", body["messages"][-1]["content"], re.DOTALL)[1]
        return json.dumps({"better": "A" if first in mine else "B"})

    with Faulty(answer=answer) as server:
        verdicts = pairwise(LLMConfig(server=server.config()), pairs=pairs)
    won = outcomes(verdicts, pairs)
    assert win_rate(won).value == 1.0
    assert win_rate(won, same=4).value == pytest.approx((verdicts.metrics["pairs"] + 2) / (verdicts.metrics["pairs"] + 4))
    lengths = {
        r["id"]: len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"])
        for r in canonical.read_pairs(pairs / "pairs.parquet")
    }
    assert dict(zip(won.id, won.longer, strict=True)) == lengths


def test_bleu1_by_hand():
    assert bleu1(["the the the cat"], ["the cat sat"]) == pytest.approx(50.0)
    assert bleu1(["the cat"], ["the cat sat down"]) == pytest.approx(100 * 2.718281828 ** (1 - 4 / 2))
    assert bleu1(["The cat sat."], ["the cat sat ."]) == pytest.approx(100.0)
    assert bleu1([""], ["x"]) == 0.0
