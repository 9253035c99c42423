"""Where tokens look in an image: shares add up to 1, and patches are mapped to the right part of the image."""

import sys

import pytest
import torch
from PIL import Image

from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.images import tiles_of
from llama_ref.study.vision.image_attention import image_attention
from llama_ref.study.vision.images import encoding_once
from random_models import random_model
from study.pictured import ARGS, IMAGE, TILE, picture, random_vision_model

TEXT = [5, IMAGE, 7, 8, 9]


@pytest.fixture(scope="module")
def model():
    return random_vision_model()


def brightest_token(image: Image.Image, at: tuple[int, int]) -> int:
    """The vision token of the patch whose pixels change most when one pixel of the image changes."""
    dotted = image.copy()
    dotted.paste((255, 255, 255), (at[0], at[1], at[0] + 1, at[1] + 1))
    changed = (tiles_of(dotted, 56, 4).pixels - tiles_of(image, 56, 4).pixels).abs().sum(1)  # (n, 56, 56)
    by_patch = changed.unflatten(2, (4, 14)).unflatten(1, (4, 14)).sum((2, 4)).flatten(1)  # (n, 16)
    tile, patch = divmod(int(by_patch.argmax()), 16)
    return tile * TILE + 1 + patch


@pytest.mark.parametrize("size", [(50, 50), (100, 50), (30, 90), (90, 110), (400, 300), (60, 400), (20, 20)])
@pytest.mark.parametrize("place", [(0.02, 0.03), (0.5, 0.4), (0.97, 0.1), (0.3, 0.96)])
def test_a_patch_is_found_where_the_image_has_it(model, size, place):
    image = Image.new("RGB", size, (60, 60, 60))
    at = int(place[0] * size[0]), int(place[1] * size[1])
    token = brightest_token(image, at)
    only = torch.zeros(len(tiles_of(image, 56, 4).pixels) * TILE)
    only[token] = 1
    with study.patch(model, {"cross_layers.*.attention.pattern": study.set_to(only)}):
        (found,) = image_attention(model, TEXT, [image])
    assert torch.equal(found.patches.sum((-2, -1))[:, 1:], torch.ones(2, 4))
    row, column = divmod(int(found.patches[0, 3].argmax()), found.patches.shape[-1])
    for middle, pixel, wide in zip(found.center(row, column), at, found.patch_size, strict=True):
        assert abs(middle - (pixel + 0.5)) <= wide / 2 + 0.5, (row, column)


@pytest.mark.parametrize("size", [(50, 50), (100, 50), (30, 90), (111, 90), (50, 200)])
def test_shares_are_those_of_the_pattern_and_add_up(model, size):
    image = picture(*size)
    (found,) = image_attention(model, TEXT, [image])
    traced = study.trace(model, TEXT, "cross_layers.*.attention.pattern", images=[image])
    patterns = torch.stack([value[0] for value in traced.values()])  # (X, H, T, N)
    total = found.patches.sum((-2, -1)) + found.class_tokens + found.beside
    torch.testing.assert_close(total, torch.tensor([0, 1, 1, 1, 1.0]).expand(2, 5))
    torch.testing.assert_close(found.class_tokens, patterns.mean(1)[..., ::TILE].sum(-1))
    assert found.seen_by == [1, 2, 3, 4] and found.before == [1, 3] and found.tokens == TEXT
    (of_head,) = image_attention(model, TEXT, [image], head=-1)
    torch.testing.assert_close(of_head.class_tokens, patterns[:, 3][..., ::TILE].sum(-1))
    assert of_head.head == 3 and found.head is None


def test_black_beside_the_image_is_counted_apart(model):
    (square,) = image_attention(model, TEXT, [picture(112, 112)])
    assert square.patches.shape == (2, 5, 8, 8) and square.beside.eq(0).all()
    (narrow,) = image_attention(model, TEXT, [picture(28, 56)])  # two columns of patches of four
    assert narrow.patches.shape == (2, 5, 4, 2) and narrow.beside[:, 1:].gt(0.1).all()


def test_several_images_share_the_attention(model):
    text = [5, IMAGE, IMAGE, 7, IMAGE, 8]
    found = image_attention(model, text, [picture(50, 50), picture(100, 50), picture(50, 50, 2)])
    assert [each.seen_by for each in found] == [[1, 2, 3], [2, 3], [4, 5]]
    total = sum(each.patches.sum((-2, -1)) + each.class_tokens + each.beside for each in found)
    torch.testing.assert_close(total, torch.tensor([0, 1, 1, 1, 1, 1.0]).expand(2, 6))


def test_what_makes_no_sense_is_told(model, monkeypatch):
    for wrong, images, head, problem in (
        (random_model(ARGS.text_only(), 0), [picture(9, 9)], None, "this model reads no images"),
        (model, [], None, "tokens has 1 places for images"),
        (model, [picture(9, 9)], 4, "head is 4, expected a whole number from 0 to 3"),
        (model, ["/nowhere"], None, "cannot read the image"),
    ):
        tokens = TEXT if wrong is model else [5, 7]
        with pytest.raises(RequestError, match=problem):
            image_attention(wrong, tokens, images, head=head)
    monkeypatch.setattr(sys.modules["llama_ref.study.vision.image_attention"], "LARGEST_LAYER", 1000)
    with pytest.raises(RequestError, match=r"the text has 5 tokens, and every head's attention is .* by 17 vision tokens"):
        image_attention(model, TEXT, [picture(50, 50)])


