"""Draft models: a smaller model with the same vocabulary guesses how a text continues."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.drafting import AcceptanceRate, Draft, PassTime
from llama_ref.decoding.loop import check_not_nan
from llama_ref.decoding.reading import prefill_tokens
from llama_ref.decoding.row import Row
from llama_ref.kv_cache import KVCache
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer
from llama_ref.sampling import Sampler

PRIOR_RATE = 0.7  # acceptance rate of a draft model, until the text provides its own


class DraftModel:
    """Speculation with a smaller model, which keeps a KV cache of each row's text."""

    def __init__(self, model: Transformer, target: Transformer):
        self.model = model
        self.pass_time = PassTime.for_model(target)
        self.cost = _bytes_read(model) / _bytes_read(target)  # of a guess, in decode steps of the target
        # The last drafter of a single row: a conversation's next turn continues with its cache.
        self._idle: list[ModelDrafter] = []

    @contextmanager
    def drafting(self, rows: list[Row]) -> Iterator[list["ModelDrafter"]]:
        idle, self._idle = self._idle, []  # another thread creates its own
        if len(rows) == len(idle) == 1 and idle[0].cache.max_seq_len >= rows[0].total_len:
            drafters = idle
            drafters[0].guessed = 0, []
        else:
            drafters = [ModelDrafter(self.model, row.total_len, self.pass_time, self.cost) for row in rows]
        try:
            yield drafters
        finally:
            self._idle = drafters if len(rows) == 1 else []


class ModelDrafter:
    """Continues one row's text with a model, sampling as the row's own sampler would."""

    def __init__(self, model: Transformer, n_tokens: int, pass_time: PassTime, cost: float):
        self.model = model
        self.pass_time, self.cost = pass_time, cost
        self.cache = new_cache(model, 1, n_tokens)
        self.cached: list[int] = []  # the tokens in the cache
        self.guessed: tuple[int, list[int]] = 0, []  # the text's length at the last draft, and the guesses
        self.rate = AcceptanceRate(PRIOR_RATE)

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        vocabulary = range(self.model.args.vocab_size)  # image ids are outside: token 0 instead
        text = [token if token in vocabulary else 0 for token in row.prompt] + row.generated
        self._compare(text)
        sampler, draft = sampler.fork(), Draft()
        # At least one guess: with none, the rate would never change again.
        n_guesses = max(1, self.rate.best_length(at_most, self.pass_time, self.cost))
        while len(draft.tokens) < n_guesses:
            logits = self._run(text + draft.tokens)
            check_not_nan(logits.amax().item(), logits.dtype, "the draft model")
            token, drawn_from = sampler.guess(logits)
            draft.tokens.append(int(token))
            if drawn_from is not None:
                draft.drawn_from.append(drawn_from[0])
        self.guessed = len(text), draft.tokens
        return draft

    def _compare(self, text: list[int]) -> None:
        """Update the acceptance rate from the guesses that the text has confirmed or contradicted."""
        begin, guesses = self.guessed
        for guess, token in zip(guesses, text[begin:], strict=False):
            self.rate.update(guess == token)
            if guess != token:
                return

    def _run(self, text: list[int]) -> Tensor:
        """Run a text's new tokens through the model: logits (1, V) after its last token."""
        begin = self.guessed[0]  # the text is unchanged up to here, unless a new conversation began
        begin = begin if self.cached[:begin] == text[:begin] else 0
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.cached[begin:], text[begin:-1], strict=False))
        begin += sum(1 for _ in same)
        self.cache.truncate([begin])
        self.cached = []  # in case the pass is interrupted
        logits = _last_logits(self.model, text[begin:], self.cache)
        self.cached = text
        return logits


@torch.inference_mode()
def _last_logits(model: Transformer, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits (1, V) after the last of the tokens that follow what the cache holds."""
    *before, last = torch.tensor([tokens], device=cache.lengths.device).split(prefill_tokens(cache), dim=1)
    for piece in before:
        with onednn_for(piece, cache.keys.dtype):
            model.hidden(piece, cache)
    with onednn_for(last, cache.keys.dtype):
        if last.shape[1] == 1:
            return model(last, cache)[:, 0]
        return model.logits(model.hidden(last, cache)[:, -1])


def _bytes_read(model: Transformer) -> int:
    """Weight bytes read in a decode step: all but the embedding, of which it reads one row."""
    parts = (*model.layers, model.output)
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
