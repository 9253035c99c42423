"""Lower bounds for the floating-point operations and bytes read per token."""

from torch import nn

from llama_ref.args import ModelArgs
from llama_ref.plan import matrices

FOR_IMAGES = ("vision_model", "cross_attention_layers", "learnable_embedding")


def flops(args: ModelArgs, n_tokens: int, n_seen: float, n_logits: int) -> float:
    """Floating-point operations of a text's forward pass; a multiply-add counts as two.

    The text's `n_tokens` attend to `n_seen` positions in total; logits are computed for `n_logits`
    of the tokens.
    """
    sizes = {matrix.name: matrix.numbers for matrix in matrices(args.text_only(), tied=False)}
    output, layers = sizes.pop("output"), sum(sizes.values()) - sizes["tok_embeddings"]
    attention = 2 * args.n_layers * args.n_heads * args.head_dim * n_seen  # q · k, and weights times values
    return 2 * (layers * n_tokens + output * n_logits + attention)


def weight_bytes(model: nn.Module, embedding: nn.Module) -> int:
    """Bytes of all weights and buffers that a step on text reads.

    The embedding counts only if it is tied.
    """
    held = {
        tensor.data_ptr(): tensor.nbytes
        for name, module in model.named_modules()
        if module is not embedding and not name.startswith(FOR_IMAGES)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(held.values())


def kv_bytes(args: ModelArgs, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize
