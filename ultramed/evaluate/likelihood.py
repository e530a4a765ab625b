"""Log-likelihood of answers: the prompt is read once, whatever the number of options.

Prompts and tokenisation follow lm-evaluation-harness 0.4.13 (tasks medqa_4options, medmcqa, pubmedqa, mmlu), so that
the choice is the same item for item; only positions whose logits are needed get any.
"""

from collections.abc import Callable

import torch
from transformers import DynamicCache

from ultramed.evaluate.generate import alone_beyond, prefill
from ultramed.lm.architecture import logits_only_at, plain_length
from ultramed.lm.batches import batches, right_pad
from ultramed.train.crew import Crew, each

TAILS = 64  # continuations of several tokens scored at a time


def lm_eval_prompt(row: dict) -> tuple[str, list[str]]:
    """(context, continuations) as the harness builds them for the row's data set; other data sets as medqa_4options."""
    options = row["options"]
    lettered = "".join(f"{k}. {v}\n" for k, v in options.items())
    letters = [f" {k}" for k in options]
    kind = row["dataset"]
    if kind == "pubmedqa":  # scores the words yes, no, maybe
        return f"Abstract: {row['context']}\nQuestion: {row['question']}\nAnswer:", [f" {v}" for v in options.values()]
    if kind == "medmcqa":
        return f"Question: {row['question']}\nChoices:\n{lettered}Answer:", letters
    if kind in ("mmlu", "mmlu_medical"):
        subject = row["subset"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        return f"{head}{row['question'].strip()}\n{lettered}Answer:", letters
    context = f"{row['context']}\n" if row.get("context") else ""
    return f"Question: {context}{row['question']}\n{lettered}Answer:", letters


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both; spaces at the end of the context belong to the continuation, as in the harness."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    head = tokenizer(context)["input_ids"]
    return head, tokenizer(context + continuation)["input_ids"][len(head) :]


def score(
    model,
    tokenizer,
    items: list[tuple[list[int], list[list[int]]]],
    *,
    budget: int = 8192,
    done: Callable[[list[int], list[list[float]]], None] | None = None,
) -> list[list[float]]:
    """Summed log-probability (nats) of each continuation given its context.

    items: (context ids, [continuation ids, ...]); every context and continuation has at least one token. The context
    is run once; where a continuation has several tokens, its cache is shared by all continuations of the item. A single
    continuation is read together with its context, in one go. model: weights, or a crew that holds them (train/crew.py).
    """
    results: list[list[float]] = [[] for _ in items]
    lengths = [len(context) + max(map(len, endings)) for context, endings in items]
    limit = model.ask(readable) if isinstance(model, Crew) else plain_length(model)
    apart = [i for i, length in enumerate(lengths) if length > limit or len(items[i][1]) == 1]
    shared = sorted(set(range(len(items))) - set(apart))
    plan = [[apart[n] for n in part] for part in batches([lengths[i] for i in apart], budget, alone_beyond(model))]
    wholes = len(plan)
    plan += [[shared[n] for n in part] for part in batches([len(items[i][0]) for i in shared], budget)]
    tasks = [
        {"items": [items[i] for i in batch], "whole": number < wholes, "budget": budget} for number, batch in enumerate(plan)
    ]
    for number, scores in each(model, tokenizer, scored, tasks):
        for i, sums in zip(plan[number], scores, strict=True):
            results[i] = sums
        if done:
            done(plan[number], scores)
    return results


def readable(model, tokenizer) -> int:
    """`plain_length`, asked of a crew."""
    return plain_length(model)


@torch.inference_mode()
def scored(model, tokenizer, items: list[tuple[list[int], list[list[int]]]], whole: bool, budget: int) -> list[list[float]]:
    """`score` of one batch. whole: without any cache, see `_whole`."""
    if whole:
        return _whole(model, items, tokenizer.pad_token_id, budget)
    several = any(len(c) > 1 for _, endings in items for c in endings)
    logits, cache, mask = prefill(model, [context for context, _ in items], tokenizer.pad_token_id, use_cache=several)
    logp = logits.float().log_softmax(-1)
    results = [[logp[row, c[0]].item() for c in endings] for row, (_, endings) in enumerate(items)]
    if several:
        _add_tails(model, tokenizer, items, cache, mask, results)
    return results


def _whole(model, items: list[tuple[list[int], list[list[int]]]], pad: int, budget: int) -> list[list[float]]:
    """The same without any cache: every continuation but its last token behind its context, padded on the right, which no
    causal model sees. Continuations of one token share one reading."""
    sums = [[0.0] * len(endings) for _, endings in items]
    users: dict[tuple, list[tuple[int, int]]] = {}  # (tokens, where the continuation's logits begin) -> (item, continuation)
    for i, (context, endings) in enumerate(items):
        for n, ending in enumerate(endings):
            users.setdefault((tuple(context + ending[:-1]), len(context) - 1), []).append((i, n))
    read = list(users)
    for batch in batches([len(tokens) for tokens, _ in read], budget, alone_beyond(model)):
        ids, _ = right_pad([list(read[r][0]) for r in batch], pad, model.device)
        at = [(row, column) for row, r in enumerate(batch) for column in range(read[r][1], len(read[r][0]))]
        with logits_only_at(model, *zip(*at, strict=True)):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        for r, block in zip(batch, logits.split([len(read[r][0]) - read[r][1] for r in batch]), strict=True):
            logps = block.float().log_softmax(-1)  # of one reading at a time: of all it would be as large as the logits again
            for i, n in users[read[r]]:
                wanted = torch.tensor(items[i][1][n], device=model.device)
                sums[i][n] = logps.gather(1, wanted[:, None]).sum().item()
    return sums


def _add_tails(model, tokenizer, items, cache, mask, results) -> None:
    """Add the log-probabilities of all but the first token of every continuation, on copies of the context's cache.

    Continuations of similar length go together, `TAILS` at a time: the logits of all of them at once, padded to the
    longest, would be the largest tensor of the whole evaluation.
    """
    where = [(row, n) for row, (_, endings) in enumerate(items) for n, ending in enumerate(endings) if len(ending) > 1]
    where.sort(key=lambda w: len(items[w[0]][1][w[1]]))
    for start in range(0, len(where), TAILS):
        part = where[start : start + TAILS]
        tails = [items[row][1][n] for row, n in part]
        width = max(map(len, tails)) - 1
        pick = torch.tensor([row for row, _ in part], device=model.device)
        copy = DynamicCache()
        for number, layer in enumerate(cache.layers):
            copy.update(layer.keys[pick], layer.values[pick], number)
        pad = [tokenizer.pad_token_id] * width
        fed = torch.tensor([(t[:-1] + pad)[:width] for t in tails], device=model.device)
        want = torch.tensor([(t[1:] + pad)[:width] for t in tails], device=model.device)
        real = torch.tensor([[i < len(t) - 1 for i in range(width)] for t in tails], device=model.device)
        logits = model(
            input_ids=fed,
            attention_mask=torch.cat([mask[pick], mask.new_ones(len(part), width)], dim=1),
            position_ids=mask[pick].sum(1, keepdim=True) + torch.arange(width, device=model.device),
            past_key_values=copy,
            use_cache=True,
        ).logits
        logp = torch.zeros(real.shape, device=model.device)
        kept = logits[real].float()
        logp[real] = kept.gather(-1, want[real][:, None])[:, 0] - kept.logsumexp(-1)
        for (row, n), total in zip(part, logp.sum(-1).tolist(), strict=True):
            results[row][n] += total
