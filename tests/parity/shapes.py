"""Random shapes of small Llamas."""

from hypothesis import strategies as st

from llama_ref.args import ModelArgs


@st.composite
def shapes(draw, factors=(None, 8.0, 32.0), head_dims=(None,)) -> ModelArgs:
    """Groups of 1, 3, 4 or 8 query heads per key head, scaled RoPE or not, odd sizes allowed.

    `head_dims`: widths of a head, where None is dim / n_heads.
    """
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 3, 4, 8]))
    factor = draw(st.sampled_from(factors))
    return ModelArgs.from_dict(
        {
            "dim": n_heads * 2 * draw(st.integers(2, 12)),
            "n_layers": draw(st.integers(1, 3)),
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": draw(st.sampled_from(head_dims)),
            "vocab_size": draw(st.integers(20, 300)),
            "ffn_dim_multiplier": draw(st.sampled_from([None, 1.0, 1.3, 1.5])),
            "multiple_of": draw(st.sampled_from([1, 16, 256])),
            "norm_eps": 1e-5,
            "rope_theta": draw(st.sampled_from([10000.0, 500000.0])),
            "use_scaled_rope": factor is not None,
            "rope_scaling_factor": factor,
        }
    )
