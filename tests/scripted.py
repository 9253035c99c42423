"""A real model that gives a test's answers: its choices are replaced in the real loop and cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama_ref.generation import Llama


def scripted(llama: Llama, answers: Sequence[str], monkeypatch) -> Llama:
    """A Llama with a short context that gives these answers, one per call, with special tokens."""
    scripted = Llama(llama.model, llama.tokenizer, max_seq_len=1024)
    encode = scripted.tokenizer.encode
    left = iter([encode(answer, bos=False, eos=False, allowed_special="all") for answer in answers])

    def sampler(rows, params, generator):
        return Choices(next(left))

    monkeypatch.setattr(scripted, "_sampler", sampler)
    return scripted


class Choices:
    """Replaces a Sampler: returns given ids one by one, whatever the logits."""

    def __init__(self, ids: Sequence[int]):
        self._ids: Iterator[int] = iter(ids)

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.full((len(logits),), next(self._ids), device=logits.device)
