"""Edits of features while a model runs: they add exactly the features' change, and nothing else."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from folders import tiny_folder
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from random_models import random_model
from study import feature_folders
from study.drawn import FEW, ids_of, models

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
N = 128
MAKERS = {
    "llama_scope": feature_folders.llama_scope,
    "sparsify": lambda folder, dim, n: feature_folders.sparsify(folder, dim, n, k=16),
    "transcoder": lambda folder, dim, n: feature_folders.transcoders(folder, dim, n, skip=True),
    "unscaled transcoder": lambda folder, dim, n: feature_folders.llama_scope(folder, dim, n, kind="TC"),
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


@pytest.fixture(scope="module", params=MAKERS)
def features(request, tmp_path_factory) -> study.Features:
    return study.open_features(MAKERS[request.param](tmp_path_factory.mktemp("features"), ARGS.dim, N).path)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(ARGS.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def firing(features: study.Features, trace: study.Trace) -> list[int]:
    """Features that fire at some tokens, but not at all tokens."""
    share = (features.encode(trace) != 0).float().mean((0, 1))
    return ((share > 0) & (share < 1)).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_edits_that_change_no_feature_change_no_bit(features, dtype, scheme):
    model = random_model(ARGS, seed=1).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    tokens = ids(2, 7)
    seen = study.trace(model, tokens, [features.reads, "logits"])
    some = firing(features, seen)[:4]
    silent = (features.encode(seen) == 0).all(0).all(0).nonzero()[:, 0].tolist()[:3] or [some[0]]
    same = [
        study.scale_features(features, dict.fromkeys(some, 1.0)),
        study.clamp_features(features, some, least=-1e6, most=1e6),
        study.steer_features(features, {some[0]: 0.0}),
        study.ablate_features(features, some, positions=[]),
        *([study.ablate_features(features, silent)] if silent != [some[0]] else []),
    ]
    for edits in same:
        with study.patch(model, edits):
            assert torch.equal(model(tokens), seen["logits"])


def test_the_activation_moves_by_the_decoders_rows_alone(model, features):
    tokens = ids(2, 7)
    names = [features.reads, *features.writes]
    before = study.trace(model, tokens, names)
    f = features.encode(before)
    one, other, *_ = firing(features, before)
    changed = {
        "set": (study.set_features(features, {one: 5.0, other: 0.0}), {one: 5.0, other: 0.0}),
        "ablate": (study.ablate_features(features, [one, other]), {one: 0.0, other: 0.0}),
        "scale": (study.scale_features(features, {one: 3.0}), {one: f[..., one] * 3}),
        "clamp": (study.clamp_features(features, one, most=0.1), {one: f[..., one].clamp(max=0.1)}),
        "steer": (study.steer_features(features, {one: 2.0}), {one: f[..., one] + 2}),
    }
    name = features.writes[0]
    for kind, (edits, wanted) in changed.items():
        with study.patch(model, edits):
            after = study.trace(model, tokens, names)
        expected = before[name].clone()
        for feature, values in wanted.items():
            expected += (values - f[..., feature])[..., None] * features.direction(feature)
        assert torch.allclose(after[name], expected, atol=1e-5), kind
        if not features.is_transcoder and kind == "steer":
            assert not torch.equal(after[name], before[name])
    assert torch.equal(study.trace(model, tokens, name)[name], before[name])  # the edit is removed


@FEW
@given(models(least_layers=2), st.sampled_from(list(MAKERS)), st.integers(1, 6), st.integers(0, 99))
def test_features_of_drawn_shapes_are_set(model, kind, length, seed):
    with TemporaryDirectory() as folder:
        features = study.open_features(MAKERS[kind](Path(folder), model.args.dim, 4 * model.args.dim).path)
        text, name = ids_of(model, length, seed), features.writes[0]
        before = study.trace(model, text, [features.reads, name])
        with study.patch(model, study.set_features(features, {2: 1.5})):
            after = study.trace(model, text, name)[name]
        moved = (1.5 - features.encode(before)[..., 2, None]) * features.direction(2)
        torch.testing.assert_close(after, before[name] + moved, rtol=1e-4, atol=1e-4)


def test_positions_and_rows_limit_an_edit(model, features):
    tokens, name = ids(3, 6), features.writes[0]
    before = study.trace(model, tokens, name)[name]
    with study.patch(model, study.steer_features(features, {3: 4.0}, positions=[2, -1], rows=1)):
        moved = (study.trace(model, tokens, name)[name] != before).any(-1)
    assert moved.nonzero().tolist() == [[1, 2], [1, 5]]


def test_texts_of_different_lengths_and_a_cache_give_the_same(model, features):
    """Every text alone, in a padded batch, and token by token with a cache."""
    texts = [ids(1, n, seed=n)[0] for n in (3, 8, 5)]
    edits = study.set_features(features, {1: 3.0, 2: 0.0})
    with study.patch(model, edits):
        alone = [model(text[None])[0] for text in texts]
        together = study.trace(model, texts, "logits")
        for i, text in enumerate(texts):
            cache = new_cache(model, 1, 16)
            steps = torch.cat([model(token[None, None], cache)[0] for token in text])
            assert torch.allclose(together.row(i)["logits"][0], alone[i], atol=1e-5)
            assert torch.allclose(steps, alone[i], atol=1e-4)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Llama:
    folder = tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")
    return Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32", verify="never")


@pytest.mark.parametrize("kind", ["steer", "set", "ablate"])
@pytest.mark.parametrize("maker", MAKERS)
def test_generation_with_a_cache_is_as_passes_without_one(talker, maker, kind, tmp_path):
    """Prompts of different lengths in one batch: each answer is what whole passes make most probable."""
    model, dim = talker.model, talker.model.args.dim
    features = study.open_features(MAKERS[maker](tmp_path, dim, 2 * dim).path)
    prompts = ["A cat", "The weather is"]
    before = study.trace(model, talker.encode(prompts[1]), features.reads)
    strongest = features.encode(before).amax((0, 1)).topk(4).indices.tolist()
    edits = {
        "steer": study.steer_features(features, {strongest[0]: 9.0}),
        "set": study.set_features(features, {strongest[0]: 9.0, strongest[1]: 0.0}),
        "ablate": study.ablate_features(features, strongest),
    }[kind]
    plain = talker.text_completion(prompts, 0.0, max_gen_len=6, logprobs=True)
    with study.patch(model, edits):
        found = talker.text_completion(prompts, 0.0, max_gen_len=6, logprobs=True)
        for prompt, answer, unedited in zip(prompts, found, plain, strict=True):
            whole, logprobs = talker.encode(prompt), []
            for _ in answer["logprobs"]:
                last = model(torch.tensor([whole]))[0, -1].log_softmax(-1)
                whole.append(int(last.argmax()))
                logprobs.append(float(last.max()))
            assert talker.tokenizer.decode(whole[-len(logprobs) :]) == answer["generation"]
            assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)
            assert answer["logprobs"] != pytest.approx(unedited["logprobs"], abs=1e-3)
    assert talker.text_completion(prompts, 0.0, max_gen_len=6, logprobs=True) == plain


@pytest.mark.parametrize("signed", [False, True])
def test_only_tokens_that_may_change_are_encoded(model, signed, tmp_path, monkeypatch):
    """Tokens at the edit's positions; for TopK only where a chosen feature's own value is above zero."""
    features = study.open_features(feature_folders.sparsify(tmp_path, ARGS.dim, N, k=16, signed=signed).path)
    tokens, counts, active = ids(3, 20), [], study.Features.active
    x = study.trace(model, tokens, features.reads)[features.reads]
    own = (x - features.weights.input_bias) @ features.weights.encoder[5] + features.weights.encoder_bias[5]
    f = features.encode(x)
    monkeypatch.setattr(study.Features, "active", lambda self, x: counts.append(len(x)) or active(self, x))
    assert torch.allclose(features.encode_some(x, [5])[..., 0], f[..., 5], atol=1e-6)
    assert 0 < int((own > 0).sum()) < 60 and counts == [60 if signed else int((own > 0).sum())]
    with study.patch(model, study.ablate_features(features, 5, positions=[2, 3], rows=1)):
        model(tokens)
    assert counts[1:] == [2 if signed else int((own[1, 2:4] > 0).sum())]


def test_a_feature_of_a_cross_layer_transcoder_moves_all_its_layers(model, tmp_path):
    made = feature_folders.cross_layer(tmp_path, ARGS.dim, N, ARGS.n_layers)
    features = study.open_features(made.path, layer=1)
    tokens = ids(1, 5)
    x = study.trace(model, tokens, features.reads)[features.reads]
    f = features.encode(x)
    one = int(f[0, -1].argmax())
    with study.patch(model, study.ablate_features(features, one)):
        within = study.trace(model, tokens, features.writes)
    by_hand = {
        name: lambda value, i=i: value - f[..., one, None] * torch.from_numpy(made.w_dec[1][one, i])
        for i, name in enumerate(features.writes)
    }
    with study.patch(model, by_hand):
        expected = study.trace(model, tokens, features.writes)
    assert all(torch.allclose(within[name], expected[name], atol=1e-5) for name in features.writes)


def test_misuse(model, features, tmp_path):
    wrong = [
        lambda: study.set_features(features, {N: 1.0}),
        lambda: study.set_features(features, {}),
        lambda: study.set_features(features, {1: float("nan")}),
        lambda: study.ablate_features(features, [1, 1]),
        lambda: study.ablate_features(features, "12"),
        lambda: study.clamp_features(features, 1),
        lambda: study.clamp_features(features, 1, least=2, most=1),
        lambda: features.encode(torch.ones(2, 3)),
        lambda: features.encode(torch.ones(2, ARGS.dim, dtype=torch.long)),
        lambda: features.decode(torch.ones(2, 3)),
    ]
    for call in wrong:
        with pytest.raises(RequestError):
            call()
    whole = study.open_cross_layer(feature_folders.cross_layer(tmp_path / "whole", ARGS.dim, 8, ARGS.n_layers).path)
    for call in (lambda: study.ablate_features(whole, 3), lambda: study.top_contexts(whole, 3, [[1, 2]], model=model)):
        with pytest.raises(RequestError, match=r"take one of its layers, features.layers\[i\]"):
            call()
    small = study.open_features(feature_folders.goodfire(tmp_path, 16, 8).path)
    with pytest.raises(RequestError, match="has features of 16 dimensions, up to layer 1, but the model has 64"):
        small.check(model)
    with study.patch(model, study.steer_features(small, {1: 1.0})), pytest.raises(RequestError, match="has 64 dimensions, but"):
        model(ids(1, 3))
    high = study.open_features(feature_folders.sparsify(tmp_path, ARGS.dim, N, name="layers.7").path)
    with pytest.raises(RequestError, match=r"up to layer 7, .* layers 0 to 2"):
        high.check(model)
