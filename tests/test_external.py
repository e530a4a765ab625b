"""Other papers' measures: CURE-Med's consistency through a judge and by its proxy, and the cells that they fill."""

import json

import pandas as pd
import pytest
from faulty import Faulty
from handmade import given

from ultramed.annotate.judge import LLMConfig
from ultramed.annotate.open_ended import consistency
from ultramed.data.rows import read_instructions
from ultramed.data.sources import SourceConfig, source
from ultramed.evaluate.language import LanguageProxy, english_in, in_language, sentences
from ultramed.evaluate.open_ended import ReplyConfig, read_replies, replies
from ultramed.experiments import external
from ultramed.papers import published
from ultramed.report.beside import cell_entries

ENGLISH = (
    "The patient should drink enough water and see a doctor if the fever lasts for more than three days.",
    "Iron deficiency is the most common cause of anaemia. It is treated with ferrous sulphate by mouth.",
    "Amoxicillin is the first choice. Rest and fluids help, and paracetamol lowers the temperature.",
    "No, this medicine is not safe during pregnancy, because it can harm the kidneys of the child.",
)


def languages(rows):
    made = {}
    for row in rows:
        made.setdefault(row["meta"]["language"], []).append(row)
    return made


@pytest.fixture(scope="module")
def curemed(data):
    return source(SourceConfig(name="curemed"))


@pytest.fixture(scope="module")
def proxy(curemed):
    return external.learn_languages(curemed)


@pytest.fixture(scope="module")
def questions(curemed):
    """Questions of the other side, which the proxy has not seen: language -> texts."""
    asked = languages(read_instructions(curemed / "test.parquet"))
    return {name: [row["prompt"][-1]["content"] for row in rows[:40]] for name, rows in asked.items()}


def test_the_proxy_knows_all_languages_and_english(proxy, questions):
    assert len(questions) == 13
    assert set(proxy.model.classes_) == {*questions, "English"}
    assert proxy.accuracy.low > 0.95
    for language, texts in questions.items():
        kept = sum(proxy.consistent(text, language) for text in texts) / len(texts)
        assert kept >= 0.85, f"{language}: {kept}"


def test_english_passes_as_nothing_else(proxy, questions):
    for text in ENGLISH:
        assert proxy.consistent(text, "English")
        assert not any(proxy.consistent(text, language) for language in questions)


def test_no_language_passes_as_another(proxy, questions):
    for language, texts in questions.items():
        wrong = [other for other in (*questions, "English") if other != language and proxy.consistent(texts[0], other)]
        assert not wrong, f"{language} passes as {wrong}"


def test_a_reply_that_drifts_into_english_does_not_pass(proxy, questions):
    for language, texts in questions.items():
        text = next(text for text in texts if proxy.consistent(text, language))
        assert not proxy.consistent(f"{text}\n{' '.join(ENGLISH)}", language), language


def test_what_has_no_letters_is_in_no_language(proxy):
    assert not proxy.consistent("", "French")
    assert not proxy.consistent("1. 2. 3.", "French")
    assert sentences("Non. Le foie est un organe vital.") == ["Le foie est un organe vital."]
    assert sentences("Non.") == ["Non."], "where all are short the whole is told"


def test_english_in_a_chain_of_thought_that_quotes():
    text = "<thinking><step1>\nThe liver makes bile.\n</step1> It says *le foie* is large. The word [foie = liver] is known."
    assert english_in(text) == "The liver makes bile."


def test_a_proxy_without_english_is_refused():
    with pytest.raises(ValueError, match="without English an English reply would pass"):
        LanguageProxy(["Le foie est un organe."], ["French"])


def asked_in(*named):
    return [
        {
            "id": f"q{n}",
            "source": "curemed",
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "completion": [{"role": "assistant", "content": "gold"}],
            "meta": {"language": language, "reasoning": ""},
        }
        for n, language in enumerate(named)
    ]


