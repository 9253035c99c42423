"""Tuned lenses, compared with the formula in plain PyTorch: reading, writing, fitting, scores."""

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import REPOSITORY, parsed
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.tuned.unembed_hash import unembed_hash
from random_models import random_model

ARGS = {"dim": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 40, "multiple_of": 16}
ARGS |= {"norm_eps": 1e-5, "rope_theta": 500000.0}
ENGLISH = (REPOSITORY / "scripts" / "quality_texts" / "english.txt").read_text(encoding="utf-8")
IDS = [3, 1, 4, 15, 9, 26, 5]


def model_of(seed=0, tied=False, **changes):
    return random_model(ModelArgs.from_dict(ARGS | changes), seed=seed, tied=tied)


def random_lens(model, seed=0):
    args, generator = model.args, torch.Generator().manual_seed(seed)
    weights = [torch.randn(args.dim, args.dim, generator=generator) * 0.2 for _ in range(args.n_layers)]
    biases = [torch.randn(args.dim, generator=generator) * 0.2 for _ in range(args.n_layers)]
    return study.TunedLens(weights, biases, "a model", unembed_hash(model))


def texts(n, length, vocab=40, seed=1):
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def streams(model, ids):
    """The residual stream after the embedding and each layer, by PyTorch's own hooks: (T, D) each."""
    seen = [model.tok_embeddings(torch.tensor(ids))]
    handles = [layer.register_forward_hook(lambda module, inputs, out: seen.append(out[0])) for layer in model.layers]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def read(model, h):
    """Log-probabilities of a residual, from the weights alone."""
    normed = h / (h.pow(2).mean(-1, keepdim=True) + model.args.norm_eps).sqrt() * model.norm.weight
    return (normed @ model.output.weight.T).log_softmax(-1)


def by_the_formula(model, lens, ids):
    *early, last = streams(model, ids)
    return [read(model, h + h @ w.T + b) for h, w, b in zip(early, lens.weights, lens.biases, strict=True)] + [
        read(model, last)
    ]


# ---- the lens


