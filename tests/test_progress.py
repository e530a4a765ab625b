"""Long work speaks: a line a minute where there is no terminal, and about how long the rest takes."""

from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ultramed.book import durations, runner
from ultramed.core import progress
from ultramed.core.config import load_profile


def test_durations():
    shown = [progress.duration(s) for s in (0.4, 89, 90, 3599, 3660, 7000, 3 * 86400, 1e8)]
    assert shown == ["0 s", "89 s", "2 min", "1 h 0 min", "1 h 1 min", "1 h 57 min", "3 days", "3 years"]


def test_a_log_gets_a_line_at_the_beginning_one_a_minute_and_one_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delenv(progress.FILE, raising=False)
    with progress._LineBar(10, "answers", "question", initial=2) as bar:
        for seconds in (30, 61, 70, 130, 131):
            now[0] = seconds
            bar.update(1)
        bar.update(3)
    assert capsys.readouterr().err.splitlines() == [
        "answers: 2 of 10 questions",
        "answers: 4 of 10 questions, 61 s, about 3 min left",
        "answers: 6 of 10 questions, 2 min, about 2 min left",
        "answers: 10 of 10 questions, 2 min",
    ]


def test_without_a_terminal_no_bar_is_drawn(monkeypatch, capsys):
    monkeypatch.delenv(progress.FILE, raising=False)
    with progress.bar(2, "replies", "reply") as bar:
        bar.update(2)
    assert capsys.readouterr().err == "replies: 0 of 2 replies\nreplies: 2 of 2 replies, 0 s\n"


@pytest.fixture
def jobs(tmp_path):
    names = ("10_medalpaca_meadow", "11_medalpaca_usmle", "90_scorecard")
    return [runner.Job(name, tmp_path / name, tmp_path / name, {}) for name in names]


KNOWN = {"10_medalpaca_meadow": 10, "11_medalpaca_usmle": 300, "90_scorecard": 20}


def test_the_rest_is_foretold_by_the_machine_and_corrected_by_what_was_seen(jobs):
    rest = durations.Rest(jobs, KNOWN, gflops=450)
    assert rest.seconds() == 2 * 330, "half as fast as the reference"
    jobs[0].state, jobs[0].seconds = "done", 10 + 2 * 20
    jobs[1].state, jobs[1].seconds = "running", 150
    pace = (50 + 60 * 2) / (10 + 60)
    assert rest.seconds() == pytest.approx(pace * 300 - 150 + pace * 20)
    jobs[1].state, jobs[1].seconds = "done", 3000  # ten times as slow as the reference: this is what counts now
    assert rest.seconds() == pytest.approx(20 * (3050 + 120) / (310 + 60))


def test_notebooks_side_by_side_share_the_machine(jobs):
    rest = durations.Rest(jobs, KNOWN, gflops=900, at_once=2)
    assert rest.seconds() == 2 * 300, "half the cores for the longest, which the others end before"
    assert durations.Rest(jobs, dict.fromkeys(KNOWN, 100), gflops=900, at_once=2).seconds() == 300, "as one after the other"


def test_a_measured_profile_has_its_times_and_others_the_plans(smoke):
    books = runner.notebooks()
    for name in ("laptop", "smoke", "workstation"):
        made = durations.reference_seconds(load_profile(name), books)
        assert set(made) == {path.stem for path in books}
        file = yaml.safe_load((Path(durations.__file__).parent / "durations.yaml").read_text())
        assert file[name] == made, "each notebook has its own"
    large, small = (durations.reference_seconds(load_profile(name), books) for name in ("medalpaca-13b", "medalpaca-7b"))
    assert large["10_medalpaca_meadow"] == durations.AROUND
    assert 1.5 < large["11_medalpaca_usmle"] / small["11_medalpaca_usmle"] < 3


def test_a_log_says_when_a_notebook_begins_and_ends(jobs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    out = StringIO()
    rest = durations.Rest(jobs, {**KNOWN, "10_medalpaca_meadow": 100}, gflops=900)
    with runner._Lines(Console(file=out, width=200), jobs, "x", rest) as lines:
        jobs[0].state = "running"
        lines.tick()
        lines.tick()  # nothing new
        now[0], jobs[0].seconds, jobs[0].note = 61, 61, "rows 12/27"
        lines.tick()
        jobs[0].state, jobs[0].seconds = "done", 100
        lines.tick()
    told = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert told == [
        "10_medalpaca_meadow running (0 of 3 notebooks, about 7 min left)",
        "10_medalpaca_meadow running, 61 s; rows 12/27 (0 of 3 notebooks, about 6 min left)",
        "10_medalpaca_meadow done, 2 min (1 of 3 notebooks, about 5 min left)",
    ]


def test_a_scorecard_is_stale_when_another_notebook_has_recorded_something(tmp_path):
    source = tmp_path / "nb.ipynb"
    source.write_text("{}")
    target = tmp_path / "figures" / "notebooks" / "nb.ipynb"
    scorecard, other = (runner.Job(name, source, target, {}) for name in ("90_scorecard", "11_medalpaca_usmle"))
    before = scorecard.key(), other.key()
    entries = tmp_path / "figures" / "entries"
    entries.mkdir(parents=True)
    (entries / "11_medalpaca_usmle.json").write_text("{}")
    assert scorecard.key() != before[0]
    assert other.key() == before[1]
