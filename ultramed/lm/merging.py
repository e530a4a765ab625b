"""Adapters into their base, weights into another precision, and what of a trained change that leaves."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from ultramed.core.errors import StoreError

log = logging.getLogger(__name__)


def merge_adapter(base, folder: Path, tolerance: float = 1e-3):
    """Merge a LoRA adapter into a freshly loaded, unquantised base and check that the logits stayed the same.

    Merged and compared in fp32, where only a wrong merge changes anything; then rounded to the base's dtype, as the
    base itself was. tolerance: largest allowed root mean square change of a logit, as a part of the logits' spread.
    Raises StoreError beyond it.
    """
    from peft import PeftModel

    if getattr(base, "is_quantized", False):
        raise StoreError("merging into a quantised model ruins it silently; load the base in 16 or 32 bits")
    dtype, device = base.dtype, base.device
    vocabulary = base.config.get_text_config().vocab_size
    probe = torch.randint(vocabulary // 2, vocabulary, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)
    net = PeftModel.from_pretrained(cast(base, torch.float32), folder).eval()
    with torch.inference_mode():
        before = net(input_ids=probe).logits
    parts = (
        (m.base_layer.weight, m.base_layer.weight + m.get_delta_weight("default"))
        for m in net.modules()
        if hasattr(m, "lora_A")
    )
    update_kept(parts, dtype)
    net = net.merge_and_unload()
    with torch.inference_mode():
        after = net(input_ids=probe).logits
    change = ((after - before).square().mean().sqrt() / before.std()).item()
    if not change <= tolerance:
        raise StoreError(f"merging {folder.name} moved the logits by {change:.2g} of their spread (limit {tolerance})")
    return cast(net, dtype)


@torch.no_grad()
def update_kept(parts: Iterable[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> float:
    """How much of what training changed is left when weights are rounded to `dtype`: the rounded change's projection on the
    whole one (1: all of it, 0: none). Less than nine tenths is told in a line of the log.

    parts: (weights before, weights after), tensor by tensor. bf16 has 8 significant bits: a weight that moved by less than a
    512th of its size goes back to where it was, which small learning rates hardly exceed.
    """
    if dtype == torch.float32:  # nothing is rounded, and so nothing read
        return 1.0
    left = whole = 0.0
    for before, after in parts:
        before, after = before.float(), after.float()
        moved = after - before
        left += ((after.to(dtype).float() - before) * moved).sum().item()
        whole += moved.square().sum().item()
    kept = left / whole if whole else 1.0
    if kept < 0.9:
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "rounding to %s leaves %.0f%% of what training changed: its steps are small for this precision", name, 100 * kept
        )
    return kept


def cast(net, dtype: torch.dtype):
    """Parameters to another dtype; buffers stay: rotary frequencies rounded to bf16 make another model."""
    for p in net.parameters():
        p.data = p.data.to(dtype)
    return net