@settings(max_examples=6, deadline=None)
@given(
    kv_heads=st.integers(1, 2), groups=st.integers(1, 2), layers=st.integers(1, 3), length=st.integers(1, 5),
    tied=st.booleans(), scaled=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_lens_reads_what_the_formula_gives(kv_heads, groups, layers, length, tied, scaled, seed):
    heads = kv_heads * groups
    shape = {"n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "dim": 8 * heads}
    model = model_of(seed, tied, use_scaled_rope=scaled, **shape)
    ids = torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    lens = random_lens(model, seed)
    found = study.logit_lens(model, ids, target=7, top=40, lens=lens)
    assert found.is_tuned and found.points == ["embedding", *(f"layers.{i}.residual_post" for i in range(layers))]
    expected = torch.stack(by_the_formula(model, lens, ids))  # (P, T, V)
    torch.testing.assert_close(found.target_probability, expected.exp()[..., 7])
    by_id = torch.zeros_like(expected).scatter_(-1, found.top_ids, found.top_probabilities)
    torch.testing.assert_close(by_id, expected.exp())
    kl = (expected[-1].exp() * (expected[-1] - expected)).sum(-1)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-4)


def test_without_translation_it_is_the_logit_lens_to_the_bit():
    model = model_of()
    zeros = study.TunedLens([torch.zeros(16, 16)] * 3, [torch.zeros(16)] * 3)
    plain = study.logit_lens(model, IDS, points=zeros.points, target=2)
    tuned = study.logit_lens(model, IDS, lens=zeros, target=2)
    for name in ("top_ids", "top_probabilities", "kl", "entropy", "target_probability"):
        assert torch.equal(getattr(plain, name), getattr(tuned, name))
    some = study.logit_lens(model, IDS, lens=random_lens(model), points=["layers.1.residual_post"], positions=[-1])
    assert some.kl.shape == (1, 1)


def test_a_lens_of_another_model_or_point_is_refused(caplog):
    lens = random_lens(model_of())
    with pytest.raises(RequestError, match="of 3 layers and 16 dimensions, but this one has 2 and 16"):
        study.logit_lens(model_of(n_layers=2), IDS, lens=lens)
    with pytest.raises(RequestError, match=r"points contains .layers\.1\.residual_mid., expected some of embedding"):
        study.logit_lens(model_of(), IDS, lens=lens, points=["layers.1.residual_mid"])
    assert not caplog.records
    study.logit_lens(model_of(seed=5), IDS, lens=lens)
    assert "the tuned lens of a model was fitted to another output matrix" in caplog.text


# ---- the published format


def test_the_published_form_is_read_and_written(tmp_path):
    model = model_of()
    lens = random_lens(model)
    lens.save(tmp_path / "ours")
    state = torch.load(tmp_path / "ours" / "params.pt", weights_only=True)
    assert list(state) == [f"{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert torch.equal(state["2.weight"], lens.weights[2])
    config = parsed((tmp_path / "ours" / "config.json").read_text())
    assert (config["d_model"], config["num_hidden_layers"], config["lens_type"]) == (16, 3, "linear_tuned_lens")
    assert config["unembed_hash"] == hashlib.sha256(np.array_str(model.output.weight.numpy(), precision=1).encode()).hexdigest()
    again = study.TunedLens.load(tmp_path / "ours")
    assert again.base_model == "a model" and torch.equal(again.biases[1], lens.biases[1])

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.save({name: value.half() for name, value in state.items()}, theirs / "params.pt")
    (theirs / "config.json").write_text(json.dumps({"d_model": 16, "num_hidden_layers": 3, "rank": None}))
    found = study.logit_lens(model, IDS, lens=study.TunedLens.load(theirs), target=7)
    half = study.TunedLens([w.half().float() for w in lens.weights], [b.half().float() for b in lens.biases])
    torch.testing.assert_close(found.target_probability, torch.stack(by_the_formula(model, half, IDS)).exp()[..., 7])
    with pytest.raises(RequestError, match=r"already holds config.json, params.pt: choose another folder"):
        lens.save(theirs)


@pytest.mark.parametrize(("vocab", "dim"), [(40, 16), (300, 16), (7, 160), (5, 240)])
def test_the_hash_is_of_what_numpy_prints(vocab, dim):
    model = model_of(vocab_size=vocab, dim=dim)
    model.output.weight.data[0] *= 1e-5  # printed with exponents
    whole = np.array_str(model.output.weight.float().numpy(), precision=1)
    assert unembed_hash(model) == hashlib.sha256(whole.encode()).hexdigest()


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, state: (folder / "config.json").unlink(), "cannot read .*config.json"),
        (lambda folder, state: (folder / "config.json").write_text("<html>no</html>"), "an HTML page"),
        (lambda folder, state: (folder / "config.json").write_text("[]"), "expected an object with d_model"),
        (lambda folder, state: (folder / "config.json").write_text('{"d_model": true}'), "d_model is True"),
        (
            lambda folder, state: (folder / "config.json").write_text(
                '{"d_model": 16, "num_hidden_layers": 3, "lens_type": "mlp"}'
            ),
            "lens_type is 'mlp'",
        ),
        (lambda folder, state: (folder / "params.pt").write_text("<html>no</html>"), "an HTML page"),
        (lambda folder, state: (folder / "params.pt").write_bytes(pickle.dumps(Evil())), "bare pickle"),
        (lambda folder, state: torch.save(Evil(), folder / "params.pt"), "asks Python to use"),
        (lambda folder, state: torch.save(state | {"3.weight": state["0.weight"]}, folder / "params.pt"), "has '3.weight'"),
        (lambda folder, state: torch.save({"0.weight": state["0.weight"]}, folder / "params.pt"), "lacks '0.bias'"),
        (lambda folder, state: torch.save(state | {"0.bias": torch.ones(4)}, folder / "params.pt"), r"\(4,\) of torch.float32"),
        (
            lambda folder, state: torch.save(state | {"0.bias": torch.full((16,), torch.nan)}, folder / "params.pt"),
            "not finite",
        ),
    ],
)
def test_a_folder_that_is_no_lens_is_refused(spoil, message, tmp_path, capsys):
    random_lens(model_of()).save(tmp_path / "lens")
    spoil(tmp_path / "lens", torch.load(tmp_path / "lens" / "params.pt", weights_only=True))
    with pytest.raises(CheckpointError, match=message):
        study.TunedLens.load(tmp_path / "lens")
    assert "this ran" not in capsys.readouterr().out


# ---- scores


def test_scores_are_those_of_their_definitions():
    model, lens = model_of(), random_lens(model_of())
    rows = [IDS, texts(1, 9)[0]]
    found = study.score_lens(model, rows, lens)
    assert found.n_tokens == 6 + 8
    own = [torch.stack(by_the_formula(model, lens, ids))[:, :-1] for ids in rows]
    logprobs, following = torch.cat(own, 1), rows[0][1:] + rows[1][1:]
    kl = (logprobs[-1].exp() * (logprobs[-1] - logprobs)).sum(-1).mean(-1)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.cross_entropy, -logprobs[:, range(14), following].mean(-1))
    for p in range(4):
        confidence, best = (x.tolist() for x in logprobs[p].exp().max(-1))
        error = 0.0
        for b in range(15):
            inside = [i for i in range(14) if b / 15 <= confidence[i] < (b + 1) / 15]
            error += abs(sum(confidence[i] - (best[i] == following[i]) for i in inside)) / 14
        assert found.calibration_error[p].item() == pytest.approx(error, abs=1e-6)


def test_one_token_has_no_next_one():
    with pytest.raises(RequestError, match="one token each"):
        study.score_lens(model_of(), [[3], [4]])


