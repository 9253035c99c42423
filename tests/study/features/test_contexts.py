"""The strongest contexts of features equal those of a full table of values, from ids and from collected activations."""

import pytest
import torch

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.study.features import contexts
from random_models import random_model
from study import feature_folders

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": False}
)
TEXTS = [torch.randint(40, (3 + i % 9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(20)]


@pytest.fixture(scope="module")
def model():
    return random_model(ARGS, seed=0)


@pytest.mark.parametrize("maker", [feature_folders.llama_scope, feature_folders.sparsify])
@pytest.mark.parametrize("stored", [False, True])
def test_the_strongest_tokens_of_the_best_texts(model, maker, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "BLOCK_TOKENS", 25)
    features = study.open_features(maker(tmp_path, ARGS.dim, 96).path)
    values = [features.encode(study.trace(model, text, features.reads))[0] for text in TEXTS]
    number = int(torch.cat(values).amax(0).argmax())
    chosen = [number, (number + 1) % 96]
    data, done = TEXTS, []
    if stored:
        data = study.collect(model, TEXTS, features.reads, to=tmp_path / "acts", positions="all")
    found = study.top_contexts(
        features,
        chosen,
        data,
        model=None if stored else model,
        n=5,
        before=2,
        after=1,
        progress=lambda *step: done.append(step),
    )
    assert list(found) == chosen and done[-1] == (20, 20)
    for feature in chosen:
        best = sorted(((float(own[:, feature].max()), -i) for i, own in enumerate(values)), reverse=True)[:5]
        best = [(value, -i) for value, i in best if value > 0]
        assert [(each.value, each.text) for each in found[feature]] == [(pytest.approx(v, abs=1e-4), i) for v, i in best]
        for each in found[feature]:
            own, at = TEXTS[each.text], int(values[each.text][:, feature].argmax())
            start = max(0, at - 2)
            assert each.position == at and each.tokens == own[start : at + 2] and each.tokens[each.at] == own[at]
            expected = values[each.text][start : at + 2, feature].tolist()
            assert each.values == [pytest.approx(value, abs=1e-4) for value in expected]


def test_features_that_never_fire_have_no_contexts(model, tmp_path):
    features = study.open_features(feature_folders.transcoders(tmp_path, ARGS.dim, 96).path)
    features.weights.encoder_bias[5] = -1e6
    assert study.top_contexts(features, 5, TEXTS, model=model) == {5: []}


def test_misuse(model, tmp_path):
    features = study.open_features(feature_folders.sparsify(tmp_path, ARGS.dim, 96).path)
    with pytest.raises(RequestError, match="model is missing"):
        study.top_contexts(features, 1, TEXTS)
    with pytest.raises(RequestError, match="feature is 96, expected a whole number from 0 to 95"):
        study.top_contexts(features, 96, TEXTS, model=model)
    with pytest.raises(RequestError, match="n is 0"):
        study.top_contexts(features, 1, TEXTS, model=model, n=0)
    acts = study.collect(model, TEXTS, "layers.0.residual_post", to=tmp_path / "acts", positions="all")
    with pytest.raises(RequestError, match="was not collected"):
        study.top_contexts(features, 1, acts)
