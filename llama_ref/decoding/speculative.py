"""Speculative decoding: guess several tokens, let the model judge them all in one pass, keep those that it would have made.

A pass over a few tokens reads the weights once, as a pass over one does, and costs little more. Guesses come from the text
itself (`NGrams`: what followed the last few tokens when they stood here before) or from a smaller model (`DraftModel`). The
output is what it would be without them: greedy tokens are the same, and so are those sampled with a seed when the guesses are
n-grams'; a draft model's are kept or replaced so that every token keeps its distribution (arXiv:2211.17192, arXiv:2302.01318).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.forward import compiled_forward
from llama_ref.decoding.loop import Row, check_not_nan, finished, prefill, prefill_tokens
from llama_ref.device import fast_for_one_row
from llama_ref.formatting import dtype_name
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.quantization.linear import Int8Matrix, QuantizedMatrix
from llama_ref.sampling import Sampler

LONGEST_DRAFT = 12  # tokens
USUAL = {1: 0.3, 2: 0.6, 3: 0.8}  # how often a match of so many tokens is gone on with as before, until the text has shown
NEWEST = 0.1  # the last guess's weight in a rate of right ones
USUAL_OF_MODELS = 0.7  # how often a draft model is right

# PassTime's numbers by weights and whether decoding is compiled, for Llama 3.2 1B's shape on two cores.
MEASURED = {
    ("bfloat16", False): (1.4, 0.04),
    ("bfloat16", True): (1.4, 0.05),
    ("float32", False): (2.5, 0.0),
    ("float32", True): (2.5, 0.0),  # taken from the uncompiled, not measured
    ("int8", False): (0.40, 0.22),
    ("int8", True): (0.68, 0.34),
    ("int4", False): (0.47, 0.44),
    ("int4", True): (7.4, 0.31),
}
# On an H200, of the same kinds (scripts/bench_cuda.py, stages speculate and batch). Uncompiled passes are bound by launches, of
# which one of several tokens has as many. A compiled step of one token has kernels of its own, those of several tokens are
# cuBLAS's or read a quantized matrix more slowly: 1.34 steps in bfloat16 on the 8B, 1.78 on the 1B.
MEASURED_ON_CUDA = {
    ("bfloat16", False): (1.0, 0.01),
    ("bfloat16", True): (1.55, 0.005),
    ("int8", False): (1.0, 0.01),
    ("int8", True): (1.7, 0.01),
    ("int4", False): (1.0, 0.01),
    ("int4", True): (3.3, 0.02),
}


@dataclass(frozen=True)
class PassTime:
    """What a pass over T > 1 tokens takes, in decode steps: `several` + T · `each`.

    The defaults are bfloat16's on a CPU. Nothing is timed on the way: a run can be repeated, and all processes of a job draft
    alike.
    """

    several: float = 1.4
    each: float = 0.04

    @classmethod
    def of(cls, model: Transformer) -> "PassTime":
        """What was measured for models of this kind (scripts/bench_speculate.py prints it).

        Fewer bits and a compiled step make a step cheaper, and a pass over several tokens less so.
        """
        block = model.layers[0]  # every part of a model has one
        norm, matrix = block.attention_norm.weight, block.attention.wq
        dtype = dtype_name(norm.dtype)
        kind = "int8" if isinstance(matrix, Int8Matrix) else "int4" if isinstance(matrix, QuantizedMatrix) else dtype
        is_compiled = any(compiled_forward(module) for module in (model, block))
        measured = MEASURED if norm.device.type == "cpu" else MEASURED_ON_CUDA
        return cls(*measured.get((kind, is_compiled), measured["bfloat16", is_compiled]))

    def with_guesses(self, n: int) -> float:
        return max(1.0, self.several + (n + 1) * self.each) if n else 1.0


@dataclass
class Draft:
    """Guessed tokens, and the distributions (V,) that they were drawn from: none where nothing was left to chance."""

    tokens: list[int] = field(default_factory=list)
    drawn_from: list[Tensor] = field(default_factory=list)


class Drafter(Protocol):
    """Guesses how one row goes on."""

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        """Up to `at_most` tokens to follow the row's; `sampler` is the row's own, and stays as it is but for its generator."""
        ...


class Speculation(Protocol):
    """A way to guess."""

    def drafters(self, rows: list[Row]) -> Sequence[Drafter]:
        """One for each row of a batch about to begin."""
        ...


def speculative_steps(
    model: Transformer,
    rows: list[Row],
    samplers: Sequence[Callable[[Tensor], Tensor]],
    stop_tokens: Collection[int],
    speculation: Speculation,
    *,
    cache: KVCache | None = None,
    prompt_logprobs: bool = False,
) -> Iterator[None]:
    """What `loop.steps` does, token by token, in fewer passes through the model; `drafted` and `accepted` stand in the rows.

    There is a sampler, for one row, to each row: they come forward at different speeds. A model's drafts need them to be
    `Sampler`s; for n-grams any will do.
    """
    if finished(rows) and not prompt_logprobs:
        return
    if cache is None:
        cache = new_cache(model, len(rows), max(row.total_len for row in rows))
    lines = [_Line(*each) for each in zip(rows, samplers, speculation.drafters(rows), strict=True)]
    logits = prefill(model, rows, cache, prompt_logprobs)[:, None]  # (B, 1, V): after a pass with no guesses
    while not finished(rows):
        yield from _take(lines, logits, stop_tokens, cache)
        if not finished(rows):
            logits = _pass(model, lines, stop_tokens, cache)


@dataclass
class _Line:
    """A row with what it needs to go on."""

    row: Row
    sampler: Callable[[Tensor], Tensor]
    drafter: Drafter
    draft: Draft = field(default_factory=Draft)

    def guess(self, room: int, stop_tokens: Collection[int]) -> None:
        """Make a draft that leaves room for the token after it, and does not go on after a stop token."""
        at_most = min(room, self.row.max_gen_len - len(self.row.generated)) - 1
        draft = Draft() if self.row.finish_reason or at_most < 1 else self.drafter.draft(self.row, at_most, self.sampler)
        stop = next((place for place, token in enumerate(draft.tokens) if token in stop_tokens), len(draft.tokens))
        self.draft = Draft(draft.tokens[: stop + 1], draft.drawn_from[: stop + 1])
        self.row.drafted += len(self.draft.tokens)

    def take(self, place: int, logits: Tensor, stop_tokens: Collection[int], dtype: torch.dtype) -> bool:
        """Choose the next token from logits (1, V): whether it is the draft's, and more may follow."""
        guessed = self.draft.tokens[place] if place < len(self.draft.tokens) else None
        if self.draft.drawn_from and guessed is not None:
            drawn_from = self.draft.drawn_from[place][None]
            chosen = self.sampler.judge(logits, torch.tensor([guessed], device=logits.device), drawn_from)
        else:  # a certain guess is kept with probability p, and what replaces it is as in p: draw, then, and compare
            chosen = self.sampler(logits)
        logprob = -F.cross_entropy(logits, chosen).item()
        check_not_nan(logprob, dtype)
        token = int(chosen)
        self.row.take(token, logprob, stop_tokens)
        self.row.accepted += token == guessed
        return token == guessed and not self.row.finish_reason


