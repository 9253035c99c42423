"""Our model behind lm-evaluation-harness's interface: log-likelihoods and generated texts."""

import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.task
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llama_ref.chat import Message
from llama_ref.errors import RequestError
from llama_ref.evaluation.continuations import score_continuations
from llama_ref.evaluation.scoring import rows_at_once, score_rows
from llama_ref.generation import Llama
from llama_ref.parallel.agreement import digest
from llama_ref.parallel.job import naming_a_lost_process
from llama_ref.progress import Progress, ProgressCounter

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # keys of generation_kwargs that we share
NOT_SAMPLING = ("until", "max_gen_toks", "do_sample")

MAX_GEN_TOKS = 256  # default when a task gives no limit, as in the harness's own models

logger = logging.getLogger(__name__)

# The harness's form of a request: ((context, continuation), context ids, continuation ids).
TokenRequest = tuple[tuple[str, str], list[int], list[int]]


def silence_bars() -> None:
    """Disable the harness's progress bars; progress is reported to the caller instead."""
    for module in (lm_eval.api.metrics, lm_eval.api.model, lm_eval.api.task):
        module.tqdm = functools.partial(tqdm, disable=True)


class LlamaRefLM(TemplateLM):
    """Wraps a Llama as a model of the harness.

    Requests longer than `llama.max_seq_len` tokens are truncated on the left. `batch`: contexts
    read at once. With `chat`, texts are dialogs in the chat format, and special tokens in them are
    parsed; else text never becomes a special token. `progress` is called with (requests done, all
    of their kind).
    """

    def __init__(self, llama: Llama, *, batch: int = 8, chat: bool = False, progress: Progress | None = None):
        super().__init__()
        self.llama = llama
        self.batch_size = batch
        self._chat = chat
        self._progress = progress

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: begin-of-text."""
        return self.llama.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.llama.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after one begin-of-text unless `add_special_tokens` is False."""
        bos = self.llama.tokenizer.bos_id
        ids = self.llama.tokenizer.encode(string, bos=False, eos=False, allowed_special="all" if self._chat else None)
        return ids if add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    # ---- chat

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches the requests that it has built."""
        return "llama_ref"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "Llama 3's chat format (llama_ref.chat)" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialog as text with special tokens.

        Without a generation prompt, the last message is left open.
        """
        # The formatter checks that the role is one of Llama's.
        messages = [Message(role=each["role"], content=each["content"]) for each in chat_history]  # type: ignore[typeddict-item]
        formatter = self.llama.formatter
        ids = formatter.encode_dialog_prompt(messages)
        if not add_generation_prompt:
            ids = ids[: -len(formatter.encode_header("assistant")) - 1]  # and the last message's end token
        return self.llama.tokenizer.decode(ids)

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        self._tell_of_cuts(len(fitting) < len(given) for (fitting, _), (_, given, _) in zip(pairs, requests, strict=True))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # the result for an empty continuation
        asked = [number for number, (_, continuation) in enumerate(pairs) if continuation]
        with self._running("log-likelihoods", pairs, len(requests)) as counter:
            counter.advance(len(requests) - len(asked))
            scores = score_continuations(self.llama.model, [pairs[number] for number in asked], self.batch_size)
            for i, score in scores:
                number = asked[i]
                found[number] = score.logprob, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                counter.advance()
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Truncate a context so that all tokens but the last fit.

        Raises RequestError if no context would be left.
        """
        if len(continuation) > self.max_length:
            raise RequestError(
                f"a continuation has {len(continuation):,} tokens, but max_seq_len is {self.max_length:,}: raise --max_seq_len"
            )
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, every token given the tokens before it in its window.

        Windows have up to max_length tokens and are disjoint; the first begins with begin-of-text.
        """
        texts = [instance.args[0] for instance in requests]
        windows = [(number, *window) for number, text in enumerate(texts) for window in self._windows(text)]
        windows.sort(key=lambda window: len(window[1]), reverse=True)
        parts: list[list[float]] = [[] for _ in texts]
        left = [sum(number == own for own, _, _ in windows) for number in range(len(texts))]
        with self._running("log-likelihoods of texts", windows, len(windows)) as counter:
            start = 0
            while start < len(windows):
                some = windows[start : start + rows_at_once(self.llama.model, len(windows[start][1]))]
                scores = score_rows(self.llama.model, [(ids, begin) for _, ids, begin in some])
                for (number, _, _), score in zip(some, scores, strict=True):
                    parts[number].append(score.logprob)
                    if len(parts[number]) == left[number]:
                        self.cache_hook.add_partial("loglikelihood_rolling", (texts[number],), sum(parts[number]))
                counter.advance(len(some))
                start += len(some)
        return [sum(each) for each in parts]

    def _windows(self, text: str) -> Iterator[tuple[list[int], int]]:
        """A text's windows, cut by the harness, as (ids, index of the first scored id)."""
        ids = self.tok_encode(text, add_special_tokens=False)
        for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
            context, scored = make_disjoint_window(pair)
            yield [*context, *scored], len(context)

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to a stop string or token, or `max_gen_toks` tokens."""
        prompts = [self.tok_encode(instance.args[0]) for instance in requests]
        found = [""] * len(requests)
        with self._running("texts", [prompts, [instance.args[1] for instance in requests]], len(requests)) as counter:
            for numbers in self._generated_together(requests, prompts):
                options = requests[numbers[0]].args[1]
                for number, text in zip(numbers, self._generate([prompts[n] for n in numbers], options), strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                counter.advance(len(numbers))
        return found

    def _generated_together(self, requests: Sequence[Instance], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of requests with the same options, the longest prompts first, in batches."""
        groups: dict[str, list[int]] = {}
        for number, instance in enumerate(requests):
            groups.setdefault(json.dumps(instance.args[1], sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            numbers.sort(key=lambda number: len(prompts[number]), reverse=True)
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _generate(self, prompts: list[list[int]], options: Mapping[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(dict(options), MAX_GEN_TOKS)
        if unknown := sorted(set(given) - {*SAMPLING, *NOT_SAMPLING}):
            raise RequestError(
                f"a task's generation_kwargs has {unknown[0]!r}, expected {', '.join((*NOT_SAMPLING, *SAMPLING))}"
            )
        max_gen_toks = given["max_gen_toks"]
        room = self.max_length - max_gen_toks
        if room < 1:
            raise RequestError(f"a task generates {max_gen_toks:,} tokens, but max_seq_len is {self.max_length:,}: raise it")
        self._tell_of_cuts(len(prompt) > room for prompt in prompts)
        sampling = {name: given[name] for name in SAMPLING if name in given}
        answers = self.llama.text_completion(
            [prompt[-room:] for prompt in prompts],
            max_gen_len=max_gen_toks,
            stop=[text for text in given["until"] if text],
            **{"temperature": 0.0, "top_p": 1.0} | sampling,
        )
        return [answer["generation"] for answer in answers]

    # ---- shared by all requests

    def _tell_of_cuts(self, are_cut: Iterable[bool]) -> None:
        """Warn about contexts that were truncated, if there are any."""
        if n := sum(are_cut):
            logger.warning(
                "%s contexts were truncated on the left to fit %s tokens with their answers", f"{n:,}", f"{self.max_length:,}"
            )

    @contextmanager
    def _running(self, what: str, requests: object, total: int) -> Iterator[ProgressCounter]:
        """Report progress for the block.

        In a job, check that all processes have the same requests.
        """
        facts = {"the requests": digest(json.dumps(requests, default=str).encode()), "batch": self.batch_size}
        self.llama.job.check_same(f"computing {what}", facts)
        counter = ProgressCounter(total, self._progress)
        counter.advance(0)
        with naming_a_lost_process():
            yield counter