# ---- the other measurements of a text with an image


def test_other_studies_see_the_image(model):
    images = [picture(100, 50)]
    traced = study.trace(model, TEXT, images=images)
    logits = traced["logits"][0]
    lens = study.logit_lens(model, TEXT, target=3, images=images)
    torch.testing.assert_close(lens.target_probability[-1], logits.softmax(-1)[:, 3])
    predicted = study.predict(model, TEXT, images=images)
    assert predicted.rank[1] == 0 and predicted.probability[:2].isnan().all()
    expected = logits.softmax(-1)[range(1, 4), TEXT[2:]]
    torch.testing.assert_close(predicted.probability[2:], expected)
    stream = study.residual_stream(model, TEXT, images=images)
    torch.testing.assert_close(stream.norm[-1], traced["layers.3.residual_post"][0].norm(dim=-1))
    pattern = traced["layers.2.attention.pattern"][0]
    torch.testing.assert_close(study.attention_pattern(model, TEXT, 2, 1, images=images), pattern[1])
    summary = study.summarize_attention(model, TEXT, images=images)
    torch.testing.assert_close(summary.sink[2], pattern[:, 1:, 0].mean(-1))
    with pytest.raises(RequestError, match="tokens has 1 places for images"):
        study.predict(model, TEXT)


def test_several_texts_with_images_are_read_together(model):
    texts, images = [TEXT, [1, 2], [IMAGE, 4, 5]], [[picture(100, 50)], [], [picture(50, 50)]]
    for lens, text, own in zip(study.logit_lenses(model, texts, images=images), texts, images, strict=True):
        alone = study.logit_lens(model, text, images=own)
        torch.testing.assert_close(lens.top_probabilities, alone.top_probabilities)


def test_the_shares_of_a_logit_add_up_with_the_images(model):
    images = [picture(100, 50)]
    found = study.attribute(model, TEXT, 7, 8, images=images)
    logits = study.trace(model, TEXT, "logits", images=images)["logits"][0, -1]
    assert found.logit == pytest.approx(float(logits[7] - logits[8]))
    assert found.total == pytest.approx(found.logit, abs=1e-4) and list(found.cross) == [1, 3]
    parts = dict(found.parts())
    assert parts["cross_layers.1"] == found.cross[3] and sum(parts.values()) == pytest.approx(found.total, abs=1e-5)
    assert list(parts).index("layers.0.ffn") + 1 == list(parts).index("cross_layers.0")
    assert abs(found.cross[3]) > 1e-3
    before = study.attribute(model, TEXT, 7, position=0, images=images)
    assert before.cross == {1: 0, 3: 0}
    assert not study.attribute(model, [5, 7], 7).cross


def test_an_overview_has_the_image(model):
    image, steps = picture(100, 50), []
    found = study.overview(model, TEXT, image=image, progress=lambda done, all_steps: steps.append((done, all_steps)))
    assert steps[-1][0] == steps[-1][1] and found.attribution.total == pytest.approx(found.attribution.logit, abs=1e-4)
    (expected,) = image_attention(model, TEXT, [image])
    assert torch.equal(found.image.patches, expected.patches)
    assert study.overview(model, [5, 7]).image is None


def test_an_overview_encodes_its_image_once(model):
    with study.recording(model, "vision.tokens") as record:
        found = study.overview(model, TEXT, image=picture(100, 50))
    assert sum("vision.tokens" in each for each in record.traces) == 1 < len(record.traces)
    with study.recording(model, "vision.tokens") as record:
        other = study.overview(model, TEXT, image=picture(100, 50, seed=1))
    assert sum("vision.tokens" in each for each in record.traces) == 1
    assert not torch.equal(found.image.patches, other.image.patches)


def test_images_are_kept_for_the_same_texts_of_the_same_model_alone(model):
    """Nested blocks share their encoded images; nothing is kept afterwards."""
    other_model, image = random_vision_model(seed=1), picture(100, 50)

    def encoded(own_model, tokens: list[int], own_image: Image.Image) -> int:
        with study.recording(own_model, "vision.tokens") as record:
            kept = study.predict(own_model, tokens, images=[own_image])
        expected = study.trace(own_model, tokens, "logits", images=[own_image])["logits"][0].softmax(-1)
        torch.testing.assert_close(kept.top_probabilities, expected.topk(5).values)
        return sum("vision.tokens" in each for each in record.traces)

    with encoding_once():
        with encoding_once():
            assert encoded(model, TEXT, image) == 1
        assert encoded(model, TEXT, image) == 0
        assert encoded(model, [5, 6, IMAGE, 7], image) == 1
        assert encoded(model, TEXT, picture(100, 50, seed=1)) == 1
        assert encoded(model, TEXT, picture(50, 100)) == 1
        assert encoded(other_model, TEXT, image) == 1
    assert encoded(model, TEXT, image) == 1
