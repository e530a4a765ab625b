"""The CPU attention against PyTorch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ultramed import models
from ultramed.attention import BLOCK, NAME, causal
from ultramed.schema import ModelConfig


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (9, 3), (6, 1)])
def test_equals_scaled_dot_product_attention(length, heads, groups):
    q, k, v = (torch.randn(2, h, length, 16) for h in (heads, groups, groups))
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(causal(q, k, v, 16**-0.5), want, atol=1e-5)


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
