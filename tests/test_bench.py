"""`ultramed bench` as someone with a model of their own uses it: the numbers, interruptions, servers that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import hub
import numpy as np
import pandas as pd
import pytest
from faulty import Faulty
from handmade import lines
from test_cli import ultramed

from ultramed.core.config import load_profile
from ultramed.core.errors import ConfigError
from ultramed.core.profile import BenchSection
from ultramed.core.store import Artifact
from ultramed.data import adapters
from ultramed.data.rows import read_rows, write_rows
from ultramed.evaluate.arms import Answers
from ultramed.experiments import bench, bench_general, bench_reward
from ultramed.lm import models
from ultramed.report import bench as report


def answered(*tasks, seed=0):
    """Made-up answers: tasks are (name, questions, share right)."""
    rng, rows = np.random.default_rng(seed), []
    for name, count, share in tasks:
        for n, right in enumerate(rng.permutation(count) < round(share * count)):
            rows.append(
                {"id": f"{name}:{n}", "task": name, "gold": "A", "letter": "A" if right else None, "correct": bool(right)}
            )
    return Answers(pd.DataFrame(rows))


def test_the_mean_of_tasks_counts_every_task_alike():
    table = bench.by_task({"m": answered(("medqa", 100, 0.5), ("pubmedqa", 20, 0.9))}).set_index("task")
    assert list(table.index) == ["medqa", "pubmedqa", "mean of tasks"]
    mean = table.loc["mean of tasks"]
    assert mean.accuracy == pytest.approx(0.7)
    se = np.sqrt(0.5 * 0.5 / 99 + 0.9 * 0.1 / 19) / 2
    assert mean.se == pytest.approx(se)
    assert mean.high - mean.low == pytest.approx(2 * 1.959964 * se)
    assert (mean.n, mean.unparsed, mean.upper) == (120, 52, 1.0)


def test_questions_that_were_not_asked_are_counted():
    asked = [bench.Questions("x", None, {"s": "long", "u": "whole"}, {"s": 5, "u": 2})]
    assert bench.too_long(answered(("long", 3, 1.0), ("whole", 2, 0.5)), asked) == {"long": 2}


def test_few_questions_that_are_all_alike_leave_doubt():
    def table(share):
        return (
            bench.by_task({"m": answered(("medqa", 5, share), ("pubmedqa", 5, share))}).set_index("task").loc["mean of tasks"]
        )

    right, wrong = table(1.0), table(0.0)
    assert (right.accuracy, right.high, wrong.accuracy, wrong.low) == (1, 1, 0, 0)
    assert 0.5 < right.low < 0.9
    assert 0.1 < wrong.high < 0.5
    same = answered(("medqa", 30, 0.5))
    (row,) = bench.compare_models({"a": same, "b": same}).to_dict("records")
    assert row["low"] == -row["high"] == pytest.approx(-0.1, abs=0.01), "the rule of three: 3 / 30"
    assert row["detectable"] > 0.1


def test_models_are_compared_question_by_question_within_tasks():
    a, b = answered(("medqa", 200, 0.8), ("anatomy", 50, 0.6)), answered(("medqa", 200, 0.6), ("anatomy", 50, 0.6))
    a, b = (
        Answers(
            x.frame.sort_values("correct", ascending=False).assign(
                id=lambda f: f.groupby("task").cumcount().astype(str) + f.task
            )
        )
        for x in (a, b)
    )
    (row,) = bench.compare_models({"a": a, "b": b}).to_dict("records")
    assert row["difference"] == pytest.approx(0.1), "20 points in one task of two"
    assert row["low"] < 0.1 < row["high"]
    assert row["p"] == row["p_holm"] < 0.001
    assert row["detectable"] == pytest.approx(2.8 * (row["high"] - row["low"]) / 3.92, rel=0.01)
    matrix = bench.win_matrix(bench.compare_models({"a": a, "b": b})).set_index("row less column")
    assert (matrix.loc["a", "b"], matrix.loc["b", "a"]) == ("+10.0*", "-10.0*")


def test_the_leaderboard_replaces_its_own_rows_and_keeps_the_others(tmp_path):
    def row(model, accuracy, limit=0):
        return {
            "model": model,
            "artifact": "a/1",
            "suite": "medical",
            "protocol": "greedy",
            "limit": limit,
            "task": "medqa",
        } | {"accuracy": accuracy}

    report.merge(tmp_path / "leaderboard.csv", pd.DataFrame([row("a", 0.1), row("b", 0.2)]))
    made = report.merge(tmp_path / "leaderboard.csv", pd.DataFrame([row("a", 0.3), row("a", 0.4, limit=5)]))
    assert made.set_index(["model", "limit"]).accuracy.to_dict() == {("a", "0"): 0.3, ("a", "5"): 0.4, ("b", "0"): 0.2}
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 3


def test_two_models_cannot_take_each_others_place(medalpaca):
    key = f"base_model/{medalpaca.base.key}"
    assert list(bench.models_named([f"m={key}", f"n={key}"])) == ["m", "n"]
    for second in ("m", "m "):
        with pytest.raises(ConfigError, match="a name of its own"):
            bench.models_named([f"m={key}", f"{second}={key}"])
    with pytest.raises(ConfigError, match="a name of its own"):
        bench.models_named([f"my model={key}", f"my_model={key}"])


def test_the_leaderboard_tells_ways_of_asking_apart():
    assert bench.told(BenchSection(), "medical") == "likelihood"
    assert bench.told(BenchSection(protocol="ultramedical", samples=3), "medical") == (
        "ultramedical, 3 samples, at most 1024 tokens"
    )
    judged = BenchSection(judge="http://a/v1#j", max_new_tokens=32)
    assert bench.told(judged, "general") == "likelihood, at most 32 tokens, judge http://a/v1#j"


def test_best_of_four_is_won_against_all_three_or_left_out(monkeypatch, tmp_path):
    """Prompt c has a pair that is too long for the model, d three."""
    given = {"a": [True] * 3, "b": [True, False, True], "c": [True, True]}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [
        {"id": f"{name}#{n}", "subset": "Math", "prompt": [{"role": "user", "content": name}], "meta": {"prompt_id": name}}
        | sides
        for name in "abcd"
        for n in range(3)
    ]
    write_rows(tmp_path / "pairs.parquet", rows)
    scores = [
        {"id": f"{name}#{n}", "subset": "Math", "concept": name, "chosen_score": float(right), "rejected_score": 0.5}
        | {"correct": right, "chosen_words": n, "rejected_words": 1}
        for name, rights in given.items()
        for n, right in enumerate(rights)
    ]
    made = SimpleNamespace(path=tmp_path, metrics={"too_long": 4})
    monkeypatch.setattr(bench_reward.models, "card", lambda _: {"kind": "reward"})
    monkeypatch.setattr(bench_reward, "pair_scores", lambda *_, **__: made)
    monkeypatch.setattr(bench_reward, "read_scores", lambda _: pd.DataFrame(scores))
    monkeypatch.setattr(bench_reward, "length_correlation", lambda _: 0.0)
    table, biases, _ = bench_reward.score_reward("rewardbench2", None, Artifact("pairs", "0", tmp_path))
    assert (table.accuracy.item(), table.n.item(), biases["prompts left out"]) == (0.5, 2, 2)


def test_ties_of_rewardbench_2_make_no_pairs():
    row = {"id": "1", "subset": "Ties", "prompt": "A colour of the rainbow?", "chosen": ["red", "green"], "rejected": ["pink"]}
    assert adapters.rewardbench2(row, 0) == []
    assert len(adapters.rewardbench2({**row, "chosen": ["red"]}, 0)) == 1


def test_names_prices_and_protocols():
    assert bench.named("my model=sft/0123abcd") == ("my model", "sft/0123abcd")
    assert bench.named("http://localhost:8000/v1#a=b") == ("http://localhost:8000/v1#a=b",) * 2
    with pytest.raises(ValueError, match="samples are of reasoned replies"):
        BenchSection(protocol="greedy", samples=3)
    e = bench.Load(10, 2_000_000, 1_000_000)
    assert e.seconds(1e9, gflops=100, utilisation=0.5) == pytest.approx(2 * 1e9 * 3e6 / 5e10)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return hub.build(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def from_hub(mirror, monkeypatch):
    monkeypatch.setenv("ULTRAMED_HUB", str(mirror))
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)


def test_all_nine_tasks_from_the_command_line(from_hub, medalpaca, tmp_path):
    model = f"base_model/{medalpaca.base.key}"
    done = ultramed(
        "bench", "-m", f"tiny={model}", "-m", f"same={model}", "--limit", 3, "--shuffle", 1, "--out", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    board = pd.read_csv(tmp_path / "b/leaderboard.csv")
    assert set(board.task) == {*bench.TASKS, "mean of tasks"}
    assert (board[board.task != "mean of tasks"].n == 3).all()
    assert "27 questions" in done.stdout
    results = json.loads((tmp_path / "b/tiny/results.json").read_text())
    medqa = board[(board.model == "tiny") & (board.task == "medqa")].iloc[0]
    assert results["results"]["medqa"]["acc,none"] == pytest.approx(medqa.accuracy, abs=1e-6)
    assert len((tmp_path / "b/tiny/samples_medqa.jsonl").read_text().splitlines()) == 3
    page = (tmp_path / "b/index.html").read_text()
    assert all(text in page for text in ("UltraMix Best (Ens)", "measured here", "timeline.png"))
    pairs = pd.read_csv(tmp_path / "b/comparisons.csv")
    assert (pairs.difference == 0).all()


def test_orders_of_options_that_a_prompt_does_not_show_tell_nothing(from_hub, medalpaca):
    """PubMedQA's prompts under likelihood name no options: a letter that has moved says nothing of what an answer follows."""
    config = bench.BenchSection(limit=8, shuffle=2)
    asked = [part for part in bench.medical_questions(config.limit, fetch=True)[0] if "pubmedqa" in part.tasks.values()]
    assert asked
    found = bench.option_order(config, medalpaca.base, asked, bench.ask(config, medalpaca.base, asked))
    assert (found["n"], found["orders"]) == (0, 3)
    assert found["accuracy_sd"] == 0, "the same prompts and choices"


def test_what_was_paid_counts_replies_with_any_line_separator(tmp_path):
    from ultramed.core.ledger import write_lines
    from ultramed.core.store import Artifact

    row = {"text": "one\u2028two\x85three", "requests": 1, "tokens": 5, "completion_tokens": 2}
    write_lines(tmp_path / "requests.jsonl", [row, row])
    assert bench.paid([Artifact("answers", "k", tmp_path)])["tokens"] == 10


def test_reasoned_replies_samples_and_scorers(from_hub, medalpaca, tmp_path):
    model = f"base_model/{medalpaca.base.key}"
    more = ("--protocol", "ultramedical", "--samples", 2, "--set", "max_new_tokens=6")
    done = ultramed("bench", "-m", model, "--limit", 2, *more, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "other projects' scorers" not in done.stdout, "a vote is no reply"
    done = ultramed("bench", "-m", model, "--limit", 2, *more[:2], *more[4:], "--out", tmp_path / "b")
    assert "HuatuoGPT-o1" in done.stdout
    assert len(pd.read_csv(tmp_path / "b/leaderboard.csv").protocol.unique()) == 2


def test_general_and_reward_suites(from_hub, medalpaca, tmp_path, smoke):
    from ultramed.experiments.ultramedical import UltraMedical

    model = f"base_model/{medalpaca.base.key}"
    more = ("--limit", 2, "--set", "max_new_tokens=6", "--out", tmp_path / "b")
    done = ultramed("bench", "-m", model, "--suite", "general", *more)
    assert done.returncode == 0, done.stderr
    assert set(pd.read_csv(tmp_path / "b/leaderboard.csv").task) == {"gsm8k", "mmlu"}
    scorer = UltraMedical.of(smoke).train_reward_model("medical")
    done = ultramed("bench", "-m", f"rm=reward/{scorer.key}", "--suite", "reward", *more[-2:])
    assert done.returncode == 0, done.stderr
    assert re.search(r"rm: \d+ pairs, about [\d,]+ tokens to read, at most 0 to write; at most about", done.stdout)
    page = (tmp_path / "b/index.html").read_text()
    assert all(title in page for title in ("<h1>General abilities</h1>", "<h1>Reward bench</h1>", "<td>gsm8k</td>"))
    board = pd.read_csv(tmp_path / "b/leaderboard.csv")
    assert {"medical_rewardbench: human", "rewardbench: math-prm", "reasoning", "mean of sections"} <= set(board.task)
    two = board[board.task == "rewardbench2: Factuality"].iloc[0]
    assert two.n == 42, "a prompt counts once, not once for each of its three wrong replies"
    assert json.loads((tmp_path / "b/rm/rewardbench.json").read_text())["model_type"] == "Seq. Classifier"
    assert len(board[board.suite == "general"]), "the other suite's rows stay"
    assert board[board.task == "gsm8k"].upper.notna().all()
    done = ultramed("bench", "-m", f"rm=reward/{scorer.key}", "--suite", "reward", "--limit", 1, *more[-2:])
    board = pd.read_csv(tmp_path / "b/leaderboard.csv").query("suite == 'reward' and limit == 1")
    assert board[board.task == "medical_rewardbench: human"].n.item() == 1
    assert board[board.task == "rewardbench2: Factuality"].n.item() == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("-m", "tiny:llama", "--suite", "general"), "no general task is at hand"),
        (("-m", "tiny:llama", "--suite", "reward", "--shuffle", 2), "belong to suite medical"),
        (("-m", "tiny:llama", "-m", "http://localhost:9/v1#x", "--limit", 1), "a server gives no likelihoods"),
    ],
)
def test_what_a_suite_cannot_do_is_said_before_it_starts(more, says, monkeypatch, tmp_path):
    for name in ("ULTRAMED_DATA", "ULTRAMED_HUB"):
        monkeypatch.delenv(name, raising=False)
    done = ultramed("bench", *more, "--out", tmp_path / "b")
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "b").exists()


