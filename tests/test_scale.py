"""What works on many rows at once gives what the plain way gives, row by row."""

import gc
import json
import random
import re
import unicodedata
import weakref
from collections import defaultdict

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from handmade import lines
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from xxhash import xxh32_intdigest

from ultramed.annotate.pairs import PairConfig, ordered_pairs, pairs
from ultramed.core.memory import settle
from ultramed.core.store import digest
from ultramed.data import rows as canonical
from ultramed.data.dedupe import (
    duplicates,
    embedding_hits,
    jaccard,
    minhash_hits,
    near_duplicates,
    ngram_hits,
    normalise,
    perturb,
    shingles,
)
from ultramed.data.hashing import BLOCK, Bands, Index, words
from ultramed.data.tfidf import Tfidf

WORDS = [
    "heart",
    "lung",
    "of",
    "the",
    "a",
    "and",
    "pain",
    "fever",
    "blood",
    "which",
    "what",
    "with",
    "in",
    "Straße",
    "café",
    "Ⅳ",
    "12",
    "x_y",
    "Ångström",
]


@pytest.fixture(scope="module")
def texts():
    """(train, test): short and long, empty, with planted copies that differ in none, few and many words; over a block."""
    rng = random.Random(0)
    known = WORDS + [f"{word}{n}" for word in WORDS for n in range(60)]

    def made(least, most, choice=known):
        return " ".join(rng.choices(choice, k=rng.randint(least, most)))

    test = [made(8, 40) for _ in range(150)] + [made(1, 4, WORDS) for _ in range(20)] + ["", "?!", "heart", "the heart"]
    train = [made(5, 60) for _ in range(BLOCK + 200)] + ["", "...", "The heart!"]
    for k in range(0, len(train) - 3, 6):
        train[k] = f"Solve: {perturb(rng.choice(test) or 'heart', rng.choice([0, 0.02, 0.05, 0.2]), rng)}"
        train[k + 1] = perturb(train[rng.randrange(k + 1)], rng.choice([0, 0.02, 0.05, 0.2]), rng)
    return train, test


def told(hits):
    return [(h.train, h.test, h.score) for h in hits]


@given(st.text(max_size=30))
def test_words_are_those_of_the_pattern(text):
    assert words(text) == re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def test_every_ascii_character_is_a_letter_or_a_gap_as_in_the_pattern():
    for c in map(chr, range(128)):
        assert words(f"a{c}B") == re.findall(r"\w+", f"a{c}B".casefold())


def test_an_index_gives_all_rows_of_a_key_in_their_order():
    keys = np.array([7 << 50, 3 << 50, 7 << 50, 5], dtype=np.uint64)
    places, rows = Index(keys, np.array([4, 1, 2, 9])).pairs(np.array([5, 1 << 60, 7 << 50, 6], dtype=np.uint64))
    assert list(zip(places.tolist(), rows.tolist(), strict=True)) == [(0, 9), (2, 4), (2, 2)]


@pytest.mark.parametrize(("n", "share"), [(10, 0.0), (4, 0.3), (1, 0.5)])
def test_ngrams_are_those_of_comparing_the_runs_themselves(texts, n, share):
    train, test = texts
    index, count = defaultdict(list), []
    for j, text in enumerate(test):
        own = words(text)
        size = min(n, len(own))
        runs = {tuple(own[k : k + size]) for k in range(len(own) - size + 1)} if size else set()
        count.append(len(runs))
        for run in runs:
            index[run].append(j)
    want = []
    for i, text in enumerate(train):
        own, found = words(text), defaultdict(set)
        for size in sorted({min(n, len(words(t))) for t in test} - {0}):
            for k in range(len(own) - size + 1):
                for j in index.get(tuple(own[k : k + size]), ()):
                    found[j].add(tuple(own[k : k + size]))
        want += [(i, j, len(f) / count[j]) for j, f in found.items() if len(f) / count[j] >= share]
    assert told(ngram_hits(train, test, n, share)) == want
    assert len(want) > 100


def lsh(threshold):
    """datasketch's own index, with the bands that `Bands` chooses, and the signature of a text."""
    bands = Bands(threshold)

    def signature(text):
        made = MinHash(128, hashfunc=xxh32_intdigest)
        made.update_batch([part.encode() for part in shingles(text)])
        return made

    return MinHashLSH(num_perm=128, params=(bands.count, bands.width)), signature


