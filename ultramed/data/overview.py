"""Tables about data sets: how many rows, how long, how many answers are empty or asked twice (notebooks 10 and 20)."""

import pandas as pd

from ultramed.core.profile import Profile
from ultramed.core.store import Artifact
from ultramed.data.catalog import SOURCES
from ultramed.data.dedupe import duplicates
from ultramed.data.messages import answer_text, question_text
from ultramed.data.rows import read_instructions, read_questions, subset_sizes
from ultramed.data.sources import dataset, local_files
from ultramed.papers import published

FORUMS = ("academia", "biology", "fitness", "health", "bioinformatics")
# Part of Medical Meadow as its repository names it -> our name of the data set.
MEADOW = {
    "Medical Flashcards": "meadow_flashcards",
    "Wikidoc": "meadow_wikidoc",
    "Wikidoc Patient Information": "wikidoc_patient_information",
    **{f"Stackexchange {forum}": f"meadow_stackexchange_{forum}" for forum in FORUMS},
    **{f"USMLE Self Assessment Step {step}": f"usmle_self_assessment:step{step}" for step in (1, 2, 3)},
    "MEDIQA": "meadow_mediqa",
    "CORD-19": "meadow_cord19",
    "MMMLU": "meadow_mmmlu",
    "Pubmed Health Advice": "meadow_health_advice",
    "Pubmed Causal": "meadow_pubmed_causal",
    "ChatDoctor": "meadow_chatdoctor",
    "OpenAssistant": "meadow_openassistant",
    "MedQA": "meadow_medqa",
}
NOT_IN_ITS_TABLE = {"MedQA": 10178}  # DATA_DESCIPTION.md, "External Datasets"; the README's table leaves this part out
EXAM_FILES = ("train", "dev", "test", "general_train", "general_test")


def words(texts: pd.Series) -> pd.Series:
    """Words of each text."""
    return texts.str.split().str.len()


def exam_parts(exam: Artifact) -> pd.DataFrame:
    """The bundled exam as texts, a row a question or open instruction: part, side, prompt, answer."""
    rows = []
    for file in EXAM_FILES:
        for row in read_questions(exam / f"{file}.parquet"):
            texts = {"prompt": question_text(row), "answer": answer_text(row, "content_first")}
            rows.append({"part": row["subset"], "side": file.removeprefix("general_"), **texts})
    for row in read_instructions(exam / "open.parquet"):
        texts = {"prompt": row["prompt"][-1]["content"], "answer": row["completion"][0]["content"]}
        rows.append({"part": "open", "side": "train", **texts})
    return pd.DataFrame(rows)


def lengths(parts: pd.DataFrame) -> pd.DataFrame:
    """Rows and mean words of prompt and answer, by part and side."""
    counted = parts.assign(prompt_words=words(parts.prompt), answer_words=words(parts.answer))
    means = {"prompt_words": ("prompt_words", "mean"), "answer_words": ("answer_words", "mean")}
    return counted.groupby(["part", "side"], sort=False).agg(rows=("part", "size"), **means).round(1).reset_index()


def gold_letters(exam: Artifact) -> pd.DataFrame:
    """How often each letter is right, by subset of the test questions."""
    counts = pd.DataFrame(read_questions(exam / "test.parquet")).groupby(["subset", "gold"]).size().unstack()
    return counts.assign(n=counts.sum(axis=1)).reset_index()


def instruction_sets(profile: Profile) -> pd.DataFrame:
    """Instruction data at hand: set, rows, mean words, empty answers, rows asked before (but for case and punctuation)."""
    names = [name for name, spec in SOURCES.items() if spec.kind == "instructions" and "train" in local_files(name)]
    return pd.DataFrame([_instruction_set(name, dataset(profile, name)) for name in names])


def _instruction_set(name: str, data: Artifact) -> dict:
    rows = read_instructions(data / "train.parquet")
    asked = [row["prompt"][-1]["content"] for row in rows]
    answered = [row["completion"][0]["content"] for row in rows]
    return {
        "set": name,
        "rows": len(rows),
        "prompt words": round(words(pd.Series(asked)).mean(), 1),
        "answer words": round(words(pd.Series(answered)).mean(), 1),
        "empty answers": sum(not text.strip() for text in answered),
        "asked before": sum(first != i for i, first in enumerate(duplicates(asked))),
        "licence": SOURCES[name].licence,
    }


def meadow_parts(profile: Profile) -> pd.DataFrame:
    """Medical Meadow as published, with the rows that could be counted here: part, published n, used in training, in the
    profile's mixture, ours, where."""
    rows = [(row.name, row.n, row.n_in_training) for row in published.table("medalpaca_meadow").itertuples()]
    rows += [(part, n, str(n)) for part, n in NOT_IN_ITS_TABLE.items()]
    return pd.DataFrame([_meadow_part(profile, *row) for row in rows]).astype({"mixture": "Int64", "ours": "Int64"})


def _meadow_part(profile: Profile, part: str, n: int, used: str) -> dict:
    name, _, subset = MEADOW[part].partition(":")
    where, count = SOURCES[name].where().partition(": ")[2], None
    if local_files(name):
        made = dataset(profile, name)
        count, where = made.metrics["counts"].get("train", 0) + made.metrics["rejected"], "ULTRAMED_DATA"
        if subset:  # read without the questions that have images, which the published n counts
            count, where = None, f"ULTRAMED_DATA: {subset_sizes(made / 'test.parquet').get(subset, 0)} without images"
    mixture = profile.train.mixture.get(name)
    return {"part": part, "published n": n, "used in training": used, "mixture": mixture, "ours": count, "where": where}
