"""What does not fit into a model's context is told, counted and kept out."""

import pytest
from handmade import given, prompt_row

from ultramed.core.errors import ConfigError
from ultramed.core.ledger import Ledger
from ultramed.core.schema import EvalConfig, SampleConfig
from ultramed.data.rows import Pair, Question, check_rows
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.engine import one_reply
from ultramed.evaluate.open_ended import ReplyConfig, read_replies, replies
from ultramed.evaluate.reward_bench import read_scores, score_pairs
from ultramed.evaluate.sample import read_samples, samples
from ultramed.lm.templates import TEMPLATES

LONG = "pain " * 30_000


@pytest.fixture(scope="module")
def questions():
    rows = [
        {"id": name, "question": text, "options": {"A": "eye", "B": "ear"}, "gold": "B"}
        for name, text in (("short", "Which organ hears?"), ("long", LONG), ("other", "Which organ sees?"))
    ]
    return given(None, rows=check_rows(Question, rows, "here"), side="test")


@pytest.mark.parametrize("protocol", ["likelihood", "greedy", "medalpaca"])
def test_a_question_of_30000_words_is_not_asked(medalpaca, questions, protocol):
    art = answers(EvalConfig(protocol=protocol, max_new_tokens=4), model=medalpaca.base, questions=questions)
    assert (art.metrics["n"], art.metrics["too_long"]) == (2, 1)
    assert set(read_answers(art).id) == {"short", "other"}
    assert art.metrics["correct"] + art.metrics["wrong"] + art.metrics["unparsed"] == 2


def test_samples_leave_it_out(medalpaca, questions):
    art = samples(SampleConfig(n=2, max_new_tokens=4), model=medalpaca.base, questions=questions)
    assert (art.metrics["prompts"], art.metrics["samples"], art.metrics["too_long"]) == (2, 4, 1)
    assert [row["id"] for row in read_samples(art)] == ["short", "other"]


def test_an_open_question_that_does_not_fit_has_an_empty_reply(medalpaca):
    data = given(None, rows=[prompt_row("short", "Which organ hears?"), prompt_row("long", LONG)], side="test")
    art = replies(ReplyConfig(max_new_tokens=4), model=medalpaca.base, data=data)
    said = read_replies(art).set_index("id").reply
    assert (art.metrics["rows"], art.metrics["too_long"], said["long"]) == (2, 1, "")
    marked = {key: "too_long" in entry for key, entry in Ledger(art / "turns.jsonl").rows.items()}
    assert marked == {"short#0": False, "long#0": True}


def test_where_nothing_may_be_left_out_it_is_an_error(medalpaca):
    with pytest.raises(ConfigError, match="1 of 1 conversations do not fit into 1024 positions with 8 new tokens"):
        one_reply(medalpaca.base, [{"role": "user", "content": LONG}], 8)


def test_a_pair_that_does_not_fit_is_counted(smoke, tmp_path):
    from ultramed.experiments.ultramedical import UltraMedical

    model = UltraMedical.of(smoke).train_reward_model("medical")
    turns = {"chosen": [{"role": "assistant", "content": "ear"}], "rejected": [{"role": "assistant", "content": LONG}]}
    prompt = [{"role": "user", "content": "Which organ hears?"}]
    short = {"rejected": [{"role": "assistant", "content": "eye"}]}
    rows = check_rows(Pair, [{"id": "1", "prompt": prompt, **turns}, {"id": "2", "prompt": prompt, **turns, **short}], "here")
    score_pairs(model, rows, tmp_path / "scores.jsonl", TEMPLATES["chat"])
    assert read_scores(tmp_path).id.tolist() == ["2"]
