"""The written-down list of a checkpoint's tensors matches the model's."""

from dataclasses import replace

import pytest

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.shapes import expected_shapes

SMALL = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=80, norm_eps=1e-5, rope_theta=5e5)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"n_kv_heads": 6},
        {"hidden_dim": 20},
        {"n_layers": 1},
        {"multiple_of": 32, "ffn_dim_multiplier": 1.3},
        {"vision_chunk_size": 28, "vision_num_cross_attention_layers": 1, "vision_dim": 32},
        {"vision_chunk_size": 14, "vision_num_cross_attention_layers": 2, "vision_dim": 16, "vision_kept_layers": ()},
    ],
)
def test_expected_shapes_are_the_models_in_its_order(changed):
    args = replace(SMALL, **changed)
    parameters = model_without_memory(args).named_parameters()
    assert list(expected_shapes(args).items()) == [(name, tuple(each.shape)) for name, each in parameters]