# ---- fitting


def test_one_step_of_sgd_is_that_of_autograd():
    model, rows = model_of(), texts(2, 5)
    lens = study.TunedLens.fit(model, rows, steps=1, tokens_per_step=5, held_out=0.5, seed=3)
    used = [i for i in (0, 1) if not torch.equal(lens.held_out.logit.kl, study.score_lens(model, [rows[1 - i]]).kl)]
    text = next(rows[i] for i in (0, 1) if torch.equal(lens.held_out.logit.kl, study.score_lens(model, [rows[1 - i]]).kl))
    assert len(used) == 1
    *early, last = streams(model, text)
    final = read(model, last)
    for layer, h in enumerate(early):
        w, b = torch.zeros(16, 16, requires_grad=True), torch.zeros(16, requires_grad=True)
        kl = (final.exp() * (final - read(model, h + h @ w.T + b))).sum(-1).mean()
        grads = torch.autograd.grad(kl, (w, b))
        norm = torch.sqrt(sum(g.pow(2).sum() for g in grads))
        step = 0.1 * 1.9 / max(1, norm)  # Nesterov's first step: gradient + momentum · gradient
        torch.testing.assert_close(lens.weights[layer], -step * grads[0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lens.biases[layer], -step * grads[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_fit_comes_nearer_on_text_it_did_not_see(optimizer, scheme):
    model = model_of(dim=32, n_layers=2)
    if scheme:
        quantize_model(model, scheme)
    seen = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = texts(20, 12)
    lens = study.TunedLens.fit(
        model, rows, steps=30, tokens_per_step=48, optimizer=optimizer, rate=1.0 if optimizer == "sgd" else 0.03,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (lens.held_out.tuned.kl[:-1] < 0.95 * lens.held_out.logit.kl[:-1]).all()
    assert lens.held_out.tuned.kl[-1] == 0 and lens.held_out.logit.n_tokens == 2 * 11
    assert seen[-1] == (30, 30)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = study.TunedLens.fit(
        model, rows, steps=30, tokens_per_step=48, optimizer=optimizer, rate=1.0 if optimizer == "sgd" else 0.03
    )
    assert all(torch.equal(a, b) for a, b in zip(lens.weights, again.weights, strict=True))


def test_an_interruption_keeps_what_was_learned(tmp_path, caplog):
    caplog.set_level("INFO", "llama_ref")

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.TunedLens.fit(model_of(), texts(8, 6), steps=50, tokens_per_step=6, to=tmp_path / "lens", progress=stop)
    assert "after 3 of 50 steps is in" in caplog.text
    assert all(weight.any() for weight in study.TunedLens.load(tmp_path / "lens").weights)
    with pytest.raises(RequestError, match="already holds"):
        study.TunedLens.fit(model_of(), texts(8, 6), steps=1, to=tmp_path / "lens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"tokens_per_step": True}, "tokens_per_step is True"),
        ({"optimizer": "lion"}, "optimizer is 'lion', expected sgd or adam"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"held_out": None}, "held_out is None"),
        ({"held_out": 0.9}, "cannot score 90% of 2 texts"),
    ],
)
def test_what_makes_no_fit_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        study.TunedLens.fit(model_of(), texts(2, 5), **options)


def test_a_fit_that_diverges_is_refused_and_saves_nothing(tmp_path):
    with pytest.raises(RequestError, match="the fit diverged, and its numbers are not finite: choose a smaller rate"):
        study.TunedLens.fit(model_of(), texts(4, 5), steps=4, tokens_per_step=5, rate=1e38, to=tmp_path / "lens")
    assert not (tmp_path / "lens").exists()
    wild = study.TunedLens([torch.full((16, 16), 3e38)] * 3, [torch.zeros(16)] * 3)
    assert study.score_lens(model_of(), texts(2, 5), wild).kl[0].isnan()


def test_a_small_fit_comes_nearer_at_every_layer_of_the_real_model(llama):
    n = 2000  # the most common tokens only: products with the output matrix take most of the time
    with torch.device("meta"):
        model = Transformer(replace(llama.model.args, vocab_size=n))
    kept = {name: value[:n] if len(value) > n else value for name, value in llama.model.state_dict().items()}
    model.load_state_dict(kept, assign=True)
    model.requires_grad_(False)
    ids = [token for token in llama.encode(ENGLISH)[1:] if token < n]
    rows = [[1, *ids[start : start + 31]] for start in range(0, len(ids) - 31, 31)]
    lens = study.TunedLens.fit(model, rows, steps=4, tokens_per_step=32, held_out=0.1)
    logit, tuned = lens.held_out.logit, lens.held_out.tuned
    assert len(tuned.kl) == 31 and tuned.n_tokens >= 30
    assert (tuned.kl[:-1] < logit.kl[:-1]).all()
    assert tuned.calibration_error[:-1].mean() < logit.calibration_error[:-1].mean()
