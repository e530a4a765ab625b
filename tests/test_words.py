"""The yardstick of words: what it sees, what it learns, and that it is asked as the trained arms are."""

import pytest

from ultramed.core.config import load_profile
from ultramed.core.errors import ConfigError
from ultramed.core.schema import WordsConfig
from ultramed.core.store import stage
from ultramed.data import rows as canonical
from ultramed.evaluate.accuracy import read_answers
from ultramed.evaluate.words import word_answers, words
from ultramed.experiments.yardstick import by_words


def question(number: int, asked: str, gold: str, side: str) -> dict:
    options = {"A": "heart", "B": "lungs"} if number % 2 else {"A": "lungs", "B": "heart"}
    letter = next(key for key, text in options.items() if text == gold)
    return {
        "id": f"{side}{number}",
        "question": asked,
        "options": options,
        "gold": letter,
        "subset": "all",
        "meta": {"concept": asked},
    }


@stage(version=1)
def made_questions(out, config):
    """Cardiac words go with the heart, pulmonary ones with the lungs; the test's words begin alike and end otherwise."""
    train = [("cardiac arrest", "heart"), ("pulmonary embolism", "lungs")] * 3
    test = [("cardiology ward", "heart")] * 2 + [("pulmonology ward", "lungs")] * 2
    for side, rows in (("train", train), ("test", test)):
        canonical.write_rows(out / f"{side}.parquet", [question(i, *row, side) for i, row in enumerate(rows)])
    return {}


@stage(version=1)
def made_rows(out, config, ids):
    turn = {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "!"}]}
    canonical.write_rows(out / "rows.parquet", [{"id": name, "source": "made", **turn} for name in ids])
    return {}


EVERY = [f"train{i}" for i in range(6)]


def test_what_stands_in_an_option_by_hand():
    row = {"question": "Which organ, of 2?", "options": {"A": "The heart", "B": "An ear"}}
    assert words(row, WordsConfig(sees="options", prefix=3)) == [{"The heart": 1, "the": 1, "hea": 1}, {"An ear": 1, "ear": 1}]
    _, second = words(row, WordsConfig(prefix=3))
    assert set(second) == {"An ear", "ear", "whi An ear", "whi ear", "org An ear", "org ear"}


def test_it_learns_which_words_go_together_and_nothing_from_the_options_alone():
    questions, rows = made_questions(None), made_rows(None, ids=EVERY)
    seen = word_answers(WordsConfig(), rows=rows, questions=questions)
    assert (seen.metrics["accuracy"], seen.metrics["n"], seen.metrics["rows"]) == (1.0, 4, 6)
    assert set(read_answers(seen).rule) == {"words"}
    blind = word_answers(WordsConfig(sees="options"), rows=rows, questions=questions)
    assert blind.metrics["accuracy"] == 0.5, "either organ is right as often as the other"
    part = word_answers(WordsConfig(), rows=rows, questions=questions, select={"all": [1, 3]})
    assert read_answers(part).id.tolist() == ["test1", "test2"]


def test_it_learns_from_the_rows_that_it_is_given_and_no_others():
    questions = made_questions(None)
    some = word_answers(
        WordsConfig(), rows=made_rows(None, ids=["train0", "train1", "train1~2", "elsewhere"]), questions=questions
    )
    assert some.metrics["rows"] == 2, "a row that is seen again is one question"
    with pytest.raises(ConfigError, match="none of the 1 rows"):
        word_answers(WordsConfig(), rows=made_rows(None, ids=["elsewhere"]), questions=questions)


def test_every_experiment_has_it_where_questions_and_rows_are_of_one_kind():
    arms = by_words(load_profile("smoke"))
    assert list(arms) == [f"{number}: {sees}" for number in (11, 22) for sees in ("options alone", "question and options")]
    smoke = load_profile("smoke")
    for name, seeds, asked in (
        ("11", smoke.usmle.seeds, smoke.usmle.questions),
        ("22", smoke.ultramedical.seeds, smoke.ultramedical.test.questions["medical"]),
    ):
        frame = arms[f"{name}: options alone"].frame
        assert sorted(frame.seed.unique()) == sorted(seeds)
        assert len(frame) == len(seeds) * sum(asked.values())
    changed = load_profile("smoke", ["usmle.questions={medqa: 4}", "ultramedical.test.questions.medical={medqa: 4}"])
    assert not by_words(changed), "MedQA's questions and the exam's rows: nothing to count"
