"""A user's error is a line and status 2; a bug shows its traceback."""

import sys

import pytest

from ultramed import cli
from ultramed.core.errors import ConfigError, ServerError, StoreError, UserError
from ultramed.data.rows import BadRow
from ultramed.lm.tokens import TemplateError


@pytest.mark.parametrize("kind", [ConfigError, ServerError, StoreError, BadRow, TemplateError])
def test_what_a_user_can_mend_is_one_kind(kind, monkeypatch, capsys):
    assert issubclass(kind, UserError)

    def fails(**_):
        raise kind("wanted this, got that")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: wanted this, got that\n"


@pytest.mark.parametrize("kind", [ValueError, KeyError, FileNotFoundError, RuntimeError, AssertionError])
def test_a_bug_shows_its_traceback(kind, monkeypatch):
    def fails(**_):
        raise kind("a slip of ours")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(kind):
        cli.main()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["run", "--set", "train.epochs={"], "not valid YAML"),
        (["run", "--set", "train.epohcs=1"], "did you mean 'train.epochs'"),
        (["eval", "--model", "/nowhere", "--questions", "/nowhere.jsonl", "--out", "x"], "no such file"),
        (["report", "--profile", "laptop"], "nothing has run"),
        (["store", "show", "0000000"], "0 artifacts match"),
    ],
)
def test_slips_at_the_command_line(line, told, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ultramed", *line])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
