"""The client against a server that misbehaves, over real sockets; test_server.py has a real model behind it."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from faulty import Faulty
from pydantic import BaseModel

from ultramed.core.client import BudgetError, Request, ServerConfig, ServerError, ask, bill, read_json, spent
from ultramed.core.errors import ConfigError
from ultramed.core.ledger import Ledger

KEY = "sk-not-to-be-seen-anywhere"


def requests(count, **options):
    return [Request(f"q{i}", [{"role": "user", "content": f"question {i}"}], options) for i in range(count)]


def test_every_request_is_answered_once_in_order_and_never_more_than_allowed_at_a_time(tmp_path):
    with Faulty(delay=0.01) as server:
        rows = ask(server.config(concurrency=4), requests(40, temperature=0.5), tmp_path / "l.jsonl")
        assert [r["id"] for r in rows] == [f"q{i}" for i in range(40)]
        assert [r["text"] for r in rows] == [f"question {i}"[::-1] for i in range(40)]
        assert server.most == 4
        assert {b["temperature"] for b in server.bodies} == {0.5}
        again = ask(server.config(), requests(40, temperature=0.5), tmp_path / "l.jsonl")
        assert again == rows
        assert len(server.bodies) == 40, "nothing is paid twice"
        ask(server.config(), requests(1, temperature=0.9), tmp_path / "l.jsonl")
        assert len(server.bodies) == 41, "other options are another request"


def test_faults_are_tried_again_and_the_wait_that_the_server_asks_for_is_kept(tmp_path):
    kinds = {0: "drop", 1: 500, 2: (429, "slow", {"retry-after": "1"}), 3: (200, "not json", {}), 4: (200, "{}", {}), 5: 503}
    with Faulty(lambda n: kinds.get(n)) as server:
        start = time.monotonic()
        rows = ask(server.config(concurrency=1, longest_wait=1.0), requests(2), tmp_path / "l.jsonl")
        assert time.monotonic() - start >= 1.0
    assert [(r["status"], r["requests"]) for r in rows] == [("ok", 7), ("ok", 1)]


def test_what_stays_unanswered_is_an_error_and_the_rest_is_kept(tmp_path):
    why = r"2 of 5 requests have no answer after 2 tries each.*HTTP 500"
    with Faulty(lambda n: None if n < 3 else 500) as server, pytest.raises(ServerError, match=why):
        ask(server.config(concurrency=1, tries=2), requests(5), tmp_path / "l.jsonl")
    with Ledger(tmp_path / "l.jsonl") as ledger:
        assert len(ledger) == 3
    with Faulty() as server:
        rows = ask(server.config(), requests(5), tmp_path / "l.jsonl")
        assert len(server.bodies) == 2
        assert len(rows) == 5


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (404, "/chat/completions"), (400, "did not understand")])
def test_what_no_other_try_can_mend_stops_at_once(tmp_path, monkeypatch, status, hint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Faulty(lambda n: (status, f"your key {KEY} is wrong", {})) as server:
        with pytest.raises(ConfigError, match=hint) as caught:
            ask(server.config(concurrency=2), requests(30), tmp_path / "l.jsonl")
        assert len(server.bodies) <= 4
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    assert KEY not in (tmp_path / "l.jsonl").read_text()


def test_budgets_stop_the_run_and_count_what_earlier_runs_spent(tmp_path):
    with Faulty() as server:
        with pytest.raises(BudgetError, match=r"used up \(6 requests, 30 tokens\); 4 of 10 are left"):
            ask(server.config(concurrency=1, max_requests=6), requests(10), tmp_path / "l.jsonl")
        with pytest.raises(BudgetError):
            ask(server.config(concurrency=1, max_tokens=40), requests(10), tmp_path / "l.jsonl")
        assert len(server.bodies) == 8
        ask(server.config(), requests(10), tmp_path / "l.jsonl")
    with Ledger(tmp_path / "l.jsonl") as ledger:
        assert spent(ledger.rows.values()) == {"requests": 10, "tokens": 50, "completion_tokens": 20}


def test_a_server_on_this_machine_is_asked_without_a_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Faulty() as server:
        assert len(ask(server.config(tries=1), requests(2), tmp_path / "l.jsonl")) == 2


def test_what_it_costs_is_told_as_it_goes(tmp_path, monkeypatch, capsys):
    assert bill(3_000_000, 1_000_000) == "3,000,000 tokens", "no prices, no cost"
    monkeypatch.setenv("ULTRAMED_PRICES", "0.5,2")
    assert bill(3_000_000, 1_000_000) == "3,000,000 tokens, $3.00"
    monkeypatch.delenv("ULTRAMED_PROGRESS_FILE", raising=False)
    monkeypatch.setenv("ULTRAMED_PRICES", "5000,20000")
    with Faulty() as server:  # three tokens read and two written a request
        ask(server.config(), requests(4), tmp_path / "l.jsonl")
    assert "(20 tokens, $0.22)" in capsys.readouterr().err
    monkeypatch.setenv("ULTRAMED_PRICES", "a lot")
    with pytest.raises(ConfigError, match=r"wanted dollars a million tokens in and out, such as 0\.15,0\.6"):
        bill(1, 1)


class Score(BaseModel):
    score: int
    why: str = ""


def test_structured_answers_are_asked_for_mended_once_and_named_when_they_fail(tmp_path):
    def answer(body):
        first, last = body["messages"][0]["content"], body["messages"][-1]["content"]
        if first == "question 0":
            return 'Sure:\n```json\n{"score": 7, "why": "ok",}\n```'
        if first == "question 1":
            return '{"score": 3}' if "cannot be used" in last else "seven"
        return '{"score": "many"}'

    with Faulty(answer=answer) as server:
        rows = ask(server.config(concurrency=1), requests(3), tmp_path / "l.jsonl", schema=Score)
        assert server.bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["score"]
    assert [r["status"] for r in rows] == ["ok", "ok", "unparsed"]
    assert [r["value"] for r in rows] == [{"score": 7, "why": "ok"}, {"score": 3, "why": ""}, None]
    assert [r["requests"] for r in rows] == [1, 2, 2]
    assert "score" in rows[2]["reason"]


def test_a_server_without_structured_outputs_is_asked_without(tmp_path):
    def faults(n):
        return (400, '{"error": "unknown field response_format"}', {}) if n == 0 else None

    with Faulty(faults, answer=lambda body: '{"score": 1}') as server:
        rows = ask(server.config(concurrency=1), requests(2), tmp_path / "l.jsonl", schema=Score)
        assert ["response_format" in b for b in server.bodies] == [True, False, False]
    assert [r["value"]["score"] for r in rows] == [1, 1]


def test_structured_outputs_are_refused_to_several_workers_at_once(tmp_path):
    """All of them had sent the parameter before the first answer said that there is no such thing."""
    refusal = (400, '{"error": "unknown field response_format"}', {})
    with Faulty(lambda n: refusal if n < 4 else None, delay=0.1, answer=lambda body: '{"score": 1}') as server:
        rows = ask(server.config(concurrency=4), requests(6), tmp_path / "l.jsonl", schema=Score)
    assert [r["value"]["score"] for r in rows] == [1] * 6
    assert [r["requests"] for r in rows] == [2, 2, 2, 2, 1, 1]


def test_a_proxy_of_the_environment_is_used_unless_the_server_is_exempt(tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Faulty() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.http.server_port}")
        where = ServerConfig(url="http://model.invalid/v1", model="m", tries=1)
        assert ask(where, requests(1), tmp_path / "l.jsonl")[0]["text"] == "0 noitseuq"
        monkeypatch.setenv("no_proxy", "model.invalid")
        with pytest.raises(ServerError, match=r"model\.invalid"):
            ask(where, requests(1), tmp_path / "m.jsonl")
        assert len(proxy.bodies) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 2}',
        'x {"a": 1} {"score": 2}',
        '```\n{"score": 2, }```',
        '{"score": 2} {"score": 3}',
        '<think>Perhaps {"score": 1}? No.</think>\n{"score": 2}',
        '{"score": NaN} {"score": 2}',
    ],
)
def test_the_first_object_that_fits_is_read(text):
    assert read_json(text, Score)[0] == {"score": 2, "why": ""}


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "https://me:key@host/v1", "https://host/v1?key=1"])
def test_addresses_that_cannot_be_used_or_hold_a_key(url):
    with pytest.raises(ValueError, match="url"):
        ServerConfig(url=url, model="m")


def test_a_server_by_its_short_name():
    where = ServerConfig.of("http://localhost:8000/v1/#org/model", concurrency=2)
    assert (where.url, where.model, where.concurrency) == ("http://localhost:8000/v1", "org/model", 2)
    for wrong in ("http://localhost:8000/v1", "http://localhost:8000/v1#", "localhost#m", "http://me:secret@host/v1#m"):
        with pytest.raises(ConfigError, match="url#model") as err:
            ServerConfig.of(wrong)
        assert "secret" not in str(err.value)


def test_it_works_where_an_event_loop_is_running_as_in_a_notebook(tmp_path):
    import asyncio

    async def cell(server):
        return ask(server.config(), requests(3), tmp_path / "l.jsonl")

    with Faulty() as server:
        assert len(asyncio.run(cell(server))) == 3


CLIENT = """
import sys
from pathlib import Path
from ultramed.core.client import bill, Request, ServerConfig, ask
requests = [Request(f"q{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(500)]
ask(ServerConfig(url=sys.argv[1], model="m", longest_wait=0.2, tries=20), requests, Path(sys.argv[2]))
"""


def test_500_requests_survive_faults_and_three_kills(tmp_path):
    """20% of the requests fail, connections drop, the client is killed three times: 500 rows, each once."""
    rng = random.Random(0)

    def faults(number):
        return rng.choice([500, 429, 503, "drop"]) if rng.random() < 0.2 else None

    path, size = tmp_path / "l.jsonl", lambda: path.read_text().count("\n") if path.exists() else 0
    with Faulty(faults, delay=0.02) as server:
        command = [sys.executable, "-c", CLIENT, server.config().url, str(path)]
        for stop in (100, 230, 390):
            client = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "TQDM_DISABLE": "1"})
            while client.poll() is None and size() < stop:
                time.sleep(0.005)
            client.send_signal(signal.SIGKILL)
            client.wait()
            assert stop <= size() < 500
        assert subprocess.run(command, stderr=subprocess.PIPE, check=False).returncode == 0
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(r["id"] for r in rows) == sorted(f"q{i}" for i in range(500))
        assert all(r["text"] == f"question {r['id'][1:]}"[::-1] for r in rows)
        # Only what was on its way when the client was killed can have been answered without having been written down.
        assert sum(server.done.values()) - 500 <= 3 * 16


def with_usage(usage, content="fine"):
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage})


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 5, "completion_tokens": None, "total_tokens": None}, 5),
        ({"prompt_tokens": "five"}, 0),
        ("none", 0),
        (None, 0),
    ],
)
def test_an_odd_count_of_tokens_loses_no_answer(tmp_path, usage, tokens):
    with Faulty(faults=lambda number: (200, with_usage(usage), {})) as server:
        (row,) = ask(server.config(), requests(1), tmp_path / "l.jsonl")
    assert (row["text"], row["tokens"], row["status"]) == ("fine", tokens, "ok")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (with_usage({}, [{"type": "text", "text": "parts"}]), "no text but a list"),
        ('{"error": {"message": "the model is asleep"}}', "the model is asleep"),
        ("[]", "without choices"),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_says_what_came(tmp_path, text, said):
    with Faulty(faults=lambda number: (200, text, {})) as server, pytest.raises(ServerError, match=said):
        ask(server.config(tries=2), requests(1), tmp_path / "l.jsonl")
    assert len(server.bodies) == 2


def test_a_used_up_quota_and_a_moved_server_stop_at_once(tmp_path):
    gone = (429, '{"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}', {})
    with Faulty(faults=lambda number: gone) as server, pytest.raises(ConfigError, match=r"quota is used up.*You exceeded"):
        ask(server.config(tries=4), requests(1), tmp_path / "l.jsonl")
    assert len(server.bodies) == 1
    moved = (308, "", {"location": "http://elsewhere/v1"})
    with Faulty(faults=lambda number: moved) as server, pytest.raises(ConfigError, match=r"another address.*elsewhere"):
        ask(server.config(tries=4), requests(1), tmp_path / "m.jsonl")


def test_what_a_server_writes_after_the_stop_is_cut_and_top_k_is_not_said_silently(tmp_path, caplog):
    from ultramed.evaluate.engine import Server
    from ultramed.evaluate.generate import Reply, Sampling

    got = []
    with Faulty(answer=lambda body: "(B). And more.") as server:
        engine = Server(server.config(), tmp_path / "l.jsonl")
        conversation = [{"role": "user", "content": "?"}]
        engine.replies([conversation], Sampling(8, 0.5, top_k=20, stop=r"\([A-D]\)"), lambda _, made: got.extend(made))
        assert "top_k" not in server.bodies[0]
    assert got == [Reply("(B)", 2, True)]
    assert "is not told top_k=20" in caplog.text
