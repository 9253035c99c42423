"""Traces and patches of a model that reads images."""

import pytest
import torch
from torch import Tensor

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.image_prompts import show_images
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.errors import RequestError
from llama_ref.images import tiles_of
from llama_ref.study.names import all_names, axes
from llama_ref.vision import VisionTransformer
from random_models import random_model
from study.leftovers import state_of
from study.pictured import ALL_TILES, ARGS, IMAGE, PARAMS, TILE, picture, random_vision_model

TEXT = [5, IMAGE, 7, 8, 9]
WIDE, SQUARE = picture(100, 50), picture(50, 50, seed=1)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return random_vision_model()


def logits_of(model: VisionTransformer, tokens: list[int], *images) -> Tensor:
    """The model's own logits, with the cache that generation uses."""
    cache = new_cache(model, 1, len(tokens))
    show_images(model, [Row(tokens, 0, [tiles_of(image, 56, 4) for image in images])], cache, 0)
    return model(torch.tensor([tokens]), cache)


def sizes(name: str) -> dict[str, int]:
    """The sizes of the axes in a trace of TEXT with WIDE."""
    heads = 2 if name.startswith("vision.") or name.endswith((".k", ".v", ".k_unrotated")) else 4
    head_dim = 16 if name.startswith("vision.") else 8
    vision = 2 * TILE if name in ("vision.features", "vision.tokens") or name.startswith("cross") else ALL_TILES
    return (
        {"batch": 1, "position": 5, "key_position": 5, "dim": 32, "head": heads, "head_dim": head_dim, "ffn_dim": ARGS.ffn_dim}
        | {"vocab": 512, "image": 1, "vision_position": vision, "vision_key_position": vision, "vision_dim": 32}
        | {"vision_ffn_dim": 128, "feature": 96}
    )


# ---- traces


def test_every_name_has_its_documented_shape(model):
    traced = study.trace(model, TEXT, images=[WIDE])
    assert list(traced) == all_names(ARGS)
    for name, value in traced.items():
        assert value.shape == tuple(sizes(name)[axis] for axis in axes(name)), name
    assert traced.tokens.tolist() == [TEXT]


def test_without_images_only_the_text_model_is_traced(model):
    traced = study.trace(model, [5, 6, 7])
    assert list(traced) == [name for name in all_names(ARGS) if not name.startswith(("vision.", "cross_layers."))]
    with pytest.raises(KeyError, match=r"'cross_layers.0.residual_pre' was not traced: add it to names and show an image"):
        traced["cross_layers.0.residual_pre"]


def test_the_logits_are_the_models_to_the_bit_and_the_model_is_as_before(model):
    before = state_of(model)
    assert torch.equal(study.trace(model, TEXT, images=[WIDE])["logits"], logits_of(model, TEXT, WIDE))
    assert state_of(model) == before


def test_a_cross_attention_layer_before_the_first_layer():
    model = random_vision_model(ModelArgs.from_dict(PARAMS | {"vision_num_cross_attention_layers": 4}))
    assert model.cross_layers == [0, 1, 2, 3]
    traced = study.trace(model, TEXT, images=[WIDE])
    assert torch.equal(traced["logits"], logits_of(model, TEXT, WIDE))
    assert torch.equal(traced["cross_layers.0.residual_pre"], traced["embedding"])
    assert torch.equal(traced["cross_layers.0.residual_post"], traced["layers.0.residual_pre"])


def test_what_a_cross_attention_layer_does_is_in_its_values(model):
    traced = study.trace(model, TEXT, images=[WIDE])
    block = model.cross_attention_layers[1]
    at = {name.removeprefix("cross_layers.1."): value for name, value in traced.items() if name.startswith("cross_layers.1.")}
    keys, values = block.attention.keys_and_values(traced["vision.tokens"][0])
    assert torch.equal(at["attention.k"][0], keys) and torch.equal(at["attention.v"][0], values)
    pattern, sees = at["attention.pattern"], torch.tensor([0, 1, 1, 1, 1.0])
    torch.testing.assert_close(pattern.sum(-1), sees.expand(1, 4, 5))
    assert torch.equal(at["attention.scores"].isinf(), ~sees.bool()[:, None].expand(1, 4, 5, 2 * TILE))
    mixed = torch.einsum("bhtn,bnhd->bthd", pattern, at["attention.v"].repeat_interleave(2, 2))
    torch.testing.assert_close(at["attention.head_output"][:, 1:], mixed[:, 1:], atol=1e-5, rtol=0)
    shares = at["attention.head_result"].sum(2) * block.gate_attn.tanh() * sees[:, None]
    torch.testing.assert_close(at["attention.output"], shares, atol=1e-5, rtol=0)
    assert torch.equal(at["residual_mid"], at["residual_pre"] + at["attention.output"])
    assert torch.equal(at["residual_post"], at["residual_mid"] + at["ffn.output"])
    assert torch.equal(at["residual_post"][:, 0], at["residual_pre"][:, 0])
    assert torch.equal(at["residual_post"], traced["layers.3.residual_pre"])


