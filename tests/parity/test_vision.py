"""Images, encoder and cross-attention compute what Meta's own code does, on random shapes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.image_prompts import ALWAYS, spans
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.errors import RequestError
from llama_ref.images import Tiles, tiles_of
from llama_ref.model import Transformer
from llama_ref.vision import VisionTransformer
from make_random_checkpoint import make_random_checkpoint
from parity.meta_vision import MetasVisionModel, metas_spans, metas_tiles
from random_models import random_model
from vision_folders import IMAGE_ID, METAS, noise

pytestmark = pytest.mark.usefixtures("one_process_group")
N_NEW = 3
sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


@settings(max_examples=150)
@given(sizes, st.sampled_from([14, 56, 70, 112]), st.integers(1, 6), st.integers(0, 9))
def test_tiles_are_metas_to_the_bit(size, tile, most_tiles, seed):
    image = noise(*size, seed)
    try:
        pixels, grid = metas_tiles(image, tile, most_tiles)
    except ValueError:  # nothing is left of the shorter side
        with pytest.raises(RequestError, match="it is too narrow"):
            tiles_of(image, tile, most_tiles)
        return
    ours = tiles_of(image, tile, most_tiles)
    assert ours.grid == grid
    assert torch.equal(ours.pixels, pixels)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (1920, 1080), (300, 800), (100, 2500)])
@pytest.mark.parametrize("tile", [448, 560])
def test_tiles_of_the_releases_are_metas_to_the_bit(size, tile):
    image = noise(*size)
    pixels, grid = metas_tiles(image, tile, 4)
    ours = tiles_of(image, tile, 4)
    assert ours.grid == grid
    assert torch.equal(ours.pixels, pixels)


@st.composite
def shapes(draw) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 2]))
    n_layers = draw(st.integers(1, 6))
    return METAS | {
        "dim": n_heads * 2 * draw(st.integers(2, 8)),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_layers": n_layers,
        "vision_num_cross_attention_layers": draw(st.integers(1, n_layers)),
        "vision_chunk_size": 14 * draw(st.integers(1, 4)),
        "vision_dim": 16 * draw(st.integers(1, 4)),
        "use_scaled_rope": draw(st.booleans()),
        "rope_scaling_factor": 8.0,
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[VisionTransformer, MetasVisionModel]:
    opened = open_folder(make_random_checkpoint(tmp_path_factory.mktemp("vision") / "model", METAS, dtype=torch.float32))
    return _with_metas(load_model(opened, opened.read_args(), dtype=torch.float32))


def _random_pair(params: dict[str, Any], seed: int) -> tuple[VisionTransformer, MetasVisionModel]:
    model = random_model(ModelArgs.from_dict(params), seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.sub_(1).mul_(0.2)  # near 0, as make_random_checkpoint draws them
    return _with_metas(model)


def _with_metas(ours: Transformer) -> tuple[VisionTransformer, MetasVisionModel]:
    assert isinstance(ours, VisionTransformer)
    return ours, MetasVisionModel(ours, max_seq_len=32, max_batch_size=3)


@settings(max_examples=12)
@given(shapes(), sizes, st.integers(0, 9))
def test_the_encoder_computes_what_metas_does(params, size, seed):
    ours, theirs = _random_pair(params, seed)
    image = noise(*size, seed)
    try:
        tiles = _tiles(ours, image)
    except RequestError:
        return
    expected = theirs.encoded(image)[: len(tiles.pixels)].flatten(0, 1)
    _assert_close(ours.vision_model.vision_encoder(*tiles), expected, 3e-5)


# A prompt's image ids, other ids, and as many images.
PROMPTS = {
    "one image": "V____",
    "an image after text": "___V__",
    "two neighbours": "VV___",
    "two, with text between": "_V_V__",
    "three, two of them neighbours": "_VV_V_",
    "an image at the end": "____V",
    "text": "_____",
}


@pytest.mark.parametrize("pattern", PROMPTS.values(), ids=PROMPTS)
def test_logits_are_metas_in_one_pass_and_step_by_step(pair, pattern):
    ours, theirs = pair
    prompt, images = _prompt(pattern, 7)
    row = Row(list(prompt), N_NEW, [_tiles(ours, image) for image in images])
    found = list(_stepwise(ours, [row]))
    whole = row.prompt + row.generated
    # With several images, Meta's spans end with the prompt; ours continue.
    seen = [[begin, len(whole) if end == len(prompt) else end] for begin, end in metas_spans(prompt, IMAGE_ID)]
    expected = theirs.logits([whole], [images], [seen])[0]
    _assert_close(torch.stack(found)[:, 0], expected[len(prompt) - 1 : -1], 1e-4)
    _assert_close(_one_pass(ours, Row(whole, 1, row.images)), expected, 1e-4)


@settings(max_examples=12)
@given(shapes(), st.text("V_", min_size=1, max_size=7), st.integers(0, 9))
def test_logits_are_metas_for_any_shape(params, pattern, seed):
    ours, theirs = _random_pair(params, seed)
    prompt, images = _prompt(pattern, seed)
    expected = theirs.logits([prompt], [images], [metas_spans(prompt, IMAGE_ID)])[0]
    _assert_close(_one_pass(ours, Row(prompt, 1, [_tiles(ours, image) for image in images])), expected, 1e-4)


def test_each_row_of_a_mixed_batch_is_metas(pair):
    ours, theirs = pair
    prompts = [_prompt(pattern, seed) for seed, pattern in enumerate(("_V____", "______", "V_V___"))]
    rows = [Row(list(prompt), N_NEW, [_tiles(ours, image) for image in images]) for prompt, images in prompts]
    found = torch.stack(list(_stepwise(ours, rows)), 1)  # (B, N_NEW, V)
    whole = [row.prompt + row.generated for row in rows]
    seen = [[[b, 9 if e == 6 else e] for b, e in metas_spans(prompt, IMAGE_ID)] for prompt, _ in prompts]
    expected = theirs.logits(whole, [images for _, images in prompts], seen)
    _assert_close(found, expected[:, 5:-1], 1e-4)


@given(st.text("V_", max_size=12))
def test_spans_are_metas_but_for_the_last_ones_end(pattern):
    prompt, _ = _prompt(pattern, 0)
    expected = [(begin, ALWAYS if end in (-1, len(prompt)) else end) for begin, end in metas_spans(prompt, IMAGE_ID)]
    assert spans([i for i, token in enumerate(prompt) if token == IMAGE_ID]) == expected


def _prompt(pattern: str, seed: int) -> tuple[list[int], list[Image.Image]]:
    prompt = [IMAGE_ID if place == "V" else 10 + (7 * i + seed) % 300 for i, place in enumerate(pattern)]
    shapes = ((50, 30), (120, 40), (60, 200))
    return prompt, [noise(*shapes[i % 3], seed + i) for i in range(pattern.count("V"))]


def _tiles(model: VisionTransformer, image: Image.Image) -> Tiles:
    assert model.args.vision_chunk_size is not None
    return tiles_of(image, model.args.vision_chunk_size, model.args.vision_max_num_chunks)


def _stepwise(model: VisionTransformer, rows: list[Row]) -> Iterator[Tensor]:
    """Logits (B, V) of each step of greedy decoding."""
    seen: list[Tensor] = []

    def greedy(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    for _ in steps(model, rows, greedy, ()):
        pass
    yield from seen


@torch.inference_mode()
def _one_pass(model: VisionTransformer, row: Row) -> Tensor:
    """Logits (T, V) of a whole prompt."""
    from llama_ref.decoding.image_prompts import show_images

    cache = new_cache(model, 1, len(row.prompt))
    show_images(model, [row], cache, 0)
    return model(torch.tensor([row.prompt]), cache)[0]


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance
