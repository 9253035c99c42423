"""Run llama.cpp on the same weights, converted to GGUF, through llama-cpp-python's C bindings."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np

from llama_ref.bench.costs import kv_bytes
from llama_ref.bench.peers.gguf import bytes_read, write_gguf
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.folder import open_folder
from llama_ref.device import named_dtype

QUANTIZED = {8: ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0), 4: ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)}
PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
CACHE_ITEM_BYTES = 2  # its cache is always float16


class LlamaCpp:
    """llama.cpp with its default settings and one context per batch size."""

    def __init__(self, settings: Settings, scratch: Path):
        folder, path = open_folder(settings.name), scratch / "weights.gguf"
        write_gguf(folder, path, named_dtype(settings.dtype))
        self.precision = PLAIN[settings.dtype]
        llama_cpp.llama_backend_init()
        if settings.quantize:
            self.precision, path = _quantized(path, 8 if settings.quantize == "int8" else 4, settings.threads)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the GGUF file written for it")
        self.n_vocab = folder.read_args().vocab_size
        self.weight_bytes = bytes_read(path)
        self.kv_bytes = kv_bytes(folder.read_args(), CACHE_ITEM_BYTES)
        self.threads = settings.threads
        self.contexts: dict[int, llama_cpp.llama_context_p] = {}  # by batch size
        self.total_len = settings.prompt_len + settings.gen_len

    def steps(self, prompts: list[list[int]], gen_len: int) -> Iterator[list[int]]:
        context = self._context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        length = len(prompts[0])
        chosen = []
        for row, prompt in enumerate(prompts):  # one prompt at a time, in llama.cpp's batches
            for start in range(0, length, self.n_batch):
                _decode(context, prompt[start : start + self.n_batch], [row], start)
            chosen.append(self._best(context, -1))
        yield chosen
        for position in range(length, length + gen_len - 1):
            _decode(context, chosen, list(range(len(prompts))), position)
            chosen = [self._best(context, row) for row in range(len(prompts))]
            yield chosen

    def matmul_seconds(self, batch: int, prompt_len: int) -> None:
        return None

    def _context(self, n_rows: int) -> llama_cpp.llama_context_p:
        if n_rows not in self.contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = n_rows * -(-self.total_len // 256) * 256, n_rows
            params.n_threads = params.n_threads_batch = self.threads
            context = llama_cpp.llama_init_from_model(self.model, params)
            if not context:
                raise RuntimeError(f"llama.cpp could not make a context for {n_rows} × {self.total_len} tokens")
            self.contexts[n_rows] = context
        self.n_batch = llama_cpp.llama_n_batch(self.contexts[n_rows])
        return self.contexts[n_rows]

    def _best(self, context: llama_cpp.llama_context_p, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())


def _decode(context: llama_cpp.llama_context_p, tokens: list[int], rows: list[int], position: int) -> None:
    """Run tokens of one row from `position` on, or one token per row.

    Computes logits of each row's last token.
    """
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + (i if len(rows) == 1 else 0)
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = rows[0] if len(rows) == 1 else rows[i]
            batch.logits[i] = len(rows) > 1 or i == len(tokens) - 1
        code = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama_decode returned {code}")


def _quantized(path: Path, bits: int, threads: int) -> tuple[str, Path]:
    """Quantize with llama.cpp's defaults; returns (name of the format, path of the file)."""
    name, file_type = QUANTIZED[bits]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    target = path.with_name(f"{name}.gguf")
    code = llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")
    path.unlink()
    return name, target
