"""Character n-grams weighted by rarity: scikit-learn's vectors, made word by word, and a sieve in front of comparing them
all."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

import numpy as np
from scipy import sparse

from ultramed.data.hashing import words

SLACK = 1e-3  # by which a sum of single-precision products may be off


class Tfidf:
    """Texts -> sparse unit vectors (N, D) of their words' character n-grams (3 to 5), as `TfidfVectorizer` gives them.

    A word has the same n-grams wherever it stands, so that the counts of a text are those of its words, added up.
    """

    def __init__(self, texts: Iterable[str]):
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

        counter = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), max_features=200_000, dtype=np.float32)
        self.weights = TfidfTransformer(sublinear_tf=True).fit(counter.fit_transform(" ".join(words(text)) for text in texts))
        analyse, number = counter.build_analyzer(), counter.vocabulary_.get

        @lru_cache(1 << 20)
        def features(word: str) -> np.ndarray:
            return np.array([n for n in map(number, analyse(word)) if n is not None], dtype=np.int32)

        self.features = features

    def counts(self, rows: list[str]) -> sparse.csr_matrix:
        """(N, D) float32: how often each n-gram is in each text; the columns of a row are in no order."""
        found, numbers = [words(text) for text in rows], {}
        ids = [numbers.setdefault(word, len(numbers)) for word in chain.from_iterable(found)]
        ends = np.cumsum([0, *map(len, found)])
        held = sparse.csr_matrix((np.ones(len(ids), dtype=np.float32), ids, ends), shape=(len(rows), len(numbers)))
        own = [self.features(word) for word in numbers]
        ends = np.cumsum([0, *map(len, own)])
        flat = np.concatenate([np.empty(0, dtype=np.int32), *own])
        shape = (len(numbers), len(self.weights.idf_))
        return held @ sparse.csr_matrix((np.ones(len(flat), dtype=np.float32), flat, ends), shape=shape)

    def __call__(self, rows: list[str]) -> sparse.csr_matrix:
        counts = self.counts(rows)
        counts.sort_indices()
        return self.weights.transform(counts, copy=False)

    def sieve(self, targets: sparse.csr_matrix, least: float) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
        """texts -> (rows, columns): every pair of a text and a target whose cosine is at least `least`, and a few more.

        Bayardo et al. 2007 (Scaling up all pairs similarity search): the commonest n-grams of a target, as many as make up
        85% of `least` of its length, are left out; they cannot bring more than their length to a cosine. What is left are
        rare n-grams, which few texts and targets share. Where that leaves few pairs, each of them is looked at whole.
        """
        rest, kept = np.zeros(targets.shape[0], dtype=np.float32), targets.copy()
        for row in range(targets.shape[0]):
            here = slice(targets.indptr[row], targets.indptr[row + 1])
            commonest = np.argsort(self.weights.idf_[targets.indices[here]], kind="stable")
            length = np.sqrt(np.cumsum(targets.data[here][commonest] ** 2))
            out = commonest[length <= 0.85 * least]
            rest[row] = length[len(out) - 1] if len(out) else 0.0
            kept.data[here][out] = 0.0
        kept.eliminate_zeros()
        kept, idf = kept.T.tocsr(), self.weights.idf_.astype(np.float32)

        def near(rows: list[str]) -> tuple[np.ndarray, np.ndarray]:
            given = self.counts(rows)
            given.data = (np.log(given.data) + 1) * idf[given.indices]
            size = np.sqrt(given.multiply(given).sum(1).A1)
            close = (given @ kept).tocoo()
            enough = close.data >= (least - SLACK - rest[close.col]) * size[close.row]
            row, column = close.row[enough], close.col[enough]
            if len(row) <= 8 * len(rows):
                whole = (least - SLACK) * size[row] <= given[row].multiply(targets[column]).sum(1).A1
                row, column = row[whole], column[whole]
            return row, column

        return near
