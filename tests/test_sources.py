"""Real data sets, where they are at hand: exact counts, and what the canonical rows look like."""

import json

import pytest

from ultramed.core.errors import ConfigError
from ultramed.data import adapters, sources
from ultramed.data.adapters import stated_score
from ultramed.data.catalog import SOURCES
from ultramed.data.formats import read_table
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.rows import read_instructions, read_questions
from ultramed.data.sources import SourceConfig, adapt, local_files, source

# Those whose rows are known, but for an exam that may not be passed on.
LOCAL = [name for name, spec in SOURCES.items() if any(n for _, n in spec.files.values()) and name != "usmle_self_assessment"]


@pytest.mark.parametrize("name", LOCAL)
def test_counts_are_the_known_ones(data, name):
    assert local_files(name), f"{name} is not in ULTRAMED_DATA"
    m = source(SourceConfig(name=name)).metrics
    known = {side: n for side, (_, n) in SOURCES[name].files.items()}
    models = 6 if name == "alpaca_eval" else 1  # that file names each instruction once a model
    assert sum(m["counts"].values()) + m["rejected"] == sum(known.values()) / models
    assert m["rejected"] <= 0.01 * sum(known.values())


def test_medqa_rows(data):
    art = source(SourceConfig(name="medqa"))
    rows = read_questions(art / "test.parquet")
    assert len(rows) == 1273
    assert all(set(r["options"]) == set("ABCD") for r in rows)
    assert rows[0]["dataset"] == rows[0]["subset"] == "medqa"


def test_models_answers_come_with_the_questions_and_give_the_recorded_accuracy(data):
    rows = read_questions(source(SourceConfig(name="mirage_medqa")) / "test.parquet")
    made = {}
    for row in rows:
        for answer in row["meta"]["answers"]:
            made.setdefault((answer["model"], answer["setting"]), []).append(answer["predicted"] == row["gold"])
    share = {key: round(100 * sum(hits) / len(hits), 2) for key, hits in made.items()}
    assert share["gpt-4-32k", "cot"] == 82.95
    assert share["gpt-35-turbo-16k", "cot"] == 64.88


@pytest.mark.parametrize(
    ("sentence", "score"),
    [
        ("This question would likely be rated around a 7 or 8. It requires", 7),
        ("I would rate this question a 10.", 10),
        ("Question 3 is hard.\n\nScore: 8\n\nJustification: two steps", 8),
        ("It names 3 drugs.", None),
        (None, None),
    ],
)
def test_the_score_in_a_sentence(sentence, score):
    assert stated_score(sentence) == score


def test_ultramedicals_rows_keep_task_score_and_answer(data):
    rows = read_instructions(source(SourceConfig(name="ultramedical")) / "train.parquet")
    assert {r["meta"]["task"] for r in rows} >= {"MedQA"}
    assert sum(r["meta"]["score"] is not None for r in rows) == 50


def test_prompts_and_statements_are_kept(data):
    kqa = read_table(source(SourceConfig(name="k_qa")) / "test.parquet")
    assert all(row["meta"]["must_have"] for row in kqa)
    turns = read_table(source(SourceConfig(name="mt_bench")) / "test.parquet")
    assert {len(row["meta"]["turns"]) for row in turns} == {2}
    compared = read_table(source(SourceConfig(name="alpaca_eval")) / "test.parquet")
    assert len({row["prompt"][0]["content"] for row in compared}) == len(compared) == 676
    assert all(row["reference"] for row in compared)
    languages = {row["meta"]["language"] for row in read_table(source(SourceConfig(name="curemed")) / "test.parquet")}
    assert len(languages) == 13


def test_a_rejected_row_names_file_row_and_reason():
    good, bad = adapt(
        SOURCES["alpaca"], [{"instruction": "Hi", "input": "", "output": "Hello"}, {"instruction": "x"}], "train", "a.parquet"
    )
    assert len(good) == 1
    assert json.loads(bad[0]) == {"file": "a.parquet", "row": 2, "reason": "KeyError: 'output'"}


