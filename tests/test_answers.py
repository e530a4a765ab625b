"""The stage that asks questions: outcomes add up, ledgers resume, protocols do what they say."""

import pytest

from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig
from ultramed.data.formats import BadRow
from ultramed.data.recognise import read
from ultramed.evaluate import accuracy, engine
from ultramed.evaluate.accuracy import answers, read_answers


@pytest.mark.parametrize("protocol", accuracy.ASK)
def test_outcomes_add_up(medalpaca, exam, protocol):
    config = EvalConfig(protocol=protocol, answer_form="letter_first", max_new_tokens=5, tries=2)
    art = answers(config, model=medalpaca.base, questions=exam, select={"step1": [0, 10], "step2": [3, 8]})
    frame, m = read_answers(art), art.metrics
    assert (m["n"], m["correct"] + m["wrong"] + m["unparsed"]) == (15, 15)
    assert m["accuracy"] == frame.correct.mean()
    assert list(frame.subset.value_counts()) == [10, 5]
    if protocol == "medalpaca":
        assert set(frame.tries) <= {1, 2}
        assert (frame[frame.tries < 2].rule == "letter: text").all()


def test_an_interrupted_evaluation_asks_only_what_is_left(medalpaca, exam, fresh_store, monkeypatch):
    config = EvalConfig(protocol="greedy", max_new_tokens=3, batch_tokens=256)
    real, asked = engine.generate, []

    def break_after_three(net, tokenizer, prompts, sampling, *, budget, done, rngs):
        def interrupted(batch, replies):
            done(batch, replies)
            asked.extend(batch)
            if len(asked) >= 3:
                raise KeyboardInterrupt

        return real(net, tokenizer, prompts, sampling, budget=budget, done=interrupted)

    monkeypatch.setattr(engine, "generate", break_after_three)
    with pytest.raises(KeyboardInterrupt):
        answers(config, model=medalpaca.base, questions=exam)
    monkeypatch.undo()
    monkeypatch.setenv("ULTRAMED_STORE", str(fresh_store))
    counted = []
    monkeypatch.setattr(engine, "generate", lambda *a, **k: (counted.append(len(a[2])), real(*a, **k))[1])
    art = answers(config, model=medalpaca.base, questions=exam)
    assert counted == [180 - len(asked)]
    frame = read_answers(art)
    assert len(frame) == frame.id.nunique() == 180


def test_a_slice_beyond_the_end_is_an_error(medalpaca, exam):
    with pytest.raises(ConfigError, match="questions 0 to 999 of 'step1' asked for, but it has 60"):
        answers(EvalConfig(), model=medalpaca.base, questions=exam, select={"step1": [0, 999]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"question": "Q", "options": {"A": "x", "B": "y"}}', "row 1: gold: no column of the answer"),
        (
            '{"question": "Q", "options": {"A": "x", "B": "y"}, "gold": "E"}',
            "row 1: wanted one of A, B, or the text of one of the options, got 'E'",
        ),
        ('{"question": "Q", "options": {"A": "x", "1": "y"}, "gold": "A"}', "options: wanted a dictionary or a list"),
        ('{"question": "", "options": {"A": "x", "B": "y"}, "gold": "A"}', "question: String should have at least 1"),
        ("{nonsense", "row 1: not JSON"),
    ],
)
def test_a_bad_question_file_names_row_and_field(tmp_path, text, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(BadRow, match=message) as err:
        read(path, "questions")
    assert str(path) in str(err.value)


def test_rows_whose_ids_repeat_are_numbered(tmp_path):
    row = '{"id": "a", "question": "Q", "options": {"A": "x", "B": "y"}, "gold": "A", "anwser": 1}\n'
    (tmp_path / "q.jsonl").write_text(row * 2)
    made = read(tmp_path / "q.jsonl", "questions")
    assert [(r["id"], r["meta"]) for r in made] == [("1", {"id": "a", "anwser": 1}), ("2", {"id": "a", "anwser": 1})]
