"""Contamination, filters and the published folder, on rows whose fate is known."""

import json

import pandas as pd
import pytest
from datasets import load_dataset
from handmade import given, lines

from ultramed.core.errors import ConfigError
from ultramed.core.schema import BuildConfig, CheckConfig
from ultramed.data import table1
from ultramed.data.collection import build, contamination, read_report, text_of
from ultramed.papers import published
from ultramed.report import beside

TEST = (
    "A 45-year-old man has crushing chest pain for two hours with ST elevation in the inferior leads. Which artery is blocked?"
)


def instruction(name, text, **meta):
    return {
        "id": name,
        "source": "x",
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": "answer"}],
        "meta": {"k": 1, **meta},
    }


def question(name, text):
    options = {"A": "right coronary artery", "B": "circumflex artery"}
    return {"id": name, "question": text, "options": options, "gold": "A", "source": "x", "meta": {"k": 1}}


@pytest.fixture(scope="module")
def parts(places):
    whole = text_of(question("t", TEST))
    train = given(
        rows=[
            instruction("copy", whole, score=9.0),
            instruction("inside", f"Please solve: {whole} Explain your steps.", score=9.0),
            instruction("edited", whole.replace("45", "46").replace("crushing", "severe"), score=9.0),
            instruction("easy", "What is a cell?", score=2.0),
            instruction(
                "fresh", "Explain how insulin lowers the glucose in the blood of a healthy adult after a meal", score=8.0
            ),
            instruction(
                "again", "explain how insulin lowers the glucose in the blood of a healthy adult, after a meal!", score=8.0
            ),
            instruction(
                "nearly", "Explain how insulin lowers the glucose in the blood of a healthy adult after every meal", score=8.0
            ),
        ]
    )
    test = given(
        rows=[question("t1", TEST), question("t2", "Which vitamin is missing in scurvy of sailors on long voyages?")],
        side="test",
    )
    return train, test


def test_scores_of_a_language_model_filter_and_the_highest_stay(places):
    texts = [f"Explain {thing} to a student in simple words" for thing in ("insulin", "warfarin", "asthma", "sepsis")]
    rows = given(rows=[instruction(f"r{i}", text) for i, text in enumerate(texts)])
    scored = lines(rows=[{"id": f"r{i}", "score": s} for i, s in enumerate([9, 4, 6, None])], name="scores.jsonl")
    parts = {"sources": {"mine": "mine"}, "mine": rows, "scores_mine": scored}
    made = build(BuildConfig(min_score=5), **parts)
    assert made.metrics["sources"]["mine"] == {"original": 4, "low score": 1, "retained": 3}
    assert build(BuildConfig(top=1), **parts).metrics["sources"]["mine"]["low score"] == 2
    table = table1.statistics(made, {"mine": "mine"}, {"mine": rows, "scores_mine": scored})
    assert table.avg_score[0] == pytest.approx((9 + 4 + 6) / 3)


def test_the_report_says_who_was_hit_how(parts):
    train, test = parts
    made = contamination(CheckConfig(), sources={"mine": "mine"}, tests=["exam"], mine=train, exam=test)
    report = read_report(made).set_index("how")
    assert dict(report.rows) == {"exact": 1, "ngram": 3, "minhash": 3, "cosine": 3, "ultramedical": 1}
    assert set(report.questions) == {1}
    assert report.share["exact"] == pytest.approx(1 / 7)
    assert report.examples["ngram"][0]["score"] == 1.0
    assert TEST[:40] in report.examples["exact"][0]["test"]


def test_a_collection_counts_what_went_and_datasets_reads_it(parts):
    train, test = parts
    checked = contamination(
        CheckConfig(how=["exact", "ngram"]), sources={"mine": "mine"}, tests=["exam"], mine=train, exam=test
    )
    made = build(BuildConfig(min_score=7, near=0.6), sources={"mine": "mine"}, checked=checked, mine=train)
    assert made.metrics["sources"]["mine"] == {
        "original": 7,
        "low score": 1,
        "contaminated": 3,
        "duplicate": 1,
        "near-duplicate": 1,
        "retained": 1,
    }
    loaded = load_dataset(str(made.path), split="train")
    assert loaded["id"][:] == ["fresh"]
    assert loaded[0]["completion"] == [{"content": "answer", "role": "assistant"}]
    text = (made / "README.md").read_text()
    assert "| mine | 7 | 1 | 3 | 1 | 1 | 1 |" in text
    assert "| mine | exam | ngram | 3 | 1 |" in text
    table = table1.statistics(made, {"mine": "mine"}, {"mine": train})
    assert table.original[0] == 7
    assert table.avg_score[0] == pytest.approx((9 * 3 + 2 + 8 * 3) / 7)
    assert json.loads((made / "manifest.json").read_text())["metrics"]["rows"] == 1


def test_nothing_left_and_wrong_names_are_errors(parts):
    train, _ = parts
    with pytest.raises(ConfigError, match="no row is left"):
        build(BuildConfig(min_score=10), sources={"mine": "mine"}, mine=train)
    with pytest.raises(ConfigError, match="no data set 'other' was given"):
        build(BuildConfig(), sources={"mine": "other"}, mine=train)


def test_the_released_collection_is_counted_by_the_source_in_its_ids(tmp_path):
    asked = {"MedQA": ["one two three", "one"], "WikiInstruct": ["one two"]}
    rows = [
        instruction(f"ultramedical:{i}:{task},{i}", text, task=task, score=7.0 + i)
        for task, texts in asked.items()
        for i, text in enumerate(texts)
    ]
    counted = table1.released(given(rows=rows))
    assert counted.to_dict("records") == [
        {"dataset": "MedQA", "retained": 2, "avg_len": 2.0, "avg_score": 7.5},
        {"dataset": "WikiInstruct", "retained": 1, "avg_len": 2.0, "avg_score": 7.0},
        {"dataset": "all", "retained": 3, "avg_len": 2.0, "avg_score": pytest.approx(22 / 3)},
    ]
    assert not table1.is_whole(counted)
    ours = pd.DataFrame([{"dataset": "medqa", "original": 5, "avg_len": 1.0, "avg_score": None, "retained": 4}])
    assert table1.cells(ours, counted)[1] == table1.ROWS


def test_the_whole_released_collection_stands_beside_the_published_counts():
    """The paper's counts by source come to the 409,593 rows that were released."""
    table = published.table("ultramedical_table1").dropna(subset="retained_exact").set_index("dataset")
    names = {name: row.split(" / ")[1] for name, row in table1.RELEASED_ROWS.items() if name != "all"}
    counts = {name: int(table.retained_exact[row]) for name, row in names.items()}
    counted = pd.DataFrame({"dataset": [*counts, "all"], "retained": [*counts.values(), sum(counts.values())]})
    counted = counted.assign(avg_len=100.0, avg_score=8.2)
    assert table1.is_whole(counted)
    cells, rows = table1.cells(pd.DataFrame(), counted)
    made = beside.cell_entries("ultramedical_table1", cells, rows, same_scale=True, protocol="", tolerance=0.01)
    verdicts = {entry["id"].split(":", 1)[1]: entry["verdict"] for entry in made}
    assert sum(name.endswith("retained_exact") and verdict == "reproduced" for name, verdict in verdicts.items()) == 10
    assert verdicts["All / Instructions:avg_score"] == verdicts["All / Instructions:retained"] == "reproduced"
    assert verdicts["All / Instructions:avg_len"] == "not reproduced"