def _take(lines: list[_Line], logits: Tensor, stop_tokens: Collection[int], cache: KVCache) -> Iterator[None]:
    """Choose tokens from a pass's logits (B, T, V), one a step, in each row as long as they are its draft's and once more.

    At every rest the cache is cut back to what has been taken.
    """
    live = [not line.row.finish_reason for line in lines]
    going_on = [(line, of_line) for line, of_line in zip(lines, logits, strict=True) if not line.row.finish_reason]
    for place in range(logits.shape[1]):
        going_on = [
            (line, of_line)
            for line, of_line in going_on
            if line.take(place, of_line[place : place + 1], stop_tokens, cache.keys.dtype)
        ]
        _cut_back(cache, lines, live)
        yield
        if not going_on:
            return


@torch.inference_mode()
def _pass(model: Transformer, lines: list[_Line], stop_tokens: Collection[int], cache: KVCache) -> Tensor:
    """Draft for every row and run the drafts through the model: logits (B, T, V) after each row's last token and its guesses.

    Shorter drafts are padded; what pads and wrong guesses write into the cache lies beyond the length that it is cut back to.
    """
    _cut_back(cache, lines, [not line.row.finish_reason for line in lines])
    for line in lines:
        line.guess(cache.max_seq_len - cache.longest, stop_tokens)
    tokens = torch.zeros(len(lines), 1 + max(len(line.draft.tokens) for line in lines), dtype=torch.long)
    for line, padded in zip(lines, tokens, strict=True):
        known = [*line.row.generated[-1:], *line.draft.tokens]
        padded[: len(known)] = torch.tensor(known)
    tokens = tokens.to(cache.lengths.device)
    with fast_for_one_row(tokens, cache.keys.dtype):
        return model(tokens, cache)


def _cut_back(cache: KVCache, lines: list[_Line], live: list[bool]) -> None:
    """Leave in the cache what has been taken and run; nothing of rows that have ended, which mark time at its beginning."""
    rows = [line.row for line in lines]
    run = [len(row.prompt) + len(row.generated) - (row.stop_token is None) for row in rows]  # not yet, the last one taken
    cache.set_lengths([length if is_live else 0 for length, is_live in zip(run, live, strict=True)])


class Rate:
    """How often guesses have been right of late, and how many to make for that."""

    def __init__(self, right: float):
        self.right = right  # a share; at first, what is usual

    def note(self, was_right: bool) -> None:
        self.right += NEWEST * (was_right - self.right)

    def best_length(self, at_most: int, pass_time: PassTime, cost: float = 0.0) -> int:
        """How many guesses bring the most tokens for the time, each costing `cost` decode steps to make."""

        def tokens_per_step(n: int) -> float:
            return sum(self.right**i for i in range(n + 1)) / (pass_time.with_guesses(n) + n * cost)

        return max(range(min(at_most, LONGEST_DRAFT) + 1), key=tokens_per_step)


