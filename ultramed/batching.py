"""Batches by token budget, and right padding, which causal attention needs no mask for."""

from collections.abc import Iterator

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
