"""All layers of a cross-layer transcoder, compared with the formula in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.errors import CheckpointError, RequestError, UnsupportedModel
from llama_ref.model import Transformer
from llama_ref.study.features import dictionary
from llama_ref.study.features.edits import replace_by_reconstruction
from llama_ref.study.passes.layer_window import layer_window
from random_models import random_model
from study import feature_folders
from study.feature_folders import CrossLayer

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": False}
)
L, D, N = ARGS.n_layers, ARGS.dim, 64


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


@pytest.fixture
def made(tmp_path) -> CrossLayer:
    return feature_folders.cross_layer(tmp_path, D, N, L)


def texts(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(ARGS.vocab_size, (n,), generator=random).tolist() for n in lengths]


def test_how_many_features_of_a_layer_fire_at_a_token(made):
    """The config's TopK needs a k, which the caller may pass, for all layers or for one."""
    config = made.path / "config.yaml"
    config.write_text(config.read_text() + "activation: topk\n")
    with pytest.raises(RequestError, match="pass k="):
        study.open_cross_layer(made.path)
    with pytest.raises(RequestError, match="k is 0, expected a positive whole number"):
        study.open_cross_layer(made.path, k=0)
    found = study.open_cross_layer(made.path, k=3).active(torch.ones(L, 4, D))
    assert [own.counts().tolist() for own in found] == [[3] * 4] * L
    one = study.open_features(made.path, layer=1, k=3).active(torch.ones(4, D))
    assert one.counts().tolist() == [3] * 4


def test_a_k_that_the_features_do_not_go_by_is_refused(made):
    with pytest.raises(RequestError, match=r"k is 3, but in .* features fire above a threshold: leave k out"):
        study.open_cross_layer(made.path, k=3)


@pytest.mark.parametrize(("biases", "thresholds"), [(True, False), (False, False), (True, True)])
def test_every_layer_writes_to_itself_and_to_all_later_ones(biases, thresholds, tmp_path):
    made = feature_folders.cross_layer(tmp_path, D, N, L, biases=biases, thresholds=thresholds)
    transcoder = study.open_cross_layer(made.path)
    assert transcoder.reads == tuple(f"layers.{i}.ffn.norm" for i in range(L))
    assert transcoder.writes == tuple(f"layers.{i}.ffn.output" for i in range(L))
    assert (len(transcoder), transcoder.dim) == (L * N, D)
    assert repr(transcoder) == "CrossLayerTranscoder(192 features of 3 layers)"
    x = np.random.default_rng(1).normal(size=(L, 2, 5, D)).astype("f4")
    f = [made.encode(i, own) for i, own in enumerate(x)]
    y = np.stack([made.decode(i, f) for i in range(L)])
    given = torch.from_numpy(x)
    for own, expected in zip(transcoder.encode(given), f, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)
    np.testing.assert_allclose(transcoder.decode([torch.from_numpy(own) for own in f]), y, atol=1e-5)
    for numbers in (1 << 24, 3 * D):  # some rows at a time
        with pytest.MonkeyPatch.context() as change:
            change.setattr(dictionary, "BLOCK_NUMBERS", numbers)
            np.testing.assert_allclose(transcoder.reconstruct(given), y, atol=1e-5)


