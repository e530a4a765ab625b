"""The CPU attention against PyTorch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ultramed.core.errors import ConfigError
from ultramed.core.schema import ModelConfig, OptimConfig
from ultramed.lm import models
from ultramed.lm.attention import BLOCK, NAME, SHORT, causal, cpu_attention, masked
from ultramed.lm.batches import pack_shared_prefixes
from ultramed.train.weights import load_for_training


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (9, 3), (6, 1)])
def test_equals_scaled_dot_product_attention(length, heads, groups):
    q, k, v = (torch.randn(2, h, length, 16) for h in (heads, groups, groups))
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(causal(q, k, v, 16**-0.5), want, atol=1e-5)


@pytest.mark.parametrize("before", [1, 30, BLOCK])
def test_queries_behind_a_prefix_see_it_and_what_is_before_them(before):
    length = BLOCK + 5
    q, k, v = (torch.randn(2, h, before + length, 16) for h in (6, 2, 2))
    whole = causal(q, k, v, 16**-0.5)
    assert torch.allclose(causal(q[:, :, before:], k, v, 16**-0.5), whole[:, before:], atol=1e-5)


def test_a_model_gives_the_same_logits_with_it_with_padding_cache_and_gradients():
    base = models.base_model(ModelConfig(name="tiny:llama", label="x"))
    net = models.load(base, dtype=torch.float32, device="cpu")
    assert net.config._attn_implementation == NAME
    ids = torch.randint(5, net.config.vocab_size, (3, 90))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0  # left padding: PyTorch's kernel takes over

    def outputs():
        with torch.inference_mode():
            plain, padded = net(input_ids=ids).logits, net(input_ids=ids, attention_mask=mask).logits[:, 40:]
            cache = net(input_ids=ids[:, :80]).past_key_values
            return plain, padded, net(input_ids=ids[:, 80:], past_key_values=cache).logits

    ours = outputs()
    net.set_attn_implementation("sdpa")
    for a, b in zip(ours, outputs(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(ours[0][:, 80:], ours[2], atol=1e-4)


@pytest.mark.parametrize("kind", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_capped_scores_and_sinks_are_refused(kind):
    from transformers import AttentionInterface

    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ConfigError, match="eager"):
        AttentionInterface()[cpu_attention()](torch.nn.Identity(), x, x, x, None, **kind)


@pytest.mark.parametrize("tree", [False, True])
def test_training_attention_has_the_gradients_of_scaled_dot_product_attention(tree):
    length, mask = 24, None
    if tree:
        packed = pack_shared_prefixes([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7, 8], [9] * 15)], pad=0)
        length, mask = packed.input_ids.shape[1], packed.attention_mask
    q, k, v = (torch.randn(2, h, length, 16, requires_grad=True) for h in (6, 2, 2))
    want = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
    ours = masked(q, k, v, mask, 16**-0.5)
    assert torch.allclose(ours, want, atol=1e-5)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (ours, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [40, SHORT + 8])
def test_a_model_is_trained_alike_with_it(length):
    base = models.base_model(ModelConfig(name="tiny:llama", label="x"))
    net = load_for_training(base, OptimConfig(method="full", learning_rate=1e-4))
    ids = torch.randint(5, net.config.vocab_size, (2, length))
    found = {}
    for name in (NAME, "sdpa"):
        net.set_attn_implementation(name)
        net.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        found[name] = [p.grad.clone() for p in net.parameters()]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found.values(), strict=True))
