"""Generate text from prompts.

`Llama` has the methods, arguments and return values of Meta's `llama` package, so that scripts written for
it run with the import changed; `stream` and the options beyond temperature and top_p are additions.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard, cast

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.chat import NO_IMAGES, ChatFormat, Dialog, Message, StopReason, images_in
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.hf.conventions import foreign_template
from llama_ref.checkpoint.loading.fingerprint import fingerprint
from llama_ref.checkpoint.loading.first_load import Verify, verified
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.meta_quantized.matrices import Activations
from llama_ref.compiled.cpu import compile_decode
from llama_ref.decoding.draft_model import DraftModel
from llama_ref.decoding.drafting import PassTime, Speculation
from llama_ref.decoding.loop import steps
from llama_ref.decoding.prompt_lookup import PromptLookup
from llama_ref.decoding.row import Row
from llama_ref.decoding.speculative import speculative_steps
from llama_ref.decoding.stream import RowText, Stream, stop_strings
from llama_ref.device import choose_device, choose_dtype, prepare_cuda
from llama_ref.errors import RequestError
from llama_ref.formatting import comma_list, dtype_name
from llama_ref.images import Tiles, load_tiles
from llama_ref.kv_cache import KVCache
from llama_ref.machine.memory import keep_scratch_memory
from llama_ref.model import Transformer
from llama_ref.numbers import plain_list, plain_number
from llama_ref.parallel.division import connect
from llama_ref.parallel.facts import generation_facts
from llama_ref.parallel.job import ALONE, Job, join_job, naming_a_lost_process
from llama_ref.parallel.sharding import check_divisible
from llama_ref.parallel.tensor import broadcast_choice
from llama_ref.progress import Progress
from llama_ref.quantization.apply import use_fast_kernels
from llama_ref.quantization.scheme import Scheme
from llama_ref.sampling import Sampler, SamplingOptions, SamplingParams
from llama_ref.tokenizer import Tokenizer
from llama_ref.tools.formats.names import ToolFormat, default_format, untrained
from llama_ref.tools.toolset import ToolLike, ToolSet
from llama_ref.vision import VisionTransformer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_ref.images import ImageSource

Speculate = Literal["ngram"]
MOST_SHOWN = 4  # special tokens in one warning

logger = logging.getLogger(__name__)


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # only with logprobs
    logprobs: list[float]  # only with logprobs


class Llama:
    """A model with its tokenizer, and methods to generate text.

    Built by `Llama.build` or from existing parts.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int = 8192,
        max_batch_size: int = 32,
        seed: int | None = 1,
        job: Job = ALONE,
        speculation: Speculation | None = None,
        chat_warning: str | None = None,
        tool_format: ToolFormat | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        form = tool_format or default_format(model.args)
        self.formatter = ChatFormat(tokenizer, chat_warning, self.image_id, form, untrained(model.args))
        self.max_seq_len = _positive("max_seq_len", max_seq_len)
        self.max_batch_size = _positive("max_batch_size", max_batch_size)
        self.generator = _generator(SamplingParams(seed=seed).seed)
        self.job = job
        self.speculation = speculation

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the generator as bytes: a tensor made only for pickling would be freed too early.

        `multiprocessing` passes tensors to a spawned worker as file descriptors, which live as long
        as the tensors. torch's own pickle of a generator contains such a temporary tensor.
        """
        return self.__dict__ | {"generator": self.generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        generator_state = torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8)
        self.generator = torch.Generator("cpu").set_state(generator_state)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 8192,
        max_batch_size: int = 32,
        model_parallel_size: int | None = None,
        seed: int | None = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        pipeline_parallel_size: int = 1,
        quantize: str | None = None,
        activations: Activations | None = None,
        compile: bool = False,
        speculate: Speculate | None = None,
        draft: str | Path | None = None,
        verify: Verify = "auto",
        in_memory: bool = False,
        progress: Progress | None = None,
    ) -> "Llama":
        """Load a checkpoint folder, given by path or release name.

        tokenizer_path: by default the folder's.
        max_seq_len: limit of prompt and answer together, in tokens; each call allocates a KV cache
        only as long as it needs.
        max_batch_size: prompts per call.
        model_parallel_size: accepted for Meta's scripts; must agree with torchrun's processes, each
        of which holds a part of every matrix.
        pipeline_parallel_size: number of pipeline stages (runs of consecutive layers).
        seed: random seed for sampling; None: a random one.
        device: by default CUDA if available, else MPS, else the CPU.
        dtype: by default bfloat16 if the device has it, else float16.
        quantize: "int8", "int4" or "int4:group=32" rounds the weights while loading
        (quantization/apply.py).
        activations: the arithmetic of Meta's int4 and fp8 releases: "reference", the default,
        rounds the inputs of their matrices as Meta's code does, "full" does not.
        compile: speed up decoding, of one sequence on a CPU (compiled/cpu.py), of any batch on CUDA
        (compiled/cuda.py), after some seconds of compiling.
        speculate: "ngram" speeds up repetitive text.
        draft: a smaller model with the same vocabulary, which speeds up any text
        (decoding/speculative.py).
        verify: "auto" compares every file with checklist.chk when it is first used, "always" at
        every load, "never" not at all.
        in_memory: copy the weights instead of mapping the files, which may then change while the
        model is used.
        progress: called with (bytes done, total bytes).

        On a CPU the process keeps up to 256 MB of freed memory from then on (machine/memory.py).
        Raises CheckpointError for a bad checkpoint, RequestError for bad arguments, JobError if
        torchrun's processes have different files or options.
        """
        _positive("max_seq_len", max_seq_len)
        _positive("max_batch_size", max_batch_size)
        SamplingParams(seed=seed)  # raises RequestError for an invalid seed
        on = choose_device(device)
        precision = choose_dtype(dtype, on)
        prepare_cuda(on)
        job = join_job(plain_number(model_parallel_size), plain_number(pipeline_parallel_size), on)
        folder = open_folder(ckpt_dir)
        _check_speculation(speculate, draft, job)
        small = None
        if draft:
            small = cls.build(
                draft,
                device=on,
                dtype=precision,
                quantize=quantize,
                compile=compile,
                verify=verify,
                in_memory=in_memory,
                progress=progress,
            )
        tokenizer_path = tokenizer_path or folder.tokenizer
        with verified(folder, verify, tokenizer_path):
            args = folder.read_args()
            tokenizer = folder.open_tokenizer(args, tokenizer_path)
            if draft and small:
                _check_vocabulary(folder.path, args, tokenizer, draft, small)
            if job.is_parallel:
                options = {
                    "the stop tokens": tokenizer.stop_tokens,
                    "dtype": dtype_name(precision),
                    "quantize": quantize and str(Scheme.parse(quantize)),
                    "activations": activations,
                    "compile": compile,
                    "speculate": speculate,
                    "max_seq_len": max_seq_len,
                    "max_batch_size": max_batch_size,
                }
                job.check_same("loading the model", fingerprint(folder, args, tokenizer_path) | options)
            check_divisible(args, job.share)
            model = load_model(
                folder,
                args,
                device=on,
                dtype=precision,
                share=job.share,
                quantize=quantize,
                activations=activations,
                in_memory=in_memory,
                progress=progress,
            )
        connect(model, args, job)
        if on.type == "cpu":
            keep_scratch_memory()
        if compile:
            compile_decode(model)
        use_fast_kernels(model)  # for quantized matrices that were not compiled
        speculation: Speculation | None = None
        if small:
            speculation = DraftModel(small.model, model)
        elif speculate:
            speculation = PromptLookup(PassTime.for_model(model))
        return cls(
            model,
            tokenizer,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            seed=seed,
            job=job,
            speculation=speculation,
            chat_warning=foreign_template(folder.path),
            tool_format=default_format(args, folder.path),
        )

    @property
    def image_id(self) -> int | None:
        """The id that marks an image in a prompt (128256); None if the model reads no images."""
        return self.model.image_id if isinstance(self.model, VisionTransformer) else None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    # ---- Meta's interface

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        images: Sequence[Sequence["ImageSource"]] | None = None,
        stop: str | Sequence[str] = (),
        **sampling: "Unpack[SamplingOptions]",
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt: (token ids per prompt, their log-probabilities per prompt or None).

        Outputs end before a stop token, before the first token of a `stop` string, after
        `max_gen_len` tokens, or at the end of the context. `echo` includes the prompt.
        Log-probabilities are those before temperature and filters; an echoed prompt's first token
        and its images have 0. `images`: for each prompt, one image per `image_id` in it: paths,
        file contents (bytes) or Pillow images. `sampling`: the other fields of SamplingParams:
        top_k, min_p, repetition_penalty, logit_bias, seed.
        `study.recording(llama.model, names)` around the call records activations.
        Raises RequestError for prompts that are empty, too many, too long, or with ids outside the
        vocabulary.
        """
        params = sampling_params(temperature=temperature, top_p=top_p, **sampling)
        texts = self._run(prompt_tokens, images, params, max_gen_len, stop, logprobs and echo)
        outputs = [_output(text, echo) for text in texts]
        return [tokens for tokens, _ in outputs], [own for _, own in outputs] if logprobs else None

    def generate_by(
        self,
        prompt_tokens: list[list[int]],
        choose: Callable[[Tensor], Tensor],
        max_gen_len: int | None = None,
        *,
        images: Sequence[Sequence["ImageSource"]] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt with ids chosen by the caller's function.

        `choose` maps float32 logits (B, V) to ids (B,). It is called once for the prompts and once
        for each later step; finished rows stay in the batch until all have finished. Outputs,
        images and errors are those of `generate`.
        """
        rows = self._start(prompt_tokens, images, max_gen_len)
        if not self.job.is_parallel:
            found = steps(self.model, rows, choose, self.tokenizer.stop_tokens)
        else:
            agreed = steps(self.model, rows, lambda logits: broadcast_choice(choose(logits)), self.tokenizer.stop_tokens)
            found = self._agreed(agreed, rows, SamplingParams(temperature=0), ())
        for _ in found:
            pass
        return [row.generated for row in rows]

    def text_completion(
        self,
        prompts: Sequence[str | list[int]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        images: Sequence[Sequence["ImageSource"]] | None = None,
        stop: str | Sequence[str] = (),
        special_tokens: bool = False,
        **sampling: "Unpack[SamplingOptions]",
    ) -> list[CompletionPrediction]:
        """Continue each text, or its ids; with `logprobs`, also the text and log-probability of every token.

        A prompt's `images` come before its text. `special_tokens`: see `encode`. The rest: see
        `generate`.
        """
        if isinstance(prompts, str):  # it would be taken as a list of characters
            raise RequestError(f"prompts is the text {prompts!r:.60}, expected a list of texts")
        params = sampling_params(temperature=temperature, top_p=top_p, **sampling)
        rows = _image_rows(images, len(prompts))
        prompt_tokens = [
            prompt if is_ids(prompt) else self._encode_text(cast(str, prompt), special_tokens, len(own))
            for prompt, own in zip(prompts, rows, strict=True)
        ]
        texts = self._run(prompt_tokens, images, params, max_gen_len, stop, logprobs and echo)
        before = [self.decode(text.row.prompt) if echo else "" for text in texts]
        predictions = [CompletionPrediction(generation=a + b.whole()) for a, b in zip(before, texts, strict=True)]
        if logprobs:
            self._add_logprobs(predictions, texts, echo)
        return predictions

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: str | Sequence[str] = (),
        tools: ToolSet | Iterable[ToolLike] | None = None,
        tool_format: str | None = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> list[ChatPrediction]:
        """Answer each dialog as the assistant. See `generate`.

        `tools`: Python functions, JSON schemas and names of built-in tools that the model may call, or a
        ToolSet of them; `tool_format` is "json", "function_tag" or "python_list", by default what the
        release expects. An answer then has its calls in `tool_calls`, the text around them in
        `content`, and `token_ids`; to continue, append it and messages with the role `tool` to the
        dialog. No tool is executed.
        """
        params = sampling_params(temperature=temperature, top_p=top_p, **sampling)
        offered = self.formatter.offered(tools, tool_format)
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog, offered) for dialog in dialogs]
        texts = self._run(prompt_tokens, [images_in(dialog) for dialog in dialogs], params, max_gen_len, stop)
        answers = [self._answer(text, offered) for text in texts]
        predictions = [ChatPrediction(generation=answer) for answer in answers]
        if logprobs:
            self._add_logprobs(predictions, texts)
        return predictions

    def _answer(self, text: RowText, offered: ToolSet | None) -> Message:
        """The message in a finished row; plain text, as Meta's package gives it, if no tools were offered."""
        plain = Message(role="assistant", content=text.whole())
        if offered is None:
            return plain
        reason: StopReason = "out_of_tokens" if text.row.finish_reason == "length" else "end_of_turn"
        return self.formatter.decode_assistant_message(text.answer_tokens, reason, offered)

    def _add_logprobs(
        self, predictions: Sequence[CompletionPrediction | ChatPrediction], texts: list[RowText], echo: bool = False
    ) -> None:
        """Add the text and log-probability of every token."""
        for prediction, text in zip(predictions, texts, strict=True):
            tokens, prediction["logprobs"] = _output(text, echo)
            prediction["tokens"] = [self.decode([token]) for token in tokens]

    # ---- one sequence, streamed

    def stream(
        self,
        prompt: str | list[int] | Dialog,
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        stop: str | Sequence[str] = (),
        *,
        images: Sequence["ImageSource"] | None = None,
        logprobs: bool = False,
        special_tokens: bool = False,
        cache: KVCache | None = None,
        tools: ToolSet | Iterable[ToolLike] | None = None,
        tool_format: str | None = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> Stream:
        """Generate for one prompt, yielding text as it is generated.

        `prompt` is a text, token ids, or a dialog to answer. `images` come before a text, or where
        ids have `image_id`; a dialog contains its images. Pieces of text never contain half a
        character; `stop` strings and stop tokens end the text and are not part of it. The Stream
        then has `.finish_reason` ("stop" or "length"), `.tokens`, `.text` and, with `logprobs`,
        `.logprobs`, one for each of `.tokens`. Iteration may be abandoned at any point. A one-row
        `cache` that holds a prefix of the prompt (and its images) avoids recomputing it; afterwards
        it holds the prompt and a prefix of the answer. `tools` are offered in a dialog, as in
        `chat_completion`; `formatter.decode_assistant_message(stream.answer_tokens)` finds the
        calls.
        """
        params = sampling_params(temperature=temperature, top_p=top_p, **sampling)
        own = _image_rows(None if images is None else [images], 1)[0]
        offered = self.formatter.offered(tools, tool_format)
        if offered and not is_dialog(prompt):
            raise RequestError("tools are offered in a dialog: give a list of messages as the prompt")
        ids = self.encode(prompt, special_tokens=special_tokens, n_images=len(own), tools=offered)
        if is_dialog(prompt):
            if own:
                raise RequestError("a dialog has its images in its messages: leave out images")
            own = images_in(cast(Dialog, prompt))
        rows = self._start([ids], [own], max_gen_len)
        if cache is not None and (len(cache.lengths) != 1 or cache.max_seq_len < rows[0].total_len):
            raise RequestError(
                f"the cache has {len(cache.lengths)} rows of {cache.max_seq_len:,} tokens, but prompt and answer need one "
                f"row of {rows[0].total_len:,}: use a larger cache or a smaller max_gen_len"
            )
        text = RowText(rows[0], self.tokenizer, stop)
        return Stream(text, self._steps(rows, params, stop, cache=cache), logprobs)

    def encode(
        self,
        prompt: str | list[int] | Dialog,
        *,
        special_tokens: bool = False,
        n_images: int = 0,
        tools: ToolSet | None = None,
    ) -> list[int]:
        """Token ids of a text or of a dialog to answer; ids are returned unchanged.

        A text's ids follow begin-of-text and `n_images` image tokens. With `special_tokens`,
        `<|eot_id|>` and the like in a text become special tokens, a text that begins with
        begin-of-text gets no second one, and a text with `<|image|>` gets no other image tokens.
        Otherwise they are encoded as plain text, with a warning. `tools` are written into a dialog.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt, special_tokens, n_images)
        if not is_dialog(prompt):
            return cast(list[int], list(plain_list(prompt)))
        return self.formatter.encode_dialog_prompt(cast(Dialog, prompt), tools)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; an image becomes `<|image|>`."""
        vocabulary = self.tokenizer.vocabulary
        return self.tokenizer.decode(vocabulary.special_id("<|image|>") if id == self.image_id else id for id in ids)

    def _encode_text(self, text: str, special_tokens: bool, n_images: int = 0) -> list[int]:
        """Token ids of a text, after one begin-of-text and `n_images` image tokens."""
        bos = self.tokenizer.bos_id
        if n_images:
            if self.image_id is None:
                raise RequestError(NO_IMAGES)
            ids = self._encode_text(text, special_tokens)
            return ids if self.image_id in ids else [bos, *[self.image_id] * n_images, *ids[1:]]
        if special_tokens:
            ids = self.tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
            if self.image_id is not None:  # the tokenizer has another id for it
                place = self.tokenizer.vocabulary.special_id("<|image|>")
                ids = [self.image_id if token == place else token for token in ids]
            return ids if ids[:1] == [bos] else [bos, *ids]
        ids = self.tokenizer.encode(text, bos=True, eos=False)
        if spelled := self.tokenizer.special_in(text):
            logger.warning(
                "the text spells %s, encoded as plain text (%d tokens in total); to get special tokens, give "
                "special_tokens=True (--special_tokens on the command line), or use chat_completion (llama-ref chat)",
                comma_list(spelled, MOST_SHOWN),
                len(ids),
            )
        return ids

    # ---- shared by these methods

    def _run(
        self,
        prompts: list[list[int]],
        images: Sequence[Sequence["ImageSource"]] | None,
        params: SamplingParams,
        max_gen_len: int | None,
        stop: str | Sequence[str],
        prompt_logprobs: bool = False,
    ) -> list[RowText]:
        """Generate for a batch of prompts until all rows have finished."""
        rows = self._start(prompts, images, max_gen_len)
        texts = [RowText(row, self.tokenizer, stop) for row in rows]
        for _ in self._steps(rows, params, stop, prompt_logprobs=prompt_logprobs):
            if stop:
                for text in texts:
                    text.read()
        return texts

    def _start(
        self, prompts: list[list[int]], images: Sequence[Sequence["ImageSource"]] | None, max_gen_len: int | None
    ) -> list[Row]:
        """The rows of a new batch. Raises RequestError for prompts that cannot be continued."""
        max_gen_len = _max_gen_len(max_gen_len)
        if len(prompts) == 0:  # a tensor has no truth value
            raise RequestError("0 prompts, expected at least one")
        if len(prompts) > self.max_batch_size:
            raise RequestError(
                f"{len(prompts)} prompts, expected at most max_batch_size = {self.max_batch_size}: use several calls, or "
                "build with a larger max_batch_size"
            )
        prompts = [plain_list(prompt) for prompt in prompts]
        for prompt in prompts:
            self._check_prompt(prompt)
        tiles = self._tiles(prompts, images)
        limit = self.max_seq_len if max_gen_len is None else max_gen_len
        return [
            Row(list(prompt), min(limit, self.max_seq_len - len(prompt)), own)
            for prompt, own in zip(prompts, tiles, strict=True)
        ]

    def _tiles(self, prompts: list[list[int]], images: Sequence[Sequence["ImageSource"]] | None) -> list[list[Tiles]]:
        """Each prompt's images, cut into tiles.

        Raises RequestError unless there is one per image token.
        """
        rows = _image_rows(images, len(prompts))
        for number, (prompt, own) in enumerate(zip(prompts, rows, strict=True)):
            if own and self.image_id is None:
                raise RequestError(NO_IMAGES)
            n_places = sum(token == self.image_id for token in prompt)
            if len(own) != n_places:
                raise RequestError(
                    f"prompt {number} has {n_places} places for images (id {self.image_id}), but {len(own)} images: give "
                    "one for each"
                )
        return [[self.load_tiles(image) for image in own] for own in rows]

    def load_tiles(self, image: "ImageSource") -> Tiles:
        """Cut an image into tiles for the model's encoder.

        Raises RequestError if it is not an image.
        """
        args = self.model.args
        if args.vision_chunk_size is None:
            raise RequestError(NO_IMAGES)
        return load_tiles(image, args.vision_chunk_size, args.vision_max_num_chunks)

    def _check_prompt(self, prompt: list[int]) -> None:
        if not isinstance(prompt, Sequence) or not all(isinstance(token, Integral) for token in prompt):
            raise RequestError(f"a prompt is {prompt!r:.60}, expected a list of token ids for each prompt")
        if not prompt:
            raise RequestError("a prompt is empty; it needs at least one token, such as begin-of-text")
        if len(prompt) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(prompt):,} tokens, but max_seq_len is {self.max_seq_len:,}: shorten it or build with more"
            )
        # The image id follows the vocabulary.
        vocab_size = self.model.args.vocab_size + (self.image_id is not None)
        invalid = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if invalid:
            raise RequestError(f"the prompt has token {invalid[0]}; the vocabulary has 0 to {vocab_size - 1}")

    def _steps(self, rows: list[Row], params: SamplingParams, stop: str | Sequence[str], **options: Any) -> Iterator[None]:
        generator = self.generator if params.seed is None else _generator(params.seed)
        stop_tokens = self.tokenizer.stop_tokens
        found: Iterator[None]
        if self.speculation is None:
            found = steps(self.model, rows, self._sampler(rows, params, generator), stop_tokens, **options)
        else:
            samplers = [self._sampler([row], params, generator) for row in rows]
            found = speculative_steps(self.model, rows, samplers, stop_tokens, self.speculation, **options)
        return self._agreed(found, rows, params, stop, **options) if self.job.is_parallel else found

    def _agreed(
        self, found: Iterator[None], rows: list[Row], params: SamplingParams, stop: str | Sequence[str], **options: Any
    ) -> Iterator[None]:
        """Run steps; raise JobError unless all processes have the same prompts and options."""
        prompts, images, limits = zip(*((row.prompt, row.images, row.max_gen_len) for row in rows), strict=True)
        with naming_a_lost_process():
            self.job.check_same("generating", generation_facts(prompts, images, limits, params, stop, **options))
            yield from found

    def _sampler(self, rows: list[Row], params: SamplingParams, generator: torch.Generator) -> Sampler:
        prompts = [[token for token in row.prompt if token != self.image_id] for row in rows]
        agree = broadcast_choice if self.job.is_parallel else None
        return Sampler(params, generator, prompts, self.model.args.vocab_size, self.device, agree)


