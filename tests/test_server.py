"""A real OpenAI-compatible server, `transformers serve` with the bundled model, against the same weights in this process."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from pydantic import BaseModel

from ultramed.core.client import Request, ServerConfig, ask
from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig, ModelConfig, SampleConfig
from ultramed.data.messages import as_completion
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.sample import read_samples, samples
from ultramed.lm import models

SELECT = {"step1": [0, 4], "step2": [0, 4]}


@pytest.fixture(scope="module")
def weights(places):
    return models.base_model(ModelConfig(name="bundled:smollm2-135m", label="SmolLM2-135M"))


@pytest.fixture(scope="module")
def url(weights, tmp_path_factory):
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = tmp_path_factory.mktemp("hub")
    command = ["serve", str(weights.path), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *command],
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended by itself"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.25)
        else:
            pytest.fail("the server did not come up in a minute")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def test_greedy_answers_of_a_server_are_those_of_the_weights(url, weights, exam):
    config = EvalConfig(max_new_tokens=12)
    served = models.resolve(f"{url}#{weights.path}")
    theirs = read_answers(answers(config, model=served, questions=exam, select=SELECT)).set_index("id")
    ours = read_answers(answers(config, model=weights, questions=exam, select=SELECT, dtype="float32")).set_index("id")
    assert list(theirs.loc[ours.index].reply) == list(ours.reply)
    assert theirs.letter.fillna("").to_dict() == ours.letter.fillna("").to_dict()


def test_samples_come_from_a_server_too(url, weights, exam):
    served = models.resolve(f"{url}#{weights.path}")
    config = SampleConfig(n=3, max_new_tokens=8, temperature=1.0)
    made = samples(config, model=served, questions=exam, select={"step1": [0, 2]})
    assert [len(row["replies"]) for row in read_samples(made)] == [3, 3]
    assert (made / "requests.jsonl").read_text().count("\n") == 6


def test_a_bench_through_a_line_that_fails_every_fifth_time(url, weights, data, fresh_store):
    """A proxy before the real server drops, refuses or breaks one request in five: the answers are those of the server asked
    directly, the server itself is asked each question once, and every request is counted."""
    from faulty import Faulty

    from ultramed.core.profile import BenchSection
    from ultramed.experiments import bench

    forwarded = []

    def forward(body):
        forwarded.append(body)
        reply = httpx.post(f"{url}/chat/completions", json={**body, "model": str(weights.path)}, timeout=300)
        return reply.json()["choices"][0]["message"]["content"]

    config = BenchSection(protocol="ultramedical", limit=1, max_new_tokens=6)
    questions, missing = bench.medical_questions(1)
    assert not missing
    with Faulty(faults=lambda n: ("drop", 500, 429)[n // 5 % 3] if n % 5 == 4 else None, answer=forward) as proxy:
        where = proxy.config()
        made = bench.ask(config, models.resolve(f"{where.url}#{where.model}"), questions)
        again = bench.ask(config, models.resolve(f"{where.url}#{where.model}"), questions)
        asked = len(proxy.bodies)
    direct = bench.ask(config, models.resolve(f"{url}#{weights.path}"), questions)
    assert list(made.frame.reply) == list(direct.frame.reply)
    assert again.frame.equals(made.frame)
    assert len(made.frame) == len(forwarded) == 9
    assert bench.paid(made.artifacts)["requests"] == asked > 9


class Verdict(BaseModel):
    score: int


def test_a_small_model_that_cannot_write_json_is_named_unparsed(url, weights, tmp_path):
    server = ServerConfig(url=url, model=str(weights.path), concurrency=2)
    asked = [Request("a", [{"role": "user", "content": "Say hello."}], {"max_tokens": 4, "temperature": 0})]
    (row,) = ask(server, asked, tmp_path / "l.jsonl", schema=Verdict)
    assert row["status"] in ("ok", "unparsed")
    assert row["requests"] >= 1
    assert row["tokens"] > 0


def test_what_needs_weights_says_so(exam):
    served = models.resolve("http://127.0.0.1:9/v1#m")
    for protocol in ("likelihood", "medalpaca"):
        with pytest.raises(ConfigError, match="needs the weights"):
            answers(EvalConfig(protocol=protocol), model=served, questions=exam, select=SELECT)
    with pytest.raises(ConfigError, match="its weights are not at hand"):
        models.load(served)
    with pytest.raises(ConfigError, match="url#model"):
        models.resolve("http://127.0.0.1:9/v1")
    assert as_completion("x")[0]["role"] == "assistant"