def test_minima_are_datasketchs(texts):
    rows = texts[0][:50] + texts[0][-3:]
    signature = lsh(0.5)[1]
    assert np.array_equal(Bands(0.5).minima([words(row) for row in rows]), [signature(row).hashvalues for row in rows])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_pairs_are_those_of_datasketchs_index(texts, threshold):
    train, test = texts
    index, signature = lsh(threshold)
    for j, text in enumerate(test):
        index.insert(j, signature(text))
    want = []
    for i, text in enumerate(train):
        scores = [(i, j, jaccard(shingles(text), shingles(test[j]))) for j in sorted(index.query(signature(text)))]
        want += [hit for hit in scores if hit[2] >= threshold]
    assert told(minhash_hits(train, test, threshold)) == want
    assert len(want) > 20


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
def test_near_duplicates_are_those_of_one_row_after_the_other(texts, threshold):
    train, _ = texts
    index, signature = lsh(threshold)
    want = []
    for i, text in enumerate(train):
        made = signature(text)
        near = [j for j in sorted(index.query(made)) if jaccard(shingles(text), shingles(train[j])) >= threshold]
        if not near:
            index.insert(i, made)
        want.append(near[0] if near else i)
    assert near_duplicates(train, threshold) == want
    assert sum(i != first for i, first in enumerate(want)) > 50
    normal = [normalise(text) for text in train]
    assert duplicates(train) == [normal.index(text) for text in normal]


def test_vectors_are_scikit_learns(texts):
    train, test = texts
    plain = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), max_features=200_000, sublinear_tf=True, dtype=np.float32
    ).fit(map(normalise, test))
    ours, theirs = Tfidf(test)(train), plain.transform(map(normalise, train))
    for part in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))


@pytest.mark.parametrize("cosine", [0.3, 0.6, 0.9])
def test_the_sieve_loses_no_pair_and_changes_no_score(texts, cosine):
    train, test = texts
    encode = Tfidf(test)
    rules = ["cosine", "ultramedical"]
    every = embedding_hits(train, test, lambda rows: encode(rows), cosine, rules)  # a plain function has no sieve
    assert embedding_hits(train, test, encode, cosine, rules) == every
    assert {h.how for h in every} == set(rules)


def test_nothing_and_texts_without_a_word_have_no_hits():
    for train, test in (([], ["a heart"]), (["a heart"], []), (["", "?"], ["a heart"])):
        assert ngram_hits(train, test) == minhash_hits(train, test) == []
    assert embedding_hits(["", "?"], ["a heart"], Tfidf(["a heart"])) == []
    assert near_duplicates([]) == duplicates([]) == []


@pytest.mark.parametrize("rule", ["all", "best_random"])
def test_pairs_by_column_are_the_rows_one_by_one(tmp_path, places, rule):
    rng = random.Random(0)

    def candidate(n):
        score = rng.choice([None, 1.0, 2.5, 7.0])
        return {"model": f"m{n}", "text": rng.choice("abcde"), "letter": rng.choice(["A", None]), "score": score}

    feedback = [
        {
            "id": f"q{n}",
            "subset": "s",
            "gold": "A",
            "prompt": [{"role": "user", "content": f"question {n}"}],
            "candidates": [candidate(k) for k in range(6)],
        }
        for n in range(60)
    ]
    config = PairConfig(take={"one": 40, "two": 0}, rule=rule, max_per_prompt=9)
    source = lines(rows=feedback, name="feedback.jsonl")
    made = pairs(config, one=source, two=source)
    want = []
    for name, count in config.take.items():
        for row in random.Random(f"0:{name}").sample(feedback, count or 60):
            for n, (a, b) in enumerate(ordered_pairs(row, config, random.Random(f"0:{row['id']}"))):
                both = {"chosen": a, "rejected": b}
                meta = {"prompt_id": row["id"], **{f"{side}_score": c["score"] for side, c in both.items()}}
                meta |= {f"{side}_model": c["model"] for side, c in both.items()}
                meta |= {f"{side}_letter": c["letter"] or "" for side, c in both.items()}
                told = {"id": f"{name}:{row['id']}#{n}", "source": name, "subset": "s", "prompt": row["prompt"]}
                told |= {side: [{"role": "assistant", "content": c["text"]}] for side, c in both.items()}
                want.append({**told, "meta": {**meta, "gold": "A"}})
    random.Random("order:0").shuffle(want)
    canonical.write_rows(tmp_path / "want.parquet", want)
    assert (made / "pairs.parquet").read_bytes() == (tmp_path / "want.parquet").read_bytes()
    assert made.metrics["row_ids"] == digest([row["id"] for row in want])
    assert json.loads((made / "manifest.json").read_text())["metrics"]["pairs"] == len(want)


def test_what_has_settled_is_not_looked_at_again_and_new_garbage_is_still_found():
    class Ring:
        def __init__(self):
            self.me = self

    settle()
    settled, gone = gc.get_freeze_count(), []
    assert settled > 10_000
    weakref.finalize(Ring(), gone.append, True)
    gc.collect()
    assert gone == [True]
    assert gc.get_freeze_count() == settled
