"""History taking with a scripted patient, and with one behind a URL."""

import pandas as pd
import pytest
from faulty import Faulty
from handmade import given, prompt_row

from ultramed.evaluate import engine as engine_module
from ultramed.evaluate import history
from ultramed.evaluate.history import HistoryConfig, Script, conversation, diagnoses, facts, histories, history_scores

CASE = {
    "demographics": "34 year old Female",
    "chief_complaints": "Cough",
    "physical_history": "None",
    "family_history": "",
    "presentation": "She has a dry cough since 12 days. Her cough was preceded by a sore throat.",
    "absent_findings": "No fever, No smoking,  No weight loss.",
    "social_history": "Works in a bakery.",
}


def case(name="a"):
    return {**prompt_row(name, "Cough"), "reference": "Acute Bronchitis", "meta": CASE}


def test_a_case_becomes_statements():
    assert facts(CASE) == [
        "She has a dry cough since 12 days.",
        "Her cough was preceded by a sore throat.",
        "Works in a bakery.",
        "No fever",
        "No smoking",
        "No weight loss",
    ]


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("Do you smoke?", "No smoking"),
        ("Have you had a fever?", "No fever"),
        ("Did you lose weight lately?", "No weight loss"),
        ("Was there a sore throat before?", "Her cough was preceded by a sore throat."),
        ("Zxqv?", None),
        ("", None),
    ],
)
def test_the_script_gives_the_statement_a_question_is_about(question, told):
    found = Script([case()], near=0.2).statement_about("a", question)
    assert (None if found is None else facts(CASE)[found]) == told


def test_the_last_turn_asks_for_diagnoses():
    talk = [{"said": "Do you smoke?", "answer": "No smoking"}]
    again, last = conversation(case(), talk, 2), conversation(case(), talk, 1)
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert "next question" in again[-1]["content"]
    assert "five most likely diagnoses" in last[-1]["content"]
    assert "Acute Bronchitis" not in str(last)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1. Asthma\n2. Acute bronchitis.\n", ["Asthma", "Acute bronchitis"]),
        ("1. Asthma 2. COPD 3. Croup", ["Asthma", "COPD", "Croup"]),
        ("Here are the most likely diagnoses:\n\n1. Migraine\n2. Tension headache", ["Migraine", "Tension headache"]),
        ("The five diagnoses are:\nMigraine\nSinusitis", ["Migraine", "Sinusitis"]),
        ("- a\n- b\n- c\n- d\n- e\n- f", list("abcde")),
        ("", []),
    ],
)
def test_diagnoses_are_read(text, names):
    assert diagnoses(text) == names


def test_names_of_one_disease():
    assert history.same_disease("acute bronchitis (viral)", "Acute Bronchitis")
    assert history.same_disease("Bronchitis, acute", "Acute Bronchitis")
    assert not history.same_disease("Bronchiectasis", "Acute Bronchitis")
    assert not history.same_disease("", "Acute Bronchitis")


def test_scores_by_hand():
    frame = pd.DataFrame(
        {
            "id": ["a", "b"],
            "found": [[0, 0, None, 2], [None] * 4],
            "questions": [["q"] * 4] * 2,
            "statements": [4, 5],
            "top1": [True, False],
            "top5": [True, True],
        }
    )
    scores = history_scores(frame)
    assert {k: e.value for k, e in scores.items()} == {"precision": 0.25, "coverage": 0.25, "top1": 0.5, "top5": 1.0}


def test_a_history_is_taken_and_goes_on_where_it_stopped(medalpaca, monkeypatch):
    data = given(rows=[case("a"), case("b")], side="test")
    config = HistoryConfig(questions=2, max_new_tokens=6)
    whole, real, calls = Script.statement_about, engine_module.open_engine, []

    def broken(self, name, text):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, name, text)

    monkeypatch.setattr(Script, "statement_about", broken)
    with pytest.raises(KeyboardInterrupt):
        histories(config, model=medalpaca.base, data=data)
    monkeypatch.setattr(Script, "statement_about", whole)
    asked = []

    def counting(*args, **more):
        engine = real(*args, **more)
        plain = engine.replies
        engine.replies = lambda conversations, *rest: (asked.append(len(conversations[0])), plain(conversations, *rest))
        return engine

    monkeypatch.setattr(engine_module, "open_engine", counting)
    made = histories(config, model=medalpaca.base, data=data)
    assert asked == [3, 5]  # the first turn, of one message, was not asked again
    frame = history.read_histories(made)
    assert [len(q) for q in frame.questions] == [2, 2]
    assert list(frame.questions[0]) == list(frame.questions[1])
    assert made.metrics == {"cases": 2, "patient": "script"}


def test_a_model_behind_a_url_can_play_the_patient(medalpaca):
    data = given(rows=[case("a")], side="test")
    with Faulty(answer=lambda body: "I do not smoke, no smoking ever.") as server:
        config = HistoryConfig(questions=2, max_new_tokens=6, patient=server.config())
        frame = history.read_histories(histories(config, model=medalpaca.base, data=data))
        assert all("No smoking" in b["messages"][0]["content"] for b in server.bodies)
        assert "Acute Bronchitis" not in str(server.bodies)
    assert [[facts(CASE)[i] for i in row] for row in frame.found] == [["No smoking", "No smoking"]]
