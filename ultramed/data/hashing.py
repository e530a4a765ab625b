"""Texts as 64-bit numbers, many rows at a time: runs of words, minima of shingles, and which rows have which number.

Two different things share a number with a probability of 2^-64 or so, which no collection is large enough to meet.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import numpy as np
from xxhash import xxh32_intdigest

SHINGLE = 3  # words
PERMUTATIONS = 128
BLOCK = 1024  # rows whose numbers fit into a core's cache
WORD = re.compile(r"\w+")
# What `\w+` and case folding make of ASCII: letters in lower case, digits and underlines, and spaces for the rest.
PLAIN = {c: chr(c).lower() if chr(c).isalnum() or chr(c) == "_" else " " for c in range(128)}


def words(text: str) -> list[str]:
    """Runs of letters and digits in compatibility form and lower case."""
    if text.isascii():  # the same at a fifth of the time
        return text.translate(PLAIN).split()
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def blocks(texts: list[str], size: int = BLOCK) -> Iterator[tuple[int, list[str]]]:
    """(index of the first, so many texts), one after the other."""
    for start in range(0, len(texts), size):
        yield start, texts[start : start + size]


class Index:
    """Rows by key. Most keys that are looked for are in none, which a table of their first bits says soonest."""

    SHIFT = np.uint64(42)

    def __init__(self, keys: np.ndarray, rows: np.ndarray):
        """keys: (K,) uint64, whose first bits must be as random as the others; rows: (K,) the row that has each."""
        order = np.argsort(keys, kind="stable")
        self.keys, self.rows = keys[order], rows[order]
        self.there = np.zeros(1 << 22, dtype=bool)
        self.there[self.keys >> self.SHIFT] = True

    def pairs(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in `keys`, rows that have the key), ordered by place; a key's rows as they were given."""
        places = np.flatnonzero(self.there[keys >> self.SHIFT])
        first = np.searchsorted(self.keys, keys[places], "left")
        count = np.searchsorted(self.keys, keys[places], "right") - first
        begin = np.cumsum(count) - count
        nth = np.arange(count.sum()) - np.repeat(begin, count)
        return np.repeat(places, count), self.rows[np.repeat(first, count) + nth]


class Runs:
    """Runs of consecutive words as keys. Words that `known` has not make no run."""

    def __init__(self, known: Iterable[str]):
        self.numbers = {word: n for n, word in enumerate(dict.fromkeys(known), 1)}
        rng = np.random.default_rng(0)
        self.values = rng.integers(0, 2**64, len(self.numbers) + 1, dtype=np.uint64)
        self.base = 2 * int(rng.integers(0, 2**63)) + 1

    def keys(self, rows: list[list[str]], lengths: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each length (rising, from 1): the row of every run of so many words, in reading order, and its key.

        A run's key is the sum of its words' values, each times a power of an odd number.
        """
        # A word that is not known stands after every row, so that no run goes beyond it.
        ids = np.fromiter(map(self.numbers.get, chain.from_iterable([*row, ""] for row in rows), repeat(0)), dtype=np.int64)
        owner = np.repeat(np.arange(len(rows)), [len(row) + 1 for row in rows])
        place = np.arange(len(ids))
        unknown = np.where(ids == 0, place, len(ids))
        reach = np.minimum.accumulate(unknown[::-1])[::-1] - place  # known words from here on
        value, total, done = self.values[ids], np.zeros(len(ids), dtype=np.uint64), 0
        for length in lengths:
            for k in range(done, length):
                total[: len(ids) - k] += value[k:] * np.uint64(pow(self.base, k, 2**64))
            done = length
            whole = np.flatnonzero(reach >= length)
            yield owner[whole], total[whole]


def shingles_of(found: list[str]) -> Iterable[str]:
    """Runs of three words, as often as they are there; a shorter text is its own one shingle."""
    if len(found) <= SHINGLE:
        return [" ".join(found)]
    return map(" ".join, zip(found, found[1:], found[2:], strict=False))


class Bands:
    """Locality-sensitive keys of texts: two of Jaccard similarity s share one with probability 1 - (1 - s^width)^bands.

    A key stands for `width` of the 128 minima of the text's shingles (datasketch's MinHash, of many texts at once). The
    width is the largest that still finds 99% of the pairs at the threshold.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash

        width = max(w for w in range(1, 9) if w == 1 or 1 - (1 - threshold**w) ** (PERMUTATIONS // w) >= 0.99)
        self.count, self.width = PERMUTATIONS // width, width
        self.factors, self.summands = MinHash(PERMUTATIONS).permutations
        odd = np.random.default_rng(0).integers(0, 2**63, (self.count, width), dtype=np.uint64)
        self.odd = odd * np.uint64(2) + np.uint64(1)

    def minima(self, rows: list[list[str]]) -> np.ndarray:
        """(rows, 128) uint32: the least value of each permutation over the shingles of a row (its words)."""
        parts = [list(shingles_of(row)) for row in rows]
        mixed = np.fromiter(map(xxh32_intdigest, map(str.encode, chain.from_iterable(parts))), dtype=np.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's last step
            mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
        count = np.array([len(part) for part in parts])
        first, out = np.cumsum(count) - count, np.empty((PERMUTATIONS, len(rows)), dtype=np.uint32)
        for k, (a, b) in enumerate(zip(self.factors, self.summands, strict=True)):
            np.minimum.reduceat(mixed * a + b, first, out=out[k])
        return out.T

    def keys(self, rows: list[list[str]]) -> np.ndarray:
        """(rows, bands) uint64."""
        used = self.minima(rows)[:, : self.count * self.width].astype(np.uint64)
        # Every band has factors of its own, so that equal keys mean the same band.
        return (used.reshape(len(rows), self.count, self.width) * self.odd).sum(2, dtype=np.uint64)
