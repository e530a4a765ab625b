"""Which language a reply is in: what CURE-Med asks of a model, and a proxy of its measure that needs no judge."""

import re
from pathlib import Path

import numpy as np

from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.evaluate import stats

# CURE-Med's inference script orders the language in a system turn; the words are ours.
ORDER = (
    "You are a doctor who speaks {language} fluently. The question is in {language}. Answer it correctly and completely, in "
    "{language} only; do not use English or any other language."
)
ENGLISH = "English"
SHARE = 0.9  # of a reply's letters that must be in the language: single terms and names are the same in many
SHORTEST = 12  # letters of a sentence that can be told: 'A. Dopamin' could be in any language
_ENDS = re.compile(r"(?<=[.!?።।。！？\n])\s*")


@stage(version=1, also=lambda config: ORDER)
def in_language(out: Path, config=None, *, data: Artifact, side: str = "test") -> dict:
    """The rows of `data` whose `meta.language` says their language, with a system turn that orders the reply to be in it."""
    rows = canonical.read_instructions(data / f"{side}.parquet")
    made = [
        {**row, "prompt": [{"role": "system", "content": ORDER.format(**row["meta"])}, *row["prompt"][-1:]]} for row in rows
    ]
    canonical.write_rows(out / f"{side}.parquet", made)
    return {"rows": len(made)}


def letters(text: str) -> int:
    """Letters of any script."""
    return sum(map(str.isalpha, text))


def sentences(text: str) -> list[str]:
    """Sentences that are long enough to tell their language; the whole text if none is, nothing if it has no letter."""
    long = [part for part in _ENDS.split(text) if letters(part) >= SHORTEST]
    return long or ([text] if letters(text) else [])


class LanguageProxy:
    """Language of sentences by their characters (n-grams of one to three), learned from labelled texts, English among them.

    It stands in for a judge that decides whether a reply is in its language throughout. It sees languages only: not whether a
    reply repeats itself, drifts or ends properly. `accuracy`: of sentences that were held out while learning.
    """

    def __init__(self, texts: list[str], languages: list[str], per_language: int = 500, seed: int = 0):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
        from sklearn.pipeline import make_pipeline

        pool: dict[str, list[str]] = {}
        for text, language in zip(texts, languages, strict=True):
            pool.setdefault(language, []).extend(sentences(text))
        if ENGLISH not in pool:
            raise ValueError(f"without English an English reply would pass as another language; got {', '.join(pool)}")
        told = [(text, language) for language, parts in pool.items() for text in canonical.spread(parts, per_language)]
        given, labels = map(list, zip(*told, strict=True))
        self.model = make_pipeline(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), max_features=20_000, sublinear_tf=True),
            LogisticRegression(C=30, max_iter=300),
        )
        fit, held, fit_y, held_y = train_test_split(given, labels, test_size=0.2, random_state=seed, stratify=labels)
        self.model.fit(fit, fit_y)
        self.accuracy = stats.wilson(self.model.predict(held) == np.array(held_y))

    def consistent(self, text: str, language: str) -> bool:
        """Whether nine letters in ten are in sentences that are told to be in the language. False for a text without
        letters."""
        parts = sentences(text)
        if not parts:
            return False
        sizes = np.array([letters(part) for part in parts])
        return bool(sizes[self.model.predict(parts) == language].sum() >= SHARE * sizes.sum())


def english_in(text: str) -> str:
    """The English sentences of a chain of thought that quotes another language: those of plain characters, without quotes."""
    parts = sentences(re.sub(r"</?\w+>", "\n", text))
    return "\n".join(part.strip() for part in parts if part.isascii() and not re.search(r"[\[\]=*\"()]", part))
