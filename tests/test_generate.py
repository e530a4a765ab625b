"""Generation and likelihood against plain reference computations."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ultramed.evaluate.generate import NUCLEUS, PREFIX, Sampling, _pick, batches, decode, generate, item_rng, prefill
from ultramed.evaluate.likelihood import encode_pair, score
from ultramed.lm import models
from ultramed.lm.cache import ROOM, with_room


@pytest.fixture(scope="module")
def net(medalpaca):
    return models.load(medalpaca.base, dtype=torch.float32)


PROMPTS = [[5, 9, 300, 41], [77], list(range(100, 130)), [1, 2, 3], list(range(40, 55))]


def test_greedy_is_what_transformers_generates(net, tokenizer):
    ours = decode(net, tokenizer, PROMPTS, Sampling(12))
    for prompt, reply in zip(PROMPTS, ours, strict=True):
        ids = net.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert reply.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.tokens == len(ids)


def test_a_repetition_penalty_is_that_of_transformers(net, tokenizer):
    given = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the patient has", "which of these is the")]
    ours = decode(net, tokenizer, given, Sampling(12, repetition_penalty=9.0))
    plain = decode(net, tokenizer, given, Sampling(12))
    for ids, reply in zip(given, ours, strict=True):
        made = net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=9.0)
        assert reply.text == tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert ours != plain


def test_finished_replies_leave_the_batch_and_the_others_do_not_notice(net, tokenizer, monkeypatch):
    """Some token that a few replies produce early is made the end token; the remaining replies stay as they were."""
    free = decode(net, tokenizer, PROMPTS, Sampling(12))
    ids = [
        net.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in PROMPTS
    ]
    end = ids[0][2]
    monkeypatch.setattr(net.generation_config, "eos_token_id", [2, end])
    cut = decode(net, tokenizer, PROMPTS, Sampling(12))
    for full, whole, reply in zip(ids, free, cut, strict=True):
        if end in full:
            assert (reply.tokens, reply.finished) == (full.index(end) + 1, True)
        else:
            assert reply == whole


def test_a_cache_with_room_holds_what_transformers_own_holds():
    from transformers import DynamicCache

    def states(batch: int, tokens: int):
        return torch.rand(batch, 2, tokens, 8), torch.rand(batch, 2, tokens, 4)  # values may be narrower than keys

    theirs, ours = DynamicCache(), DynamicCache()
    for cache, read in itertools.product((theirs, ours), [states(5, 7)]):
        cache.update(*read, 0)
    ours = with_room(ours)
    moved = 0
    for step in range(2 * ROOM + 3):
        if step == ROOM // 2:
            for cache in (theirs, ours):
                cache.batch_select_indices(torch.tensor([0, 2, 3]))
        new, before = states(5 if step < ROOM // 2 else 3, 1), ours.layers[0].keys.data_ptr()
        for made, wanted in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(made, wanted)
        moved += ours.layers[0].keys.data_ptr() != before
        assert ours.get_seq_length() == theirs.get_seq_length() == 8 + step
    assert moved <= 4, "it is copied when there is no room, not at every token"


def test_layers_with_a_window_keep_their_own_ways():
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    cache = Cache(layers=[DynamicSlidingWindowLayer(4), DynamicLayer()])
    for layer in (0, 1):
        cache.update(torch.rand(1, 2, 6, 8), torch.rand(1, 2, 6, 8), layer)
    assert type(with_room(cache).layers[0]) is DynamicSlidingWindowLayer
    assert type(cache.layers[1]).__name__ == "RoomyLayer"


def test_a_sampled_reply_depends_on_its_seed_not_on_its_batch(net, tokenizer):
    sampling = Sampling(8, temperature=0.9, top_k=20, top_p=0.9)

    def run(order, budget):
        rngs = [item_rng(0, i) for i in order]
        made = generate(net, tokenizer, [PROMPTS[i] for i in order], sampling, budget=budget, rngs=rngs)
        return {i: r for i, r in zip(order, made, strict=True)}

    assert run([0, 1, 2, 3, 4], 10_000) == run([3, 1, 4, 2, 0], 40)


def test_reading_a_shared_beginning_once_changes_nothing(net, tokenizer):
    start = list(range(50, 50 + 2 * PREFIX))
    rows = [[*start, 3, 4, 5], [*start, 9], [*start, *range(100, 140)]]
    logits, cache, mask = prefill(net, rows, pad=0)
    assert mask.sum(1).tolist() == [len(r) for r in rows]
    for i, row in enumerate(rows):
        with torch.inference_mode():
            alone = net(input_ids=torch.tensor([row])).logits[0, -1]
        assert torch.allclose(logits[i], alone, atol=1e-4)
    replies = decode(net, tokenizer, rows, Sampling(6))
    assert [r.text for r in replies] == [decode(net, tokenizer, [row], Sampling(6))[0].text for row in rows]
    assert cache.get_seq_length() == mask.shape[1]


def test_sampling_follows_the_distribution_within_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    rngs = [item_rng("x", i) for i in range(4000)]
    drawn = torch.tensor(_pick(logits, Sampling(1, temperature=1.0, top_k=4, top_p=1.0), rngs))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    drawn = torch.tensor(_pick(logits, Sampling(1, temperature=1.0, top_k=4, top_p=0.6), rngs))
    assert set(drawn.tolist()) == {0, 1}, "0.5 alone is below 0.6, 0.5 + 0.3 reaches it"
    drawn = torch.tensor(_pick(logits, Sampling(1, temperature=1.0, top_k=1, top_p=1.0), rngs))
    assert set(drawn.tolist()) == {0}


def test_sampling_with_nothing_cut_follows_the_softmax():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(4000, -1)
    drawn = torch.tensor(_pick(logits, Sampling(1, temperature=2.0, top_p=1.0), [random.Random(i) for i in range(4000)]))
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares.tolist() == pytest.approx((logits[0] / 2).softmax(-1).tolist(), abs=0.03)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.2, 0.9), (5.0, 0.9)])
def test_sampling_without_top_k_picks_what_a_sort_of_the_vocabulary_picks(temperature, top_p):
    logits = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0)) * 4
    sampling = Sampling(1, temperature=temperature, top_k=0, top_p=top_p)
    quick = _pick(logits, sampling, [random.Random(i) for i in range(200)])
    p, tokens = (logits / temperature).softmax(-1).sort(-1, descending=True)
    flat = (p[:, :NUCLEUS].sum(-1) < top_p).float().mean().item()
    assert {5.0: 1.0, 0.7: 0.0}.get(temperature, flat) == pytest.approx(flat, abs=0.05), "both ways should be taken"
    p[p.cumsum(-1) - p >= top_p] = 0
    u = torch.tensor([[random.Random(i).random()] for i in range(200)])
    sure = ((p.cumsum(-1) / p.sum(-1, keepdim=True) - u).abs() > 1e-5).all(-1)
    want = tokens.gather(-1, ((p / p.sum(-1, keepdim=True)).cumsum(-1) < u).sum(-1, keepdim=True))[:, 0]
    assert sure.sum() > 150
    assert [q for q, s in zip(quick, sure, strict=True) if s] == want[sure].tolist()


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(500, 2000))
def test_batches_hold_every_index_once_and_keep_the_budget(lengths, budget):
    made = list(batches(lengths, budget))
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= budget for b in made)


def test_a_budget_may_be_used_up_and_long_rows_stand_alone():
    assert list(batches([10, 10, 10, 10], 30)) == [[0, 1, 2], [3]]
    assert list(batches([50, 50, 40, 40], 1000, alone_beyond=40)) == [[0], [1], [2, 3]]


def test_scores_are_the_sums_of_a_plain_forward_pass(net, tokenizer):
    items = [
        ([5, 6, 7, 8], [[10], [11]]),
        ([9, 10], [[20, 21, 22], [23], [24, 25]]),
        (list(range(50, 70)), [[30, 31, 32, 33, 34], [35, 36]]),
    ]
    got = score(net, tokenizer, items)
    for (context, endings), scores in zip(items, got, strict=True):
        for ending, value in zip(endings, scores, strict=True):
            logp = net(input_ids=torch.tensor([context + ending])).logits[0].log_softmax(-1)
            want = sum(logp[len(context) - 1 + i, t].item() for i, t in enumerate(ending))
            assert value == pytest.approx(want, abs=1e-3)
    assert score(net, tokenizer, items, budget=64)[1] == pytest.approx(got[1], abs=1e-3)


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(tokenizer):
    context, ending = encode_pair(tokenizer, "Answer: ", "A")
    assert tokenizer.decode(context) == "Answer:"
    assert tokenizer.decode(ending) == " A"
