"""Hugging Face's vision folders: transformers loads ours, we load its, and both compute the same.

Its published model differs from Meta's (as of 5.24): it keeps the encoder's states one block late,
and adds cross-attention's output to tokens that see no image. Both are corrected here.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    MllamaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.hf.vision.tile_tables import from_grid_rows, to_grid_rows
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.image_prompts import show_images
from llama_ref.decoding.row import Row
from llama_ref.generation import Llama
from llama_ref.vision import VisionTransformer
from parity.meta_vision import MetasVisionModel, metas_spans
from vision_folders import IMAGE_ID, METAS, PARAMS, noise, vision_folder

CLOSE = {"atol": 1e-4, "rtol": 0}
TOKENS = [[5, 9, 260, 7, 300, 3], [4, 4, 80, 0, 6, 511]]
SIZES = ((50, 30), (120, 40), (60, 200))
TEXTS = {
    "one image": "<|image|>What is this?",
    "an image after text": "Look: <|image|> what?",
    "two neighbours": "<|image|><|image|>?",
    "two, with text between": "a<|image|>b<|image|>c",
    "three": "<|image|><|image|>ab<|image|>",
}


@st.composite
def shapes(draw) -> dict:
    """A small vision model; transformers' head width is the model's width divided by the heads."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    n_layers, kept = draw(st.integers(1, 6)), draw(st.sets(st.integers(0, 2), min_size=1))
    return PARAMS | {
        "dim": n_heads * 2 * draw(st.integers(2, 8)),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0])),
        "use_scaled_rope": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "vision_chunk_size": 14 * draw(st.integers(1, 4)),
        "vision_max_num_chunks": draw(st.integers(1, 5)),
        "vision_num_cross_attention_layers": draw(st.integers(1, n_layers)),
        "vision_dim": 16 * draw(st.integers(1, 4)),
        "vision_n_layers": 3,
        "vision_kept_layers": sorted(kept),
    }


def built(folder: Path) -> Llama:
    return Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32")


@torch.inference_mode()
def ours(llama: Llama, prompt: list[int], images: list) -> Tensor:
    """Logits (T, V) of a whole prompt."""
    row = Row(prompt, 1, [llama.load_tiles(image) for image in images])
    cache = new_cache(llama.model, 1, len(prompt))
    show_images(llama.model, [row], cache, 0)
    return llama.model(torch.tensor([prompt]), cache)[0]


def transformers_model(folder: Path) -> MllamaForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, MllamaForConditionalGeneration)
    assert not any(info.values()), info
    return model.eval()


def corrected(model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
    """Keep each encoder state before its block; add no attention to tokens that see no image."""
    model.model.vision_model.transformer.register_forward_hook(
        lambda _, inputs, out: BaseModelOutput(out.last_hidden_state, (inputs[0], *out.hidden_states[:-1]))
    )
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            _zero_attention_without_images(layer)
    return model


def _zero_attention_without_images(layer: torch.nn.Module) -> None:
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda *call: seen.append(call[-1]["full_text_row_masked_out_mask"]), with_kwargs=True)
    layer.cross_attn.register_forward_hook(lambda _, inputs, out: (out[0] * seen.pop()[:, 0], *out[1:]))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return vision_folder(tmp_path_factory.mktemp("mllama") / "native", METAS, dtype=torch.float32)


@pytest.fixture(scope="module")
def converted(native) -> Path:
    return to_hugging_face(native, native.with_name("hf"))


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="module")
def llama(converted) -> Llama:
    return built(converted)


@pytest.fixture(scope="module")
def theirs(converted) -> MllamaForConditionalGeneration:
    return corrected(transformers_model(converted))


@pytest.fixture(scope="module")
def metas(converted, one_process_group) -> MetasVisionModel:
    """Meta's model on transformers' files, through our conversion."""
    again = built(to_meta(converted, converted.with_name("again"))).model
    assert isinstance(again, VisionTransformer)
    return MetasVisionModel(again, 64, 1)


@settings(max_examples=8)
@given(shapes(), st.integers(0, 9), st.sampled_from([60_000, 5 * 10**9]))
def test_transformers_opens_what_is_written_and_would_have_written_the_same(tmp_path_factory, params, seed, max_shard_bytes):
    root = tmp_path_factory.mktemp("to_hf")
    source = vision_folder(root / "source", params, dtype=torch.float32, seed=seed)
    folder = to_hugging_face(source, root / "hf", max_shard_bytes=max_shard_bytes)
    model = transformers_model(folder)
    with torch.inference_mode():
        torch.testing.assert_close(built(source).model(torch.tensor(TOKENS)), model(torch.tensor(TOKENS)).logits, **CLOSE)
    model.save_pretrained(root / "theirs")
    written, saved = tensors_of(folder), tensors_of(root / "theirs")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in saved.items())
    config = AutoConfig.from_pretrained(root / "theirs").to_dict() | {"_name_or_path": str(folder)}
    assert AutoConfig.from_pretrained(folder).to_dict() == config
    shutil.copy(folder / "tokenizer.json", root / "theirs")
    assert compare(folder, root / "theirs").identical
    shutil.rmtree(root)