def run_replaced(model: Transformer, made: CrossLayer, text: list[int], skip: int) -> Tensor:
    """The model's logits, with PyTorch hooks that replace every feed-forward's output from position `skip` on."""
    features: list[np.ndarray] = []

    def put(layer: int, x: Tensor, output: Tensor) -> Tensor:
        features.append(made.encode(layer, x[0].double().numpy()))
        new = torch.from_numpy(made.decode(layer, features)).float()[None]
        return torch.cat([output[:, :skip], new[:, skip:]], 1)

    hooks = [
        layer.feed_forward.register_forward_hook(lambda module, inputs, output, i=i: put(i, inputs[0], output))
        for i, layer in enumerate(model.layers)
    ]
    try:
        return model(torch.tensor([text]))[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("skip", [0, 2])
def test_losses_variance_and_sparsity(model, made, skip):
    transcoder, some = study.open_cross_layer(made.path), texts(7, 4, 9)
    found = study.measure_reconstruction(model, transcoder, some, skip=skip)

    def mean_loss(logits: list[Tensor]) -> float:
        each = [
            F.cross_entropy(own[skip:-1].double(), torch.tensor(text[skip + 1 :]), reduction="none")
            for own, text in zip(logits, some, strict=True)
        ]
        return float(torch.cat(each).mean())

    assert found.loss == pytest.approx(mean_loss([model(torch.tensor([text]))[0] for text in some]), abs=1e-5)
    expected = mean_loss([run_replaced(model, made, text, skip) for text in some])
    assert found.loss_reconstructed == pytest.approx(expected, abs=1e-4)
    nothing = replace(made, w_dec=[w * 0 for w in made.w_dec], b_dec=[b * 0 for b in made.b_dec])
    assert found.loss_zero == pytest.approx(mean_loss([run_replaced(model, nothing, text, skip) for text in some]), abs=1e-4)
    assert len({round(each, 3) for each in (found.loss, found.loss_reconstructed, found.loss_zero)}) == 3

    seen = [study.trace(model, text, [*transcoder.reads, *transcoder.writes]) for text in some]
    x, y = (
        [torch.cat([each[name][0, skip:] for each in seen]).double().numpy() for name in names]
        for names in (transcoder.reads, transcoder.writes)
    )
    f = [made.encode(i, own) for i, own in enumerate(x)]
    errors = [((own - made.decode(i, f)) ** 2).sum() / ((own - own.mean(0)) ** 2).sum() for i, own in enumerate(y)]
    assert found.unexplained == pytest.approx(np.mean(errors), rel=1e-4)
    assert found.l0 == pytest.approx(sum((own != 0).sum(1).mean() for own in f))
    assert found.alive == sum(int((own != 0).any(0).sum()) for own in f)
    assert found.n_tokens == sum(len(text) - skip for text in some)


def test_replaced_in_a_batch_with_a_cache_and_at_positions(model, made):
    """Each text alone, in a padded batch, and token by token; only the chosen positions change."""
    transcoder, some = study.open_cross_layer(made.path), texts(3, 6)
    with study.patch(model, replace_by_reconstruction(transcoder)):
        alone = [model(torch.tensor([text]))[0] for text in some]
        together = study.trace(model, some, "logits")
        cache = new_cache(model, 1, 16)
        steps = torch.cat([model(torch.tensor([[token]]), cache)[0] for token in some[1]])
    assert all(torch.allclose(together.row(i)["logits"][0], own, atol=1e-4) for i, own in enumerate(alone))
    assert torch.allclose(steps, alone[1], atol=1e-4)
    before = study.trace(model, some[1], transcoder.writes)
    with study.patch(model, replace_by_reconstruction(transcoder, positions=[2, 4])):
        after = study.trace(model, some[1], transcoder.writes)
    moved = (after[transcoder.writes[0]] != before[transcoder.writes[0]]).any(-1)[0]
    assert moved.nonzero()[:, 0].tolist() == [2, 4]


def test_its_layers_are_features_as_others(model, made):
    transcoder, tokens = study.open_cross_layer(made.path), torch.tensor(texts(5))
    layer = transcoder.layers[1]
    assert layer.writes == transcoder.writes[1:]
    before = study.trace(model, tokens, layer.writes)
    with study.patch(model, study.steer_features(layer, {3: 2.0})):
        after = study.trace(model, tokens, layer.writes)
    moved = after[layer.writes[0]] - before[layer.writes[0]]
    assert torch.allclose(moved, 2 * torch.from_numpy(made.w_dec[1][3, 0]).expand_as(moved), atol=1e-5)


def test_passes_without_the_first_layers_are_refused(model, made):
    transcoder, tokens = study.open_cross_layer(made.path), torch.tensor(texts(4))
    residual = study.trace(model, tokens, "layers.1.residual_pre")["layers.1.residual_pre"]
    steered = study.steer_features(transcoder.layers[0], {3: 2.0})
    for edits, message in (
        (steered, "leaves out layers.0.ffn.norm"),
        (replace_by_reconstruction(transcoder), "skipped layers"),
    ):
        with study.patch(model, edits):
            model(tokens)
            with layer_window(model, range(1, L), residual), pytest.raises(RequestError, match=message):
                model(tokens)


def test_misuse(model, made, tmp_path):
    transcoder = study.open_cross_layer(made.path)
    for wrong in (torch.ones(L - 1, 2, D), None, [1, 2, 3]):
        with pytest.raises(RequestError, match="expected activations of the 3 layers"):
            transcoder.encode(wrong)
    with pytest.raises(RequestError, match="different shapes"):
        transcoder.reconstruct([torch.ones(i + 1, D) for i in range(L)])
    with pytest.raises(RequestError, match="was not traced"):
        transcoder.active(study.trace(model, texts(3), transcoder.reads[:2]))
    small = feature_folders.cross_layer(tmp_path / "small", D, N, L - 1)
    with pytest.raises(RequestError, match="has 2 layers of 32 dimensions, but the model has 3 of 32"):
        study.measure_reconstruction(model, study.open_cross_layer(small.path), texts(4))
    with pytest.raises(RequestError, match="site is 'x'"):
        study.open_cross_layer(made.path, site="x")
    with pytest.raises(RequestError, match="not clear"):
        study.open_cross_layer(made.path, site="transcoder_mid")
    with pytest.raises(CheckpointError, match=r"has no cross-layer transcoder: expected W_enc_0"):
        study.open_cross_layer(feature_folders.goodfire(tmp_path, D, N).path)


def test_files_that_do_not_fit_each_other(made):
    def change(name: str, **changed: Tensor | None) -> None:
        file = made.path / f"{name}.safetensors"
        stored = {key: tensor.clone() for key, tensor in load_file(file).items()} | changed
        file.unlink()
        save_file({key: tensor for key, tensor in stored.items() if tensor is not None}, file)

    last = made.path / "W_enc_2.safetensors"
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(
        CheckpointError, match=r"W_dec_0 is \(64, 3, 32\), expected \(64, 2, 32\), as there are 2 layers; are files"
    ):
        study.open_cross_layer(made.path)
    last.write_bytes(data)
    change("W_enc_1", b_dec_1=torch.full((D,), float("nan")))
    with pytest.raises(CheckpointError, match="b_dec_1 has values that are not finite"):
        study.open_cross_layer(made.path)
    change("W_enc_1", b_dec_1=torch.ones(D + 1))
    with pytest.raises(CheckpointError, match=r"b_dec_1 is \(33,\), expected \(32,\)"):
        study.open_cross_layer(made.path)
    change("W_enc_1", b_dec_1=None, W_skip_1=torch.ones(D, D))
    with pytest.raises(UnsupportedModel, match="W_skip_1 of a cross-layer transcoder, which is not supported"):
        study.open_cross_layer(made.path)
    (made.path / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"W_enc_1\.safetensors"):
        study.open_cross_layer(made.path)
