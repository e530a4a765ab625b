"""Held-out loss: transformers' own loss, whoever shares a batch, whatever stops it; and its comparison, by hand."""

import json

import pandas as pd
import pytest
import torch
from handmade import given

from ultramed.core import config as settings
from ultramed.core.errors import ConfigError
from ultramed.data.mixture import MixtureConfig, mixture
from ultramed.data.rows import read_instructions
from ultramed.evaluate import held_out
from ultramed.evaluate.held_out import LossConfig, difference, held_out_loss, mean_loss, read_losses
from ultramed.evaluate.stats import bootstrap_means
from ultramed.lm import models
from ultramed.lm.templates import TEMPLATES
from ultramed.lm.tokens import encode_rows, labels


@pytest.fixture(scope="module")
def rows(exam):
    return mixture(MixtureConfig(counts={"exam:step1": 20, "exam:general": 12}), exam=exam)


def losses(rows, model, **config):
    return held_out_loss(LossConfig(**config), model=model, data=rows, side="rows", dtype="float32")


def test_it_is_transformers_own_loss(medalpaca, rows, tokenizer):
    net = models.load(medalpaca.base, dtype=torch.float32).eval()
    made = losses(rows, medalpaca.base)
    found = read_losses(made).set_index("id")
    total = tokens = 0
    for row in read_instructions(rows / "rows.parquet"):
        (ids,) = encode_rows([row], tokenizer, TEMPLATES["chat"], 2048)
        wanted = labels(ids["input_ids"], ids["prompt_length"])
        with torch.no_grad():
            loss = net(input_ids=torch.tensor([ids["input_ids"]]), labels=torch.tensor([wanted])).loss.item()
        one = found.loc[row["id"]]
        assert one.tokens == len(ids["input_ids"]) - ids["prompt_length"]
        assert ids["input_ids"][-1] == tokenizer.eos_token_id, "the end of the completion counts"
        assert one.nll / one.tokens == pytest.approx(loss, rel=1e-4)
        total, tokens = total + loss * one.tokens, tokens + one.tokens
    assert len(found) == made.metrics["rows"] == 32
    assert made.metrics["tokens"] == tokens
    assert made.metrics["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert mean_loss(read_losses(made)).value == pytest.approx(made.metrics["loss"])


def test_a_batch_and_one_at_a_time_are_equal(medalpaca, rows):
    together, alone = (read_losses(losses(rows, medalpaca.base, batch_tokens=n)).set_index("id") for n in (4096, 64))
    assert alone.nll.to_dict() == pytest.approx(together.loc[alone.index].nll.to_dict(), abs=1e-3)
    assert alone.tokens.equals(together.loc[alone.index].tokens)


def test_several_processes_and_an_interrupted_run_give_the_same(medalpaca, rows, monkeypatch, fresh_store):
    models.base_model(medalpaca.config)
    real, read = held_out.score, []

    def stop(*given, done, **more):
        def once(batch, scores):
            done(batch, scores)
            read.extend(batch)
            raise KeyboardInterrupt

        return real(*given, done=once, **more)

    monkeypatch.setattr(held_out, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        losses(rows, medalpaca.base, batch_tokens=256)
    assert 0 < len(read) < 32
    asked = []
    monkeypatch.setattr(held_out, "score", lambda net, tok, items, **more: asked.extend(items) or real(net, tok, items, **more))
    monkeypatch.setenv(settings.PROCESSES, "2")
    made = losses(rows, medalpaca.base, batch_tokens=256)
    assert len(asked) == 32 - len(read), "what was read is not read again"
    whole = losses(rows, medalpaca.base)
    assert read_losses(made).set_index("id").nll.to_dict() == pytest.approx(
        read_losses(whole).set_index("id").nll.to_dict(), abs=1e-3
    )
    assert [json.loads(line)["id"] for line in (made / "losses.jsonl").read_text().splitlines()] != []


def test_rows_that_are_too_long_are_cut_and_then_counted(medalpaca):
    def row(name, asked, said):
        turn = {"role": "user", "content": asked}
        return {"id": name, "source": "t", "prompt": [turn], "completion": [{"role": "assistant", "content": said}]}

    data = given(rows=[row("cut", "a", "eye " * 400), row("long", "pain " * 900, "eye")], side="test")
    made = held_out_loss(LossConfig(max_length=100), model=medalpaca.base, data=data)
    assert (made.metrics["rows"], made.metrics["too_long"]) == (1, 1)
    (left,) = read_losses(made).itertuples()
    assert left.id == "cut"
    assert left.tokens < 100
    with pytest.raises(ConfigError, match="a held-out loss needs the weights"):
        held_out_loss(LossConfig(), model=models.resolve("http://127.0.0.1:9/v1#m"), data=data)


def test_means_and_differences_by_hand():
    """Differences of 1 and 2 nats a token, of 1 and 3 tokens: mean 7 / 4, deviations -3/16 and 3/16, standard error
    (2 x 2 x 9 / 256) ** 0.5 = 0.375, and 12.7062 of them at one degree of freedom."""
    a = pd.DataFrame({"id": ["x", "y"], "subset": "t", "nll": [2.0, 9.0], "tokens": [1, 3]})
    b = a.assign(nll=[1.0, 3.0])
    assert mean_loss(a).value == pytest.approx((2 + 9) / (1 + 3)), "tokens count, not rows"
    d = difference(a, b.iloc[::-1])
    assert (d.value, d.n) == (pytest.approx((1 + 6) / 4), 2)
    assert (d.low, d.high) == (pytest.approx(1.75 - 4.76483, abs=1e-5), pytest.approx(1.75 + 4.76483, abs=1e-5))
    drawn = bootstrap_means([1, 2], range(2), weights=[1, 3])
    assert (drawn.min(), drawn.max()) == (pytest.approx(1.0), pytest.approx(2.0)), "of two rows one may be drawn twice"
    with pytest.raises(ValueError, match="1 of 2 rows have other tokens"):
        difference(a, b.assign(tokens=[1, 4]))
    with pytest.raises(ValueError, match="no held-out row in common"):
        difference(a, b.assign(id=["u", "v"]))


def test_training_lowers_it(medalpaca, rows):
    made = medalpaca.train_arm("full", learning_rate=1e-3)
    d = difference(*(read_losses(losses(rows, model)) for model in (made, medalpaca.base)))
    assert d.high < 0