def is_dialog(prompt: str | list[int] | Dialog) -> bool:
    """Whether a prompt is neither text nor ids."""
    return not isinstance(prompt, str) and not is_ids(prompt)


def is_ids(prompt: object) -> TypeGuard[list[int]]:
    """Whether a prompt is token ids."""
    plain = plain_list(prompt)
    return isinstance(plain, list) and bool(plain) and isinstance(plain[0], int)


def _image_rows(images: Any, n_prompts: int) -> Sequence[Sequence["ImageSource"]]:
    """The images of each prompt. Raises RequestError if `images` is not a list of lists."""
    if images is None:
        return [()] * n_prompts
    if not isinstance(images, list | tuple):
        raise RequestError(f"images is {images!r:.60}, expected a list with the images of each prompt")
    if len(images) != n_prompts:
        raise RequestError(f"images has {len(images)} lists, expected one for each of {n_prompts} prompts")
    for number, own in enumerate(images):
        if not isinstance(own, list | tuple):
            raise RequestError(f"images has {own!r:.60} for prompt {number}, expected a list of images")
    return images


def _output(text: RowText, echo: bool) -> tuple[list[int], list[float]]:
    """A row's ids and log-probabilities without a stop string's; if `echo`, the prompt's first."""
    row = text.row
    tokens = text.tokens if text.ends_at_stop_string else row.generated
    logprobs = row.logprobs[: len(tokens)]
    return (row.prompt + tokens, row.prompt_logprobs + logprobs) if echo else (tokens, logprobs)


def _generator(seed: int | None) -> torch.Generator:
    """A CPU generator with this seed; None: a random seed."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def _check_speculation(speculate: str | None, draft: str | Path | None, job: Job) -> None:
    if speculate not in (None, "ngram"):
        raise RequestError(f'speculate is {speculate!r}, expected "ngram" or None; name a draft model with draft')
    if speculate and draft:
        raise RequestError(f"speculate is {speculate!r} and draft is {str(draft)!r}: choose one")
    if draft and job.is_parallel:
        raise RequestError("a draft model works in one process only: leave out draft, or use speculate='ngram'")


def _check_vocabulary(path: Path, args: ModelArgs, tokenizer: Tokenizer, draft: str | Path, small: "Llama") -> None:
    """A draft model must have the same vocabulary."""
    ours, theirs = tokenizer.vocabulary, small.tokenizer.vocabulary
    n_ours, n_theirs = args.vocab_size, small.model.args.vocab_size
    if n_ours != n_theirs or ours.ranks != theirs.ranks or ours.added != theirs.added:
        found = f"{n_theirs:,} tokens, expected {n_ours:,}" if n_ours != n_theirs else f"also {n_ours:,} tokens, but different"
        raise RequestError(f"the draft model {draft} has another vocabulary than {path} ({found}): use one of the same family")


def check_stream_options(max_gen_len: int | None = None, stop: str | Sequence[str] = (), **sampling: Any) -> None:
    """Raise RequestError for options that `Llama.stream` would reject; needs no model, so call it before loading."""
    _max_gen_len(max_gen_len)
    stop_strings(stop)
    sampling_params(**sampling)


def sampling_params(**options: Any) -> SamplingParams:
    """Options by name. Raises RequestError for an unknown or invalid one."""
    ours = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in ours:
            known = ["max_gen_len", "stop", "logprobs", *ours]  # the first three are arguments of the calls
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            raise RequestError(f"unknown option {name!r}: {hint}")
    return SamplingParams(**options)


def _max_gen_len(value: int | None) -> int | None:
    number = plain_number(value)
    if number is not None and not (type(number) is int and number >= 0):
        raise RequestError(f"max_gen_len is {value!r}, expected a whole number, or None for as many as fit")
    return number


def _positive(name: str, value: int) -> int:
    number = plain_number(value)
    if not isinstance(number, int) or number < 1:
        raise RequestError(f"{name} is {value!r}, expected a positive whole number")
    return number
