"""Every notebook: stripped, one parameters cell, no function of its own, and it runs at `smoke`."""

import ast
import hashlib
import json
import re
import statistics

import nbformat
import pandas as pd
import pytest
from conftest import REPO
from faulty import Faulty

from ultramed.book import runner as batch
from ultramed.book.plan import jobs_of
from ultramed.core import store
from ultramed.core.config import home, load_profile
from ultramed.core.errors import ConfigError
from ultramed.papers.claims import claims_of

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
    assert not re.search(r"\bmade \+=", "\n".join(c.source for c in code)), "results carry their artifacts"


def test_notebooks_are_prose_and_calls():
    lengths = {path.stem: [len(c.source.splitlines()) for c in code_cells(path)] for path in NOTEBOOKS}
    assert statistics.median(n for part in lengths.values() for n in part) <= 6
    assert max(n for part in lengths.values() for n in part) <= 20
    assert all(statistics.median(part) <= 6 for part in lengths.values()), lengths


def code_cells(path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_opening_cell_says_what_the_paper_claims(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    assert re.search(r"\*\*(Papers?|Source|What it shows)\*\*", opening)
    for claim in claims_of(path.stem):
        assert f"- {claim.sentence}." in opening, f"claims.csv has another wording of {claim.id}"


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
    claims = {e["id"]: e for e in entries if e["kind"] == "claim" and e["verdict"] != "not run"}
    assert {"medalpaca:finetuned-beats-base", "medalpaca:full-beats-lora", "medalpaca:8bit-level-with-lora"} <= set(claims)
    wanted = (
        "sft-beats-base",
        "xpo-beats-sft",
        "iterative-beats-vanilla",
        "ensemble-beats-greedy",
        "mix-keeps-general",
        "rm-beats-sc",
        "medical-rm-beats-general",
        "medical-rm-competitive",
    )
    assert {f"ultramedical:{name}" for name in wanted} <= set(claims)
    for claim in claims.values():
        assert all(claim[key] is not None for key in ("n", "p", "interval", "se", "detectable")), claim["id"]
        assert (claim["p_holm"] or 1) >= claim["p"] if claim["test"] == "beats" else claim["p_holm"] is None
        assert claim["verdict"] in ("reproduced", "contradicted", "inconclusive")
    assert all(e["verdict"] == "no verdict" for e in entries if e["kind"] == "diagnostic")
    cells = {e["id"] for e in entries if e["kind"] == "cell" and e["verdict"] == "differs in scale"}
    assert {"medalpaca_usmle:MedAlpaca 7b / 7b / full:step2", "ultramedical_table4:UltraMedRM-8B:um_hard"} <= cells
    assert "medalpaca_cost:LLaMA 7b / True / True / True / False / False:minutes_per_epoch" in cells


def sources_of(folder, kind: str = "tables") -> dict[str, list[str]]:
    """Table or figure -> artifacts that its provenance names."""
    paths = (folder / "tables" if kind == "tables" else folder).glob("[0-9]*.json")
    return {path.stem: json.loads(path.read_text()).get("artifacts", []) for path in paths}


def test_provenance_is_complete(book):
    """Every model that was trained and every answer that was given for a table is named beside it."""
    made = sources_of(book[1])
    stages = {name: {key.partition("/")[0] for key in keys} for name, keys in made.items()}
    assert {"sft", "preference", "answers", "samples"} <= stages["22_main"], "with the ensemble's samples"
    assert {"reward", "bench", "pair_scores"} <= stages["24_reward"]
    assert {"sft", "answers", "reward_feedback"} <= stages["25_rerank"]
    assert {"preference", "answers", "reward_feedback"} <= stages["26_rounds"]
    assert {"base_model", "sft", "answers"} <= stages["11_usmle"]
    assert all(keys for name, keys in made.items() if name[:2] in ("11", "22", "23", "24", "25", "26"))


def test_the_plan_is_what_ran(book):
    """Training runs of the book's results, by configuration (learning rates are tuned on the way, and a control takes as many
    steps as what it controls took), are those planned."""
    keys = {key for part in (sources_of(book[1]), sources_of(book[1], "figures")) for made in part.values() for key in made}
    lineage = {m["key"]: m for key in keys for m in store.find(key).lineage()}
    kinds = ("sft", "preference", "reward")

    def setting(config) -> str:
        return store.digest({k: v for k, v in store.canonical(config).items() if k not in ("learning_rate", "max_steps")})

    ran = {(m["stage"], setting(m["config"])) for m in lineage.values() if m["stage"] in kinds}
    planned = {(job.kind, setting(job.config)) for _, job in jobs_of(load_profile("smoke")) if job.trains}
    assert ran == planned


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
    shares = "import os; assert os.environ['OMP_NUM_THREADS'] == '3', 'half of six cores'"
    for name, code in (("01_bad", "raise ValueError('on purpose')"), ("02_good", shares)):
        nb = nbformat.v4.new_notebook()
        tagged = nbformat.v4.new_code_cell('profile = "smoke"\noverrides = []', metadata={"tags": ["parameters"]})
        nb.cells = [tagged, nbformat.v4.new_code_cell(code)]
        nb.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
        nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("ULTRAMED_HOME", str(folder))
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    monkeypatch.setattr(batch, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
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
        changes = [f"judge={server.config().url}#m", *sources]
        assert batch.run(["20", "27"], "smoke", changes)
    tables = home() / "figures" / load_profile("smoke", changes).name / "tables"
    trust = pd.read_csv(tables / "27_trust.csv").set_index("against")
    assert abs(float(trust.judge["physicians' labels (K-QA)"])) < 0.15
    assert pd.read_csv(tables / "20_table1.csv").set_index("dataset").avg_score["ultramedical"] > 1
    entries = json.loads((tables.parent / "entries" / "27_ultramedical_openended.json").read_text())["entries"]
    cells = [entry for entry in entries if entry["kind"] == "cell"]
    assert len(cells) == 6
    assert all(cell["interval"] and cell["n"] for cell in cells)
