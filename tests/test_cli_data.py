"""The commands of the data half: decontamination, and annotation through a server whose answers are known."""

import json

import pytest
from faulty import Faulty
from test_cli import ultramed

from ultramed.data import rows as canonical
from ultramed.data.recognise import read

QUESTION = (
    "A 45-year-old man has crushing chest pain with ST elevation in the inferior leads. Which artery is most likely blocked?"
)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Why?"}, "Why?", None),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"prompt": [{"role": "user", "content": "Why?"}], "extra": 1}, "Why?", None),
        ({"instruction": "Sum up.", "input": "x", "output": "y"}, "x", "y"),
        ({"instruction": "Sum up.", "output": ""}, "Sum up.", None),
    ],
)
def test_anyones_rows_are_read(tmp_path, row, prompt, completion):
    (made,) = read(write(tmp_path / "r.jsonl", [row]), "rows")
    assert made["id"] == "1"
    assert made["prompt"][-1]["content"] == prompt
    assert (made["completion"][0]["content"] if "completion" in made else None) == completion


def test_a_row_without_anything_to_ask_is_named(tmp_path):
    with pytest.raises(canonical.BadRow, match=r"row 2.*prompt"):
        read(write(tmp_path / "r.jsonl", [{"prompt": "a"}, {"text": "b"}]), "rows")


def test_decontaminate_keeps_the_clean_rows(tmp_path):
    edited = QUESTION.replace("45", "46").replace("crushing", "severe")
    train = [{"prompt": p} for p in (QUESTION, f"Solve this: {edited}", "How does insulin lower the glucose in the blood?")]
    test = [{"question": QUESTION, "options": {"A": "right coronary", "B": "circumflex"}, "gold": "A"}]
    files = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    done = ultramed("data", "decontaminate", *files, "--out", tmp_path / "out", "--set", "jaccard=0.4", "--set", "cosine=0.7")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 rows hit" in done.stdout
    assert [r["id"] for r in canonical.read_rows(tmp_path / "out" / "clean.parquet")] == ["3"]
    again = ultramed("data", "decontaminate", *files, "--out", tmp_path / "out")
    assert (again.returncode, "give a new folder" in again.stderr) == (2, True)


def test_annotate_score_goes_on_after_the_budget(tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"question {i}"} for i in range(6)])
    with Faulty(answer=lambda body: '{"score": 7}') as server:
        where = f"{server.config().url}#m"
        args = ["annotate", "score", "--data", data, "--server", where, "--out", tmp_path / "out"]
        first = ultramed(*args, "--set", "server.max_requests=4", "--set", "server.concurrency=1", OPENAI_API_KEY="sk-secret")
        assert (first.returncode, "the budget is used up" in first.stderr) == (2, True)
        assert not (tmp_path / "out").exists()
        second = ultramed(*args, OPENAI_API_KEY="sk-secret")
        assert second.returncode == 0, second.stderr
        assert len(server.bodies) == 6
    assert json.loads(second.stdout.partition("}")[0] + "}")["mean_score"] == 7.0
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 6
    assert "sk-secret" not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json*"))


def test_annotate_feedback_compare_and_write(tmp_path):
    def answer(body):
        text = body["messages"][-1]["content"]
        if "Reply A:" in text:
            return '{"better": "A"}' if "Reply A:\ngood" in text else '{"better": "B"}'
        if "Reply 1:" in text:
            shown = [part.partition("\n")[2].strip() for part in text.split("Reply ")[1:]]
            return json.dumps({"scores": [9 if s == "good" else 2 for s in shown]})
        return json.dumps({"instruction": f"Explain in three steps, with one exception: {text}"})

    with Faulty(answer=answer) as server:
        where = f"{server.config().url}#m"
        candidates = write(tmp_path / "c.jsonl", [{"prompt": "Why?", "candidates": ["bad", "good", "worse"]}])
        done = ultramed("annotate", "feedback", "--data", candidates, "--server", where, "--out", tmp_path / "f")
        assert done.returncode == 0, done.stderr
        (row,) = map(json.loads, (tmp_path / "f" / "feedback.jsonl").read_text().splitlines())
        assert [c["rank"] for c in row["candidates"]] == [2, 1, 2]

        pairs = write(tmp_path / "p.jsonl", [{"prompt": "Why?", "chosen": "good", "rejected": "bad"}])
        done = ultramed("annotate", "compare", "--pairs", pairs, "--server", where, "--out", tmp_path / "v")
        assert json.loads((tmp_path / "v" / "verdicts.jsonl").read_text())["verdict"] == "chosen", done.stderr

        topics = write(tmp_path / "t.jsonl", [{"prompt": "Sepsis"}, {"prompt": "Asthma"}])
        done = ultramed("annotate", "write", "topic", "--data", topics, "--server", where, "--out", tmp_path / "w")
        assert done.returncode == 0, done.stderr
        assert len(canonical.read_rows(tmp_path / "w" / "train.parquet")) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["write", "topics", "--data", "ROWS", "--server", "http://127.0.0.1:9/v1#m"], "did you mean 'topic'?"),
        (["score", "--data", "ROWS", "--server", "127.0.0.1:9"], "url#model"),
        (["score", "--data", "nowhere.jsonl", "--server", "http://127.0.0.1:9/v1#m"], "no such file"),
        (["feedback", "--data", "ROWS", "--server", "http://127.0.0.1:9/v1#m"], "candidates: wanted two or more texts"),
        (["score", "--data", "ROWS", "--server", "http://127.0.0.1:9/v1#m", "--set", "temprature=1"], "did you mean"),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, message):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    done = ultramed("annotate", *[data if a == "ROWS" else a for a in args], "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
