"""Perplexity of a text: exp of the mean negative log-likelihood per token."""

import math
from dataclasses import dataclass

from llama_ref.errors import RequestError
from llama_ref.evaluation.scoring import rows_at_once, score_rows
from llama_ref.evaluation.texts import TextFile
from llama_ref.evaluation.windows import Cut, Window
from llama_ref.generation import Llama
from llama_ref.parallel.agreement import digest
from llama_ref.parallel.job import naming_a_lost_process
from llama_ref.progress import Progress, ProgressCounter


@dataclass(frozen=True)
class Perplexity:
    """A text's `perplexity` per token, and `bits_per_byte`, which is comparable across tokenizers.

    `tokens` is the number of scored tokens, `n_bytes` their length in UTF-8, `windows` the number
    of windows. `nll`: mean negative log-likelihood of a token, in nats. bits_per_byte = nll ·
    tokens / (n_bytes · ln 2).
    """

    perplexity: float
    bits_per_byte: float
    nll: float
    tokens: int
    n_bytes: int
    windows: int


def perplexity(llama: Llama, text: TextFile, cut: Cut, progress: Progress | None = None) -> Perplexity:
    """Compute a text's perplexity over the windows of `cut`. Every text gets a begin-of-text token.

    `progress` is called with (tokens scored, tokens to score). Raises RequestError for a text that
    is too short, LlamaRefError for NaN logits.
    """
    windows = windows_of(llama, text, cut)
    llama.job.check_same("scoring", {"the text": digest(text.text.encode()), "windows": str(cut)})
    counter = ProgressCounter(sum(len(window.scored) for window in windows), progress)
    counter.advance(0)
    means: list[float] = []
    n_rows = rows_at_once(llama.model, cut.context)
    with naming_a_lost_process():
        for start in range(0, len(windows), n_rows):
            some = windows[start : start + n_rows]
            scores = score_rows(llama.model, [(window.ids, window.begin) for window in some])
            means += [-score.logprob / len(window.scored) for score, window in zip(scores, some, strict=True)]
            counter.advance(sum(len(window.scored) for window in some))
    return _figures(llama, windows, means)


def windows_of(llama: Llama, text: TextFile, cut: Cut) -> list[Window]:
    """A text's windows. Raises RequestError, naming the file, if the text is too short."""
    content = text.text
    if cut.convention == "llama.cpp":
        content = content.removesuffix("\n")  # llama.cpp's tool drops it too
    try:
        return cut.windows(llama.tokenizer.encode(content, bos=True, eos=False), llama.tokenizer.bos_id)
    except RequestError as error:
        raise RequestError(f"{text.path}: {error}") from None


def _figures(llama: Llama, windows: list[Window], means: list[float]) -> Perplexity:
    weights = [window.weight for window in windows]
    nll = math.fsum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    tokens = sum(len(window.scored) for window in windows)
    n_bytes = sum(len(llama.tokenizer.token_bytes(token)) for window in windows for token in window.scored)
    bits_per_byte = nll * tokens / (n_bytes * math.log(2))
    return Perplexity(_exp(nll), bits_per_byte, nll, tokens, n_bytes, len(windows))


def _exp(nll: float) -> float:
    """exp, or infinity on overflow: a useless model's mean can be too large."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
