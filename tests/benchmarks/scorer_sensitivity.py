"""How much of a difference between two papers is the parser? The recorded replies of two models, scored under six rules.

    ULTRAMED_DATA=... python tests/benchmarks/scorer_sensitivity.py

MIRAGE's raw replies of GPT-3.5 and GPT-4 to MedQA and PubMedQA (no model is asked): a row a scorer, a column a model and way of
asking; and for every two of them, how far their difference moves from one scorer to another.
"""

from itertools import combinations

import pandas as pd

from ultramed.data.formats import read_table
from ultramed.data.sources import data_root
from ultramed.evaluate.scorers import sensitivity

YESNO = {"A": "yes", "B": "no", "C": "maybe"}
replies: dict[str, list] = {}
for name in ("medqa", "pubmedqa"):
    for row in read_table(data_root() / "mirage_answers" / f"{name}.jsonl.gz"):
        for answer in row["answers"]:
            asked = f"{name} {answer['model']} {answer['setting']}"
            replies.setdefault(asked, []).append((answer["raw"], row["options"] or YESNO, row["answer"]))

tables = {asked: sensitivity(given).set_index("scorer") for asked, given in replies.items()}
shown = pd.DataFrame({f"{asked} (n = {table.n.iloc[0]})": (100 * table.accuracy).round(1) for asked, table in tables.items()})
print(shown.T.to_markdown())
for name in ("medqa", "pubmedqa"):
    for a, b in combinations([asked for asked in tables if asked.startswith(f"{name} ")], 2):
        gaps = 100 * (tables[a].accuracy - tables[b].accuracy)[tables[a].accuracy > 0]  # some rules read no such reply
        print(f"{a} less {b}: {gaps.min():+.1f} ({gaps.idxmin()}) to {gaps.max():+.1f} ({gaps.idxmax()})")