def test_a_judge_behind_a_url_is_asked_in_both_orders(from_hub, fresh_store):
    """It prefers whatever stands first, except that a reply which says "Right" always wins."""

    def answer(body):
        text = body["messages"][-1]["content"]
        first, second = text.split("Reply A:")[1].split("Reply B:")
        better = "A" if "Right" in first else "B" if "Right" in second else "A"
        return json.dumps({"reason": "x", "better": better})

    with Faulty(answer=answer) as server:
        where = server.config()
        model = models.resolve(f"{where.url}#{where.model}")
        found, _ = bench_reward.reward_pairs()
        table, biases, _ = bench_reward.score_reward("rewardbench", model, found["rewardbench"])
        assert "biomedical" not in server.bodies[-1]["messages"][0]["content"]
        assert (table.accuracy == 1).all()
        assert (biases["orders agree"], biases["ties"]) == (1.0, 0)
        table, biases, _ = bench_reward.score_reward("medical_rewardbench", model, found["medical_rewardbench"])
        assert "biomedical" in server.bodies[-1]["messages"][0]["content"]
    assert (table.accuracy == 0.5).all(), "first place decides: no order agrees with the other"
    assert (biases["orders agree"], biases["ties"]) == (0.0, 42)


def test_mt_bench_is_graded_by_a_judge(data, medalpaca, monkeypatch, fresh_store):
    monkeypatch.setenv("ULTRAMED_DATA", str(data))
    with Faulty(
        answer=lambda body: json.dumps({"reason": "x", "score": 4 if "User: " in body["messages"][-1]["content"] else 1})
    ) as server:
        where = server.config()
        config = BenchSection(limit=2, max_new_tokens=4, judge=f"{where.url}#{where.model}")
        row, _ = bench_general.mt_bench(config, models.base_model(medalpaca.config), bench_general.at_hand("mt_bench"))
    assert (row["task"], row["accuracy"], row["n"], row["unparsed"]) == ("mt_bench, of 10", 0.4, 4, 0)


