"""Batches by token budget; right padding, which causal attention needs no mask for; sequences that begin alike in one row."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


def batches(lengths: list[int], budget: int, alone_beyond: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (a run that does not fit fails at once), `budget` padded tokens each.

    What is longer than `alone_beyond` gets a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        alone = bool(batch) and alone_beyond is not None and lengths[batch[0]] > alone_beyond
        if batch and (alone or (len(batch) + 1) * lengths[batch[0]] > budget):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # in the order of words: what these two share, all rows between them share
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]


def right_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, lengths), (B, T) and (B,). Causal attention needs no mask then: padding comes after every real token."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
    return ids, torch.tensor([len(r) for r in rows], device=device)


@dataclass(frozen=True)
class PackedPrefixes:
    """Sequences that begin alike in one row: what they share is read once, and none sees another.

    input_ids, position_ids: (B, T); attention_mask: (B, 1, T, T), True where a token may look. `rows[i]`, `columns[i]`:
    where sequence i has the last token of its prompt, followed by its reply's tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: list[int]
    columns: list[list[int]]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        names = ("input_ids", "position_ids", "attention_mask")
        return {name: getattr(self, name) for name in names}


ROOT, PROMPT = -1, 0  # numbers of the prompt and of the reply that stand for "what all prompts share" and "the prompt itself"


class _Row:
    """One row being filled. Beside each token stands whose it is: the number of its prompt, and of its reply."""

    def __init__(self, shared: tuple[int, ...]):
        self.ids, self.positions = list(shared), list(range(len(shared)))
        self.prompt, self.reply = [ROOT] * len(shared), [PROMPT] * len(shared)
        self.starts: dict[tuple, tuple[int, int]] = {}  # prompt -> (its number in the row, column of its last token)

    def add(self, tokens: tuple[int, ...], first: int, prompt: int, reply: int) -> list[int]:
        """Append tokens at the positions from `first` on; their columns."""
        start = len(self.ids)
        self.ids += tokens
        self.positions += range(first, first + len(tokens))
        self.prompt += [prompt] * len(tokens)
        self.reply += [reply] * len(tokens)
        return list(range(start, len(self.ids)))


def pack_shared_prefixes(
    sequences: list[tuple[list[int], list[int]]], pad: int, device="cpu", limit: int = 256
) -> PackedPrefixes:
    """Pack (prompt, reply) token sequences into rows of at most `limit` tokens (or one sequence, if that is longer).

    Two levels are shared: what all prompts begin with stands once in every row, a prompt once before its replies. A
    reply's hidden states are those it has alone: it sees the root, its prompt and itself, at the positions it has alone.
    For short replies to prompts of one form this is several times less work than a padded row a sequence.
    """
    shared = tuple(common_prefix([prompt for prompt, _ in sequences]))
    groups: dict[tuple, list[int]] = {}
    for i, (prompt, _) in enumerate(sequences):
        groups.setdefault(tuple(prompt), []).append(i)
    layout: list[_Row] = []
    rows, columns = [0] * len(sequences), [[] for _ in sequences]
    for prompt, members in groups.items():
        rest = prompt[len(shared) :]
        for i in members:
            reply = tuple(sequences[i][1])
            needed = len(reply) + (0 if layout and prompt in layout[-1].starts else len(rest))
            if not layout or (len(layout[-1].ids) > len(shared) and len(layout[-1].ids) + needed > limit):
                layout.append(_Row(shared))
            row = layout[-1]
            if prompt not in row.starts:
                number = len(row.starts)
                at = row.add(rest, len(shared), number, PROMPT)
                row.starts[prompt] = number, (at or [len(shared) - 1])[-1]
            number, last = row.starts[prompt]
            rows[i] = len(layout) - 1
            columns[i] = [last, *row.add(reply, len(prompt), number, i + 1)]
    width = max(len(row.ids) for row in layout)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [value] * (width - len(row.ids)) for row in layout], device=device)

    prompt, reply = fill("prompt", -2), fill("reply", 0)
    same = (prompt[:, :, None] == prompt[:, None, :]) & (
        (reply[:, None, :] == PROMPT) | (reply[:, :, None] == reply[:, None, :])
    )
    seen = same | (prompt[:, None, :] == ROOT)
    mask = seen & torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return PackedPrefixes(fill("ids", pad), fill("positions", 0), mask[:, None], rows, columns)