class NGrams:
    """Guesses that the text goes on as it did after the same few tokens before: prompt lookup, with no second model."""

    def __init__(self, pass_time: PassTime = PassTime()):
        self.pass_time = pass_time

    def drafters(self, rows: list[Row]) -> list["NGramDrafter"]:
        return [NGramDrafter(self.pass_time) for _ in rows]


class NGramDrafter:
    """Looks up the end of one row's text in what stands before it, the longest match first, the latest of them.

    What would have been guessed is compared with every token that comes, whether or not it was: so it is known for each
    length of match how far it can be trusted, and text that does not repeat soon costs no more passes than without.
    """

    def __init__(self, pass_time: PassTime):
        self.pass_time = pass_time
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # where the text went on after these tokens, when they came last
        self.rates = {n: Rate(right) for n, right in USUAL.items()}

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        self._read(row)
        length, place = self._look_up()
        if not length:
            return Draft()
        n_guesses = self.rates[length].best_length(at_most, self.pass_time)
        tokens = self.text[place : place + n_guesses]
        while len(tokens) < n_guesses:  # the text ends in a repetition: its period goes on
            tokens.append(tokens[place - len(self.text)])
        return Draft(tokens)

    def _read(self, row: Row) -> None:
        """Take in what the row has come to since."""
        if not self.text:
            for token in row.prompt:
                self._add(token)
        for token in row.generated[len(self.text) - len(row.prompt) :]:
            length, place = self._look_up()
            if length:
                self.rates[length].note(self.text[place] == token)
            self._add(token)

    def _add(self, token: int) -> None:
        for n in USUAL:
            if n <= len(self.text):
                self.after[tuple(self.text[-n:])] = len(self.text)
        self.text.append(token)

    def _look_up(self) -> tuple[int, int]:
        """The longest match's length, and where the text went on after it; (0, 0) for none."""
        found = ((n, self.after.get(tuple(self.text[-n:]))) for n in reversed(USUAL))
        return next(((n, place) for n, place in found if place is not None), (0, 0))


class DraftModel:
    """Guesses of a smaller model with the same vocabulary, which keeps its own keys and values of each row's text."""

    def __init__(self, model: Transformer, target: Transformer, pass_time: PassTime | None = None):
        self.model = model
        self.pass_time = pass_time or PassTime.of(target)
        self.cost = _bytes_read(model) / _bytes_read(target)  # of a token, in decode steps of the target
        self._last: ModelDrafter | None = None  # that of a single row: a conversation's next turn goes on from it

    def drafters(self, rows: list[Row]) -> list["ModelDrafter"]:
        if len(rows) == 1 and self._last and self._last.cache.max_seq_len >= rows[0].total_len:
            self._last.guessed = 0, []
            return [self._last]
        drafters = [ModelDrafter(self.model, row.total_len, self.pass_time, self.cost) for row in rows]
        self._last = drafters[0] if len(rows) == 1 else None
        return drafters


class ModelDrafter:
    """Continues one row's text with a model, drawing as the row's own sampler would."""

    def __init__(self, model: Transformer, n_tokens: int, pass_time: PassTime, cost: float):
        self.model = model
        self.pass_time, self.cost = pass_time, cost
        self.cache = new_cache(model, 1, n_tokens)
        self.known: list[int] = []  # the text that stands in the cache
        self.guessed: tuple[int, list[int]] = 0, []  # what, the last time, and after how many tokens
        self.rate = Rate(USUAL_OF_MODELS)

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        text = row.prompt + row.generated
        self._compare(text)
        sampler, draft = sampler.fork(), Draft()
        n_guesses = max(1, self.rate.best_length(at_most, self.pass_time, self.cost))  # with none it would never learn more
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
        """Learn from how many of the last guesses came to be in the text."""
        begin, guesses = self.guessed
        for guess, token in zip(guesses, text[begin:], strict=False):
            self.rate.note(guess == token)
            if guess != token:
                return

    def _run(self, text: list[int]) -> Tensor:
        """Run what is new in a text through the model: logits (1, V) after its last token."""
        begin = self.guessed[0]  # so far it is what it was, but in a new conversation
        begin = begin if self.known[:begin] == text[:begin] else 0
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.known[begin:], text[begin:-1], strict=False))
        begin += sum(1 for _ in same)
        self.cache.set_lengths([begin])
        self.known = []  # should this be broken off
        logits = _last_logits(self.model, text[begin:], self.cache)
        self.known = text
        return logits


@torch.inference_mode()
def _last_logits(model: Transformer, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits (1, V) after the last of some tokens that follow what the cache holds."""
    *before, last = torch.tensor([tokens], device=cache.lengths.device).split(prefill_tokens(cache), dim=1)
    for piece in before:
        model.hidden(piece, cache)
    with fast_for_one_row(last, cache.keys.dtype):
        if last.shape[1] == 1:
            return model(last, cache)[:, 0]
        return model.logits(model.hidden(last, cache)[:, -1])


def _bytes_read(model: Transformer) -> int:
    """Of weights, in a decode step: all but the embedding, of which it is a row."""
    tensors = (tensor for part in (model.layers, model.output) for tensor in (*part.parameters(), *part.buffers()))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
