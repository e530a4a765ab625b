"""UltraMedical's Table 1: a collection in its columns, and the released collection counted by source."""

import pandas as pd

from ultramed.core.store import Artifact
from ultramed.data.catalog import SOURCES
from ultramed.data.collection import scores_of, text_of
from ultramed.data.mixture import source_rows
from ultramed.data.rows import read_instructions

CATEGORY = {
    "exam": "Examination",
    "medqa": "Examination",
    "medqa_5opt": "Examination",
    "medmcqa": "Examination",
    "pubmedqa": "Literature",
}
ROWS = {  # data set -> row of the table
    "medqa": "Examination / MedQA / False",
    "medmcqa": "Examination / MedMCQA / False",
    "pubmedqa": "Literature / PubMedQA / False",
    "chatdoctor": "Open-ended / ChatDoctor / False",
    "medquad": "Open-ended / MedQuad / False",
}
RELEASED_ROWS = {  # what the ids of the released rows begin with -> row of the table
    "MedQA": "Examination / MedQA / False",
    "MedMCQA": "Examination / MedMCQA / False",
    "MedQA-Evol": "Examination / MedQA-Evol / True",
    "TextBookQA": "Examination / TextBookQA / True",
    "PubMedQA": "Literature / PubMedQA / False",
    "ChatDoctor": "Open-ended / ChatDoctor / False",
    "MedQuad": "Open-ended / MedQuad / False",
    "MedInstruct-52k": "Open-ended / MedInstruct-52K / True",
    "Medical-Instruct-120k": "Open-ended / MedIns-120K / True",
    "WikiInstruct": "Open-ended / WikiInstruct / True",
    "all": "All / Instructions",
}


def statistics(collection: Artifact, sources: dict[str, str], data: dict[str, Artifact]) -> pd.DataFrame:
    """Table 1 of a collection: category, dataset, original, avg_len (words of what is asked), avg_score, retained."""
    out, given = [], scores_of(data)
    for name, counts in collection.metrics["sources"].items():
        rows = source_rows(sources[name], "train", data)
        scores = [s for r in rows if (s := given.get((name, r["id"]), (r.get("meta") or {}).get("score"))) is not None]
        out.append(
            {
                "category": CATEGORY.get(name, "Open-ended"),
                "dataset": name,
                "original": counts["original"],
                "avg_len": sum(len(text_of(r).split()) for r in rows) / len(rows),
                "avg_score": sum(scores) / len(scores) if scores else None,
                "retained": counts.get("retained", 0),
            }
        )
    return pd.DataFrame(out)


def released(collection: Artifact) -> pd.DataFrame:
    """The collection that the authors released (data set `ultramedical`), a row a source that its ids name, and one of all:
    dataset, retained, avg_len, avg_score."""
    rows = [
        {"dataset": row["meta"]["task"], "avg_len": len(text_of(row).split()), "avg_score": row["meta"].get("score")}
        for row in read_instructions(collection / "train.parquet")
    ]
    frame = pd.DataFrame(rows).astype({"avg_score": float})
    both = pd.concat([frame, frame.assign(dataset="all")])
    counted = both.groupby("dataset", sort=False).agg(
        retained=("avg_len", "size"), avg_len=("avg_len", "mean"), avg_score=("avg_score", "mean")
    )
    return counted.reset_index()


def is_whole(counted: pd.DataFrame | None) -> bool:
    """Whether `released` has counted all 409,593 rows, so that its numbers can be held against the paper's."""
    *_, whole = SOURCES["ultramedical"].hub["train"]
    return counted is not None and int(counted.set_index("dataset").retained["all"]) == whole


def cells(ours: pd.DataFrame, counted: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, str]]:
    """(dataset, subset, value; dataset -> row of the table): what stands beside the published cells. That is the released
    collection if it is at hand as a whole, and else a collection of one's own, out of what is public.

    Scores of the released rows are held against the table's only for all rows together: weighted by the rows that were kept,
    the table's scores of the sources come to 7.0 where it prints 8.2 for all, so they are of rows before the filter.
    """
    if not is_whole(counted):
        return ours.melt("dataset", ["original", "avg_len", "avg_score", "retained"], var_name="subset"), ROWS
    counted = counted.assign(retained_exact=counted.retained)
    every = counted.dataset == "all"
    parts = counted[~every].melt("dataset", ["avg_len", "retained_exact"], var_name="subset")
    total = counted[every].melt("dataset", ["avg_len", "avg_score", "retained"], var_name="subset")
    return pd.concat([parts, total], ignore_index=True), RELEASED_ROWS