def test_the_system_turn_orders_the_language_and_the_judge_is_asked_for_all_of_the_definition():
    told, judged = [], []

    def answer(body):
        text = body["messages"][-1]["content"]
        if "Is the reply consistent" in body["messages"][0]["content"]:
            judged.append(body["messages"])
            return json.dumps({"consistent": "Oui" in text}) if "broken" not in str(body["messages"]) else "maybe"
        told.append([(m["role"], m["content"]) for m in body["messages"]])
        return {"Question 0?": "Oui, bien s\u00fbr.", "Question 1?": "Yes, of course."}.get(text, "broken")

    data = in_language(None, data=given(rows=asked_in("French", "Hausa", "Thai"), side="test"))
    with Faulty(answer=answer) as server:
        from ultramed.lm import models

        made = replies(ReplyConfig(), model=models.resolve(f"{server.config().url}#m"), data=data)
        verdicts = consistency(LLMConfig(server=server.config()), replies=made)
    assert len(told) == 3
    for language, turns in zip(("French", "Hausa", "Thai"), sorted(told, key=lambda t: t[-1]), strict=True):
        assert [role for role, _ in turns] == ["system", "user"]
        assert f"in {language} only" in turns[0][1]
    assert verdicts.metrics == {"replies": 3, "unread": 1, "consistent": 1}
    found = pd.read_json(verdicts / "verdicts.jsonl", lines=True).set_index("id").consistent
    assert (found["q0"], found["q1"], pd.isna(found["q2"])) == (True, False, True)
    rubric = next(messages[0]["content"] for messages in judged if "Oui" in messages[-1]["content"])
    assert all(word in rubric for word in ("all of it in French", "any other language", "drift", "conclusion"))
    assert len(read_replies(made)) == 3


def test_consistency_is_the_judges_where_there_is_one(smoke, medalpaca, curemed, proxy):
    def answer(body):
        system = body["messages"][0]["content"]
        return json.dumps({"consistent": True} if "consistent" in system else {"correct": False})

    policies, profile = {"base": medalpaca.base}, smoke.model_copy(update={"open_rows": 13, "open_tokens": 8})
    short = [row for row in read_instructions(curemed / "test.parquet") if len(row["prompt"][-1]["content"]) < 60]
    data = given(rows=short, side="test")
    alone = external.measure_language(profile, policies, data, proxy, None)
    with Faulty(answer=answer) as server:
        judge = LLMConfig(server=server.config())
        judged = external.measure_language(profile, policies, data, proxy, judge)
    assert judged.values.value.tolist() == [100.0]
    assert alone.values.value.tolist() != [100.0], "a tiny model of random weights is in no language"
    assert alone.protocol.startswith("language: proxy, no judge")
    assert judged.protocol.startswith(f"language: judged by {judge.server.model}")
    (row,) = judged.table.to_dict("records")
    assert row["correct, by the judge"].startswith("0.0")
    assert row["not read"] == 0
    assert any("proxy" in column for column in alone.table)


def test_every_third_party_cell_but_mimics_has_a_measure():
    cells = {cell["row"]: cell["published"] for cell in published.cells("ultramedical_third_party")}
    assert len(cells) == 9
    assert set(cells) - set(external.PUBLISHED_ROWS.values()) == {
        "Medical history-taking / MIMIC / precision / size not stated"
    }
    values = pd.DataFrame(
        [
            {"arm": arm, "cell": cell, "value": n, "n": 5}
            for arm in ("base", "sft")
            for n, cell in enumerate(external.PUBLISHED_ROWS)
        ]
    )
    measured = external.Measured(values, values, (), "made up")
    found = external.as_cells({"all": measured})
    entries = cell_entries(
        "ultramedical_third_party",
        found,
        external.PUBLISHED_ROWS,
        same_scale=False,
        protocol=external.protocol({"all": measured}),
    )
    assert [entry["ours"] for entry in entries] == list(range(8))
    assert {entry["verdict"] for entry in entries} == {"differs in scale"}
    assert entries[6]["published"] == cells[external.PUBLISHED_ROWS["language"]] == 47.03
    assert external.as_cells({}).empty
