"""Long work speaks: a line a minute where there is no terminal, and about how long the rest takes."""

from io import StringIO

import pytest
from rich.console import Console

from ultramed.book import runner
from ultramed.core import progress


def test_durations():
    shown = [progress.duration(s) for s in (0.4, 89, 90, 3599, 3660, 7000)]
    assert shown == ["0 s", "89 s", "2 min", "1 h 0 min", "1 h 1 min", "1 h 57 min"]


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


def test_the_rest_is_foretold_by_ratios_and_corrected_by_what_was_seen(jobs):
    rest = runner.Rest(jobs)
    rest.known = {"10_medalpaca_meadow": 10, "11_medalpaca_usmle": 300, "90_scorecard": 20}
    assert rest.seconds() is None, "nothing is known of this machine yet"
    jobs[0].state, jobs[0].seconds = "done", 20  # twice as slow
    jobs[1].state, jobs[1].seconds = "running", 150
    assert rest.seconds() == 2 * 300 - 150 + 2 * 20
    del rest.known["90_scorecard"]
    assert rest.seconds() is None, "nothing is known of one that is left"


def test_every_notebook_has_a_duration(jobs):
    assert set(runner.Rest(jobs).known) == {path.stem for path in runner.notebooks()}


def test_a_log_says_when_a_notebook_begins_and_ends(jobs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    out = StringIO()
    with runner._Lines(Console(file=out, width=200), jobs, "x") as lines:
        lines.rest.known = {"10_medalpaca_meadow": 100, "11_medalpaca_usmle": 300, "90_scorecard": 20}
        jobs[0].state = "running"
        lines.tick()
        lines.tick()  # nothing new
        now[0], jobs[0].seconds, jobs[0].note = 61, 61, "rows 12/27"
        lines.tick()
        jobs[0].state, jobs[0].seconds = "done", 100
        lines.tick()
    told = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert told == [
        "10_medalpaca_meadow running (0 of 3 notebooks)",
        "10_medalpaca_meadow running, 61 s; rows 12/27 (0 of 3 notebooks)",
        "10_medalpaca_meadow done, 2 min (1 of 3 notebooks, about 5 min left)",
    ]
