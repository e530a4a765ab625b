"""What the papers printed: every published cell, with its source."""

from functools import cache
from importlib.resources import files
from io import StringIO

import pandas as pd

# table -> (citation, columns that name a row, notebook that holds ours against it)
TABLES = {
    "medalpaca_meadow": ("MedAlpaca (arXiv 2304.08247), data overview in its repository", ["name"], "10_medalpaca_meadow"),
    "medalpaca_usmle": ("MedAlpaca (arXiv 2304.08247), main table", ["model", "size", "method"], "11_medalpaca_usmle"),
    "medalpaca_cost": (
        "MedAlpaca repository, README",
        ["model", "train_8bit", "lora", "fp16", "bf16", "gradient_checkpointing"],
        "12_medalpaca_cost",
    ),
    "ultramedical_table1": (
        "UltraMedical (arXiv 2406.03949), Table 1",
        ["category", "dataset", "synthetic"],
        "20_ultramedical_collection",
    ),
    "ultramedical_table2": ("UltraMedical (arXiv 2406.03949), Table 2", ["segment", "model"], "22_ultramedical_main"),
    "ultramedical_general": (
        "UltraMedical (arXiv 2406.03949), general-domain table",
        ["model", "benchmark", "metric"],
        "23_ultramedical_mixture",
    ),
    "ultramedical_table4": ("UltraMedical (arXiv 2406.03949), Table 4", ["reward_model"], "24_ultramedical_reward"),
    "ultramedical_rerank": ("UltraMedical (arXiv 2406.03949), re-ranking", ["policy", "selection"], "25_ultramedical_rerank"),
    "ultramedical_medqa_timeline": (
        "UltraMedical repository, MedQA figure (dates read off the axis)",
        ["model", "released", "access"],
        "22_ultramedical_main",
    ),
    "ultramedical_third_party": (
        "other papers' measurements, as listed by a leaderboard",
        ["task", "dataset", "metric"],
        "30_external_benchmarks",
    ),
}


@cache
def _text(name: str) -> str:
    return files("ultramed.papers").joinpath("tables", f"{name}.csv").read_text()


def table(name: str) -> pd.DataFrame:
    """One published table as printed. Raises KeyError for an unknown name."""
    if name not in TABLES:
        raise KeyError(f"no published table {name!r}; there are {', '.join(TABLES)}")
    return pd.read_csv(StringIO(_text(name)))


def cells() -> list[dict]:
    """Every published number: id, source, statement, published value, and the notebook that it belongs to.

    A value that is text in the source ('OOM', '92 (test only)') is kept as text; an empty cell is no cell.
    """
    out = []
    for name, (source, keys, notebook) in TABLES.items():
        frame = table(name)
        for _, row in frame.iterrows():
            label = " / ".join(str(row[k]) for k in keys)
            for column in frame.columns.difference(keys, sort=False):
                if pd.notna(row[column]):
                    value = row[column].item() if hasattr(row[column], "item") else row[column]
                    cell = {"id": f"{name}:{label}:{column}", "kind": "cell", "source": source}
                    out.append({**cell, "statement": f"{label}: {column}", "published": value, "notebook": notebook})
    return out