def test_a_set_that_is_not_at_hand_says_what_to_put_where(monkeypatch):
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"\$ULTRAMED_DATA/usmle_self_assessment/\{questions\.jsonl\}"):
        source(SourceConfig(name="usmle_self_assessment"))
    with pytest.raises(ConfigError, match="did you mean 'pubmedqa'"):
        sources.get("pubmedq")
    monkeypatch.setenv("ULTRAMED_DATA", "/nowhere/at/all")
    with pytest.raises(ConfigError, match="not a folder"):
        sources.data_root()


def test_a_part_of_meadow_without_a_public_copy_says_how_to_bring_it(monkeypatch, tmp_path, fresh_store):
    monkeypatch.setenv("ULTRAMED_DATA", str(tmp_path))
    wanted = (
        r"'meadow_stackexchange_health' is not at hand: .*\$ULTRAMED_DATA/meadow_stackexchange/\{health.jsonl\}.*no public copy"
    )
    with pytest.raises(ConfigError, match=wanted):
        source(SourceConfig(name="meadow_stackexchange_health"))
    (tmp_path / "meadow_stackexchange").mkdir()
    row = {"instruction": "Answer.", "input": "Is water wet?", "output": "Yes."}
    (tmp_path / "meadow_stackexchange/health.jsonl").write_text(json.dumps(row) + "\n")
    made = source(SourceConfig(name="meadow_stackexchange_health"))
    assert made.metrics["counts"] == {"train": 1}
    assert read_instructions(made / "train.parquet")[0]["completion"][0]["content"] == "Yes."


def test_the_first_exchange_of_an_openassistant_conversation():
    text = "### Human: Why?### Assistant: Because.\nSo.### Human: Really?### Assistant: Yes."
    made = adapters.guanaco({"text": text}, 0)
    assert [turn["content"] for turn in (*made["prompt"], *made["completion"])] == ["Why?", "Because.\nSo."]


def test_a_wrong_count_is_an_error(tmp_path, monkeypatch, fresh_store):
    from ultramed.data.rows import write_rows

    (tmp_path / "alpaca").mkdir()
    write_rows(tmp_path / "alpaca" / "alpaca_early5000.parquet", [{"instruction": "a", "input": "", "output": "b"}])
    monkeypatch.setenv("ULTRAMED_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="1 rows, 5000 expected"):
        source(SourceConfig(name="alpaca"))


# --------------------------------------------------------------------------------------------------------- mixtures


def _mix(exam, **counts):
    return mixture(MixtureConfig(counts={f"exam:{k}": v for k, v in counts.items()}), exam=exam)


def test_a_mixture_has_the_rows_asked_for_and_repeats_only_on_request(exam):
    rows = read_instructions(_mix(exam, step1=10, general=5) / "rows.parquet")
    assert len({r["id"] for r in rows}) == 15
    twice = read_instructions(_mix(exam, step1=2.0) / "rows.parquet")
    assert len(twice) == 120
    assert len({r["id"].split("~")[0] for r in twice}) == 60
    with pytest.raises(ConfigError, match=r"61 rows of 'exam:step1' asked for, it has 60.*fraction such as 1\.0"):
        _mix(exam, step1=61)


def test_two_arms_that_share_a_source_and_a_seed_share_its_rows(exam):
    a = {r["id"] for r in read_instructions(_mix(exam, step1=10) / "rows.parquet")}
    b = {r["id"] for r in read_instructions(_mix(exam, step1=10, general=9) / "rows.parquet")}
    assert a < b


def test_an_unknown_source_of_a_mixture(exam):
    with pytest.raises(ConfigError, match="no data set 'medqa' was given"):
        mixture(MixtureConfig(counts={"medqa": 3}), exam=exam)
    with pytest.raises(ConfigError, match="no rows for 'exam:step9'"):
        _mix(exam, step9=3)
