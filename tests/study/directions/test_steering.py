"""Directions, probes, steering and control vectors, compared with NumPy, scikit-learn, plain forwards and gguf."""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Context, Transformer
from random_models import random_model
from study.drawn import FEW, ids_of, models

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0}
)
TEXT = [7, 3, 59, 1, 22]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Two clouds of 60 points in 8 dimensions, separated along one dimension, with unequal spreads."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(120, 8, generator=generator) * torch.arange(1.0, 9) + 5
    rows[60:, 2] += 8
    return rows


@pytest.fixture
def direction() -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(3))


# ---- directions and probes


def test_mean_difference_is_numpys(rows):
    expected = rows[60:].numpy().mean(0) - rows[:60].numpy().mean(0)
    np.testing.assert_allclose(study.mean_difference(rows[60:], rows[:60]).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_principal_components_are_scikit_learns(rows):
    ours, theirs = study.principal_components(rows, 3), PCA(3).fit(rows.double().numpy())
    np.testing.assert_allclose(ours.share.numpy(), theirs.explained_variance_ratio_, rtol=1e-4)
    cosines = (ours.directions.numpy() * theirs.components_).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)


def test_a_probe_is_scikit_learns_and_is_scored_on_what_it_did_not_see(rows):
    labels = [i >= 60 for i in range(120)]
    probe = study.fit_probe(rows, labels, held_out=0.25)
    assert probe.n_held_out == 30 and probe.majority == 0.5 and probe.accuracy > 0.8
    every = study.fit_probe(rows, labels, held_out=2 / 120)  # all but one of each kind
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(rows.numpy(), labels)
    agree = (every.scores(rows).numpy() > 0) == theirs.predict(rows.numpy())
    assert agree.mean() > 0.97
    assert np.corrcoef(every.scores(rows).numpy(), theirs.decision_function(rows.numpy()))[0, 1] > 0.99
    generator = torch.Generator().manual_seed(1)
    noise = study.fit_probe(torch.randn(120, 100, generator=generator), labels, strength=100)
    assert noise.train_accuracy > 0.95 and noise.accuracy < 0.75


# ---- steering


def plain(model: Transformer, ids: list[int], added: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits (T, V) from the model's own modules, with vectors added after layers."""
    tokens = torch.tensor([ids])
    context, x = Context(model.args, tokens, None), model.tok_embeddings(tokens)
    for layer, block in enumerate(model.layers):
        x = block(x, context, layer) + added.get(layer, 0)
    return model.logits(model.norm(x))[0]


def test_steering_adds_to_the_residual_stream(model, direction):
    before = model(torch.tensor([TEXT]))
    with study.steer(model, direction, 2.5, [0, 2]):
        found = model(torch.tensor([TEXT]))[0]
    torch.testing.assert_close(found, plain(model, TEXT, {0: 2.5 * direction, 2: 2.5 * direction}))
    assert not torch.allclose(found, before[0], atol=0.1)
    each = {0: direction, 1: -2 * direction}
    expected = plain(model, TEXT, each)
    with study.steer(model, each):
        torch.testing.assert_close(model(torch.tensor([TEXT]))[0], expected)
    assert torch.equal(model(torch.tensor([TEXT])), before)


@FEW
@given(models(), st.integers(1, 6), st.integers(0, 99))
def test_drawn_shapes_are_steered_and_ablated(model, length, seed):
    """Ablating equals orthogonal weights; a tied output keeps reading with its own."""
    text, dim = ids_of(model, length, seed), model.args.dim
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    last = model.args.n_layers - 1
    with study.steer(model, direction, -3, last):
        steered = model(text)[0]
    torch.testing.assert_close(steered, plain(model, text[0].tolist(), {last: -3 * direction}), rtol=1e-4, atol=1e-4)
    with study.ablate(model, direction):
        found = model(text)
    unit = direction / direction.norm()
    remove = torch.eye(dim) - torch.outer(unit, unit)
    model.output.weight = nn.Parameter(model.output.weight.clone(), requires_grad=False)
    model.tok_embeddings.weight = nn.Parameter(model.tok_embeddings.weight @ remove, requires_grad=False)
    for block in model.layers:
        for matrix in (block.attention.wo, block.feed_forward.w2):
            matrix.weight.copy_(remove @ matrix.weight)
    torch.testing.assert_close(found, model(text), rtol=1e-4, atol=1e-4)


def test_generation_is_steered(llama):
    (token,) = llama.tokenizer.encode(" Paris", bos=False, eos=False)
    toward = 60 * torch.nn.functional.normalize(llama.model.output.weight[token].float(), dim=0)
    prompts = [llama.encode("I like"), llama.encode("The weather is fine and")]
    with study.steer(llama.model, toward, 4, 28):
        steered, _ = llama.generate(prompts, 6, 0.0)
    plainly, _ = llama.generate(prompts, 6, 0.0)
    assert study.share_of_tokens(steered, {token}) > 0.5 > study.share_of_tokens(plainly, {token}) == 0


def test_an_ablated_direction_is_that_of_orthogonal_weights(model, direction):
    with study.ablate(model, direction):
        found = model(torch.tensor([TEXT]))
        seen = study.trace(model, TEXT, "layers.*.residual_post")
    unit = direction / direction.norm()
    assert all((value @ unit).abs().max() < 1e-4 for value in seen.values())
    orthogonal = random_model(ARGS, seed=0)
    remove = torch.eye(32) - torch.outer(unit, unit)
    orthogonal.tok_embeddings.weight.data @= remove
    for block in orthogonal.layers:
        block.attention.wo.weight.data = remove @ block.attention.wo.weight.data
        block.feed_forward.w2.weight.data = remove @ block.feed_forward.w2.weight.data
    torch.testing.assert_close(found, orthogonal(torch.tensor([TEXT])), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model(torch.tensor([TEXT])), atol=1e-2)


def test_log_likelihoods_are_those_of_a_plain_forward(model, direction):
    prompts, answers = [TEXT, [5], [9, 8]], [[1, 2], [3], [4, 4, 4]]
    found = study.log_likelihoods(model, prompts, answers)
    for value, prompt, answer in zip(found, prompts, answers, strict=True):
        logprobs = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        own = [logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
        torch.testing.assert_close(value, torch.stack(own).sum())
    with study.steer(model, model.output.weight[11], 5, 2):
        steered = study.answer_margins(model, prompts, [11], [12])
    assert (steered > study.answer_margins(model, prompts, [11], [12]) + 1).all()


def test_misuse_is_named(model, direction, rows):
    for call, words in (
        (lambda: study.steer(model, direction).__enter__(), "layers is missing"),
        (lambda: study.steer(model, direction, 1, 3).__enter__(), "layer is 3, expected a whole number from 0 to 2"),
        (lambda: study.steer(model, direction, "2", 1).__enter__(), "scale is '2'"),
        (lambda: study.steer(model, direction, math.nan, 1).__enter__(), "scale is nan, expected a finite number"),
        (lambda: study.steer(model, direction[:5], 1, 1).__enter__(), r"expected floating-point numbers \(32,\)"),
        (lambda: study.steer(model, {1: direction}, 1, [2]).__enter__(), "no direction for layer 2, only for 1"),
        (lambda: study.ablate(model, torch.zeros(32)).__enter__(), "direction is zero"),
        (lambda: study.mean_difference(rows, rows[:, :3]), "8 dimensions and over 3"),
        (lambda: study.mean_difference(rows[0], rows), "expected activations"),
        (lambda: study.principal_components(rows[:3], 3), "expected 1 to 2"),
        (lambda: study.fit_probe(rows, [True] * 120), "at least two of each kind"),
        (lambda: study.fit_probe(rows, [i > 60 for i in range(120)], held_out=2), "between 0 and 1"),
        (lambda: study.share_of_tokens([[]], {1}), "no tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            call()


# ---- control vectors


def test_gguf_reads_what_is_written_and_the_other_way_round(direction, tmp_path):
    study.write_control_vector(tmp_path / "a.gguf", {2: direction, 1: direction.bfloat16()})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    assert {each.name: each.data.tolist() for each in reader.tensors} == {
        "direction.1": direction.bfloat16().tolist(),
        "direction.2": direction.tolist(),
    }
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == 2
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "controlvector")
    writer.add_tensor("direction.10", direction.numpy())
    writer.add_tensor("direction.9", direction.numpy() * 2)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = study.read_control_vector(tmp_path / "b.gguf")
    assert list(found) == [9, 10] and torch.equal(found[10], direction) and torch.equal(found[9], 2 * direction)


def test_other_files_are_refused(direction, tmp_path):
    for wrong, words in (
        ({0: direction}, "layer 0, expected 1 or above"),
        ({"a": direction}, "layer 'a', expected 1 or above"),
        ({1: direction.tolist()}, "direction is "),
        (direction, "expected one for each layer"),
        ({}, "expected one for each layer"),
    ):
        with pytest.raises(RequestError, match=words):
            study.write_control_vector(tmp_path / "a.gguf", wrong)
        assert not (tmp_path / "a.gguf").exists()
    study.write_control_vector(tmp_path / "a.gguf", {1: direction})
    whole = (tmp_path / "a.gguf").read_bytes()
    huge = whole.replace((32).to_bytes(8, "little"), (1 << 60).to_bytes(8, "little"))
    assert huge != whole
    for data in (b"", b"GGUF", whole[:-40], whole[:60], whole.replace(b"direction.1", b"direction.x"), huge):
        (tmp_path / "b.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"b\.gguf"):
            study.read_control_vector(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="No such file"):
        study.read_control_vector(tmp_path / "c.gguf")


def test_a_steered_llama_takes_a_written_vector(peaked: Llama, tmp_path):
    dim = peaked.model.args.dim
    study.write_control_vector(tmp_path / "v.gguf", {1: torch.ones(dim)})
    text = torch.tensor([[65, 66, 67]])
    with study.steer(peaked.model, study.read_control_vector(tmp_path / "v.gguf"), 3.0):
        found = peaked.model(text)
    with study.steer(peaked.model, torch.ones(dim), 3.0, 1):
        assert torch.equal(peaked.model(text), found)
