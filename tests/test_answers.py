"""The stage that asks questions: outcomes add up, ledgers resume, protocols do what they say."""

from types import SimpleNamespace

import pytest

from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig
from ultramed.data.formats import BadRow
from ultramed.data.recognise import read
from ultramed.evaluate import accuracy, engine
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.generate import Reply, Sampling
from ultramed.lm.parsing import accepted
from ultramed.lm.templates import TEMPLATES


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
        assert [accepted(reply) or tries == 2 for reply, tries in zip(frame.reply, frame.tries, strict=True)] == [True] * 15


def test_medalpacas_prompt_is_that_of_its_evaluation_token_by_token(tokenizer, monkeypatch):
    """eval/eval_usmle.py with prompt_templates/medalpaca.json: nothing after the colon of the forced beginning."""
    row = {"id": "q", "subset": "step1", "gold": "B", "meta": {}, "question": "Which organ sees?"}
    row |= {"options": {"A": "ear", "B": "eye"}}
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAnswer this multiple choice question.\n\n"
        "### Input:\nWhich organ sees?\nA: ear\nB: eye\n\n"
        "### Response:\nThe Answer to the question is:"
    )
    said, asked, written = iter(["I am", "(B)", "** B eye", "never asked"]), [], []
    local = engine.Local.__new__(engine.Local)
    local.tokenizer, local.template, local.net = tokenizer, TEMPLATES["medalpaca"], None
    monkeypatch.setattr(local, "fitting", lambda ids, *_: list(range(len(ids))), raising=False)
    monkeypatch.setattr(accuracy, "weights", lambda *_: local)

    def generate(net, tokenizer, prompts, sampling, *, budget, rngs):
        asked.append((*prompts, sampling))
        return [Reply(next(said), 3, True)]

    monkeypatch.setattr(accuracy, "generate", generate)
    ledger, bar = SimpleNamespace(add=written.append), SimpleNamespace(update=lambda n: None)
    config = EvalConfig(protocol="medalpaca", answer_form="content_first", max_new_tokens=128)
    accuracy.ASK["medalpaca"](local, [row], config, ledger, bar, None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # "I am" looks like option I to MedAlpaca, so it is accepted and no option: unparsed.
    assert asked == [(ids, Sampling(128, 0.4, 50, 0.9))]
    assert (written[0]["reply"], written[0]["letter"], written[0]["tries"]) == ("I am", None, 1)
    accuracy.ASK["medalpaca"](local, [row], config, ledger, bar, None)
    assert len(asked) == 3, "'(B)' has no text after it, so it was asked once more"
    assert (written[1]["reply"], written[1]["letter"], written[1]["tries"]) == ("** B eye", "B", 2)
    said = iter(["(B)"] * 9)
    accuracy.ASK["medalpaca"](local, [row], config, ledger, bar, None)
    assert len(asked) == 8, "five tries"
    assert (written[2]["reply"], written[2]["letter"], written[2]["tries"]) == ("(B)", "B", 5), (
        "the last reply is read all the same"
    )


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
