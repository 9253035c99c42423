"""Composition and token-to-token circuits of heads, compared with dense matrices and the model's own scores."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.linalg import matrix_norm

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.model import rope_frequencies
from llama_ref.quantization.apply import quantize_model
from random_models import grouped_model, random_model

model_of = partial(grouped_model, vocab_size=50, rope_theta=100.0)


@pytest.fixture(scope="module")
def model():
    return model_of()


def dense(model, layer, head, distance=0, fold=True):
    """W_QK and W_OV as in the papers, (D, D) each; a key is `distance` tokens before its query."""
    w, args = model.state_dict(), model.args
    hd, group = args.head_dim, head // (args.n_heads // args.n_kv_heads)
    own = {name: w[f"layers.{layer}.attention.{name}.weight"].double() for name in ("wq", "wk", "wv", "wo")}
    norm = torch.diag(w[f"layers.{layer}.attention_norm.weight"].double()) if fold else torch.eye(args.dim).double()
    q, k, v = own["wq"][head * hd :][:hd], own["wk"][group * hd :][:hd], own["wv"][group * hd :][:hd]
    angle = distance * rope_frequencies(args).double()
    turns = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in angle]
    return (torch.block_diag(*turns) @ q @ norm).T @ (k @ norm), own["wo"][:, head * hd :][:, :hd] @ v @ norm


@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 3), scaled=st.booleans(),
    distance=st.integers(0, 5), fold=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_composition_is_that_of_dense_matrices(groups, kv_heads, layers, scaled, distance, fold, seed):
    model = model_of(groups, kv_heads, layers, scaled=scaled, seed=seed)
    found = study.composition(model, distance=distance, fold_norms=fold)
    heads = range(model.args.n_heads)
    for reader in range(layers):
        for writer in range(layers):
            for h in heads:
                qk, ov = dense(model, reader, h, distance, fold)
                for other in heads:
                    own = [score[reader, h, writer, other].item() for score in (found.q, found.k, found.v)]
                    if writer >= reader:
                        assert all(score != score for score in own)
                        continue
                    _, written = dense(model, writer, other, fold=fold)
                    expected = [
                        matrix_norm(left @ written) / matrix_norm(left) / matrix_norm(written) for left in (qk.T, qk, ov)
                    ]
                    assert own == pytest.approx([float(x) for x in expected], rel=1e-4)


def test_chosen_layers_and_the_largest_scores():
    model = model_of(layers=3)
    whole, some = study.composition(model), study.composition(model, [2, 0])
    assert some.layers == [0, 2] and torch.equal(some.k[1, :, 0], whole.k[2, :, 0])
    reader, writer, score = some.top("k", 1)[0]
    assert reader.startswith("layers.2.heads.") and writer.startswith("layers.0.heads.")
    assert score == some.k[1, :, 0].max() and len(some.top("q", 99)) == 16


def circuit(model, layer, head, fold):
    """Output · W_OV · embedding: (V, V)."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    norm = w["norm.weight"] if fold else 1
    return (w["output.weight"] * norm) @ dense(model, layer, head, fold=fold)[1] @ w["tok_embeddings.weight"].T


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_eigenvalues_are_those_of_the_whole_circuit(fold, tied, monkeypatch):
    monkeypatch.setattr("llama_ref.study.circuits.vocabulary.ROWS", 7)
    model = model_of(groups=3, kv_heads=1, tied=tied)
    found = study.copying(model, fold_norms=fold)
    for layer in range(2):
        for head in range(3):
            every = torch.linalg.eigvals(circuit(model, layer, head, fold))
            largest = every[every.abs().argsort(descending=True)[:8]]
            own = found.eigenvalues[layer, head]
            assert own.abs().sort().values.tolist() == pytest.approx(largest.abs().sort().values.tolist(), rel=1e-3)
            assert found.scores[layer, head] == pytest.approx(float(every.sum().real / every.abs().sum()), abs=1e-3)


def test_a_head_that_copies_scores_one(model):
    model = model_of(groups=1, kv_heads=1, tied=True)
    attention = model.layers[1].attention
    attention.wo.weight.copy_(attention.wv.weight.T)
    scores = study.copying(model, fold_norms=False).scores
    assert scores[1, 0] == pytest.approx(1, abs=1e-5) and abs(scores[0, 0]) < 0.99
    attention.wo.weight.neg_()
    assert study.copying(model, fold_norms=False).scores[1, 0] == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("head", range(4))
def test_scores_of_layer_0_are_the_models_own(model, head):
    ids = [3, 7, 7, 20, 49, 0, 11]
    scores = study.trace(model, ids, "layers.0.attention.scores")["layers.0.attention.scores"][0, head]
    found = study.HeadCircuit(model, 0, head)
    for query in range(len(ids)):
        for key in range(query + 1):
            own = found.attention_scores([ids[query]], [ids[key]], query - key)
            assert own.item() == pytest.approx(scores[query, key].item(), abs=1e-4)
    assert found.attention_scores(ids, ids[:2], 3).shape == (7, 2)


def test_logits_are_what_the_head_adds(model):
    """On a text of one token, which attends only to itself."""
    found = study.HeadCircuit(model, 0, 3)
    written = study.trace(model, [5], "layers.0.attention.head_result")["layers.0.attention.head_result"][0, 0, 3]
    torch.testing.assert_close(found.logits([5])[0], model.logits(written * model.norm.weight), atol=1e-4, rtol=1e-4)
    best, logit = found.raised(5, 3)[0]
    assert logit == found.logits([5]).max() and best == found.logits([5]).argmax()


@pytest.mark.parametrize("tied", [True, False])
def test_copied_tokens_are_those_of_all_logits(tied, monkeypatch):
    monkeypatch.setattr("llama_ref.study.circuits.vocabulary.ROWS", 16)
    found = study.HeadCircuit(model_of(tied=tied), 1, 2)
    logits = found.logits(range(50))
    expected = (logits.diagonal() - logits.mean(1)) / logits.std(1, correction=0)
    torch.testing.assert_close(found.copied(), expected, atol=1e-4, rtol=1e-3)
    assert found.top_copied(1) == [(int(expected.argmax()), pytest.approx(float(expected.max()), rel=1e-3))]


def test_quantized_heads_are_those_of_their_weights():
    args = ModelArgs.from_dict(
        {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "multiple_of": 32, "norm_eps": 1e-5}
        | {"rope_theta": 100.0}
    )
    model, whole = random_model(args, seed=0), random_model(args, seed=0)
    quantize_model(model, "int8")
    torch.testing.assert_close(study.copying(model).scores, study.copying(whole).scores, atol=0.05, rtol=0)
    torch.testing.assert_close(study.composition(model).k, study.composition(whole).k, atol=0.05, rtol=0, equal_nan=True)
    own, other = (study.HeadCircuit(each, 1, 1).logits([3]) for each in (model, whole))
    torch.testing.assert_close(own, other, atol=0.2, rtol=0)


def test_what_a_model_lacks_is_refused(model):
    for call, error in (
        (lambda: study.composition(model, [2]), "layer is 2, expected a whole number from 0 to 1"),
        (lambda: study.composition(model, distance=-1), "distance is -1, expected how many tokens"),
        (lambda: study.composition(model).top("x", 1), "port is 'x', expected q, k or v"),
        (lambda: study.HeadCircuit(model, 0, 4), "head is 4, expected a whole number from 0 to 3"),
        (lambda: study.HeadCircuit(model, 0, 0).raised(50), "token 50 is not in the vocabulary"),
    ):
        with pytest.raises(RequestError, match=error):
            call()
