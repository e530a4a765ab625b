"""What holds for the repository as a whole."""

import ast
import json
import re
import subprocess
import tomllib

import pandas as pd
import pytest
import yaml
from conftest import REPO

from ultramed.papers.claims import claims as all_claims

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def test_environment_yml_says_what_pyproject_says():
    conda = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    pip = set(next(d["pip"] for d in conda if isinstance(d, dict)))
    wanted = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]}
    assert pip == {*wanted, "-c constraints.txt", "-e ."}


def test_every_dependency_is_locked_within_its_range():
    from packaging.requirements import Requirement

    locked = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().split() if "==" in line)
    locked = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in locked.items()}
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        need = Requirement(text)
        assert need.specifier.contains(locked[re.sub(r"[-_.]+", "-", need.name).lower()]), text
    assert locked["torch"] == "2.13.0"


def tracked() -> list:
    done = subprocess.run(["git", "-C", str(REPO), "ls-files"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in done.stdout.split()]


def test_modules_can_be_read_in_one_sitting():
    long = {p.name: n for p in (REPO / "ultramed").rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


FLOORS = [
    {"core", "papers"},
    {"data"},
    {"lm"},
    {"train"},
    {"evaluate"},
    {"annotate"},
    {"report", "experiments"},
    {"book"},
    {"cli"},
]


def test_nothing_is_loose_at_the_top():
    assert {p.name for p in (REPO / "ultramed").glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {p.parent.name for p in (REPO / "ultramed").glob("*/__init__.py")}
    assert folders == set().union(*FLOORS)


def test_imports_only_go_down():
    """A module imports from its own folder and from the floors below it."""
    for number, floor in enumerate(FLOORS):
        below = set().union(*FLOORS[:number])
        for folder in floor:
            for path in (REPO / "ultramed" / folder).rglob("*.py"):
                used = set(re.findall(r"(?:from|import) ultramed\.(\w+)", path.read_text()))
                assert used <= below | {folder, *(floor if number == 0 else ())}, (path, used - below)
                assert not re.search(r"from ultramed import (?!__version__)", path.read_text()), path


def test_nothing_is_said_to_the_formatter():
    assert not [path for path in tracked() if path.suffix in (".py", ".ipynb") and "fmt: " + "skip" in path.read_text()]


def test_no_unsafe_loading():
    for path in tracked():
        if path.suffix in (".py", ".ipynb") and "tests" not in path.parts:
            assert not re.search(r"trust_remote_code(?!\"?[=:] ?False)|pickle\.load|torch\.load\b", path.read_text()), path


DOCS = [
    "README.md",
    "RESULTS.md",
    *(f"docs/{name}.md" for name in ("GUIDE", "LOG", "PERFORMANCE", "REPRODUCING", "DATA_LICENSES")),
]
BOOKS = ("laptop", "workstation", "replication")  # profiles whose runs are committed
EXECUTED = {  # the other notebooks show there what they show at laptop, or have not been run
    "laptop": tuple(path.name[:2] for path in sorted((REPO / "notebooks").glob("*.ipynb"))),
    "workstation": ("10", "11", "22", "23", "24", "25", "90"),
    "replication": ("10", "11", "22", "23", "24", "25", "26", "90"),
    "gpu": ("12",),
}


@pytest.mark.parametrize("name", DOCS)
def test_pages_name_commands_paths_and_pages_that_exist(name):
    from typer.main import get_command

    from ultramed.cli import app

    page, known = REPO / name, set(get_command(app).commands)
    text = page.read_text()
    for command in re.findall(r"^ultramed ([a-z]+)", text, re.M) + re.findall(r"`ultramed ([a-z]+)", text):
        assert command in known, command
    for path in re.findall(r"`((?:params|figures|notebooks|tests|ultramed|docs)/[\w./-]+\.\w+)`", text):
        assert (REPO / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_readme_is_read_in_a_minute():
    assert len((REPO / "README.md").read_text().split()) <= 700


def blocks(name: str) -> str:
    return "".join(re.findall(r"<!-- results:.*?-->(.*?)<!-- end of results -->", (REPO / name).read_text(), re.S))


def committed_tables() -> str:
    """The text of every table of every committed run."""
    paths = [path for book in EXECUTED for path in (REPO / "figures" / book / "tables").glob("*.md")]
    return "\n".join(path.read_text() for path in paths)


def test_the_results_are_those_of_the_committed_run():
    """Every table row between the markers stands in a table of a committed run, word for word."""
    rows = [line for line in blocks("RESULTS.md").splitlines() if line.startswith("| ")]
    made = set(committed_tables().splitlines())
    assert len(rows) > 25
    assert [row for row in rows if row not in made] == []


def prose(name: str) -> str:
    """A page's sentences: no tables, pictures or headings."""
    lines = (REPO / name).read_text().splitlines()
    return " ".join(line for line in lines if not line.startswith(("|", "!", "#", "<!--")))


def test_what_the_results_say_stands_in_a_table_of_a_committed_run():
    """Every interval of the prose is some table's, and every difference in whole points is one of a tested statement,
    rounded."""
    text = prose("RESULTS.md")
    made = committed_tables()
    interval = re.compile(r"[+-]?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]")
    intervals = interval.findall(text)
    assert len(intervals) >= 5
    assert [found for found in intervals if found not in made] == []
    ends = [json.loads(path.read_text())["cells"][-1] for path in sorted((REPO / "notebooks").glob("*.ipynb"))]
    answers = ["".join(cell["source"]) for cell in ends if "".join(cell["source"]).startswith("**Answer**")]
    assert len(answers) == 6
    assert [found for found in interval.findall(" ".join(answers)) if found not in made] == []
    known = {round(abs(float(value))) for value in re.findall(r"\| ([+-]\d+\.\d) \[", made)}
    assert {int(n) for n in re.findall(r"by (\d+)(?= points)", text)} <= known


def test_the_claims_on_the_first_screen_are_those_of_the_committed_run():
    """'- **verdict**: statement. difference [interval], n = N (`ultramed run NN`)'."""
    shown = re.findall(
        r"- \*\*(\w+)\*\*: (.+?)\. ([+-][\d.]+ \[.+?\]), n = (\d+) \(`ultramed run (\d\d)`\)", blocks("README.md")
    )
    assert len(shown) == 6
    claims = pd.read_csv(REPO / "figures" / "replication" / "tables" / "90_claims.csv").set_index("statement")
    notebooks = {claim.sentence: claim.notebook[:2] for claim in all_claims()}
    for verdict, statement, difference, n, number in shown:
        found = claims.loc[statement]
        assert (found.verdict, found["A - B, 95% interval"], str(found.n)) == (verdict, difference, n)
        assert notebooks[statement] == number


@pytest.mark.parametrize("book", EXECUTED)
def test_executed_notebooks_can_be_read_on_the_web(book):
    """Committed with their outputs, whole, small, and without a path of the machine that ran them."""
    executed = sorted((REPO / "figures" / book / "notebooks").glob("*.ipynb"))
    assert [path.name[:2] for path in executed] == list(EXECUTED[book])
    assert sum(path.stat().st_size for path in executed) < 6e6
    for path in executed:
        text = path.read_text()
        assert '"output_type": "error"' not in text
        assert str(REPO) not in text, path
        assert not re.search(r'"(/home|/root|/tmp|/Users)/', text), path
        today = code_cells((REPO / "notebooks" / path.name).read_text())
        assert code_cells(text) == today, f"{path.name} is a copy of an older notebook"


def code_cells(notebook: str) -> list[str]:
    """A notebook's code, without what a run injects and without captions: how results are described may be put better, or
    otherwise once intervals are made otherwise, and an executed copy keeps the words of its own run."""
    cells = [c for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
    trees = [ast.parse("".join(c["source"])) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "caption":
            node.value = ast.Constant("")
    return [ast.unparse(tree) for tree in trees]


@pytest.mark.parametrize("book", BOOKS)
def test_the_committed_scorecard_is_whole(book):
    from ultramed.papers.published import cells
    from ultramed.report.scorecard import Entry

    entries = [Entry(**e) for e in json.loads((REPO / "figures" / book / "scorecard.json").read_text())]
    assert {c["id"] for c in cells()} | {claim.id for claim in all_claims()} <= {e.id for e in entries}
    assert (
        sum(e.kind == "claim" and e.verdict != "not run" for e in entries)
        >= {"laptop": 6, "workstation": 13, "replication": 16}[book]
    )
    assert all(e.ours is not None or e.reason or e.verdict == "context" for e in entries)
