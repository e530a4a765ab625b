"""Every notebook: stripped, one parameters cell, no function of its own, and it runs at `smoke`."""

import ast
import hashlib
import json

import nbformat
import pandas as pd
import pytest
from conftest import REPO
from faulty import Faulty

from ultramed.book import runner as batch
from ultramed.core.config import home
from ultramed.core.errors import ConfigError

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_source_is_stripped_and_well_formed(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert set(batch.parameters_of(path)) == {"profile", "overrides"}
    assert nb.cells[0].cell_type == "markdown"
    assert "**Takes**" in nb.cells[0].source
    made = [n.name for c in code for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert not made, "functions and classes live in the package, with tests"


@pytest.fixture(scope="module")
def book():
    """The whole book at smoke, in the tests' own home and store."""
    fine = batch.run([], "smoke", [])
    return fine, home() / "figures" / "smoke"


def test_the_whole_book_runs_at_smoke(book):
    fine, folder = book
    assert fine
    for path in NOTEBOOKS:
        executed = json.loads((folder / "notebooks" / path.name).read_text())
        assert not [o for c in executed["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
        text = json.dumps(executed)
        assert "question/s" not in text
        assert "Warning" not in text, "a reader should not have to read warnings"
    entries = json.loads((folder / "scorecard.json").read_text())
    claims = {e["id"]: e for e in entries if e["kind"] == "claim"}
    assert {"medalpaca:finetuned-beats-base", "medalpaca:full-beats-lora", "medalpaca:format"} <= set(claims)
    wanted = (
        "sft-beats-base",
        "xpo-beats-sft",
        "iterative-beats-vanilla",
        "ensemble-beats-greedy",
        "mix-keeps-general",
        "mix-costs-nothing",
        "rm-beats-sc",
        "medical-rm-beats-general",
        "medical-rm-competitive",
    )
    assert {f"ultramedical:{name}" for name in wanted} <= set(claims)
    assert all(c["n"] and c["p"] is not None for c in claims.values())


def test_the_second_time_nothing_runs(book):
    stamps = {p: p.stat().st_mtime_ns for p in (book[1] / "notebooks").glob("*.ipynb")}
    assert batch.run([], "smoke", [])
    assert stamps == {p: p.stat().st_mtime_ns for p in (book[1] / "notebooks").glob("*.ipynb")}


def test_the_report_of_the_book(book):
    from ultramed.report.site import write_report

    page = write_report("smoke").read_text()
    assert page.count("<figure") >= 8
    assert 'href="notebooks/11_medalpaca_usmle.html"' in page
    assert (book[1] / "notebooks" / "11_medalpaca_usmle.html").exists()


def test_a_failing_notebook_is_reported_and_the_others_still_run(places, tmp_path, monkeypatch):
    folder = tmp_path / "home"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "params").symlink_to(REPO / "params")
    for name, code in (("01_bad", "raise ValueError('on purpose')"), ("02_good", "print(1)")):
        nb = nbformat.v4.new_notebook()
        tagged = nbformat.v4.new_code_cell('profile = "smoke"\noverrides = []', metadata={"tags": ["parameters"]})
        nb.cells = [tagged, nbformat.v4.new_code_cell(code)]
        nb.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
        nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("ULTRAMED_HOME", str(folder))
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    assert not batch.run([], "smoke", [], jobs=2, console=Console(file=out, width=120))
    assert "01_bad failed: ValueError: on purpose" in out.getvalue()
    assert "1 of 2 notebooks fine" in out.getvalue()
    assert (folder / "figures" / "smoke" / "notebooks" / "02_good.json").exists()


def test_an_unknown_number_or_parameter_is_refused():
    with pytest.raises(ConfigError, match="no notebook '12x'"):
        batch.notebooks(["12x"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"profil": "smoke"}, "unknown notebook parameter 'profil'; did you mean 'profile'?"),
        ({"profile": "smoke", "train__epohcs": 2}, "unknown key 'train.epohcs'; did you mean 'train.epochs'?"),
    ],
)
def test_papermill_by_hand_with_a_misspelt_parameter_fails(tmp_path, parameters, message):
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match="ConfigError") as err:
        papermill.execute_notebook(
            REPO / "notebooks" / "90_scorecard.ipynb", tmp_path / "out.ipynb", parameters=parameters, progress_bar=False
        )
    assert message in str(err.value)


def test_papermill_by_hand_reaches_any_key(tmp_path, book):
    import papermill

    papermill.execute_notebook(
        REPO / "notebooks" / "90_scorecard.ipynb",
        tmp_path / "out.ipynb",
        parameters={"profile": "smoke", "train__epochs": 2},
        progress_bar=False,
    )
    assert "changed  train.epochs=2" in (tmp_path / "out.ipynb").read_text()


def test_notebooks_with_a_judge(book, data):
    """What a judge is needed for runs with one; one that answers by dice agrees with physicians no more than dice do."""

    def dice(body):
        rubric, text = body["messages"][0]["content"], body["messages"][-1]["content"]
        number = int(hashlib.md5(text.encode()).hexdigest(), 16)
        if '"label"' in rubric:
            return json.dumps({"label": ["Entailment", "Neutral", "Contradiction"][number % 3]})
        if '"better"' in rubric:
            return json.dumps({"better": "AB"[number % 2]})
        return json.dumps({"score": number % 10 + 1, "instruction": f"Explain every step, with one exception: {text[:80]}"})

    sources = ["collection.sources.ultramedical=ultramedical", "collection.score=[ultramedical]"]
    with Faulty(answer=dice) as server:
        assert batch.run(["20", "27"], "smoke", [f"judge={server.config().url}#m", *sources])
    tables = book[1] / "tables"
    trust = pd.read_csv(tables / "27_trust.csv").set_index("against")
    assert abs(float(trust.judge["physicians' labels (K-QA)"])) < 0.15
    assert pd.read_csv(tables / "20_table1.csv").set_index("dataset").avg_score["ultramedical"] > 1
