"""Measure what quantization costs: perplexity and divergence, on English, code and Korean.

    python scripts/bench_quality.py [--folder checkpoints/SmolLM2-135M-Instruct] [--windows 2] [--stored]

The texts are in scripts/quality_texts, so that the table is the same on every machine. They were
written for this project (MIT); calibration uses other texts
(llama_ref/quantization/calibration.txt). Everything but the weights is float32, so that only their
bits differ. llama.cpp (the package llama-cpp-python, if installed) quantizes the same weights its
own way, reads the same tokens with its own arithmetic, and is compared with itself in float32.

The demo's weights were stored in four bits, with a scale and a minimum per 32 weights (Q4_1), and
int4:group=32 would recover exactly those steps. So the weights are first spread evenly over their
steps, which makes the model a little worse; `--stored` uses them unchanged.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder, shard_name
from llama_ref.checkpoint.formats.atomic import new_folder, write_params
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.hf.config import make_params
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.meta_quantized.kinds import INT4_GROUP, Kind, scales_name, tensors_of
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT
from llama_ref.checkpoint.writing.convert import Source, write_native_tokenizer
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import WHOLE
from llama_ref.quantization.apply import quantized_bytes
from quantized_layouts import fp8_tensors, int4_tensors

REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = {kind: REPOSITORY / "scripts" / "quality_texts" / f"{kind.lower()}.txt" for kind in ("English", "code", "Korean")}
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
SCHEMES = ("int8", "int4", "int4:group=32")
PEERS = ("BF16", "Q8_0", "Q4_0", "Q4_1")
WINDOW_TOKENS = 512
STEPS_GROUP = 32  # weights that shared a scale in Q4_1

Reader = Callable[[Tensor], Tensor]  # tokens (B, T) -> log-probabilities float32 (B, T, V)


@dataclass(frozen=True)
class Quality:
    """`kl`: mean KL(unquantized ‖ quantized), in nats; `agreement`: share of equal top tokens."""

    perplexity: float
    kl: float
    agreement: float


def main(folder: str | Path = DEMO, windows: int = 2, stored: bool = False) -> None:
    """Print a table of every scheme's bytes, perplexity, divergence and agreement."""
    tokenizer = open_folder(folder).open_tokenizer(open_folder(folder).read_args())
    ids = {kind: cut(tokenizer.encode(text, bos=False, eos=False), tokenizer.bos_id, windows) for kind, text in texts().items()}
    print(f"{'':<27}{'MB':>6}" + "".join(f"   {kind + ': ppl':>13} {'KL':>8} {'same top':>8}" for kind in ids))
    with TemporaryDirectory() as scratch:
        source = Path(folder) if stored else spread_folder(folder, Path(scratch, "spread"))
        expected = show(ids, ours(source, Path(scratch)))
        if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
            show(ids, theirs(source, Path(scratch)), expected)
        else:
            print("llama.cpp: not installed (pip install llama-cpp-python gguf)")


def texts() -> dict[str, str]:
    """The texts by kind."""
    return {kind: path.read_text(encoding="utf-8") for kind, path in TEXTS.items()}


def show(
    ids: Mapping[str, Tensor], rows: Iterable[tuple[str, int, Reader]], others: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Print a row per reader, compared with the first (this with `others`); return its result."""
    expected: dict[str, Tensor] = {}
    for name, n_bytes, read in rows:
        found = {kind: read(tokens) for kind, tokens in ids.items()}
        reference = expected or others or found
        qualities = [quality(found[kind], tokens, reference[kind]) for kind, tokens in ids.items()]
        cells = "".join(f"   {q.perplexity:13.3f} {q.kl:8.5f} {q.agreement:8.1%}" for q in qualities)
        print(f"{name:<27}{n_bytes / 1e6:6.0f}{cells}", flush=True)
        expected = expected or found
    return expected


def ours(source: Path, scratch: Path) -> Iterator[tuple[str, int, Reader]]:
    """(name, bytes of the matrices, reader) of every scheme, unquantized (in bfloat16) first."""
    plain = load(source)
    yield "none", held_bytes(plain), reader(plain)
    for scheme in SCHEMES:
        rounded = load(source, scheme)
        yield scheme, held_bytes(rounded), reader(rounded)
        if scheme.startswith("int4"):
            rounded = load(quantize_folder(source, scratch / "calibrated", scheme, force=True, verify="never"))
            yield f"{scheme}, calibrated", held_bytes(rounded), reader(rounded)
    for kind in (Kind.INT4, Kind.FP8):
        folder = in_metas_layout(source, scratch / kind.value, kind)
        for activations, what in (("reference", "inputs rounded"), ("full", "weights only")):
            rounded = load(folder, activations=activations)
            yield f"Meta's {kind.value}, {what}", held_bytes(rounded), reader(rounded)


def held_bytes(model: Transformer) -> int:
    """Bytes of the weights; those that are not quantized count as bfloat16."""
    return quantized_bytes(model) + 2 * sum(parameter.numel() for parameter in model.parameters())


def in_metas_layout(source: Path, out: Path, kind: Kind) -> Path:
    """The weights as Meta's quantized releases store them, without SpinQuant's rotation or QLoRA's training."""
    opened = Source.open(source)
    tensors = {tensor.name: tensor for tensor in opened.tensors(WHOLE, torch.float32)}
    tensors.setdefault(OUTPUT, tensors[EMBEDDING])  # the releases hold both tables

    def draw(name: str) -> Iterator[Tensor]:
        return iter(tensors[name].blocks())

    params = make_params(opened.args) | ({"quantization_args": {"group_size": INT4_GROUP}} if kind is Kind.INT4 else {})
    expected = tensors_of(ModelArgs.from_dict(params), kind)
    with new_folder(out, force=True, n_bytes=sum(tensor.nbytes for tensor in tensors.values())) as folder:
        write_params(folder, params)
        if kind is Kind.INT4:
            write_pth(folder / shard_name(0), int4_tensors(expected, draw, torch.float32))
        else:
            shard, scales = fp8_tensors(expected, draw, torch.float32, rank=0)
            write_pth(folder / shard_name(0), shard)
            write_pth(folder / scales_name(0), scales)
    return out


def theirs(source: Path, scratch: Path) -> Iterator[tuple[str, int, Reader]]:
    """The same for llama.cpp's formats, float32 first."""
    import llama_cpp

    from llama_ref.bench.peers.gguf import bytes_read, write_gguf

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    plain, rounded = scratch / "F32.gguf", scratch / "rounded.gguf"
    write_gguf(open_folder(source), plain, torch.float32)
    yield "llama.cpp F32", bytes_read(plain), peer_reader(plain)
    for name in PEERS:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(rounded).encode(), params):
            raise RuntimeError(f"llama.cpp did not write {name}")
        yield f"llama.cpp {name}", bytes_read(rounded), peer_reader(rounded)