def test_alpaca_eval_is_judged_in_both_orders_against_the_baseline(data, medalpaca, monkeypatch, fresh_store):
    """The judge likes short replies; one of ours is empty, which no judge need see to be lost."""
    monkeypatch.setenv("ULTRAMED_DATA", str(data))
    baseline = bench_general.at_hand("alpaca_eval")
    texts = ("No.", "Ask.", "")
    first = read_rows(baseline / "test.parquet")[: len(texts)]
    said = [{**row, "reply": text, "replies": [text]} for row, text in zip(first, texts, strict=True)]
    monkeypatch.setattr(bench_general, "replies", lambda *_, **__: lines(rows=said, name="replies.jsonl"))
    seen = []

    def answer(body):
        seen.append(body["messages"])
        first, second = body["messages"][-1]["content"].split("\n\nReply B:\n")
        return json.dumps({"better": "A" if len(first) < len(second) else "B"})

    with Faulty(answer=answer) as server:
        where = server.config()
        config = BenchSection(judge=f"{where.url}#{where.model}")
        row, _ = bench_general.alpaca_eval(config, models.base_model(medalpaca.config), baseline)
    assert (row["task"], row["plain win rate"]) == ("alpaca_eval, length-controlled", pytest.approx(2 / 3))
    assert (row["n"], len(seen)) == (3, 4)
    assert "medical" not in seen[0][0]["content"]
    assert "reference" not in seen[0][0]["content"], "the baseline's reply is no reference"


