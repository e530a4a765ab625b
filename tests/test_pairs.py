"""Rankings become pairs as documented; ties give none; scores and orders hold for any input."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.annotate.feedback import oracle, ranks
from ultramed.annotate.pairs import PairConfig, ordered_pairs


def candidate(text, score, **more):
    return {"text": text, "score": score, "model": "m", "letter": "A", **more}


def row(*scores):
    return {"id": "q", "candidates": [candidate(f"reply {i}", s) for i, s in enumerate(scores)]}


def config(rule, **more):
    return PairConfig(take={"x": 0}, rule=rule, **more)


def found(r, c):
    return [(a["score"], b["score"]) for a, b in ordered_pairs(r, c, random.Random(0))]


def test_rules_by_hand():
    r = row(3, 9, 9, 5)
    assert found(r, config("best_worst")) == [(9, 3)]
    assert found(r, config("all")) == [(5, 3), (9, 5), (9, 5), (9, 3), (9, 3)], "the closest first"
    assert found(r, config("all", max_per_prompt=2)) == [(5, 3), (9, 5)]
    assert found(r, config("all", margin=4.5)) == [(9, 3), (9, 3)]
    assert found(r, config("all", margin=6)) == [(9, 3), (9, 3)], "a difference of the margin is enough"
    assert found(r, config("all", margin=6.01)) == []
    assert found(r, config("best_random"))[0] in {(9, 5), (9, 3)}
    seen = {ordered_pairs(r, config("best_random"), random.Random(i))[0][1]["score"] for i in range(50)}
    assert seen == {3, 5}, "the rejected one is any lower-ranked candidate"
    assert found(row(9, 3), config("best_worst")) == found(row(9, 3), config("best_random")) == [(9, 3)]
    worst = {ordered_pairs(r, config("best_worst"), random.Random(i))[0][1]["score"] for i in range(50)}
    assert worst == {3}, "the worst is drawn by no lot"


def test_ties_equal_texts_and_unscored_candidates_give_no_pair():
    assert found(row(4, 4, 4), config("all")) == []
    assert found(row(4), config("best_worst")) == []
    same = {"id": "q", "candidates": [candidate("one", 5), candidate("one", 2), candidate(" ", 1)]}
    assert ordered_pairs(same, config("all"), random.Random(0)) == []
    assert found(row(None, 7, 2), config("all")) == [(7, 2)]


@given(st.lists(st.one_of(st.none(), st.floats(0, 10)), max_size=8), st.floats(0, 3), st.integers(1, 28))
def test_every_pair_is_ordered_and_limits_hold(scores, margin, most):
    r = row(*scores)
    for rule in ("best_random", "best_worst", "all"):
        made = found(r, config(rule, margin=margin, max_per_prompt=most))
        assert all(a > b and a - b >= margin for a, b in made)
        assert len(made) <= (most if rule == "all" else 1)
        if rule != "all" and made:
            assert made[0][0] == max(s for s in scores if s is not None)


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=1, max_size=8))
def test_ranks_are_competition_ranks(scores):
    got = ranks(scores)
    known = sorted((s for s in scores if s is not None), reverse=True)
    assert got == [None if s is None else known.index(s) + 1 for s in scores]


def test_the_oracle_by_hand():
    def reply(letter, strict, finished, tokens, text="bb"):
        return {"letter": letter, "strict": strict, "finished": finished, "tokens": tokens, "text": text}

    given = [reply("B", True, True, 12), reply("A", True, True, 24), reply(None, False, False, 28), reply("B", False, True, 6)]
    given[0]["text"] = "aabb"  # as the reference; "bb" has two of its four characters: 2 * 2 / 6
    asked = [{"role": "user", "content": "Which?\nA. bb\nB. aabb"}]
    rated = [oracle({"gold": "B", "reference": "aabb", "prompt": asked}, c) for c in given]
    # The last one's letter is right, its text is another option's: half the points for being right.
    assert rated == pytest.approx([10.0, 3.25 + 1 / 3, 0.5 * 12 / 28 + 1 / 3, 4.5 + 1 / 3], abs=1e-3)
