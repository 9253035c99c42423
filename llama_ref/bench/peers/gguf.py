"""Write a checkpoint as a GGUF file for llama.cpp: weights and shape, without a vocabulary."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.formats.gguf_names import WITHIN_LAYER
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.model import Transformer, rope_frequencies

TYPES = {
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float16: GGMLQuantizationType.F16,
    torch.float32: GGMLQuantizationType.F32,
}
CONTEXT = 131072


def write_gguf(folder: CheckpointFolder, path: Path, dtype: torch.dtype) -> None:
    """Write matrices in `dtype`, norms in float32.

    No permutation is needed: both use adjacent pairs in RoPE.
    """
    model = load_model(folder, folder.read_args(), dtype=dtype)
    args = model.args
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(model).items():
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_read(path: Path) -> int:
    """Bytes of all tensors that a step reads; the embedding counts only if it is tied."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(tensors.values())


def _tensors(model: Transformer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {"token_embd.weight": model.tok_embeddings.weight, "output_norm.weight": model.norm.weight}
    if model.output.weight is not model.tok_embeddings.weight:
        out["output.weight"] = model.output.weight
    if model.args.use_scaled_rope:
        plain = model.args.rope_theta ** -(torch.arange(0, model.args.head_dim, 2) / model.args.head_dim)
        out["rope_freqs.weight"] = plain / rope_frequencies(model.args)  # factor by which each pair's frequency is reduced
    for i, layer in enumerate(model.layers):
        out |= {f"blk.{i}.{gguf}.weight": layer.get_parameter(f"{name}.weight") for name, gguf in WITHIN_LAYER.items()}
    return out


def _add(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach() if tensor.dim() == 2 else tensor.detach().float()
    raw: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()  # NumPy has no bfloat16
    writer.add_tensor(name, raw, raw_dtype=TYPES[tensor.dtype])
