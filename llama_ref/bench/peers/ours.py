"""Run this project's own model, loaded by `Llama.build`, in its usual generation loop."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_ref.bench.costs import kv_bytes, weight_bytes
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.shapes import expected_shapes
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.loop import steps
from llama_ref.decoding.reading import PREFILL_TOKENS
from llama_ref.decoding.row import Row
from llama_ref.generation import Llama
from llama_ref.kv_cache import KVCache

REPEATS = 3


class Ours:
    def __init__(self, settings: Settings, scratch: Path):
        self.llama = Llama.build(
            settings.name,
            device=settings.device,
            dtype=settings.dtype,
            quantize=settings.quantize,
            activations=settings.activations,
            compile=settings.compile,
            verify=settings.verify,
            in_memory=settings.in_memory,
        )
        model = self.llama.model
        self.precision = f"{settings.quantize or settings.dtype}{', compiled' if settings.compile else ''}"
        self.weight_bytes = weight_bytes(model, model.tok_embeddings)
        self.kv_bytes = kv_bytes(model.args, self.llama.dtype.itemsize)
        self.room = max(settings.contexts, default=0) + settings.gen_len
        self.filled: KVCache | None = None

    def steps(self, prompts: list[list[int]], gen_len: int, cache: KVCache | None = None) -> Iterator[list[int]]:
        rows = [Row(prompt, gen_len) for prompt in prompts]
        for _ in steps(self.llama.model, rows, lambda logits: logits.argmax(-1), stop_tokens=(), cache=cache):
            yield [row.generated[-1] for row in rows]  # already on the host, so the device has finished

    def steps_after(self, context: int, gen_len: int) -> Iterator[list[int]]:
        """Like `steps` after a prompt of `context` tokens, of which only the last is run.

        The other tokens' keys and values are random numbers, which take the same time to read.
        """
        if self.filled is None:
            self.filled = new_cache(self.llama.model, 1, self.room)
            self.filled.keys.normal_()
            self.filled.values.normal_()
        self.filled.truncate([context - 1])
        return self.steps([[0] * context], gen_len, self.filled)

    @torch.inference_mode()
    def matmul_seconds(self, batch: int, prompt_len: int) -> float:
        """Time one layer's matrix products, scale to all layers, and add the output's."""
        args = self.llama.model.args
        piece = min(prompt_len, max(1, PREFILL_TOKENS // batch))  # chunk size of the generation loop
        shapes = Counter(s for n, s in expected_shapes(args).items() if n.startswith("layers.0.") and len(s) == 2)
        layer = sum(count * self._product_seconds(batch * piece, *shape) for shape, count in shapes.items())
        return layer * args.n_layers * prompt_len / piece + self._product_seconds(batch, args.vocab_size, args.dim)

    def _product_seconds(self, rows: int, n_out: int, n_in: int) -> float:
        x = torch.randn(rows, n_in, dtype=self.llama.dtype, device=self.llama.device)
        weight = torch.randn(n_out, n_in, dtype=self.llama.dtype, device=self.llama.device)
        return statistics.median(self._time(x, weight) for _ in range(1 + REPEATS))

    def _time(self, x: torch.Tensor, weight: torch.Tensor) -> float:
        synchronize(x.device)
        start = time.perf_counter()
        F.linear(x, weight)
        synchronize(x.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
