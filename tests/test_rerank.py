"""Selection out of N samples: by hand, by brute force, and against recorded votes of real models."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.core.errors import ConfigError
from ultramed.evaluate import rerank
from ultramed.evaluate.arms import Answers

LETTERS = np.array([list("ABBA"), ["", "C", "", ""], ["", "", "", ""], list("DDDA")])
REWARDS = np.array([[0, 1, 2, 9], [5, 1, 0, 0], [1, 2, 3, 4], [0, 0, 0, 5.0]])


def test_selections_by_hand():
    assert list(rerank.majority(LETTERS)) == ["A", "C", "", "D"], "a tie goes to the first sampled; unparsed do not vote"
    assert list(rerank.best_of_n(LETTERS, REWARDS)) == ["A", "", "", "A"]
    assert list(rerank.reward_vote(LETTERS, REWARDS)) == ["A", "C", "", "A"]
    assert list(rerank.majority_of_bests(LETTERS, REWARDS)) == ["B", "C", "", "D"]


def test_questions_without_a_readable_sample_stay_unanswered():
    letters = np.array([["", ""], ["", ""]])
    assert rerank.majority(letters).tolist() == ["", ""]


def test_weights_of_a_vote_are_a_softmax_of_each_questions_rewards():
    """e^1.1 > 2 e^0 (3.0 against 2), but 2 e^0.9 > e^1.1: one good sample outvotes two, unless these are nearly as good.
    The third question is the second with 1,000 added to every reward, which changes nothing."""
    letters = np.array([list("ABB"), list("ABB"), list("ABB")])
    rewards = np.array([[1.1, 0, 0], [1.1, 0.9, 0.9], [1001.1, 1000.9, 1000.9]])
    assert rerank.reward_vote(letters, rewards).tolist() == ["A", "B", "B"]
    assert rerank.reward_vote(letters[:1], np.array([[-800.0, -801.0, -801.0]])).tolist() == ["A"], "no weight underflows"


def test_the_better_half_rounds_up_and_keeps_the_order_of_sampling():
    """Of five samples three; of rewards that are equal the first; among three different letters the first sampled."""
    letters = np.array([list("ABCDD")])
    assert rerank.majority_of_bests(letters, np.array([[1, 2, 3, 0, 0.0]])).tolist() == ["A"]
    assert rerank.majority_of_bests(letters, np.array([[1, 0, 0, 3, 2.0]])).tolist() == ["D"]
    assert rerank.majority_of_bests(letters, np.zeros((1, 5))).tolist() == ["A"]
    many = np.array([list("BACDEACDEACDEACDEBBBCBCDEACDEACDEACD")])  # more than sixteen: an unstable sort would mix them
    want = rerank.majority(many[:, :18])
    assert rerank.majority_of_bests(many, np.zeros(many.shape)).tolist() == want.tolist()
    both = np.array([list("AABBB"), list("BBBAA")])
    scores = np.array([[3, 2, 1, 0, 0.0], [0, 0, 1, 2, 3]])
    assert rerank.majority_of_bests(both, scores).tolist() == ["A", "A"], "each question has its own better half"


def test_curves_draw_samples_of_each_question_and_come_out_the_same_again():
    rng = np.random.default_rng(0)
    letters, gold = rng.choice(list("ABCD"), (30, 5)), rng.choice(list("ABCD"), 30)
    rewards = rng.random((30, 5))
    assert rerank.curves(letters, rewards, gold, [2, 5]).equals(rerank.curves(letters, rewards, gold, [2, 5]))
    right = np.array([["A", "A", "B"], ["A", "A", "B"]])
    made = rerank.curves(right, None, np.array(["A", "B"]), [3]).iloc[0]
    assert (made.accuracy, made.low, made.high) == (0.5, 0.0, 1.0), "both questions are drawn, the first included"
    first = rerank.curves(np.array([["A", "B"], ["A", "B"]]), None, np.array(["A", "A"]), [2]).iloc[0]
    assert first.accuracy == 1, "a tie goes to the first sampled"


def test_reward_models_that_differ_widen_how_often_they_prefer_a_right_sample():
    """Three seeds' reward models prefer it in 12, 14 and 16 of 20 questions: 70%, by Student's t of three values
    4.3 x 10 / 3^0.5 = 24.8 points to either side, where 60 questions of one reward model would allow 12."""
    votes = rerank.Votes({})
    votes.letters, votes.gold = np.array([["A", "B"]] * 60), np.array(["A"] * 60)
    votes.rewards = np.array([[1.0, 0.0] if i < right else [0.0, 1.0] for right in (12, 14, 16) for i in range(20)])
    votes.seed, votes.concept = np.repeat([0, 1, 2], 20), np.arange(60)
    found = votes.prefers_right()
    assert (found.value, found.high - found.value) == (pytest.approx(0.7), pytest.approx(0.248, abs=1e-3))


def test_how_often_the_reward_prefers_a_right_sample_by_hand():
    """Right samples have 3 and 1, wrong ones 2 and 1: 3 beats both, 1 loses once and ties once, 2.5 of 4. The second question
    has no right sample, the third no wrong one; in the fourth the right one is behind all."""
    votes = rerank.Votes({})
    votes.letters = np.array([list("AABC"), list("BBCC"), list("AAAA"), ["A", "", "B", "D"]])
    votes.rewards = np.array([[3, 1, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3.0]])
    votes.gold, votes.concept, votes.seed = np.array(list("AAAA")), np.array(list("wxyz")), np.zeros(4)
    found = votes.prefers_right()
    assert (found.value, found.n) == (pytest.approx((2.5 / 4 + 0) / 2), 2)
    assert 0 <= found.low < found.value < found.high <= 1
    assert votes.summary().endswith("(2 questions that have both; chance is 50)")
    votes.rewards = None
    assert votes.prefers_right() is None
    assert votes.summary() == "4 questions, 4 samples each: 43.8% right, 6.2% unparsed"


@pytest.fixture
def greedy():
    """Four questions in two subsets, the first and the third right."""
    about = {"id": list("pqrs"), "seed": 0, "subset": ["one", "one", "two", "two"], "concept": list("wxyz")}
    return Answers(pd.DataFrame({**about, "correct": [True, False, True, False]}))


def votes_on(greedy, letters, rewards=None):
    votes = rerank.Votes({})
    votes.letters, votes.gold, votes.rewards = np.array(letters), np.array(list("AAAA")), rewards
    for name in ("id", "seed", "subset", "concept"):
        setattr(votes, name, greedy.frame[name].to_numpy())
    return votes


def test_several_reward_models_on_the_same_samples_by_hand(greedy):
    """The vote is right in two of four, one model chooses a right sample in all and the other in none."""
    letters = [list("AAB"), list("AAB"), list("ABB"), list("ABB")]
    good, bad = np.array([[1, 0, 0.0]] * 4), np.array([[0, 0, 1.0]] * 4)
    made = rerank.by_reward_model({3: votes_on(greedy, letters, good), 5: votes_on(greedy, letters, bad)}, greedy)
    assert made["reward model"].tolist() == ["seed 3", "seed 5"]
    assert [cell.split()[0] for cell in made["best of N"]] == ["100.0", "0.0"]
    assert [cell.split()[0] for cell in made["minus the vote"]] == ["+50.0", "-50.0"]
    assert [cell.split()[0] for cell in made["minus greedy"]] == ["+50.0", "-50.0"]
    assert [cell.split()[0] for cell in made["prefers a right sample"]] == ["87.5", "12.5"]


def test_the_temperature_curve_by_hand(greedy):
    """Cold: half of the questions wholly right. Hot: two of three samples right everywhere, so the vote is right everywhere."""
    cold, hot = [list("AAA"), list("BBB")] * 2, [list("AAB")] * 4
    made = rerank.temperature_curve({0.4: votes_on(greedy, cold), 1.0: votes_on(greedy, hot)})
    found = made.set_index(["temperature", "answer"]).accuracy
    assert found.to_dict() == {
        (0.4, "one sample"): pytest.approx(0.5),
        (0.4, "vote of 3"): pytest.approx(0.5),
        (1.0, "one sample"): pytest.approx(2 / 3, abs=0.1),  # of 50 draws
        (1.0, "vote of 3"): pytest.approx(1.0),
    }


def test_pass_at_n_by_hand_and_beside_chance():
    letters, gold = np.array([list("ABCD"), list("BBBB")]), np.array(["A", "A"])
    assert rerank.pass_at(letters, gold, 1) == pytest.approx(0.125)
    assert rerank.pass_at(letters, gold, 2) == pytest.approx(0.25)
    assert rerank.pass_at(letters, gold, 4) == pytest.approx(0.5)
    assert rerank.chance_at(8) == pytest.approx(0.8999, abs=1e-4)


def test_curves_and_pass_are_means_of_tasks_like_every_accuracy():
    """Ten questions of one task, all right, and two of another, all wrong: a half, however many questions a task has."""
    votes = rerank.Votes({})
    votes.letters, votes.rewards = np.array([list("AAA")] * 12), None
    votes.gold, votes.subset = np.array(["A"] * 10 + ["B"] * 2), np.array(["many"] * 10 + ["few"] * 2)
    votes.concept, votes.seed = np.arange(12), np.zeros(12, dtype=int)
    assert votes.curves().accuracy.tolist() == pytest.approx([0.5] * 3)
    assert votes.passes()["pass@N"].tolist() == pytest.approx([0.5] * 3)
    assert rerank.pass_at(votes.letters, votes.gold, 1) == pytest.approx(10 / 12)


@given(st.lists(st.lists(st.sampled_from(["A", "B", "C", ""]), min_size=5, max_size=5), min_size=1, max_size=6))
def test_majority_is_a_most_frequent_letter_first_sampled(rows):
    for row, got in zip(rows, rerank.majority(np.array(rows)), strict=True):
        votes = [x for x in row if x]
        want = max(dict.fromkeys(votes), key=votes.count) if votes else ""  # max keeps the first of equals
        assert got == want


def test_the_curve_ends_at_the_whole_set_and_begins_at_the_mean_sample():
    rng = np.random.default_rng(0)
    letters, gold = rng.choice(list("ABCD"), (200, 6)), rng.choice(list("ABCD"), 200)
    made = rerank.curves(letters, rng.random((200, 6)), gold, [1, 3, 6], draws=200)
    at = made.set_index(["selection", "n"])
    assert at.loc[("self_consistency", 6), "accuracy"] == (rerank.majority(letters) == gold).mean()
    assert at.loc[("self_consistency", 1), "accuracy"] == pytest.approx((letters == gold[:, None]).mean(), abs=0.02)
    assert ((made.low <= made.accuracy) & (made.accuracy <= made.high)).all()
    with pytest.raises(ConfigError, match="N = 7"):
        rerank.curves(letters, None, gold, [7])


def test_recorded_votes_of_a_real_model(data):
    """20 samples of Qwen2.5-14B on 1,030 MedQA questions: our vote gives the recorded self-consistency accuracy."""
    rows = pd.read_parquet(data / "medqa_votes" / "self_consistency_20_qwen25_14b.parquet")
    votes = rows.all_predictions.map(lambda v: json.loads(v) if isinstance(v, str) else list(v))
    width = max(map(len, votes))
    letters = np.array(
        [[v if isinstance(v, str) and v in "ABCDE" else "" for v in row] + [""] * (width - len(row)) for row in votes]
    )
    ours = rerank.majority(letters)
    clear = np.array(
        [
            sorted([row.count(x) for x in set(row) if x])[-1:] != sorted([row.count(x) for x in set(row) if x])[-2:-1]
            for row in letters.tolist()
        ]
    )
    assert (ours[clear] == rows.predicted.to_numpy()[clear]).all(), "only ties may fall differently"
    assert (ours == rows.correct.to_numpy()).mean() == pytest.approx(rows.is_correct.mean(), abs=1e-9)
    curve = rerank.curves(letters, None, rows.correct.to_numpy(), [1, 5, width], draws=20)
    assert curve.accuracy.iloc[-1] == pytest.approx(rows.is_correct.mean(), abs=1e-9)
