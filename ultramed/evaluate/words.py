"""What words alone give away: a yardstick for trained models that knows no language, no medicine and no pretraining.

The idea is that of hypothesis-only baselines (Gururangan et al. 2018, "Annotation Artifacts in Natural Language Inference
Data"): whatever a count of words gets right, a fine-tuned model may have got right in the same way.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ultramed.core.errors import ConfigError
from ultramed.core.ledger import write_lines
from ultramed.core.schema import WordsConfig
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.sources import names_in
from ultramed.evaluate.accuracy import record, select_rows, summary


@stage(version=1)
def word_answers(
    out: Path, config: WordsConfig, *, rows: Artifact, questions: Artifact, side: str = "test", select: dict | None = None
) -> dict:
    """Answer the questions of a side by a logistic regression on words, and write `answers.jsonl` as `answers` does.

    It learns from the training questions whose ids are among `rows` (a mixture), which is what a fine-tuned model learns
    from, whether an option is the right one. A question's choice is its likeliest option, the first of equals. Raises
    ConfigError if no row is one of the data set's training questions.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    ids = {row["id"].split("~")[0] for row in canonical.read_rows(rows / "rows.parquet")}
    known = [row for row in canonical.read_questions(questions / "train.parquet") if row["id"] in ids]
    if not known:
        raise ConfigError(
            f"none of the {len(ids)} rows of {rows.key} is a training question of {questions.key}: no words to count"
        )
    counts = DictVectorizer()
    learned = LogisticRegression(C=config.strength, max_iter=2000)
    learned.fit(
        counts.fit_transform([found for row in known for found in words(row, config)]),
        [letter == row["gold"] for row in known for letter in row["options"]],
    )
    result = []
    for row in select_rows(canonical.read_questions(questions / f"{side}.parquet"), select):
        worth = learned.decision_function(counts.transform(words(row, config)))
        result.append(record(row, list(row["options"])[worth.argmax()], "words", True))
    write_lines(out / "answers.jsonl", result)
    return {**summary(result), "rows": len(known), "words": len(counts.feature_names_)}


def can_count(asked: Iterable[str], trained: Iterable[str]) -> bool:
    """Whether the yardstick can be had: whether what is asked is of the data sets that are trained on (sources of either)."""
    return set(names_in(asked)) <= set(names_in(trained))


def words(row: dict, config: WordsConfig) -> list[dict[str, int]]:
    """What stands in each option of a question, a dictionary an option: its beginnings of words, and each of them together with
    each of the question's. Beginnings, because `prefix` letters of a word are often its stem."""
    asked, out = _beginnings(row["question"], config.prefix), []
    for text in row["options"].values():
        option = {text, *_beginnings(text, config.prefix)}
        pairs = {f"{word} {other}" for word in asked for other in option} if config.sees == "question" else set()
        out.append(dict.fromkeys(option | pairs, 1))
    return out


def _beginnings(text: str, letters: int) -> set[str]:
    return {word[:letters] for word in re.findall(r"[^\W\d_]{3,}", text.lower())}
