"""Duplicates and contamination on texts whose answer is known."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.core.errors import ConfigError
from ultramed.data.dedupe import (
    duplicates,
    embedding_hits,
    exact_hits,
    jaccard,
    minhash_hits,
    near_duplicates,
    ngram_hits,
    normalise,
    shingles,
)
from ultramed.data.tfidf import Tfidf

QUESTION = "A 45-year-old man comes to the clinic with chest pain that began two hours ago while he was shovelling snow"
OTHER = "Which of the following enzymes is deficient in a newborn who has vomiting and a musty smell of the urine"


def test_normalisation_is_blind_to_case_punctuation_width_and_space():
    assert normalise("  Ｃhest-PAIN,\n(acute)! ") == "chest pain acute"
    assert exact_hits(["x", QUESTION.upper() + "?"], [OTHER, QUESTION])[0].__dict__ == {
        "train": 1,
        "test": 1,
        "how": "exact",
        "score": 1.0,
    }
    assert duplicates(["a b", "c", "A, b!", "c"]) == [0, 1, 0, 1]


def test_ngrams_find_a_question_inside_a_longer_row_and_score_its_share():
    wrapped = f"Answer this exam question. {QUESTION} Explain."
    half = " ".join(QUESTION.split()[:12])
    (whole,) = ngram_hits([wrapped], [OTHER, QUESTION], n=8)
    assert (whole.train, whole.test, whole.score) == (0, 1, 1.0)
    (part,) = ngram_hits([f"So: {half}."], [OTHER, QUESTION], n=8)
    words = len(normalise(QUESTION).split())
    assert part.score == pytest.approx((len(normalise(half).split()) - 7) / (words - 7))
    assert ngram_hits([f"So: {half}."], [OTHER, QUESTION], n=8, share=0.9) == []
    assert ngram_hits([OTHER], [QUESTION], n=8) == []


def test_short_test_rows_are_looked_for_whole():
    train = ["what is the heart made of", "what is a heart made of"]
    found = ngram_hits(train, ["What is the heart?", "the heart made", "made the heart"], n=10)
    assert sorted((h.train, h.test) for h in found) == [(0, 0), (0, 1)]


def test_minhash_agrees_with_the_exact_similarity():
    rng = random.Random(0)
    base = [" ".join(rng.choices("abcdefghijklmnop", k=60)) for _ in range(40)]
    changed = []
    for text in base:
        words = text.split()
        for _ in range(rng.randrange(0, 16)):
            words[rng.randrange(60)] = "zz"
        changed.append(" ".join(words))
    want = {(i, j) for i, a in enumerate(changed) for j, b in enumerate(base) if jaccard(shingles(a), shingles(b)) >= 0.5}
    found = minhash_hits(changed, base, 0.5)
    assert {(h.train, h.test) for h in found} == want
    assert len(want) > 10
    assert all(h.score == jaccard(shingles(changed[h.train]), shingles(base[h.test])) for h in found)


def test_near_duplicates_point_to_the_first_of_their_kind():
    twin = QUESTION.replace("man", "woman")
    assert near_duplicates([QUESTION, OTHER, twin, OTHER + " today", QUESTION], 0.6) == [0, 1, 0, 1, 0]
    assert near_duplicates([QUESTION, twin], 0.99) == [0, 1]


def test_embeddings_find_edits_and_ultramedicals_rule_needs_like_lengths():
    train = [QUESTION.replace("45", "46"), OTHER, f"{QUESTION} " * 2]
    encode = Tfidf([QUESTION, OTHER])
    assert {(h.train, h.test) for h in embedding_hits(train, [QUESTION], encode, cosine=0.9)} == {(0, 0), (2, 0)}
    ruled = embedding_hits(train, [QUESTION], encode, rules=["ultramedical"])
    assert [(h.train, h.test) for h in ruled] == [(0, 0)]
    assert ruled[0].score >= 0.975
    with pytest.raises(ConfigError, match="cosine"):
        embedding_hits(train, [QUESTION], encode, rules=["l1"])


def test_ultramedicals_rule_is_a_squared_distance():
    """|a - b|^2 = 0.05 is a cosine of 0.975."""
    angle = np.arccos(0.976), np.arccos(0.974)
    vectors = {"t": [1, 0], "in": [np.cos(angle[0]), np.sin(angle[0])], "out": [np.cos(angle[1]), np.sin(angle[1])]}
    found = embedding_hits(["in", "out"], ["t"], lambda rows: np.array([vectors[r] for r in rows]), rules=["ultramedical"])
    assert found == [], "the texts' lengths differ"
    vectors |= {"inn": vectors["in"], "outt": vectors["out"], "tes": vectors["t"]}
    found = embedding_hits(["inn", "out"], ["tes"], lambda rows: np.array([vectors[r] for r in rows]), rules=["ultramedical"])
    assert [h.train for h in found] == [0]


@given(st.lists(st.text(alphabet="ab c", max_size=12), max_size=12))
def test_duplicates_are_the_first_equal_text(texts):
    for i, first in enumerate(duplicates(texts)):
        assert first <= i
        assert normalise(texts[first]) == normalise(texts[i])
        assert all(normalise(texts[k]) != normalise(texts[i]) for k in range(first))
