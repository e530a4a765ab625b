"""Batched generation: token-budget batches, a prompt is read once for all its samples, finished replies leave the batch.

Every item has its own random stream: a reply depends on the item and its seed, not on which other items shared its
batch (up to the rounding of the dtype, which a batch's shape can change).
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

import torch

from ultramed.lm.architecture import logits_only_at, plain_length, reads_padding, rope_limit
from ultramed.lm.batches import batches, common_prefix, right_pad
from ultramed.lm.cache import with_room
from ultramed.lm.tokens import end_tokens
from ultramed.train.crew import each

NUCLEUS = 256  # tokens sorted before the whole vocabulary is
PREFIX = 8  # tokens that a batch must share for reading them apart to pay


@dataclass(frozen=True)
class Sampling:
    """Greedy when temperature is 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    stop: str | None = None  # regular expression: a reply ends where it first matches
    repetition_penalty: float = 1.0  # of tokens in the prompt or the reply so far (Keskar et al. 2019, section 4.1)


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # new tokens, the end token included
    finished: bool  # False if cut off by max_new_tokens


class Stream(random.Random):
    """A random stream that knows what it was made of, so that another process can make it, too."""

    parts: list[str]


def item_rng(*parts) -> Stream:
    """A random stream of the item's own, the same on every machine."""
    texts = [str(part) for part in parts]
    stream = Stream(hashlib.sha256("\x1f".join(texts).encode()).digest())
    stream.parts = texts
    return stream