def test_what_the_encoder_does_is_in_its_values(model):
    traced = study.trace(model, TEXT, "vision.*", images=[WIDE])
    tiles = tiles_of(WIDE, 56, 4)
    assert torch.equal(traced["vision.features"][0], model.vision_model.vision_encoder(*tiles))
    assert torch.equal(traced["vision.tokens"][0], model.vision_model(*tiles))
    last = traced["vision.global.1.residual_post"][0, : 2 * TILE]
    assert torch.equal(traced["vision.features"][0, :, :32], last)
    kept = [traced[f"vision.layers.{i}.residual_pre"][0, : 2 * TILE] for i in (1, 2)]
    assert torch.equal(traced["vision.features"][0, :, 32:], torch.stack(kept, -1).flatten(-2))
    for block in ("vision.layers.0", "vision.global.1"):
        pattern, v = traced[f"{block}.attention.pattern"], traced[f"{block}.attention.v"]
        mixed = torch.einsum("iaqk,ikad->iqad", pattern, v)
        torch.testing.assert_close(traced[f"{block}.attention.head_output"], mixed, atol=1e-5, rtol=0)
        is_real = torch.arange(ALL_TILES) < 2 * TILE
        assert torch.equal(traced[f"{block}.attention.scores"][0, 0].isinf(), ~(is_real[:, None] | is_real))
        for before, output, after in (("pre", "attention", "mid"), ("mid", "ffn", "post")):
            added = traced[f"{block}.residual_{before}"] + traced[f"{block}.{output}.output"]
            assert torch.equal(traced[f"{block}.residual_{after}"], added)


def test_texts_and_images_of_several_sizes_run_together(model):
    texts = [TEXT, [IMAGE, 3, IMAGE, 4, 5, 6, 7], [1, 2, 3]]
    images = [[WIDE], [SQUARE, WIDE], []]
    together = study.trace(model, texts, images=images)
    assert together["vision.tokens"].shape[:2] == (3, 2 * TILE)
    assert together["vision.tokens"][1, TILE:].eq(0).all() and together["vision.tokens"][1, :TILE].ne(0).all()
    assert together["cross_layers.0.attention.pattern"][2].eq(0).all()
    for i, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone, row = study.trace(model, text, images=own or None), together.row(i)
        assert row.tokens.tolist() == [text]
        for name in ("cross_layers.1.residual_post", "cross_layers.0.attention.pattern", "logits") if own else ("logits",):
            n_keys = alone[name].shape[-1]  # the images of the longest may have more tokens
            torch.testing.assert_close(row[name][..., :n_keys], alone[name], atol=1e-5, rtol=0)


def test_a_recorded_generation_is_as_if_the_whole_text_was_run_at_once(model):
    row = Row(list(TEXT), 4, [tiles_of(WIDE, 56, 4)])
    with torch.inference_mode(), study.recording(model) as record:
        for _ in steps(model, [row], lambda logits: logits.argmax(-1), []):
            pass
    whole = study.trace(model, (TEXT + row.generated)[:-1], images=[WIDE])
    assert list(record.trace) == list(whole) and torch.equal(record.trace.tokens, whole.tokens)
    for name, value in whole.items():
        torch.testing.assert_close(record.trace[name], value, atol=1e-5, rtol=0, msg=name)


def test_an_image_that_comes_later_in_a_recorded_chat(model):
    first, second = tiles_of(WIDE, 56, 4), tiles_of(SQUARE, 56, 4)
    text, cache = [*TEXT, 6, IMAGE, 4], new_cache(model, 1, 16)
    with torch.inference_mode(), study.recording(model) as record:
        for end, images in ((5, [first]), (8, [first, second])):
            show_images(model, [Row(text[:end], 0, images)], cache, cache.longest)
            model(torch.tensor([text[cache.longest : end]]), cache)
    whole = study.trace(model, text, images=[first, second])
    assert record.trace["vision.tokens"].shape[0] == 2
    for name in ("vision.tokens", "cross_layers.1.attention.pattern", "cross_layers.0.attention.k", "logits"):
        torch.testing.assert_close(record.trace[name], whole[name], atol=1e-5, rtol=0, msg=name)


def test_a_trace_with_images_is_read_from_its_file(model, tmp_path):
    traced = study.trace(model, TEXT, images=[WIDE])
    traced.save(tmp_path / "trace.safetensors")
    read = study.Trace.load(tmp_path / "trace.safetensors")
    assert read.model_args.cross_layers == ARGS.cross_layers
    assert list(read) == list(traced) and all(torch.equal(read[name], traced[name]) for name in traced)


# ---- patches


def test_layers_that_add_nothing_leave_the_text_model(model):
    edits = {f"cross_layers.*.{part}.output": study.zero() for part in ("attention", "ffn")}
    with study.patch(model, edits):
        patched = study.trace(model, TEXT, "logits", images=[WIDE])["logits"]
    assert torch.equal(patched, model(torch.tensor([TEXT])))
    assert not torch.equal(patched, logits_of(model, TEXT, WIDE))


