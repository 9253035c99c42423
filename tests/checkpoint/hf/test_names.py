"""Every vision tensor has one name in Hugging Face's files, which number all layers together."""

import pytest

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.hf.names import OTHER_PREFIXES, hf_name, numbers_of_cross_layers, numbers_of_layers, usual_name
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.checkpoint.shapes import EMBEDDING, LEARNABLE, expected_shapes

ARGS = ModelArgs.from_dict(RELEASES["Llama3.2-11B-Vision-Instruct"].params)
PUBLISHED = {  # as in the index of meta-llama/Llama-3.2-11B-Vision-Instruct
    "layers.0.attention.wq.weight": "language_model.model.layers.0.self_attn.q_proj.weight",
    "layers.3.attention_norm.weight": "language_model.model.layers.4.input_layernorm.weight",
    "layers.31.feed_forward.w2.weight": "language_model.model.layers.39.mlp.down_proj.weight",
    "cross_attention_layers.0.gate_attn": "language_model.model.layers.3.cross_attn_attn_gate",
    "cross_attention_layers.7.gate_ffwd": "language_model.model.layers.38.cross_attn_mlp_gate",
    "cross_attention_layers.1.attention.k_norm.weight": "language_model.model.layers.8.cross_attn.k_norm.weight",
    "cross_attention_layers.1.attention.wo.weight": "language_model.model.layers.8.cross_attn.o_proj.weight",
    "cross_attention_layers.1.ffn_norm.weight": "language_model.model.layers.8.post_attention_layernorm.weight",
    "tok_embeddings.weight": "language_model.model.embed_tokens.weight",
    "learnable_embedding.weight": "language_model.model.embed_tokens.weight",
    "norm.weight": "language_model.model.norm.weight",
    "output.weight": "language_model.lm_head.weight",
    "vision_model.vision_projection.bias": "multi_modal_projector.bias",
    "vision_model.vision_encoder.conv1._linear.weight": "vision_model.patch_embedding.weight",
    "vision_model.vision_encoder.ln_pre.bias": "vision_model.layernorm_pre.bias",
    "vision_model.vision_encoder.global_transformer.resblocks.7.gate_ffn": "vision_model.global_transformer.layers.7.gate_ffn",
    "vision_model.vision_encoder.transformer.resblocks.2.mlp.c_fc.bias": "vision_model.transformer.layers.2.mlp.fc1.bias",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_the_published_ones(name):
    assert hf_name(name, ARGS) == PUBLISHED[name]


def test_no_two_tensors_share_a_name_but_the_embeddings():
    names = [hf_name(name, ARGS) for name in expected_shapes(ARGS)]
    assert len(names) == len(set(names)) + 1 and hf_name(EMBEDDING, ARGS) == hf_name(LEARNABLE, ARGS)


def test_layers_of_both_kinds_are_counted_together():
    assert numbers_of_cross_layers(ARGS) == [3, 8, 13, 18, 23, 28, 33, 38]
    assert sorted(numbers_of_cross_layers(ARGS) + numbers_of_layers(ARGS)) == list(range(40))


def test_the_other_generations_names_are_known():
    for name in (hf_name(own, ARGS) for own in expected_shapes(ARGS)):
        assert usual_name(name) == name
        for other, usual in OTHER_PREFIXES.items():
            if name.startswith(usual):
                assert usual_name(other + name.removeprefix(usual)) == name
