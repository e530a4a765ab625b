import json

import pandas as pd
import pytest

from ultramed.core.config import home
from ultramed.core.errors import ConfigError
from ultramed.papers import published
from ultramed.report import scorecard, tables
from ultramed.report.site import write_report


@pytest.mark.parametrize("name", published.TABLES)
def test_every_published_table_is_there_and_gives_cells(name):
    assert len(published.table(name))
    assert any(c["id"].startswith(f"{name}:") for c in published.cells())


def test_cells_are_unique_and_hold_what_was_printed():
    cells = {c["id"]: c["published"] for c in published.cells()}
    assert len(cells) == len(published.cells())
    assert cells["medalpaca_usmle:MedAlpaca 7b / 7b / full:step3"] == 0.398
    assert cells["ultramedical_table2:70B UltraMedical / UltraMix Best (Ens):medqa"] == 85.4


def test_an_average_that_was_printed_agrees_with_its_cells():
    """Except where the paper's own arithmetic does not: the 70B UltraMix + SFT row prints 84.27, its cells average 84.36."""
    t = published.table("ultramedical_table2").set_index(["segment", "model"])
    t = t.dropna()
    off = (t.drop(columns="avg").mean(axis=1) - t.avg).abs() > 0.06
    assert ("70B UltraMedical", "UltraMix + SFT") in t[off].index


def _entry(**more):
    return {"id": "x:1", "kind": "claim", "source": "s", "statement": "st", "ours": 1, "verdict": "reproduced", **more}


def test_entries_are_checked():
    with pytest.raises(ValueError, match="needs a reason"):
        scorecard.record("t", "11_x", [_entry(verdict="not run", ours=None)])
    with pytest.raises(ValueError, match="needs the number"):
        scorecard.record("t", "11_x", [_entry(ours=None)])
    with pytest.raises(ValueError, match="occur twice"):
        scorecard.record("t", "11_x", [_entry(), _entry()])


FRAME = pd.DataFrame({"arm": ["full", "LoRA & co"], "accuracy": [0.51234, float("nan")], "n": [720, 0]})


def test_tables_in_three_forms(tmp_path):
    tables.save_table(FRAME, "t", profile="forms", caption="A caption.")
    base = home() / "figures" / "forms" / "tables"
    pd.testing.assert_frame_equal(pd.read_csv(base / "t.csv"), FRAME)
    assert (base / "t.md").read_text().splitlines()[2:5] == [
        "| arm | accuracy | n |",
        "|---|---:|---:|",
        "| full | 0.5123 | 720 |",
    ]
    tex = (base / "t.tex").read_text()
    assert r"LoRA \& co &  & 0 \\" in tex
    assert r"\begin{tabular}{lrr}" in tex
    assert json.loads((base / "t.json").read_text())["versions"]["torch"].startswith("2.13.0")


def test_the_report_is_one_page_that_needs_no_other_file_or_host():
    scorecard.record("page", "11_x", [_entry(statement="<b>bold</b> claim")])
    tables.save_table(FRAME, "t", profile="page", caption="A caption.")
    page = write_report("page").read_text()
    assert "&lt;b&gt;bold" in page
    assert "LoRA &amp; co" in page
    assert 'src="http' not in page
    assert "<script" not in page
    with pytest.raises(ConfigError, match="nothing has run"):
        write_report("never")
