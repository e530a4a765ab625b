"""Log-likelihood of answers: the prompt is read once, whatever the number of options.

Prompts and tokenisation follow lm-evaluation-harness 0.4.13 (tasks medqa_4options, medmcqa, pubmedqa, mmlu), so that
the choice is the same item for item; only positions whose logits are needed get any.
"""

from collections.abc import Callable

import torch

from ultramed.evaluate.generate import batches, left_pad


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
    if kind == "mmlu_medical":
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


@torch.inference_mode()
def score(
    model, tokenizer, items: list[tuple[list[int], list[list[int]]]], *, budget: int = 8192,
    done: Callable[[list[int], list[list[float]]], None] | None = None,
) -> list[list[float]]:  # fmt: skip
    """Summed log-probability of each continuation given its context.

    items: (context ids, [continuation ids, ...]); every context and continuation has at least one token. The context
    is run once; where a continuation has several tokens, its cache is shared by all continuations of the item.
    """
    results: list[list[float]] = [[] for _ in items]
    for batch in batches([len(c) for c, _ in items], budget):
        ids, mask = left_pad([items[i][0] for i in batch], tokenizer.pad_token_id, model.device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        several = any(len(c) > 1 for i in batch for c in items[i][1])
        full = None if mask.all() else mask
        first = model(
            input_ids=ids, attention_mask=full, position_ids=position, use_cache=several, logits_to_keep=1
        )
        logp = first.logits[:, -1].float().log_softmax(-1)
        for row, i in enumerate(batch):
            results[i] = [logp[row, c[0]].item() for c in items[i][1]]
        if several:
            _add_tails(model, tokenizer, items, batch, first.past_key_values, mask, position[:, -1:] + 1, results)
        if done:
            done(batch, [results[i] for i in batch])
    return results


def _add_tails(model, tokenizer, items, batch, cache, mask, position, results) -> None:
    """Add the log-probabilities of all but the first token of every continuation, on copies of the context's cache."""
    where = [(row, i, n) for row, i in enumerate(batch) for n in range(len(items[i][1]))]
    tails = [items[i][1][n] for _, i, n in where]
    width = max(map(len, tails)) - 1
    pick = torch.tensor([row for row, _, _ in where], device=model.device)
    cache.batch_select_indices(pick)
    fed = torch.tensor([(t[:-1] + [tokenizer.pad_token_id] * width)[:width] for t in tails], device=model.device)
    want = torch.tensor([(t[1:] + [0] * width)[:width] for t in tails], device=model.device)
    real = torch.tensor([[1.0] * (len(t) - 1) + [0.0] * (width - len(t) + 1) for t in tails], device=model.device)
    steps = torch.arange(width, device=model.device)
    out = model(
        input_ids=fed, attention_mask=torch.cat([mask[pick], mask.new_ones(len(where), width)], dim=1),
        position_ids=position[pick] + steps, past_key_values=cache, use_cache=True,
    )  # fmt: skip
    picked = out.logits.gather(-1, want[..., None])[..., 0].float()
    logp = (picked - out.logits.float().logsumexp(-1)) * real
    for (_, i, n), total in zip(where, logp.sum(-1).tolist(), strict=True):
        results[i][n] += total
