"""Reads the probabilities of a verdict while the guard's answer is generated."""

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.guard.verdict import Probabilities
from llama_ref.tokenizer import Tokenizer


class VerdictReader:
    """Samples answers: the verdict by its probability and the threshold, other tokens greedily.

    The verdict is read at the first position whose likeliest token is not white space; Guard 3's
    prompt ends right before it, so a verdict costs one prefill. If that token is "safe" or
    "unsafe", the ratio P(unsafe) / (P(safe) + P(unsafe)) is compared with the threshold, and a safe
    answer ends there. `probabilities` and `is_safe` have one entry per row.
    """

    def __init__(self, tokenizer: Tokenizer, threshold: float, n_rows: int) -> None:
        self._tokenizer = tokenizer
        self._unsafe, self._safe = word_id(tokenizer, "unsafe"), word_id(tokenizer, "safe")
        self._threshold = threshold
        self._is_read = [False] * n_rows
        self.probabilities = [Probabilities(0.0, 0.0, 0.0)] * n_rows
        self.is_safe = [False] * n_rows

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next tokens: float32 logits (B, V) -> ids (B,)."""
        chosen = logits.argmax(-1)  # (B,)
        if all(self._is_read):
            return chosen
        words = [self._unsafe, self._safe]
        found = logits.softmax(-1)[:, words].tolist()  # (B, 2)
        ratios = (logits[:, self._unsafe] - logits[:, self._safe]).sigmoid().tolist()
        ids = chosen.tolist()
        for row, (token, (unsafe, safe), ratio) in enumerate(zip(ids, found, ratios, strict=True)):
            if self._is_read[row]:
                continue
            self.probabilities[row] = Probabilities(unsafe, safe, ratio)
            self._is_read[row] = not self._tokenizer.decode([token]).isspace()
            if token in words:
                self.is_safe[row] = ratio < self._threshold
                ids[row] = self._tokenizer.eot_id if self.is_safe[row] else self._unsafe
        return torch.tensor(ids, device=logits.device)


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """The id of a word that is one token. Raises RequestError if it is several tokens."""
    ids = tokenizer.encode(word, bos=False, eos=False)
    if len(ids) != 1:
        raise RequestError(
            f"this tokenizer encodes {word!r} as {len(ids)} tokens, Llama 3's as one: the model is not a Llama Guard"
        )
    return ids[0]
