"""transformers loads converted folders, and we load transformers' own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from guard_folders import PARAMS
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.hf.tokenizer import write_tokenizer_json
from llama_ref.checkpoint.hf.tokenizer_config import tokenizer_config
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.generation import Llama
from llama_ref.vocabulary import write_tokenizer_model
from make_random_checkpoint import make_random_checkpoint
from parity.oracles import hugging_faces_config
from vocabularies import VOCABULARIES

CLOSE = {"atol": 1e-4, "rtol": 0}
TOKENS = torch.tensor([[5, 9, 260, 7, 300, 3], [4, 4, 80, 0, 6, 511]])


@st.composite
def shapes(draw, vocab_size: int) -> dict:
    """params.json of a small Llama 3: groups of 1, 3 or 4 query heads, RoPE scaled by 8, 32 or not at all."""
    n_kv_heads, factor = draw(st.integers(1, 3)), draw(st.sampled_from([None, 8.0, 32.0]))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 3, 4]))
    params = {
        "dim": n_heads * 2 * draw(st.integers(2, 12)),
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        **draw(st.sampled_from([{}, {}, {"head_dim": 10}])),
        "vocab_size": vocab_size,
        "ffn_dim_multiplier": draw(st.sampled_from([1.0, 1.3])),
        "multiple_of": draw(st.sampled_from([2, 16, 64])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_theta": draw(st.sampled_from([10000.0, 500000.0])),
    }
    return params | ({"use_scaled_rope": True, "rope_scaling_factor": factor} if factor else {})


def ours(folder: Path) -> Tensor:
    """Logits of the model that our loader reads from a folder of either format."""
    with torch.inference_mode():
        return Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32").model(TOKENS)


@torch.inference_mode()
def hugging_faces(folder: Path) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model(TOKENS).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@settings(max_examples=12)
@given(data=st.data(), tied=st.booleans(), max_shard_bytes=st.sampled_from([1, 40_000, 5 * 10**9]), shards=st.booleans())
def test_transformers_opens_what_is_written_and_its_logits_are_ours(tmp_path_factory, data, tied, max_shard_bytes, shards):
    root = tmp_path_factory.mktemp("to_hf")
    vocabulary = VOCABULARIES[data.draw(st.sampled_from(["byte pairs", "everything"]))]
    params = data.draw(shapes(vocabulary.n_words))
    source = make_random_checkpoint(root / "source", params, tied=tied, dtype=torch.float32)
    write_tokenizer_model(source, vocabulary)
    (source / "checklist.chk").unlink()
    folder = to_hugging_face(source, root / "hf", max_shard_bytes=max_shard_bytes)
    expected = ours(source)
    torch.testing.assert_close(hugging_faces(folder), expected, **CLOSE)
    assert torch.equal(ours(folder), expected)

    # What transformers itself would have written for this model.
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(root / "theirs", max_shard_size=max(max_shard_bytes, 40_000))
    written, saved = tensors_of(folder), tensors_of(root / "theirs")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in saved.items())
    assert AutoConfig.from_pretrained(folder).to_dict() == AutoConfig.from_pretrained(root / "theirs").to_dict() | {
        "_name_or_path": str(folder)
    }
    if (folder / "model.safetensors.index.json").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == saved.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    # And its own folder is read as the same model.
    assert compare(source, root / "theirs").tensors == []
    shutil.rmtree(root)


def test_tokenizer_and_generation_config_open_as_they_are(tmp_path, shorter_tokenizer_path):
    source = make_random_checkpoint(tmp_path / "source", PARAMS, tokenizer=shorter_tokenizer_path)
    folder = to_hugging_face(source, tmp_path / "hf")
    llama, tokenizer = Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32"), AutoTokenizer.from_pretrained(folder)
    dialog = [{"role": "system", "content": "짧게 답해."}, {"role": "user", "content": "What is 2 + 2?\n\n"}]
    templated = tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert templated == llama.encode(dialog)
    assert tokenizer("안녕, world  ").input_ids == llama.tokenizer.encode("안녕, world  ", bos=True, eos=False)
    config = GenerationConfig.from_pretrained(folder)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.9)
    assert set(config.eos_token_id) == set(llama.tokenizer.stop_tokens)
    assert config.bos_token_id == AutoConfig.from_pretrained(folder).bos_token_id == llama.tokenizer.bos_id
    assert (to_meta(folder, tmp_path / "back") / "tokenizer.model").read_bytes() == shorter_tokenizer_path.read_bytes()


def saved_by_transformers(folder: Path, params: dict, tied: bool, seed: int, **options) -> Path:
    torch.manual_seed(seed)
    config = hugging_faces_config(ModelArgs.from_dict(params), tied=tied)
    LlamaForCausalLM(config).save_pretrained(folder, **options)
    return folder


@settings(max_examples=12)
@given(data=st.data(), tied=st.booleans(), shards=st.sampled_from([1, 2]), max_shard_size=st.sampled_from(["40KB", "5GB"]))
def test_what_transformers_saved_is_read_as_it_is_and_converted_there_and_back(
    tmp_path_factory, data, tied, shards, max_shard_size
):
    """Also with vocabularies enlarged by words and then padded, as in fine-tunes."""
    root = tmp_path_factory.mktemp("to_meta")
    vocabulary = VOCABULARIES[data.draw(st.sampled_from(["bytes alone", "Korean words", "everything"]))]
    padded = -(-vocabulary.n_words // 64) * 64
    params = data.draw(shapes(padded).filter(lambda params: params["n_heads"] % shards == 0))
    folder = saved_by_transformers(root / "hf", params, tied, data.draw(st.integers(0, 99)), max_shard_size=max_shard_size)
    write_tokenizer_json(folder / "tokenizer.json", vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(vocabulary, 131072)))

    expected = hugging_faces(folder)
    torch.testing.assert_close(ours(folder), expected, **CLOSE)
    native = to_meta(folder, root / "meta", shards=shards)
    torch.testing.assert_close(ours(native), expected, **CLOSE)
    back = to_hugging_face(native, root / "back")
    found, saved = tensors_of(back), tensors_of(folder)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in saved.items())
    assert torch.equal(hugging_faces(back), expected)
    before, after = (AutoTokenizer.from_pretrained(each) for each in (folder, back))
    text = "하늘바 말씀 the things 12!! " + "".join(vocabulary.added)
    assert before(text).input_ids == after(text).input_ids
    shutil.rmtree(root)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folders_have_the_same_bits_here_and_there(tmp_path, dtype):
    params = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 512, "multiple_of": 8, "norm_eps": 1e-5, "rope_theta": 5e5}
    source = make_random_checkpoint(tmp_path / "source", params)
    write_tokenizer_model(source, VOCABULARIES["bytes alone"])
    (source / "checklist.chk").unlink()
    folder = to_hugging_face(source, tmp_path / "hf", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)  # in the dtype that config.json says
    assert model.dtype == dtype
    native = Llama.build(to_meta(folder, tmp_path / "meta"), max_seq_len=64, device="cpu", dtype=dtype).model
    assert torch.equal(model.lm_head.weight, native.output.weight)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, native.layers[0].feed_forward.w2.weight)


def test_a_tied_models_own_output_is_used_as_transformers_uses_it(tmp_path):
    params = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 512, "multiple_of": 8, "norm_eps": 1e-5, "rope_theta": 5e5}
    folder = saved_by_transformers(tmp_path / "hf", params, tied=True, seed=0)
    tensors = load_file(folder / "model.safetensors")
    output = torch.randn(512, 32)
    save_file(tensors | {"lm_head.weight": output}, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer_json(folder / "tokenizer.json", VOCABULARIES["bytes alone"])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, output)
    torch.testing.assert_close(ours(folder), hugging_faces(folder), **CLOSE)
