"""Batches by token budget; right padding, which causal attention needs no mask for; trees of replies to one prompt."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (a run that does not fit fails at once), `budget` padded tokens each."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def right_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, lengths), (B, T) and (B,). Causal attention needs no mask then: padding comes after every real token."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
    return ids, torch.tensor([len(r) for r in rows], device=device)


@dataclass(frozen=True)
class Trees:
    """Replies to the same prompt in one row behind it: the prompt is read once, and no reply sees another.

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


def trees(sequences: list[tuple[list[int], list[int]]], pad: int, device="cpu", limit: int = 1024) -> Trees:
    """Pack (prompt, reply) token sequences; equal prompts share a row as long as it has at most `limit` tokens.

    A reply's hidden states are those it has alone: it sees its prompt and itself, at the positions it has alone. For
    short replies to long prompts this is several times less work than a row a sequence.
    """
    layout: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments (0 is the prompt)
    open_rows: dict[tuple, int] = {}
    rows, columns = [], []
    for prompt, reply in sequences:
        key = tuple(prompt)
        at = open_rows.get(key)
        if at is None or len(layout[at][0]) + len(reply) > limit:
            at = open_rows[key] = len(layout)
            layout.append((list(prompt), list(range(len(prompt))), [0] * len(prompt)))
        ids, positions, segments = layout[at]
        start = len(ids)
        rows.append(at)
        columns.append([len(prompt) - 1, *range(start, start + len(reply))])
        segments += [segments[-1] + 1] * len(reply)
        positions += range(len(prompt), len(prompt) + len(reply))
        ids += reply
    width = max(len(ids) for ids, _, _ in layout)

    def fill(number: int, value: int) -> torch.Tensor:
        return torch.tensor([list(row[number]) + [value] * (width - len(row[number])) for row in layout], device=device)

    segment = fill(2, -1)
    own = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = own & torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return Trees(fill(0, pad), fill(1, 0), mask[:, None], rows, columns)
