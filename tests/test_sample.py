"""Samples depend on seed, question and number alone; prompts are shared; runs resume; feedback joins them."""

import json
import re
import weakref

import pytest
import torch

from ultramed.annotate.feedback import OracleConfig, feedback
from ultramed.core.ledger import Ledger
from ultramed.core.schema import SampleConfig
from ultramed.data.messages import names_option
from ultramed.evaluate.engine import asking
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.evaluate.sample import read_feedback, read_samples, references, samples
from ultramed.lm import models

CONFIG = SampleConfig(n=4, max_new_tokens=5, temperature=1.0)


@pytest.fixture(scope="module")
def made(medalpaca, exam):
    return samples(CONFIG, model=medalpaca.base, questions=exam, select={"step1": [0, 6]})


def test_the_first_samples_of_many_are_those_of_few(medalpaca, exam, made):
    few = samples(CONFIG.model_copy(update={"n": 2}), model=medalpaca.base, questions=exam, select={"step1": [0, 6]})
    for a, b in zip(read_samples(few), read_samples(made), strict=True):
        assert [r["text"] for r in a["replies"]] == [r["text"] for r in b["replies"][:2]]
    assert made.metrics["samples"] == 24
    assert len({r["text"] for row in read_samples(made) for r in row["replies"]}) > 12, "samples differ"


def test_sharing_the_prompt_and_batching_change_no_reply(medalpaca, tokenizer):
    net = models.load(medalpaca.base, dtype=torch.float32)
    prompts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("what is a", "the finding of", "name")]
    repeated = [p for p in prompts for _ in range(3)]
    sampling = Sampling(8, temperature=1.0, top_k=0)

    def replies(budget):
        rngs = [item_rng(7, i) for i in range(len(repeated))]
        return [r.text for r in generate(net, tokenizer, repeated, sampling, budget=budget, rngs=rngs)]

    together = replies(10**6)
    assert together == replies(1), "one sequence a batch"
    rngs = [item_rng(7, i) for i in range(len(repeated))]
    alone = [generate(net, tokenizer, [p], sampling, rngs=[r])[0].text for p, r in zip(repeated, rngs, strict=True)]
    assert together == alone


def test_a_reply_ends_at_its_stop(medalpaca, tokenizer):
    net = models.load(medalpaca.base, dtype=torch.float32)
    prompt = tokenizer("what is a", add_special_tokens=False)["input_ids"]
    whole = generate(net, tokenizer, [prompt], Sampling(12))[0]
    stop = re.escape(whole.text[3:5])
    cut = generate(net, tokenizer, [prompt], Sampling(12, stop=stop))[0]
    assert cut.finished
    assert cut.tokens <= whole.tokens
    assert cut.text == whole.text[: re.search(stop, whole.text).end()]


def test_an_interrupted_run_goes_on(medalpaca, exam, fresh_store, monkeypatch):
    from ultramed.evaluate import engine as module

    own = {"model": models.base_model(medalpaca.config), "select": {"step1": [0, 6]}}
    from ultramed.core.config import load_profile
    from ultramed.data.sources import dataset

    own["questions"] = dataset(load_profile("smoke"), "exam")
    real, calls = module.generate, []

    def failing(*args, done=None, **kwargs):
        def count(batch, replies):
            done(batch, replies)
            calls.append(len(batch))
            if len(calls) == 2:
                raise KeyboardInterrupt

        return real(*args, done=count, **kwargs)

    config = CONFIG.model_copy(update={"batch_tokens": 300})
    monkeypatch.setattr(module, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        samples(config, **own)
    monkeypatch.setattr(module, "generate", real)
    resumed = read_samples(samples(config, **own))
    assert [r["index"] for r in resumed] == list(range(6))
    kept = [p for p in fresh_store.rglob("samples.jsonl")]
    assert len(kept) == 1
    assert len({json.loads(line)["id"] for line in kept[0].read_text().splitlines()}) == 6


def test_weights_are_let_go_before_the_next_ones_are_loaded(medalpaca, tmp_path):
    """Also while the caller still has a name for the engine, as every stage has."""
    with Ledger(tmp_path / "ledger.jsonl", key="id") as ledger:
        with asking(ledger, 1, "samples", "question", medalpaca.base, None, tmp_path, budget=64) as (engine, _):
            net = weakref.ref(engine.net)
        assert net() is None


def test_a_guesser_is_right_by_chance_and_always_in_form(exam):
    rows = read_samples(references(CONFIG, questions=exam, side="test", select={"step1": [0, 60]}, guess=True))
    replies = [(row, reply) for row in rows for reply in row["replies"]]
    assert all(names_option(row["prompt"], reply["letter"], reply["text"]) and reply["strict"] for row, reply in replies)
    right = sum(reply["letter"] == row["gold"] for row, reply in replies)
    assert 0.1 < right / len(replies) < 0.4
    assert all(reply["text"] == row["reference"] for row, reply in replies if reply["letter"] == row["gold"])


def test_feedback_joins_candidates_by_prompt(exam, made):
    one = CONFIG.model_copy(update={"n": 1})
    gold = references(one, questions=exam, side="test", select={"step1": [0, 6]})
    rows = read_feedback(feedback(OracleConfig(), reference=gold, tiny=made))
    assert [len(r["candidates"]) for r in rows] == [5] * 6
    for row in rows:
        best = min(row["candidates"], key=lambda c: c["rank"])
        assert best["model"] == "reference"
        assert best["letter"] == row["gold"]
        assert best["text"] == row["reference"]
