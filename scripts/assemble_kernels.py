"""Compile the Triton kernels for GPUs that need not be present, and show the resources of each.

    python scripts/assemble_kernels.py [--cards 75,80,90] [--release Llama3.1-8B] [--only "int4"]

For each kernel of a layer, in a release's shape and the dtype that the GPU computes in: registers
per thread, spilled bytes, shared memory, warps, and 16-byte loads. Needs PyTorch for CUDA with its
Triton, but no GPU: nothing runs, so this shows that the kernels compile and fit, not that they are
correct or fast. Cards are compute capabilities: 75 is a T4, 80 an A100, 86 an RTX 3090, 89 an RTX
4090, 90 an H100. Exit code 1: a kernel does not fit on a card.
"""

import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import find_release
from llama_ref.cli.console import SafeConsole
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.formatting import dtype_name

SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # the most that a block can have
CONTEXT = 8192  # tokens in the cache
ROW_COUNTS = (8, 32, 64)  # of batches
ROWS = 8
GROUP = 128  # int4 weights per scale
METAS_GROUP = 32


@dataclass(frozen=True)
class Assembled:
    """One kernel as machine code."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    wide_loads: int


@command()
def main(
    *,
    cards: Annotated[str, Flag("compute capabilities", metavar="N,N,...")] = "75,80,90",
    release: Annotated[str, Flag("release whose shape the matrices have")] = "Llama3.1-8B",
    only: Annotated[str, Flag("kernels whose name contains this text", unset="all")] = "",
) -> int:
    """Compile every kernel for every card, and print a table for each card."""
    args, capabilities = ModelArgs.from_dict(find_release(release).params), [_capability(word) for word in cards.split(",")]
    if importlib.util.find_spec("triton") is None:
        raise LlamaRefError("Triton is not installed: PyTorch for CUDA includes it on Linux (no GPU is needed)")
    fits = True
    for card in capabilities:
        dtype = torch.bfloat16 if card >= 80 else torch.float16
        found = [kernel for name, call in calls(args, dtype, card) if only in name for kernel in assemble(name, call, card)]
        if not found:
            raise RequestError(f"--only is {only!r:.60}, which is in no kernel's name; without it, all are shown")
        print_table(found, card, release, dtype)
        fits = fits and all(kernel.shared_bytes <= SHARED_KB[card] << 10 for kernel in found)
    return 0 if fits else 1


def _capability(word: str) -> int:
    if not word.isdigit() or int(word) not in SHARED_KB:
        raise RequestError(f"--cards names {word!r:.20}, expected some of {', '.join(map(str, SHARED_KB))}")
    return int(word)


# ---- the calls, with tensors that have shapes but no memory


def calls(args: ModelArgs, dtype: torch.dtype, card: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each kernel's name and a call of it, as compiled/cuda.py calls it for this shape."""
    from llama_ref.compiled.triton.attention import attend_one
    from llama_ref.compiled.triton.elementwise import rms_norm, rotate_and_store, row_stats, silu_mul
    from llama_ref.compiled.triton.products import dequantize, matmul, matvec

    D, F, H, K, hd = args.dim, args.ffn_dim, args.n_heads, args.n_kv_heads, args.head_dim
    qkv = (H + 2 * K) * hd
    x, wide = empty(D, dtype=dtype), empty(F, dtype=dtype)
    keys, values = empty(1, K, CONTEXT, hd, dtype=dtype), empty(1, K, CONTEXT, hd, dtype=dtype)
    cos, sin = empty(CONTEXT, hd // 2), empty(CONTEXT, hd // 2)
    position = empty(1, dtype=torch.int64)
    rope = (cos, sin, keys[0], values[0], position)
    for kind in ("", "int8 ", "int4 "):
        wqkv, wo, w13, w2, output = (
            matrix(kind, *shape, dtype) for shape in ((qkv, D), (D, H * hd), (2 * F, D), (D, F), (args.vocab_size, D))
        )
        yield f"{kind}norm, wqkv, rope, cache", lambda w=wqkv: matvec(x, *w, gain=x, rope=rope)
        yield f"{kind}wo, residual", lambda w=wo: matvec(empty(H * hd, dtype=dtype), *w, residual=x)
        yield f"{kind}norm, w1 w3, swiglu", lambda w=w13: matvec(x, *w, gain=x, gated=True)
        yield f"{kind}w2, residual", lambda w=w2: matvec(wide, *w, residual=x)
        if kind != "int4 ":  # an int4 model's output has eight bits
            yield f"{kind}norm, output", lambda w=output: matvec(x, *w, gain=x)
        if kind and card >= 80:  # as `has_tensor_cores`
            for rows in ROW_COUNTS:
                yield f"{kind}w1 w3 of {rows} rows", lambda w=w13, n=rows: matmul(empty(n, D, dtype=dtype), *w, gated=True)
                yield f"{kind}w2 of {rows} rows", lambda w=w2, n=rows: matmul(empty(n, F, dtype=dtype), *w)
        if kind:
            scale, zero = (*w13[1:], None)[:2]
            yield f"{kind}w1 w3 dequantized", lambda w=w13, s=scale, z=zero: dequantize(w[0], s, z, dtype)
    metas = empty(F, D // 2, dtype=torch.uint8), empty(F, D // METAS_GROUP)  # Meta's int4 releases: no zero points
    yield "Meta's int4 w1", lambda: matvec(x, *metas)
    if card >= 80:
        for rows in ROW_COUNTS:
            yield f"Meta's int4 w1 of {rows} rows", lambda n=rows: matmul(empty(n, D, dtype=dtype), *metas)
    yield "Meta's int4 w1 dequantized", lambda: dequantize(*metas, None, dtype)
    q = empty(1, H, hd, dtype=dtype)
    yield "attention", lambda: attend_one(q, keys, values, position)
    rows = empty(ROWS, D, dtype=dtype)
    yield "norm of rows", lambda: rms_norm(rows, x, args.norm_eps)
    tokens = empty(ROWS, qkv, dtype=dtype), empty(ROWS, dtype=torch.int64)
    cache = [empty(ROWS, K, CONTEXT, hd, dtype=dtype) for _ in range(2)]
    yield "rope and cache of rows", lambda: rotate_and_store(*tokens, cos, sin, *cache, H)
    yield "swiglu of rows", lambda: silu_mul(empty(ROWS, 2 * F, dtype=dtype))
    yield "the likeliest token", lambda: row_stats(empty(1, args.vocab_size))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matrix(kind: str, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A matrix (N, K) as `matvec` takes it."""
    if kind == "int8 ":
        return empty(N, K, dtype=torch.int8), empty(N)
    if kind == "int4 ":
        scale, zero = (empty(N, K // GROUP, dtype=torch.bfloat16) for _ in range(2))
        return empty(N, K // 2, dtype=torch.uint8), scale, zero
    return (empty(N, K, dtype=dtype),)


# ---- assembling


def assemble(name: str, call: Callable[[], Any], card: int) -> list[Assembled]:
    """Compile the kernels that a call launches, without launching them."""
    with pretended(card) as compiled:
        call()
    names = [name] if len(compiled) == 1 else [f"{name}, {kernel.name.strip('_')}" for kernel in compiled]
    return [measured(each, kernel, card) for each, kernel in zip(names, compiled, strict=True)]


@contextmanager
def pretended(card: int) -> Iterator[list[Any]]:
    """Let Triton compile for a GPU that is not present; yield the list that gets its kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from llama_ref.compiled.triton import attention as triton_attention
    from llama_ref.compiled.triton import products as triton_products

    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        self.device_caches.clear()  # of another card
        compiled.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    no_card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", card, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    has_pdl = mock.Mock(return_value=card >= 90 and triton_products.PDL_COMPILES)
    active = "_active" if hasattr(driver, "_active") else "active"  # the second: Triton 3.4
    with (
        mock.patch.object(driver, active, no_card),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_products, "has_pdl", has_pdl),
        mock.patch.object(triton_attention, "has_pdl", has_pdl),
        mock.patch.object(triton_attention, "has_tensor_cores", lambda device: card >= 80),
    ):
        yield compiled


def measured(name: str, kernel: Any, card: int) -> Assembled:
    """The resources of a compiled kernel according to ptxas, and the 16-byte loads in its PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    is_for_all_cards = not inspect.signature(get_ptxas).parameters  # Triton 3.4's
    ptxas = get_ptxas() if is_for_all_cards else get_ptxas(card)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        arch = f"sm_{card}a" if card >= 90 else f"sm_{card}"
        words = [ptxas.path, "-v", f"--gpu-name={arch}", source, "-o", Path(scratch) / "kernel.cubin"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LlamaRefError(f"{name} cannot be assembled for {arch}: {done.stderr.strip()}")
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)))
    wide = len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)|cp\.async\.cg\S+ .*, 0x10,", kernel.asm["ptx"]))
    return Assembled(name, registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps, wide)


def print_table(found: list[Assembled], card: int, release: str, dtype: torch.dtype) -> None:
    title = f"sm_{card} in {dtype_name(dtype)}, {release}'s shape; shared memory: at most {SHARED_KB[card]} KB"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for column in ("registers", "spilled", "shared KB", "warps", "16-byte loads"):
        table.add_column(column, justify="right")
    for kernel in found:
        shared = f"{kernel.shared_bytes / 1024:.1f}"
        table.add_row(kernel.name, *map(str, (kernel.registers, kernel.spilled_bytes, shared, kernel.warps, kernel.wide_loads)))
    SafeConsole().print_safely(table)


if __name__ == "__main__":
    sys.exit(run(main))
