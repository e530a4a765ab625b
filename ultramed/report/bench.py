"""What a bench leaves behind: a leaderboard that grows, results in the shapes of lm-evaluation-harness and RewardBench, a
page."""

import json
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from ultramed.core.store import environment, file_name, write_json, write_text
from ultramed.evaluate.arms import Answers, percent

LEADERBOARD = "leaderboard.csv"
KEY = ["model", "artifact", "suite", "protocol", "limit", "task"]  # a row with these takes the place of an older one


def merge(path: Path, rows: pd.DataFrame, key: list[str] = KEY) -> pd.DataFrame:
    """Add rows (columns `key` and the numbers) to a file; rows of other models and settings stay."""
    new = rows.assign(when=f"{datetime.now(UTC):%Y-%m-%d}").astype({k: str for k in key})
    old = pd.read_csv(path, dtype={k: str for k in key}, keep_default_na=False, na_values=[""]) if path.exists() else new[:0]
    kept = old.merge(new[key], on=key, how="left", indicator=True).query("_merge == 'left_only'").drop(columns="_merge")
    merged = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    merged = merged.sort_values(key, kind="stable").round(6)
    write_text(path, merged.to_csv(index=False))
    return merged


def harness_results(table: pd.DataFrame, answered: Answers, name: str, config: dict) -> tuple[dict, dict[str, list[dict]]]:
    """(results.json, samples by task) of one model in lm-evaluation-harness 0.4's shape."""
    tasks = table[(table.model == name) & (table.task != "mean of tasks")]
    results = {r.task: {"alias": r.task, "acc,none": r.accuracy, "acc_stderr,none": r.se} for r in tasks.itertuples()}
    counts = {r.task: {"original": r.n, "effective": r.n} for r in tasks.itertuples()}
    made = {"results": results, "n-samples": counts, "config": {"model": name, **config}, "versions": environment()["versions"]}
    samples = {
        task: [
            {"doc_id": row.id, "target": row.gold, "filtered_resps": [row.letter], "acc": float(row.correct)}
            | ({"resps": [[row.reply]]} if isinstance(getattr(row, "reply", None), str) else {})
            for row in part.itertuples()
        ]
        for task, part in answered.frame.groupby("task", sort=False)
    }
    return made, samples


def write_harness(out: Path, name: str, made: dict, samples: dict[str, list[dict]]) -> None:
    folder = out / file_name(name)
    write_json(folder / "results.json", made)
    for task, rows in samples.items():
        write_text(folder / f"samples_{task}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`by_task` as a reader wants it: a row a model, '48.7 [45.4, 51.9]' a task, the mean of tasks last."""
    cells = table.assign(score=percent(table))
    made = cells.pivot_table(index="model", columns="task", values="score", aggfunc="first", sort=False)
    overall = table[table.task == "mean of tasks"].set_index("model")
    return made.join(overall[["n", "unparsed"]]).reset_index()


TITLES = {"medical": "Medical bench", "reward": "Reward bench", "general": "General abilities"}


def page(out: Path, suite: str, tables: dict[str, pd.DataFrame], figures: list[str], notes: list[str]) -> Path:
    """`<suite>.html` with every table and figure of a suite, and `index.html` with those of all suites that ran into `out`."""
    template = jinja2.Environment(autoescape=True).from_string(files("ultramed.report").joinpath("bench.html").read_text())
    shown_tables = [
        (caption, list(f.columns), f.astype(object).where(f.notna(), "").values.tolist()) for caption, f in tables.items()
    ]
    part = template.module.suite(TITLES[suite], shown_tables, figures, notes)
    write_text(out / f"{suite}.html", template.render(parts=[part]))
    others = [(out / f"{name}.html").read_text() for name in TITLES if (out / f"{name}.html").exists()]
    parts = [text.partition("<main>")[2].rpartition("</main>")[0] for text in others]
    write_text(out / "index.html", template.render(parts=map(Markup, parts)))
    return out / "index.html"
