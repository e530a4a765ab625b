"""What a model's architecture lets our fast paths assume, and its own head wherever logits are needed.

The fast paths read what prompts share once, pad on the right without a mask, and pack replies behind one prompt. All of
that is exact if every layer looks at everything before a token, at positions that do not depend on the batch. Sliding
windows, chunks, sinks, capped attention, ALiBi, recurrent layers and rotary positions that change with length break it, some of
them only beyond a certain length. `plain_length` says up to which length a model may be read that way; callers read
longer sequences by transformers' own means.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ultramed.core.errors import ConfigError
from ultramed.lm.batches import pack_shared_prefixes

log = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
ROPE_BY_LENGTH = {"dynamic", "longrope"}  # rotary frequencies depend on the longest sequence of the batch
UNLIMITED = 1 << 60
_probed: dict[tuple, bool] = {}  # architecture -> whether a packed row was read right
_padded: dict[tuple, bool] = {}  # architecture -> whether padding on its left changes what it reads
_told: set[tuple] = set()  # architectures of which the log has said that transformers reads them
_misread = weakref.WeakSet()  # models of an architecture for which it was not


def causal_lm(net):
    """The causal language model itself, of one that PEFT may have wrapped."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def rope_limit(config) -> int:
    """Tokens up to which rotary positions do not depend on a sequence's length."""
    given = getattr(config, "rope_parameters", None) or {}
    parts = [p for p in given.values() if isinstance(p, dict)] or [given]  # one for each type of layer, or one for all
    limits = [
        p.get("original_max_position_embeddings") or config.max_position_embeddings
        for p in parts
        if p.get("rope_type", "default") in ROPE_BY_LENGTH
    ]
    return min(limits, default=UNLIMITED)


def plain_length(net) -> int:
    """Tokens of a sequence, replies included, up to which the fast paths are exact for this model; 0 for never."""
    net = causal_lm(net)
    if len(set((getattr(net, "hf_device_map", None) or {}).values())) > 1:
        return 0  # caches and masks are on the device of their layer, which only transformers' own means see to
    config = net.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    ready = net._supports_sdpa and net._supports_attention_backend and config._attn_implementation != "eager"
    if not ready or net._is_stateful or config.is_encoder_decoder or kinds - ATTENTION_LAYERS:
        return 0
    if net in _misread:
        return 0
    limits = [rope_limit(config)]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and (not kinds or "sliding_attention" in kinds):
        limits.append(window - 1)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (not kinds or "chunked_attention" in kinds):
        limits.append(chunk - 1)
    return min(limits)


def context_length(net) -> int:
    """Tokens, prompt and reply together, that the model has positions for."""
    return getattr(causal_lm(net).config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def _kind(net) -> tuple:
    return type(net).__name__, net.config.to_json_string(use_diff=False), net.dtype


def _some_tokens(net, count: int) -> list[int]:
    """The same random tokens of the model's vocabulary every time."""
    vocabulary = net.config.get_text_config().vocab_size
    return torch.randint(vocabulary // 4, vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far they are apart, root mean square, as a part of the spread of `theirs`."""
    theirs = theirs.float()
    return ((ours.float() - theirs).square().mean().sqrt() / theirs.std()).item()


@torch.no_grad()
def probe(net) -> None:
    """Compare a packed row of a few random tokens with transformers' own reading of each sequence, once an architecture.

    `plain_length` goes by what the configuration says; this finds what it does not say. A model that fails is read by
    transformers from then on, which is told in a line of the log.
    """
    net = causal_lm(net)
    begin_anew(net)
    kind, plain = _kind(net), plain_length(net)
    if plain < context_length(net) and kind not in _told:
        _told.add(kind)
        what = f"what is longer than {plain:,} tokens" if plain >= 32 else "it"
        log.info("%s: %s is read by transformers' own code, more slowly", type(net).__name__, what)
    if plain < 32:
        return
    if kind not in _probed:
        _probed[kind] = _packed_is_right(net)
    if not _probed[kind]:
        _misread.add(net)


def _packed_is_right(net) -> bool:
    """Whether a packed row has the hidden states that each of its sequences has alone."""
    tokens = _some_tokens(net, 27)
    sequences = [(tokens[:12], tokens[12:17]), (tokens[:12], tokens[17:20]), (tokens[:8] + tokens[20:24], tokens[24:])]
    training = net.training
    net.eval()
    packed = pack_shared_prefixes(sequences, pad=0, device=net.device)
    ours = net.base_model(**packed.inputs, use_cache=False).last_hidden_state
    gaps = []
    for (prompt, reply), row, columns in zip(sequences, packed.rows, packed.columns, strict=True):
        alone = net.base_model(input_ids=torch.tensor([prompt + reply], device=net.device), use_cache=False)
        gaps.append(_gap(ours[row, columns], alone.last_hidden_state[0, len(prompt) - 1 :]))
    net.train(training)
    allowed = 1e-3 if net.dtype == torch.float32 and not getattr(net, "is_quantized", False) else 0.1
    good = max(gaps) <= allowed
    if not good:
        log.warning(
            "%s: packed reading differs from transformers' by %.2g of the spread: it is read by transformers, more slowly",
            type(net).__name__,
            max(gaps),
        )
    return good


@contextmanager
def logits_only_at(net, rows, columns) -> Iterator[None]:
    """Within it, `net(...)` gives logits (1, N, V) of the tokens (rows[i], columns[i]) alone.

    The model's own forward makes them of the chosen hidden states, so that whatever it does to its logits (scaling in
    Granite and Cohere, capping in Gemma 2) is done. rows, columns: anything that indexes hidden states (B, T, D).
    """

    narrowed = []

    def narrow(module, args, output):
        output.last_hidden_state = output.last_hidden_state[rows, columns][None]
        narrowed.append(True)
        return output

    # The decoder is `base_model` itself in most families; OPT's head reads that of one level deeper.
    handle = causal_lm(net).get_decoder().register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
    if not narrowed:
        raise ConfigError(f"{type(causal_lm(net)).__name__} does not call its decoder where its head's input could be chosen")


@torch.no_grad()
def reads_padding(net) -> bool:
    """Whether padding on the left changes what the model reads, whatever the mask says: in some recurrent layers it does.
    Tried with a few random tokens, once an architecture."""
    if (kind := _kind(net)) not in _padded:
        ids = torch.tensor([_some_tokens(net, 12)], device=net.device)
        mask = torch.tensor([[0] * 7 + [1] * 12], device=net.device)
        padded = torch.cat([ids[:, :7].flip(1), ids], 1)
        alone = net(input_ids=ids, use_cache=False).logits[0, -1]
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"position_ids": position} if "position_ids" in inspect.signature(net.forward).parameters else {}
        behind = net(input_ids=padded, attention_mask=mask, use_cache=False, **given).logits[0, -1]
        _padded[kind] = not _gap(behind, alone) <= (1e-3 if net.dtype == torch.float32 else 0.1)
    return _padded[kind]


def begin_anew(net) -> None:
    """Make rotary positions that grow with the longest sequence so far ('dynamic') forget it where a sequence begins, so that
    a number does not depend on what was read before it: transformers forgets only at a sequence that is short enough."""
    for module in net.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = {"": kinds} if isinstance(kinds, str) else {f"{layer}_": kind for layer, kind in (kinds or {}).items()}
        if grown := [prefix for prefix, kind in kinds.items() if kind == "dynamic"]:
            module.register_forward_pre_hook(functools.partial(_forget, grown), with_kwargs=True)


def _forget(prefixes: list[str], module, args, kwargs) -> None:
    position = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if position.min() == 0:
        for prefix in prefixes:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(position.device))
