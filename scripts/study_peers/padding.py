"""Prompts of different lengths in one pass, for peers: right-padded, with a mask."""

from collections.abc import Iterator

import torch
from torch import Tensor

PASS_PROMPTS = 10


def passes(prompts: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batch prompts of similar length: yield their indices, ids (B, T), mask (B, T)."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for begin in range(0, len(order), PASS_PROMPTS):
        numbers = order[begin : begin + PASS_PROMPTS]
        ids = torch.zeros(len(numbers), len(prompts[numbers[0]]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            mask[row, : len(prompts[i])] = 1
        yield numbers, ids, mask
