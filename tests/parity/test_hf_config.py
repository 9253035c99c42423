"""config.json as transformers writes and reads it, and the FFN width as Meta's code computes it."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.model import FeedForward
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.hf.config import NAMES, make_config, make_params, read_config
from llama_ref.model import rope_frequencies

LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@st.composite
def configs(draw) -> LlamaConfig:
    """A Llama 3 as a transformers user would make it, with the old or the new keys for RoPE."""
    n_kv_heads, head_dim = draw(st.integers(1, 4)), 2 * draw(st.integers(2, 64))
    n_heads = n_kv_heads * draw(st.integers(1, 8))
    theta, factor = draw(st.sampled_from([10000.0, 500000.0, 12345.0])), draw(st.sampled_from([None, 8.0, 13.0, 32.0]))
    scaling = factor and {"rope_type": "llama3", "factor": factor, **LLAMA_3_ROPE}
    old = {"rope_theta": theta, "rope_scaling": scaling}
    new = {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}
    return LlamaConfig(
        hidden_size=n_heads * head_dim,
        head_dim=draw(st.sampled_from([None, head_dim, 10])),
        intermediate_size=draw(st.integers(1, 20_000)),
        num_hidden_layers=draw(st.integers(1, 100)),
        num_attention_heads=n_heads,
        num_key_value_heads=draw(st.sampled_from([n_kv_heads, None])),
        vocab_size=draw(st.integers(3, 200_000)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        max_position_embeddings=131072,
        tie_word_embeddings=draw(st.booleans()),
        architectures=draw(st.sampled_from([None, ["LlamaForCausalLM"]])),
        dtype=draw(st.sampled_from([None, "bfloat16"])),
        **draw(st.sampled_from([old, new])),
    )


@settings(max_examples=50)
@given(configs())
def test_what_transformers_saves_is_read_and_what_is_written_it_opens(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "hugging_face"
    shutil.rmtree(folder, ignore_errors=True)
    config.save_pretrained(folder)
    read = read_config(folder / "config.json")
    assert {theirs: getattr(read.args, ours) for ours, theirs in NAMES.items()} == {
        theirs: getattr(config, theirs) for theirs in NAMES.values()
    }
    assert read.tied == config.tie_word_embeddings
    torch.testing.assert_close(rope_frequencies(read.args), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)

    written = make_config(read.args, tied=read.tied, dtype=torch.bfloat16, bos=1, eos=[2])
    (folder / "config.json").write_text(json.dumps(written))
    for opened in (AutoConfig.from_pretrained(folder), LlamaConfig.from_dict(written)):
        assert type(opened) is LlamaConfig
        same = (
            *NAMES.values(),
            "rope_parameters",
            "tie_word_embeddings",
            "head_dim",
            "hidden_act",
            "attention_bias",
            "mlp_bias",
        )
        assert {key: getattr(opened, key) for key in same} == {key: getattr(config, key) for key in same}
        assert (opened.dtype, opened.bos_token_id, opened.eos_token_id) == (torch.bfloat16, 1, 2)
        assert opened.architectures == ["LlamaForCausalLM"]


@pytest.mark.usefixtures("one_process_group")
@settings(max_examples=30)
@given(st.integers(1, 500).map(lambda n: 2 * n), st.integers(1, 30_000))
def test_metas_code_gives_the_width_that_params_were_made_for(dim, width):
    numbers = {"n_layers": 1, "n_heads": 1, "vocab_size": 1, "norm_eps": 1e-5, "rope_theta": 1e4}
    params = make_params(ModelArgs.from_dict(numbers | {"dim": dim, "hidden_dim": width}))
    with torch.device("meta"):
        theirs = FeedForward(dim, 4 * dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
    assert theirs.w1.weight.shape == (width, dim)
