"""What holds for the repository as a whole."""

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import REPO

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


def test_no_unsafe_loading():
    for path in tracked():
        if path.suffix in (".py", ".ipynb") and "tests" not in path.parts:
            assert not re.search(r"trust_remote_code|pickle\.load|torch\.load\b", path.read_text()), path


def test_the_readme_names_commands_that_exist():
    text = (REPO / "README.md").read_text()
    from typer.main import get_command

    from ultramed.cli import app

    known = set(get_command(app).commands)
    for command in re.findall(r"^ultramed ([a-z]+)", text, re.M):
        assert command in known
    for path in re.findall(r"`((?:params|figures|notebooks|tests|ultramed)/[\w./-]+)`", text):
        assert (REPO / path).exists(), path


def test_the_results_in_the_readme_are_those_of_the_committed_run():
    """Every table row between the markers stands in a table of `figures/laptop`, word for word."""
    text = (REPO / "README.md").read_text()
    block = text.partition("<!-- results:")[2].partition("<!-- end of results -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("| ")]
    made = {line for path in (REPO / "figures" / "laptop" / "tables").glob("*.md") for line in path.read_text().splitlines()}
    assert len(rows) > 8
    assert [row for row in rows if row not in made] == []


def test_the_committed_scorecard_is_whole():
    import json

    from ultramed.papers.published import cells
    from ultramed.report.scorecard import Entry

    entries = [Entry(**e) for e in json.loads((REPO / "figures" / "laptop" / "scorecard.json").read_text())]
    assert {c["id"] for c in cells()} <= {e.id for e in entries}
    assert sum(e.kind == "claim" for e in entries) >= 5
    assert all(e.ours is not None or e.reason for e in entries)
