"""Two independent implementations with our model's weights: Meta's reference and Hugging Face's."""

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ref.args import ModelArgs
from llama_ref.model import HIGH_FREQ_FACTOR, LOW_FREQ_FACTOR, ORIGINAL_CONTEXT, Transformer

if TYPE_CHECKING:
    from llama_models.llama3.model import Transformer as MetaTransformer


def metas_model(model: Transformer, max_seq_len: int, max_batch_size: int = 1) -> "MetaTransformer":
    """Meta's reference. Its RoPE factor is fixed at 8, so ours must be 8 or unscaled."""
    # Only here: machines that have transformers alone use the other implementation.
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    args = model.args
    if args.rope_scaling_factor not in (1.0, 8.0):
        raise ValueError("Meta's reference knows no other RoPE factor than 8")
    same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
    reference = MetaTransformer(
        MetaArgs(
            **{name: getattr(args, name) for name in same},
            rope_theta=args.rope_theta,
            use_scaled_rope=args.use_scaled_rope,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
        )
    )
    reference.load_state_dict(model.state_dict())
    return reference.to(model.tok_embeddings.weight.dtype).eval()


def hugging_faces_model(model: Transformer) -> LlamaForCausalLM:
    """Hugging Face's Llama, with query and key rows permuted because its RoPE pairs halves."""
    reference = LlamaForCausalLM(hugging_faces_config(model.args))
    reference.load_state_dict(_hugging_faces_names(model))
    reference = reference.to(model.tok_embeddings.weight.dtype).eval()
    # The cast rounds RoPE's frequencies too, as from_pretrained does not: after 1,200 tokens logits were off by 10 %.
    rotary = reference.model.rotary_emb
    reference.model.rotary_emb = type(rotary)(reference.config).to(rotary.inv_freq.device)
    return reference


def hugging_faces_config(args: ModelArgs, *, tied: bool = False) -> LlamaConfig:
    """A config of the same shape, with random weights of a realistic size."""
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        }
    return LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=args.dim**-0.5,
    )


def _hugging_faces_names(model: Transformer) -> dict[str, Tensor]:
    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for i, layer in enumerate(model.layers):
        attention, ffn, prefix = layer.attention, layer.feed_forward, f"model.layers.{i}."
        state |= {
            prefix + "self_attn.q_proj.weight": _halves(attention.wq.weight, model.args.head_dim),
            prefix + "self_attn.k_proj.weight": _halves(attention.wk.weight, model.args.head_dim),
            prefix + "self_attn.v_proj.weight": attention.wv.weight,
            prefix + "self_attn.o_proj.weight": attention.wo.weight,
            prefix + "mlp.gate_proj.weight": ffn.w1.weight,
            prefix + "mlp.down_proj.weight": ffn.w2.weight,
            prefix + "mlp.up_proj.weight": ffn.w3.weight,
            prefix + "input_layernorm.weight": layer.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": layer.ffn_norm.weight,
        }
    return state


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows 0, 2, 4, … of each head, then 1, 3, 5, …: (heads·hd, D) -> the same shape."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