def load(folder: Path, scheme: str | None = None, **options: Any) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), dtype=torch.float32, quantize=scheme, **options)


def reader(model: Transformer) -> Reader:
    return lambda tokens: log_probabilities(model, tokens)


def peer_reader(path: Path) -> Reader:
    """Read with llama.cpp, in one batch per row, with keys and values in float32 like ours."""
    import llama_cpp
    import numpy as np

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path.name}")

    def read_row(row: Tensor) -> Tensor:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(row)
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(len(row), 0, 1)
        try:
            batch.n_tokens = len(row)
            for i, token in enumerate(row.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp did not read {len(row)} tokens")
            n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(row), n_vocab))
            return torch.from_numpy(logits).log_softmax(-1)  # a copy: the logits are freed with the context
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    return lambda tokens: torch.stack([read_row(row) for row in tokens])


def spread_folder(source: str | Path, target: Path) -> Path:
    """Write a bfloat16 checkpoint with weights moved by up to half a 4-bit step of their group."""
    opened = Source.open(source)
    generator = torch.Generator().manual_seed(0)
    tensors = [_spread(tensor, generator) for tensor in opened.tensors(WHOLE, torch.bfloat16)]
    with new_folder(target) as folder:
        write_params(folder, make_params(opened.args))
        write_native_tokenizer(folder, opened)
        write_pth(folder / "consolidated.00.pth", tensors, {OUTPUT: EMBEDDING} if opened.stored.tied else {})
    return target


def _spread(tensor: LazyTensor, generator: torch.Generator) -> LazyTensor:
    def blocks() -> Iterator[Tensor]:
        for rows in tensor.blocks():
            groups = rows.float().unflatten(1, (-1, STEPS_GROUP))
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            yield (groups + step * (torch.rand(groups.shape, generator=generator) - 0.5)).flatten(1).bfloat16()

    return replace(tensor, blocks=blocks) if len(tensor.shape) == 2 else tensor


def cut(ids: list[int], bos_id: int, windows: int) -> Tensor:
    """The text's first tokens in rows, each after begin-of-text: (windows, 1 + WINDOW_TOKENS).

    Raises RequestError if the text is too short.
    """
    if not 1 <= windows <= len(ids) // WINDOW_TOKENS:
        raise RequestError(f"windows is {windows}, expected 1 to {len(ids) // WINDOW_TOKENS}: a text has {len(ids):,} tokens")
    rows = torch.tensor(ids[: windows * WINDOW_TOKENS]).view(windows, WINDOW_TOKENS)
    return torch.nn.functional.pad(rows, (1, 0), value=bos_id)


@torch.inference_mode()
def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """Log-probabilities, one row at a time: (B, T) -> float32 (B, T, V)."""
    return torch.cat([model(row[None]).log_softmax(-1) for row in tokens])


def quality(found: Tensor, tokens: Tensor, expected: Tensor) -> Quality:
    """Compare log-probabilities (B, T, V) of the tokens (B, T) with the expected ones."""
    nll = -found[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    kl = torch.stack([(e.exp() * (e - f)).sum(-1).mean() for e, f in zip(expected, found, strict=True)]).mean()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return Quality(nll.exp().item(), kl.item(), agreement.item())


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except LlamaRefError as error:
        raise SystemExit(f"bench_quality: {error}") from None
