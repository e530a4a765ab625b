import pytest

from ultramed.core.errors import StoreError
from ultramed.core.ledger import Ledger


def test_rows_survive_and_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    with Ledger(path) as ledger:
        ledger.add({"key": "a", "x": 1}, {"key": "b", "x": 2})
    with open(path, "ab") as fh:
        fh.write(b'{"key": "c", "x"')  # killed in the middle of a line
    with Ledger(path) as ledger:
        assert set(ledger.rows) == {"a", "b"}
        ledger.add({"key": "c", "x": 3})
    with Ledger(path) as ledger:
        assert [r["x"] for r in ledger.rows.values()] == [1, 2, 3]


def test_an_item_cannot_be_written_twice(tmp_path):
    with Ledger(tmp_path / "a.jsonl") as ledger:
        ledger.add({"key": "a"})
        with pytest.raises(ValueError, match="already"):
            ledger.add({"key": "a"})


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("hello\n")
    with pytest.raises(StoreError, match=r"line 1: not a ledger row"):
        Ledger(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "damaged", ['{"key": "x", "y"', '{"other": 1}', '["key"]', '{"key": "x"}, {"key": "y"}', '{"key": []}']
)
def test_the_damaged_one_of_many_lines_is_named(tmp_path, damaged):
    lines = [f'{{"key": "{n}", "text": "{"word " * 100}"}}' for n in range(5000)]  # more than are parsed at once
    lines[3210] = damaged
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"key": "torn']))
    with pytest.raises(StoreError, match=r"line 3211: not a ledger row"):
        Ledger(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3210], *lines[3211:], '{"key": "torn']))
    with Ledger(tmp_path / "a.jsonl") as ledger:
        assert list(ledger.rows) == [str(n) for n in range(5000) if n != 3210]
        ledger.add({"key": "torn"})
    assert (tmp_path / "a.jsonl").read_text().splitlines()[-1] == '{"key": "torn"}'