def test_the_tokens_of_another_image_are_the_other_image(model):
    other = picture(100, 50, seed=2)
    for name in ("vision.tokens", "vision.features", "vision.layers.0.residual_pre"):
        source = study.trace(model, TEXT, name, images=[other])
        with study.patch(model, {name: study.swap_from(source)}):
            patched = study.trace(model, TEXT, "logits", images=[WIDE])["logits"]
        assert torch.equal(patched, logits_of(model, TEXT, other)), name


def test_an_edited_pattern_mixes_the_values_anew(model):
    name, last = "cross_layers.0.attention.pattern", torch.zeros(2 * TILE)
    last[3] = 1
    with study.patch(model, {name: study.set_to(last).at(heads=[1], positions=[2])}):
        traced = study.trace(model, TEXT, "cross_layers.0.attention.*", images=[WIDE])
    plain = study.trace(model, TEXT, "cross_layers.0.attention.*", images=[WIDE])
    changed = traced["cross_layers.0.attention.head_output"]
    assert torch.equal(changed[0, 2, 1], traced["cross_layers.0.attention.v"][0, 3, 0])
    where = (changed != plain["cross_layers.0.attention.head_output"]).any(-1)[0].nonzero()
    assert where.tolist() == [[2, 1]]


def test_edited_scores_and_shares_reach_no_token_that_sees_no_image(model):
    edits = {"cross_layers.0.attention.scores": study.zero(), "cross_layers.1.attention.head_result": study.zero()}
    with study.patch(model, edits):
        traced = study.trace(model, TEXT, images=[WIDE])
    assert traced["logits"].isfinite().all()
    assert torch.equal(traced["logits"][:, 0], logits_of(model, TEXT, WIDE)[:, 0])
    even = traced["cross_layers.0.attention.pattern"][0, :, 1:]
    torch.testing.assert_close(even, torch.full_like(even, 1 / (2 * TILE)))
    assert traced["cross_layers.1.attention.output"].eq(0).all()


def test_the_encoders_heads_can_be_edited_and_averaged(model):
    with study.patch(model, {"vision.global.0.attention.head_output": study.zero().at(heads=1)}):
        traced = study.trace(model, TEXT, images=[WIDE])
    assert traced["vision.global.0.attention.head_output"][:, :, 1].eq(0).all()
    assert traced["vision.global.0.attention.head_output"][:, :, 0].ne(0).any()
    with study.patch(model, {"vision.tokens": study.mean()}):
        tokens = study.trace(model, TEXT, "vision.tokens", images=[WIDE])["vision.tokens"]
    assert (tokens == tokens[:, :1]).all()


# ---- misuse


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (study.zero().at(positions=0), r"vision.tokens has no positions in the text; its axes are image, vision_position, dim"),
        (study.zero().at(rows=0), r"vision.tokens has no rows; its axes are image, vision_position, dim"),
        (study.zero().at(heads=0), r"vision.tokens has no heads; its axes are image, vision_position, dim"),
    ],
)
def test_an_image_has_no_rows_or_positions(model, edit, problem):
    with pytest.raises(RequestError, match=problem), study.patch(model, {"vision.tokens": edit}):
        study.trace(model, TEXT, "logits", images=[WIDE])


def test_an_image_of_other_tiles_cannot_be_swapped_in(model):
    source = study.trace(model, TEXT, "vision.tokens", images=[SQUARE])
    problem = r"vision.tokens is \(1, 34, 32\) here, but \(1, 17, 32\) in the trace .* with images of the same tiles"
    with pytest.raises(RequestError, match=problem), study.patch(model, {"vision.tokens": study.swap_from(source)}):
        study.trace(model, TEXT, "logits", images=[WIDE])


@pytest.mark.parametrize(
    ("tokens", "images", "problem"),
    [
        (TEXT, None, r"tokens has 1 places for images \(id 512\), but 0 images: give one for each"),
        ([5, 6], [WIDE], r"tokens has 0 places for images \(id 512\), but 1 images"),
        ([TEXT, TEXT], [[WIDE], []], r"text 1 has 1 places for images \(id 512\), but 0 images"),
        ([TEXT, TEXT], [WIDE], r"images has 1 values for 2 texts, expected a list of paths"),
        (TEXT, WIDE, r"images is <PIL.*expected a list of paths, files' bytes or Pillow images"),
        (TEXT, ["/nowhere.png"], r"cannot read the image: .*nowhere.png"),
        ([5, IMAGE + 1], [WIDE], r"tokens contains 513; the vocabulary has 0 to 511"),
    ],
)
def test_images_that_do_not_fit_the_texts(model, tokens, images, problem):
    with pytest.raises(RequestError, match=problem):
        study.trace(model, tokens, "logits", images=images)


def test_a_text_model_reads_no_images():
    with pytest.raises(RequestError, match="this model reads no images; use a vision release"):
        study.trace(random_model(ARGS.text_only(), 0), [5, 6], "logits", images=[WIDE])


def test_images_come_without_gradients_and_without_a_cache(model):
    for options in ({"requires_grad": True}, {"cache": new_cache(model, 1, 8)}):
        with pytest.raises(RequestError, match="images were given with requires_grad or a cache"):
            study.trace(model, TEXT, "logits", images=[WIDE], **options)