def prefill(model, rows: list[list[int]], pad: int, use_cache: bool = True):
    """Read token rows: (logits after each row's last token (B, V), cache or None, mask (B, T) with 0 at the padding).

    What all rows begin with (a system message) is read once. For rows of at most `plain_length` tokens.
    """
    shared = min(len(common_prefix(rows)), min(map(len, rows)) - 1) if len(rows) > 1 else 0
    if shared < PREFIX:
        shared, given = 0, {"use_cache": use_cache}
    else:
        start = torch.tensor([rows[0][:shared]], device=model.device)
        cache = model.base_model(input_ids=start, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        given = {"use_cache": True, "past_key_values": cache}
    ids, lengths = right_pad([row[shared:] for row in rows], pad, model.device)
    position = torch.arange(shared, shared + ids.shape[1], device=model.device)[None]
    with logits_only_at(model, torch.arange(len(rows), device=model.device), lengths - 1):
        read = model(input_ids=ids, position_ids=position, **given)
    mask = (torch.arange(shared + ids.shape[1], device=model.device) < shared + lengths[:, None]).long()
    return read.logits[0], read.past_key_values, mask


@torch.inference_mode()
def decode(
    model, tokenizer, prompts: list[list[int]], sampling: Sampling, rngs: list[random.Random] | None = None
) -> list[Reply]:
    """Continue each prompt (token ids). One batch; see `generate` for many. Equal prompts are read once."""
    if max(map(len, prompts)) + sampling.max_new_tokens > plain_length(model):
        return _decode_by_transformers(model, tokenizer, prompts, sampling, rngs)
    end = ends(model, tokenizer)
    stop = re.compile(sampling.stop) if sampling.stop else None
    unique = list(dict.fromkeys(map(tuple, prompts)))
    number = {prompt: i for i, prompt in enumerate(unique)}
    source = torch.tensor([number[tuple(p)] for p in prompts], device=model.device)
    logits, cache, mask = prefill(model, [list(u) for u in unique], tokenizer.pad_token_id)
    if len(unique) < len(prompts):
        logits, mask = logits[source], mask[source]
        cache.batch_select_indices(source)
    cache = with_room(cache)
    position = mask.sum(1, keepdim=True)
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    finished = [False] * len(prompts)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=model.device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=model.device)] = True
    for made in range(1, sampling.max_new_tokens + 1):
        logits = logits.float()
        if seen is not None:
            logits = torch.where(seen[rows], _penalised(logits, sampling.repetition_penalty), logits)
        chosen = _pick(logits, sampling, [rngs[r] for r in rows] if rngs else None)
        if seen is not None:
            seen[rows, chosen] = True
        for row, token in zip(rows, chosen, strict=True):
            if not finished[row]:
                out[row].append(token)
                finished[row] = token in end or bool(stop and stop.search(tokenizer.decode(out[row])))
        alive = [i for i, row in enumerate(rows) if not finished[row]]
        if not alive or made == sampling.max_new_tokens:
            break
        if len(alive) <= 0.75 * len(rows):  # shrinking copies the cache, so not for every single reply
            keep = torch.tensor(alive, device=model.device)
            cache.batch_select_indices(keep)
            mask, position, chosen = mask[keep], position[keep], [chosen[i] for i in alive]
            rows = [rows[i] for i in alive]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        step = model(
            input_ids=torch.tensor(chosen, device=model.device)[:, None],
            attention_mask=None if mask.all() else mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits, cache, position = step.logits[:, -1], step.past_key_values, position + 1
    return [cut(tokenizer.decode(o, skip_special_tokens=True), len(o), d, stop) for o, d in zip(out, finished, strict=True)]


def _decode_by_transformers(model, tokenizer, prompts, sampling: Sampling, rngs) -> list[Reply]:
    """The same through transformers' `generate`: padding on the left, caches and masks of the model's own making. Tokens
    are picked, and replies stopped, by the same rules."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    if len(lengths := {len(p) for p in prompts}) > 1 and reads_padding(model):
        replies: list[Reply | None] = [None] * len(prompts)
        for length in lengths:
            same = [i for i, p in enumerate(prompts) if len(p) == length]
            streams = [rngs[i] for i in same] if rngs else None
            made = _decode_by_transformers(model, tokenizer, [prompts[i] for i in same], sampling, streams)
            for i, reply in zip(same, made, strict=True):
                replies[i] = reply
        return replies
    longest, end = max(map(len, prompts)), ends(model, tokenizer)
    stop = re.compile(sampling.stop) if sampling.stop else None
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def pick(seen: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if sampling.repetition_penalty != 1:
            for row, tokens in enumerate(seen):
                held = tokens[longest - len(prompts[row]) :]  # without the padding
                logits[row, held] = _penalised(logits[row, held], sampling.repetition_penalty)
        chosen = torch.tensor(_pick(logits, sampling, rngs), device=model.device)
        return torch.full_like(logits, float("-inf")).scatter(1, chosen[:, None], 0.0)

    def stopped(seen: torch.Tensor, scores, **_) -> torch.Tensor:
        made = [bool(stop and stop.search(tokenizer.decode(tokens[longest:]))) for tokens in seen]
        return torch.tensor(made, device=seen.device)

    # `generate` would fill what a call leaves open from the model's own settings, penalties and all.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=sorted(end), pad_token_id=tokenizer.pad_token_id
    )
    try:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([pick]),
            stopping_criteria=StoppingCriteriaList([stopped]),
        )[:, longest:].tolist()
    finally:
        model.generation_config = own
    replies = []
    for tokens in made:
        last = next(
            (i for i, t in enumerate(tokens) if t in end or (stop and stop.search(tokenizer.decode(tokens[: i + 1])))), None
        )
        tokens = tokens[: last + 1] if last is not None else tokens
        replies.append(cut(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), last is not None, stop))
    return replies


def _penalised(logits: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def cut(text: str, tokens: int, finished: bool, stop: re.Pattern | None) -> Reply:
    """A reply that ends where `stop` first matches."""
    found = stop.search(text) if stop else None
    return Reply(text[: found.end()] if found else text, tokens, finished)


def _pick(logits: torch.Tensor, sampling: Sampling, rngs) -> list[int]:
    """Next tokens of (B, V) logits; sampling draws one uniform number a row from that row's own stream."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    u = torch.tensor([[r.random()] for r in rngs], device=logits.device, dtype=logits.dtype)
    scaled, whole = logits / sampling.temperature, logits.shape[-1]
    k = min(sampling.top_k or whole, whole)
    if k < whole:
        values, tokens = scaled.topk(k)
        return _nucleus(values.softmax(-1), tokens, sampling.top_p, u).tolist()
    if sampling.top_p == 1:  # nothing is cut, so nothing needs an order
        return torch.searchsorted(scaled.softmax(-1).cumsum(-1), u).clamp(max=whole - 1)[:, 0].tolist()
    # Sorting the vocabulary would take longer than the model: the likeliest few nearly always hold the nucleus.
    tokens = scaled.topk(min(NUCLEUS, whole)).indices
    p = scaled.softmax(-1).gather(-1, tokens)
    chosen = _nucleus(p, tokens, sampling.top_p, u)
    flat = p.sum(-1) < sampling.top_p
    if flat.any():
        p, tokens = scaled[flat].softmax(-1).sort(-1, descending=True)
        chosen[flat] = _nucleus(p, tokens, sampling.top_p, u[flat])
    return chosen.tolist()


def _nucleus(p: torch.Tensor, tokens: torch.Tensor, top_p: float, u: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) at the quantiles u (B, 1) of the sorted probabilities p (B, K), cut where they add up to top_p."""
    p = p.where(p.cumsum(-1) - p < top_p, 0)  # the most likely token always stays
    cumulative = (p / p.sum(-1, keepdim=True)).cumsum(-1)
    index = (cumulative < u).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return tokens.gather(-1, index)[:, 0]


def ends(model, tokenizer) -> set[int]:
    """Tokens at which a reply ends."""
    return end_tokens(tokenizer, model.generation_config.eos_token_id)


def alone_beyond(model) -> int:
    """Length from which on a sequence is read alone: where rotary frequencies go by the longest one of a batch."""
    return rope_limit(model.config.get_text_config())


def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    budget: int = 8192,
    rngs: list[Stream] | None = None,
    done: Callable[[list[int], list[Reply]], None] | None = None,
) -> list[Reply]:
    """Replies in the order of the prompts. `done(indices, replies)` is called after every batch, for ledgers and bars.

    model: weights, or a crew that holds them (train/crew.py). rngs: fresh streams, of which nothing was drawn.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    plan = list(batches([len(p) + sampling.max_new_tokens for p in prompts], budget, alone_beyond(model)))
    tasks = [
        {
            "prompts": [prompts[i] for i in batch],
            "sampling": asdict(sampling),
            "streams": [rngs[i].parts for i in batch] if rngs else None,
        }
        for batch in plan
    ]
    for number, told in each(model, tokenizer, decoded, tasks, small=True):
        made = [Reply(*reply) for reply in told]
        for i, reply in zip(plan[number], made, strict=True):
            replies[i] = reply
        if done:
            done(plan[number], made)
    return replies


def decoded(model, tokenizer, prompts: list[list[int]], sampling: dict, streams: list[list[str]] | None) -> list[tuple]:
    """`decode` with plain data: text, tokens and finished of every reply."""
    rngs = [item_rng(*parts) for parts in streams] if streams else None
    return [astuple(reply) for reply in decode(model, tokenizer, prompts, Sampling(**sampling), rngs)]