@settings(max_examples=8)
@given(shapes(), st.integers(0, 99))
def test_what_transformers_saved_is_read_and_comes_back_from_metas_format(tmp_path_factory, params, seed):
    root = tmp_path_factory.mktemp("to_meta")
    template = to_hugging_face(vision_folder(root / "template", params, dtype=torch.float32), root / "hf")
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(AutoConfig.from_pretrained(template))
    with_equal_copies(model, ModelArgs.from_dict(params))
    theirs = root / "theirs"
    model.save_pretrained(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(template / name, theirs)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor(TOKENS)).logits
        torch.testing.assert_close(built(theirs).model(torch.tensor(TOKENS)), expected, **CLOSE)
    native = to_meta(theirs, root / "native")
    back = to_hugging_face(native, root / "back")
    saved, found = tensors_of(theirs), tensors_of(back)
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    shutil.rmtree(root)


@torch.no_grad()
def with_equal_copies(model: MllamaForConditionalGeneration, args: ModelArgs) -> None:
    """Make random tables of tile positions, built from one vector per position; open all gates."""
    vision, n = model.model.vision_model, args.vision_max_num_chunks
    tables = {
        vision.gated_positional_embedding.tile_embedding.weight: args.patches_per_tile,
        vision.pre_tile_positional_embedding.embedding.weight: 1,
        vision.post_tile_positional_embedding.embedding.weight: 1,
    }
    for table, tokens in tables.items():
        table.copy_(torch.cat(list(to_grid_rows(torch.randn(n, n, tokens, args.vision_dim)))))
        from_grid_rows("table", table, (n, n, tokens, args.vision_dim))
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.fill_(0.5)


def prompt_and_images(processor, text: str) -> tuple[dict[str, Tensor], list]:
    images = [noise(*SIZES[i % 3], i) for i in range(text.count("<|image|>"))]
    return processor(images=images, text="<|begin_of_text|>" + text, return_tensors="pt", add_special_tokens=False), images


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_logits_with_images_are_those_of_the_corrected_model(processor, llama, theirs, text):
    inputs, images = prompt_and_images(processor, text)
    with torch.inference_mode():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(ours(llama, inputs["input_ids"][0].tolist(), images), expected, **CLOSE)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_logits_of_transformers_files_are_metas(processor, llama, metas, text):
    inputs, images = prompt_and_images(processor, text)
    prompt = inputs["input_ids"][0].tolist()
    expected = metas.logits([prompt], [images], [metas_spans(prompt, IMAGE_ID)])[0]
    torch.testing.assert_close(ours(llama, prompt, images), expected, **CLOSE)


def test_the_processor_makes_our_ids_and_tiles(converted, processor, llama):
    image = noise(100, 50)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in it?"}]
    dialog = [{"role": "system", "content": "Short."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(dialog, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"][0].tolist() == llama.encode(dialog)
    tiles = llama.load_tiles(image)
    assert torch.equal(inputs["pixel_values"][0, 0, : len(tiles.pixels)], tiles.pixels)
    assert not inputs["pixel_values"][0, 0, len(tiles.pixels) :].any()
    assert llama.decode(llama.encode(dialog)) == text
    config = GenerationConfig.from_pretrained(converted)
    assert set(config.eos_token_id) == set(llama.tokenizer.stop_tokens)


def test_the_template_takes_images_of_users_alone(processor):
    for role, item in (("assistant", {"type": "image"}), ("user", {"type": "video"}), ("user", {"type": "text"})):
        with pytest.raises(Exception, match="an item of the content has the type text, of a user also image"):
            processor.apply_chat_template([{"role": role, "content": [item]}])


NEWER_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def test_either_generation_of_names_is_read(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "newer")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        before = next(prefix for prefix in NEWER_NAMES if name.startswith(prefix))
        tensors[NEWER_NAMES[before] + name.removeprefix(before)] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "checklist.chk").unlink()
    assert tensors.keys() <= transformers_model(folder).state_dict().keys()
    assert compare(converted, folder).identical


def test_half_precision_is_read_and_written_as_it_is(tmp_path):
    folder = to_hugging_face(vision_folder(tmp_path / "bf16"), tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    converted = to_hugging_face(folder, tmp_path / "f16", dtype=torch.float16)
    config = json.loads((converted / "config.json").read_text())
    assert {config["torch_dtype"], *(config[key]["torch_dtype"] for key in ("text_config", "vision_config"))} == {"float16"}
    assert AutoModelForImageTextToText.from_pretrained(converted).dtype == torch.float16
