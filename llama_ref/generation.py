"""Prompts to text.

`Llama` has the methods, arguments and return values of Meta's `llama` package, so that scripts written for it run with the
import changed; `stream` and the sampling options beyond temperature and top_p are this project's.
"""

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.chat import ChatFormat, Dialog, Message
from llama_ref.checkpoint.first_load import Verify, verified
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loader import load_model
from llama_ref.compiled.cpu import compile_decode
from llama_ref.decoding.loop import Row, steps
from llama_ref.decoding.speculative import DraftModel, NGrams, PassTime, Speculation, speculative_steps
from llama_ref.decoding.stream import Stream, stop_strings
from llama_ref.device import choose_device, choose_dtype, prepare_cuda
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.parallel.job import ALONE, Job, join_job
from llama_ref.parallel.pipeline import split_layers
from llama_ref.parallel.sharding import check_divisible
from llama_ref.parallel.tensor import agreeing, split_matrices
from llama_ref.progress import Progress
from llama_ref.quantization.apply import use_fast_kernels
from llama_ref.sampling import Sampler, SamplingParams
from llama_ref.tokenizer import Tokenizer

Speculate = Literal["ngram"]


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


class Llama:
    """A model, its tokenizer and how to generate with them. Made by `Llama.build`, or from parts built elsewhere."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int = 8192,
        max_batch_size: int = 32,
        seed: int = 1,
        job: Job = ALONE,
        speculation: Speculation | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = ChatFormat(tokenizer)
        self.max_seq_len = max_seq_len
        self.max_batch_size = max_batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.job = job
        self.speculation = speculation

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 8192,
        max_batch_size: int = 32,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        pipeline_parallel_size: int = 1,
        quantize: str | None = None,
        compile: bool = False,
        speculate: Speculate | None = None,
        draft: str | Path | None = None,
        verify: Verify = "auto",
        progress: Progress | None = None,
    ) -> "Llama":
        """Load a checkpoint folder, named by path or release.

        `tokenizer_path` defaults to the folder's own. `device`: CUDA when there is one, else MPS, else the CPU. `dtype`:
        bfloat16 where the device has it, else float16. Of several processes (torchrun) each holds its part of every matrix, and
        of every `pipeline_parallel_size`-th run of layers. `max_seq_len` bounds prompt and answer together, in tokens; the KV
        cache is taken for each call and only as long as the call needs. `verify`: "auto" compares every file with
        checklist.chk the first time it is used, "always" each time, "never" does not. `progress` is called with (bytes done,
        bytes in all).
        `quantize`: "int8", "int4" or "int4:group=32" rounds the weights as they are read (quantization/apply.py). `compile`
        makes decoding faster, of one sequence on a CPU (compiled/cpu.py), of any number on CUDA (compiled/cuda.py); building
        waits some seconds for it. `speculate`="ngram" has text that repeats made faster, `draft` any text: it names a smaller
        model of the same vocabulary (decoding/speculative.py).
        Raises CheckpointError for what is wrong on disk, RequestError for what is wrong in the call.
        """
        _check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        SamplingParams(seed=seed)  # raises for a seed that is none
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        prepare_cuda(device)
        folder = open_folder(ckpt_dir)
        job = join_job(model_parallel_size, pipeline_parallel_size, device)
        _check_speculation(speculate, draft, job)
        fast = {"quantize": quantize, "compile": compile}
        small = draft and cls.build(draft, device=device, dtype=dtype, verify=verify, progress=progress, **fast)
        tokenizer_path = tokenizer_path or folder.tokenizer
        with verified(folder, verify, tokenizer_path):
            args = folder.read_args()
            tokenizer = folder.open_tokenizer(args, tokenizer_path)
            if small:
                _check_vocabulary(folder.path, args, tokenizer, draft, small)
            check_divisible(args, job.share)
            options = {"device": device, "dtype": dtype, "share": job.share, "quantize": quantize, "progress": progress}
            model = load_model(folder, args, **options)
        _divide(model, job)
        if compile:
            compile_decode(model)
        use_fast_kernels(model)  # for what is quantized, and not compiled
        speculation = DraftModel(small.model, model) if small else NGrams(PassTime.of(model)) if speculate else None
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        return cls(model, tokenizer, **limits, seed=seed, job=job, speculation=speculation)

    @property
    def device(self) -> torch.device:
        return self.model.layers[0].attention_norm.weight.device  # every part of a model has one, and it is never quantized

    @property
    def dtype(self) -> torch.dtype:
        return self.model.layers[0].attention_norm.weight.dtype

    # ---- Meta's interface

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt: (token ids per prompt, their log-probabilities per prompt or None).

        Outputs end before the stop token, after `max_gen_len` tokens or where the context ends. `echo` puts the prompt in
        front. Log-probabilities are the model's own, before temperature and filters; an echoed prompt's first token has none
        and stands as 0. `sampling` takes what SamplingParams has: top_k, min_p, repetition_penalty, logit_bias, seed.
        `study.recording(llama.model, names)` around the call keeps activations.
        Raises RequestError for prompts that are empty, too many, too long or hold ids outside the vocabulary.
        """
        params = SamplingParams(temperature=temperature, top_p=top_p, **sampling)
        rows = self._start(prompt_tokens, max_gen_len)
        for _ in self._steps(rows, params, prompt_logprobs=logprobs and echo):
            pass
        tokens = [(row.prompt if echo else []) + row.generated for row in rows]
        if not logprobs:
            return tokens, None
        return tokens, [(row.prompt_logprobs if echo else []) + row.logprobs for row in rows]

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Any,
    ) -> list[CompletionPrediction]:
        """Continue each text. With `logprobs`, every token's text and log-probability stand beside it. See `generate`."""
        if isinstance(prompts, str):  # would be taken for a list of its letters
            raise RequestError(f"prompts is the text {prompts!r:.60}, expected a list of texts")
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        tokens, token_logprobs = self.generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, **sampling)
        if token_logprobs is None:
            return [{"generation": self.tokenizer.decode(t)} for t in tokens]
        return [
            {"generation": self.tokenizer.decode(t), "tokens": [self.tokenizer.decode([x]) for x in t], "logprobs": p}
            for t, p in zip(tokens, token_logprobs, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **sampling: Any,
    ) -> list[ChatPrediction]:
        """Answer each dialog as the assistant. See `generate`."""
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        tokens, token_logprobs = self.generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **sampling)
        answers: list[Message] = [{"role": "assistant", "content": self.tokenizer.decode(t)} for t in tokens]
        if token_logprobs is None:
            return [{"generation": answer} for answer in answers]
        return [
            {"generation": answer, "tokens": [self.tokenizer.decode([x]) for x in t], "logprobs": p}
            for answer, t, p in zip(answers, tokens, token_logprobs, strict=True)
        ]

    # ---- one sequence, as it is made

    def stream(
        self,
        prompt: str | list[int] | Dialog,
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        stop: str | Sequence[str] = (),
        *,
        cache: KVCache | None = None,
        **sampling: Any,
    ) -> Stream:
        """Generate for one prompt and hand out the text as it is made.

        `prompt` is a text, token ids, or a dialog to answer. Iterating gives pieces of text that never hold half a
        character; `stop` strings and stop tokens end it and are not shown. The Stream then has `.finish_reason`
        ("stop" or "length"), `.tokens` and `.text`. It may be left at any point. A one-row `cache` that holds the prompt's
        beginning saves running that part again; afterwards it holds the prompt and the answer's beginning.
        """
        params = SamplingParams(temperature=temperature, top_p=top_p, **sampling)
        rows = self._start([self.encode(prompt)], max_gen_len)
        if cache is not None and (len(cache.lengths) != 1 or cache.max_seq_len < rows[0].total_len):
            raise RequestError(
                f"the cache has {len(cache.lengths)} rows of {cache.max_seq_len:,} tokens; prompt and answer need one row of "
                f"{rows[0].total_len:,}: make it larger, or max_gen_len smaller"
            )
        return Stream(rows[0], self._steps(rows, params, cache=cache), self.tokenizer, stop)

    def encode(self, prompt: str | list[int] | Dialog) -> list[int]:
        """Token ids of a text (with begin-of-text in front), of a dialog to answer, or as given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        if prompt and isinstance(prompt[0], int):
            return list(prompt)
        return self.formatter.encode_dialog_prompt(prompt)

    # ---- before the first token

    def _start(self, prompts: list[list[int]], max_gen_len: int | None) -> list[Row]:
        """A batch about to begin. Raises RequestError for prompts that cannot be continued."""
        _check_max_gen_len(max_gen_len)
        if not 0 < len(prompts) <= self.max_batch_size:
            raise RequestError(
                f"{len(prompts)} prompts, expected 1 to max_batch_size = {self.max_batch_size}: give them in turns, or "
                "build with a larger max_batch_size"
            )
        for prompt in prompts:
            self._check_prompt(prompt)
        limit = self.max_seq_len if max_gen_len is None else max_gen_len
        return [Row(list(prompt), min(limit, self.max_seq_len - len(prompt))) for prompt in prompts]

    def _check_prompt(self, prompt: list[int]) -> None:
        if not isinstance(prompt, Sequence) or not all(isinstance(token, Integral) for token in prompt):
            raise RequestError(f"a prompt is {prompt!r:.60}, expected a list of token ids for each prompt")
        if not prompt:
            raise RequestError("a prompt is empty; it needs one token at least (begin-of-text, say)")
        if len(prompt) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(prompt):,} tokens, but max_seq_len is {self.max_seq_len:,}: shorten it or build with more"
            )
        strange = [token for token in (min(prompt), max(prompt)) if not 0 <= token < self.model.args.vocab_size]
        if strange:
            raise RequestError(f"the prompt holds token {strange[0]}; the vocabulary has 0 to {self.model.args.vocab_size - 1}")

    def _steps(self, rows: list[Row], params: SamplingParams, **options: Any) -> Iterator[None]:
        generator = self.generator if params.seed is None else torch.Generator().manual_seed(params.seed)
        stop_tokens = self.tokenizer.stop_tokens
        if self.speculation is None:
            return steps(self.model, rows, self._sampler(rows, params, generator), stop_tokens, **options)
        samplers = [self._sampler([row], params, generator) for row in rows]
        return speculative_steps(self.model, rows, samplers, stop_tokens, self.speculation, **options)

    def _sampler(self, rows: list[Row], params: SamplingParams, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        sampler = Sampler(params, generator, [row.prompt for row in rows], self.model.args.vocab_size, self.device)
        return agreeing(sampler) if self.job is not ALONE else sampler


def _divide(model: Transformer, job: Job) -> None:
    """Make a process's part of a model work together with the others'."""
    if job.tensor_group:
        split_matrices(model, job.share, job.tensor_group)
    if job.pipeline_group:
        split_layers(model, job.share, job.pipeline_group)


def _check_speculation(speculate: str | None, draft: str | Path | None, job: Job) -> None:
    if speculate not in (None, "ngram"):
        raise RequestError(f'speculate is {speculate!r}, expected "ngram" or None; a draft model is named by draft')
    if speculate and draft:
        raise RequestError(f"speculate is {speculate!r} and draft is {str(draft)!r}: choose one")
    if draft and job is not ALONE:
        raise RequestError("a draft model works in one process only: leave out draft, or take speculate='ngram'")


def _check_vocabulary(path: Path, args: ModelArgs, tokenizer: Tokenizer, draft: str | Path, small: "Llama") -> None:
    """A draft model's ids must mean what the model's do."""
    ours, theirs = tokenizer.vocabulary, small.tokenizer.vocabulary
    n_ours, n_theirs = args.vocab_size, small.model.args.vocab_size
    if n_ours != n_theirs or ours.ranks != theirs.ranks or ours.added != theirs.added:
        found = f"{n_theirs:,} tokens, expected {n_ours:,}" if n_ours != n_theirs else f"{n_ours:,} tokens too, but others"
        raise RequestError(f"the draft model {draft} has another vocabulary than {path} ({found}): name one of the same family")


def check_stream_options(max_gen_len: int | None = None, stop: str | Sequence[str] = (), **sampling: Any) -> None:
    """Raise RequestError for options that `Llama.stream` would refuse, without a model: before a long load, say."""
    _check_max_gen_len(max_gen_len)
    stop_strings(stop)
    SamplingParams(**sampling)


def _check_max_gen_len(max_gen_len: int | None) -> None:
    if max_gen_len is not None and not (type(max_gen_len) is int and max_gen_len >= 0):
        raise RequestError(f"max_gen_len is {max_gen_len!r}, expected a whole number, or None for as many as fit")


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise RequestError(f"{name} is {number!r}, expected a positive whole number")