def test_nothing_at_hand_means_the_bundled_exam_and_says_what_to_fetch(medalpaca, tmp_path, monkeypatch):
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    monkeypatch.delenv("ULTRAMED_HUB", raising=False)
    done = ultramed("bench", "-m", f"base_model/{medalpaca.base.key}", "--limit", 2, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "not at hand   medqa: hub GBaker/MedQA-USMLE-4-options" in done.stdout
    assert "exam_step3" in done.stdout


def test_killed_five_times_it_ends_with_the_same_files(from_hub, medalpaca, tmp_path, fresh_store):
    """kill -9 at any moment, then again: the finished bench is the one that nobody touched."""
    model = models.base_model(medalpaca.config)
    command = [sys.executable, "-m", "ultramed", "bench", "-m", f"tiny=base_model/{model.key}", "--limit", "12"]
    command += ["--protocol", "ultramedical", "--samples", "3", "--set", "max_new_tokens=24", "--set", "batch_tokens=600"]
    kills = 0
    for wait in (6, 8, 9, 10, 11, 300):
        running = subprocess.Popen(
            [*command, "--out", tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        clock = time.monotonic()
        while running.poll() is None and time.monotonic() - clock < wait:
            time.sleep(0.05)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
    assert kills >= 1
    assert running.returncode == 0
    whole = {**os.environ, "ULTRAMED_STORE": str(tmp_path / "other")}
    done = subprocess.run(
        [*command[:5], "tiny=tiny:llama", *command[6:], "--out", tmp_path / "whole"], env=whole, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.suffix in (".jsonl",):
            assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path.name
    boards = [pd.read_csv(tmp_path / name / "leaderboard.csv").drop(columns="artifact") for name in ("killed", "whole")]
    pd.testing.assert_frame_equal(*boards)


def test_a_server_that_fails_loses_nothing_and_is_not_asked_twice(from_hub, tmp_path, fresh_store, monkeypatch):
    """One request in five fails or is dropped; every question is answered once, and the second run asks nothing."""
    monkeypatch.setattr("random.random", lambda: 0.0)  # no waiting between tries

    def answer(body):
        return "I think so.\nAnswer: A"

    with Faulty(faults=lambda n: ("drop", 500, 429)[n // 5 % 3] if n % 5 == 4 else None, answer=answer) as server:
        where = server.config()
        model = models.resolve(f"{where.url}#{where.model}")
        config = BenchSection(protocol="ultramedical", limit=4, max_new_tokens=16)
        questions, _ = bench.medical_questions(4)
        made = bench.ask(config, model, questions)
        asked = len(server.bodies)
        assert bench.ask(config, model, questions).frame.equals(made.frame)
        assert len(server.bodies) == asked
    assert len(made.frame) == 36
    assert set(made.frame.letter) == {"A"}
    texts = [body["messages"][-1]["content"] for body in server.bodies]
    assert len(set(texts)) == 36
    assert asked < 36 * 1.5, "what was answered is not asked again"


def test_notebook_parameters_name_the_models():
    profile = load_profile("smoke")
    assert profile.bench.models == []
    with pytest.raises(ConfigError, match=r"bench\.protocol"):
        load_profile("smoke", ["bench.protocol=guess"])
