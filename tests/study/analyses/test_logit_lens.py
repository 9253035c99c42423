"""Lens, attribution, attention, norms, weights: compared with hand computation, and on the demo."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from folders import PARAMS, byte_tokenizer
from llama_ref.args import ModelArgs
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Context, Transformer
from llama_ref.quantization.apply import quantize_model, quantized, tie
from llama_ref.quantization.scheme import Scheme
from llama_ref.study.analyses import attention, weights
from llama_ref.study.analyses.attention import attention_pattern, induction_score, repeated_tokens, summarize_attention
from llama_ref.study.analyses.attribution import attribute
from llama_ref.study.analyses.logit_lens import logit_lens, logit_lenses, residual_points
from llama_ref.study.analyses.residual import residual_stream
from llama_ref.study.analyses.rope import rope_waves
from llama_ref.study.analyses.weights import quantization_errors, spectra
from llama_ref.study.inputs import readable
from llama_ref.study.patching.exact import patch_grid
from make_random_checkpoint import make_random_checkpoint

lens = importlib.import_module("llama_ref.study.analyses.logit_lens")  # the package has a function of that name

TOKENS = [256, 84, 104, 101, 32, 99, 97, 116, 32, 84]
TARGET, OTHER = 101, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers of width 32, two query heads for each key/value head."""
    path = tmp_path_factory.mktemp("study") / "Tiny"
    return make_random_checkpoint(path, PARAMS | {"n_kv_heads": 2}, tokenizer=byte_tokenizer(path.with_name("Tiny.model")))


def build(folder, dtype: str = "float32") -> Transformer:
    """A model with matrices large enough that its distributions are not nearly uniform."""
    model = Llama.build(folder, device="cpu", dtype=dtype, max_seq_len=64).model
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(10)
    return model


@pytest.fixture(scope="module")
def model(folder) -> Transformer:
    return build(folder)


@pytest.fixture(scope="module")
def stream(model) -> list[Tensor]:
    """The residual stream (T, D) at every point, computed with the model's own modules."""
    ids = torch.tensor([TOKENS])
    context = Context(model.args, ids, None)
    points = [model.tok_embeddings(ids)]
    for layer, block in enumerate(model.layers):
        points.append(points[-1] + block.attention(block.attention_norm(points[-1]), context, layer))
        points.append(points[-1] + block.feed_forward(block.ffn_norm(points[-1])))
    return [x[0] for x in points]


# ---- logit lens


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 12), st.integers(0, 1), st.integers(0, 2**16))
def test_the_most_likely_tokens_are_those_of_topk(rows, top, n_blocks, rest, seed):
    V = n_blocks * lens.BLOCK + rest * 5
    assume(top <= V)
    logprobs = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    logprobs[0, : V // 2] = -torch.inf
    ids, probabilities = lens.top_tokens(logprobs, top)
    expected = logprobs.exp().topk(top)
    torch.testing.assert_close(probabilities, expected.values)
    torch.testing.assert_close(logprobs.exp().gather(1, ids), expected.values)
    assert all(len(set(own)) == top for own in ids.tolist())


@pytest.mark.parametrize(
    ("made", "read"), [(lens.LOGITS_AT_A_TIME, lens.LOGITS_TO_READ), (25 * 512, 3 * 512), (7 * 512, 512), (3 * 512, 1), (1, 1)]
)
def test_every_point_says_what_norm_and_output_make_of_it(model, stream, monkeypatch, made, read):
    monkeypatch.setattr(lens, "LOGITS_AT_A_TIME", made)
    monkeypatch.setattr(lens, "LOGITS_TO_READ", read)
    found = logit_lens(model, TOKENS, target=TARGET, top=3)
    final = model(torch.tensor([TOKENS]))[0].softmax(-1)
    assert found.points == residual_points(2) and len(found.points) == len(stream) == 5
    assert found.tokens == TOKENS
    for p, residual in enumerate(stream):
        scale = (residual.pow(2).mean(-1, keepdim=True) + model.args.norm_eps).sqrt()
        probabilities = (residual / scale * model.norm.weight @ model.output.weight.T).softmax(-1)  # (T, V)
        ordered = probabilities.sort(dim=-1, descending=True)
        assert torch.equal(found.top_ids[p], ordered.indices[:, :3])
        torch.testing.assert_close(found.top_probabilities[p], ordered.values[:, :3])
        torch.testing.assert_close(found.target_probability[p], probabilities[:, TARGET])
        assert torch.equal(found.target_rank[p], 1 + (ordered.indices == TARGET).int().argmax(-1))
        torch.testing.assert_close(found.entropy[p], -(probabilities * probabilities.log()).sum(-1))
        expected = (final * (final / probabilities).log()).sum(-1)
        torch.testing.assert_close(found.kl[p], expected, rtol=1e-3, atol=1e-4)


def test_only_the_positions_asked_for_are_read(model):
    every, some = logit_lens(model, TOKENS, target=TARGET), logit_lens(model, TOKENS, target=TARGET, positions=[4, -1])
    assert every.positions == list(range(10)) and some.positions == [4, 9] and some.tokens == TOKENS
    torch.testing.assert_close(some.target_probability, every.target_probability[:, [4, 9]])
    torch.testing.assert_close(some.kl, every.kl[:, [4, 9]], rtol=1e-4, atol=1e-5)
    assert torch.equal(some.top_ids, every.top_ids[:, [4, 9]])


def test_only_the_points_asked_for_are_read(model):
    points = residual_points(2)
    every, some = logit_lens(model, TOKENS, target=TARGET), logit_lens(model, TOKENS, target=TARGET, points=points[:4:3])
    assert some.points == ["embedding", "layers.1.residual_mid"]
    for name in ("top_ids", "top_probabilities", "entropy", "kl", "target_probability", "target_rank"):
        assert torch.equal(getattr(some, name), getattr(every, name)[[0, 3]])


@pytest.mark.parametrize("pass_tokens", [1024, 12])
def test_lenses_of_texts_of_different_lengths_are_each_texts_own(model, monkeypatch, pass_tokens):
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", pass_tokens)
    texts, targets = [TOKENS, TOKENS[:3], TOKENS[:6]], [TARGET, None, OTHER]
    for found, text, target in zip(logit_lenses(model, texts, targets=targets, positions=[-1, 0]), texts, targets, strict=True):
        alone = logit_lens(model, text, target=target, positions=[-1, 0])
        assert (found.tokens, found.positions, found.target) == (text, [len(text) - 1, 0], target)
        assert torch.equal(found.top_ids, alone.top_ids)
        for name in ("top_probabilities", "entropy", "kl", *(() if target is None else ("target_probability",))):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-3, atol=1e-5)
    assert [lens.target for lens in logit_lenses(model, texts, targets=TARGET, top=1)] == [TARGET] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in another unit elsewhere")
def test_a_lens_at_all_points_takes_little_memory():
    """Regression test: results allocated between the loop's large tensors fragmented memory and took 1.4 GB."""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    program = [sys.executable, str(Path(__file__).with_name("lens_memory.py"))]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert int(done.stdout) < 400, "MB"


def test_the_last_point_is_the_model_itself(model):
    found = logit_lens(model, TOKENS, top=512)
    own = model(torch.tensor([TOKENS]))[0].softmax(-1)
    torch.testing.assert_close(found.top_probabilities[-1], own.gather(-1, found.top_ids[-1]))
    assert found.kl[-1].eq(0).all() and (found.kl[:-1] > 0).all()
    assert found.target_rank is None


def test_an_answer_rises_through_the_layers(llama):
    (paris,) = llama.tokenizer.encode(" Paris", bos=False, eos=False)
    tokens = llama.encode("The capital of France is")
    found = logit_lens(llama.model, tokens, target=paris)
    after_layers = found.target_probability[2::2, -1].tolist()
    assert max(after_layers[:20]) < 1e-6 < after_layers[24] < after_layers[26] < after_layers[27] < after_layers[28]
    assert after_layers[-1] > 0.5 and found.target_rank[-1, -1] == 1 and found.top_ids[-1, -1, 0] == paris
    shares = attribute(llama.model, tokens, paris)
    assert abs(shares.total - shares.logit) < 1e-4 * abs(shares.logit)
    assert shares.logit == pytest.approx(llama.model(torch.tensor([tokens]))[0, -1, paris].item(), rel=1e-5)


# ---- attribution


@pytest.mark.parametrize("other", [None, OTHER])
@pytest.mark.parametrize("position", [-1, 0, 4])
def test_the_shares_add_up_to_the_logit(model, position, other):
    found = attribute(model, TOKENS, TARGET, other, position=position)
    logits = model(torch.tensor([TOKENS]))[0, position]
    expected = logits[TARGET] - (0 if other is None else logits[other])
    assert found.logit == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert found.total == pytest.approx(found.logit, rel=1e-5, abs=1e-5)
    assert sum(share for _, share in found.parts()) == pytest.approx(found.total)
    assert found.position == position % len(TOKENS)
    names = [name for name, _ in found.parts()]
    assert names[:2] + names[-1:] == ["embedding", "layers.0.heads.0", "layers.1.ffn"] and len(names) == 1 + 2 * (4 + 1)


def test_each_share_is_what_taking_the_part_out_of_the_last_residual_changes(model, stream):
    """By hand, with the norm's scale held fixed: each head through its own columns of wo."""
    found = attribute(model, TOKENS, TARGET)
    scale = (stream[-1][-1].pow(2).mean() + model.args.norm_eps).rsqrt()

    def share(part: Tensor) -> float:
        return (part * scale * model.norm.weight * model.output.weight[TARGET]).sum().item()

    assert found.embedding == pytest.approx(share(stream[0][-1]), rel=1e-4, abs=1e-5)
    for layer, block in enumerate(model.layers):
        before, middle, after = (x[-1] for x in stream[2 * layer : 2 * layer + 3])
        assert found.ffns[layer].item() == pytest.approx(share(after - middle), rel=1e-3, abs=1e-4)
        assert found.heads[layer].sum().item() == pytest.approx(share(middle - before), rel=1e-3, abs=1e-4)
        normed = block.attention_norm(stream[2 * layer])
        v = block.attention.wv(normed).unflatten(-1, (2, 8))  # (T, K, hd)
        for head in range(4):
            mixed = attention_pattern(model, TOKENS, layer, head)[-1] @ v[:, head // 2]  # (hd,)
            written = block.attention.wo.weight[:, 8 * head : 8 * head + 8] @ mixed  # (D,)
            assert found.heads[layer, head].item() == pytest.approx(share(written), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "int8", "int4:group=32"])
def test_shares_add_up_in_other_precisions_but_for_their_rounding(folder, how):
    model = build(folder, "bfloat16" if how == "bfloat16" else "float32")
    if how != "bfloat16":
        quantize_model(model, how)
    found = attribute(model, TOKENS, TARGET)
    assert found.total == pytest.approx(found.logit, rel=0.02 if how == "bfloat16" else 1e-4, abs=0.1)
    assert logit_lens(model, TOKENS).kl[-1].eq(0).all()


def test_shares_that_do_not_add_up_are_an_error(folder):
    model = build(folder)
    model.layers[1].feed_forward.w2.weight.data[0, 0] = math.nan
    with pytest.raises(LlamaRefError, match=r"the parts add up to nan, .* verify --deep"):
        attribute(model, TOKENS, TARGET)


# ---- attention


@pytest.mark.parametrize(
    ("keys", "sink", "previous", "induction"),
    [
        ([0, 0, 0, 0, 0, 0, 0], 1, 0, 0),
        ([0, 0, 1, 2, 3, 4, 5], 1 / 6, 1, 0),
        ([0, 1, 2, 3, 2, 3, 4], 0, 0, 1),  # begin-of-text, A B C, A B C: each attends to what followed it the first time
    ],
)
def test_constructed_patterns_have_the_scores_they_are_made_for(keys, sink, previous, induction):
    pattern = F.one_hot(torch.tensor(keys), 7).float()
    assert attention.sink_mass(pattern).item() == pytest.approx(sink)
    assert attention.previous_token_score(pattern).item() == pytest.approx(previous)
    assert induction_score(pattern, 3).item() == pytest.approx(induction)
    assert attention.attention_entropy(pattern).item() == 0


def test_a_text_whose_patterns_no_memory_holds_is_refused(model):
    most = 2**15 / model.args.n_heads**0.5  # 4 · H · T² = 2³²
    tokens = [1] * (int(most) + 1)
    for ask in (summarize_attention, lambda model, tokens: attention_pattern(model, tokens, 0, 0)):
        with pytest.raises(RequestError, match=rf"has {len(tokens):,} tokens.* in one layer; shorten it to {int(most):,}"):
            ask(model, tokens)


def test_even_attention_has_the_entropy_of_its_width():
    pattern = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    assert attention.attention_entropy(pattern).item() == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert attention.sink_mass(pattern).item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_a_summary_is_of_the_patterns_of_every_head(model):
    found = summarize_attention(model, TOKENS, bos=256, ids=range(256))
    assert found.sink.shape == found.previous.shape == found.entropy.shape == found.induction.shape == (2, 4)
    repeated = repeated_tokens(model, bos=256, ids=range(256))
    for layer, head in ((0, 3), (1, 0)):
        pattern = attention_pattern(model, TOKENS, layer, head)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(len(TOKENS)))
        assert found.sink[layer, head] == pytest.approx(sum(row[0].item() for row in pattern[1:]) / 9)
        before = sum(pattern[t, t - 1].item() for t in range(2, 10)) / 8
        assert found.previous[layer, head].item() == pytest.approx(before)
        again = attention_pattern(model, repeated, layer, head)
        followed = sum(again[t, t - 49].item() for t in range(51, 101)) / 50
        assert found.induction[layer, head].item() == pytest.approx(followed)


def test_random_tokens_come_twice_and_only_from_those_asked_for(model):
    row = repeated_tokens(model, 6, bos=256, ids=[3, 5, 8])[0].tolist()
    assert row[0] == 256 and row[1:7] == row[7:] and set(row[1:]) <= {3, 5, 8}
    assert row == repeated_tokens(model, 6, bos=256, ids=[3, 5, 8])[0].tolist() != repeated_tokens(model, 6, seed=2)[0].tolist()


def test_one_token_has_no_habits(model):
    found = summarize_attention(model, [256])
    assert found.sink.isnan().all() and found.previous.isnan().all() and not found.induction.isnan().any()


def test_the_demo_checkpoint_has_sinks_previous_token_heads_and_induction_heads(llama):
    tokens = llama.encode("The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun.")
    ids = sorted(llama.tokenizer.vocabulary.ranks.values())
    found = summarize_attention(llama.model, tokens, bos=llama.tokenizer.bos_id, ids=ids)
    assert found.sink.max() > 0.9 and found.previous.max() > 0.7 and found.induction.max() > 0.5
    assert found.induction.median() < 0.1  # only few heads are induction heads


# ---- residual stream, waves, weights


def test_norms_and_drift_are_those_of_the_stream(model, stream):
    found = residual_stream(model, TOKENS)
    assert found.points == residual_points(2)
    torch.testing.assert_close(found.norm, torch.stack([x.square().sum(-1).sqrt() for x in stream]))
    for p in (1, 4):
        cosine = (stream[p] * stream[p - 1]).sum(-1) / (found.norm[p] * found.norm[p - 1])
        torch.testing.assert_close(found.drift[p], cosine)
    torch.testing.assert_close(found.to_last[-1], torch.ones(len(TOKENS)))
    assert found.drift[0].eq(1).all()


def test_short_waves_are_kept_and_long_ones_slowed_by_the_factor():
    shape = {
        "dim": 2048,
        "n_layers": 1,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 512,
        "multiple_of": 256,
        "norm_eps": 1e-5,
    }
    args = ModelArgs.from_dict(shape | {"rope_theta": 5e5, "use_scaled_rope": True})
    waves = rope_waves(args)
    torch.testing.assert_close(waves.unscaled, 5e5 ** -(torch.arange(32) / 32))
    assert waves.wavelengths[0] == waves.unscaled_wavelengths[0] == pytest.approx(2 * math.pi)
    assert waves.slowed[waves.unscaled_wavelengths < 2048].eq(1).all()
    torch.testing.assert_close(waves.slowed[waves.unscaled_wavelengths > 8192], torch.full((14,), 32.0))
    plain = rope_waves(ModelArgs.from_dict(shape | {"rope_theta": 5e5}))
    assert plain.slowed.eq(1).all() and torch.equal(plain.frequencies, waves.unscaled)


@pytest.mark.parametrize("rows_at_a_time", [weights.ROWS_AT_A_TIME, 7])
def test_singular_values_are_those_of_an_svd(model, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(weights, "ROWS_AT_A_TIME", rows_at_a_time)
    found = {spectrum.name: spectrum for spectrum in spectra(model)}
    assert len(found) == 2 * 7 + 2
    for name, spectrum in found.items():
        weight = model.get_parameter(name)
        expected = torch.linalg.svdvals(weight.double())
        torch.testing.assert_close(spectrum.values, expected, atol=1e-7 * expected[0].item(), rtol=1e-6)
        assert spectrum.shape == tuple(weight.shape)
        assert spectrum.stable_rank == pytest.approx((weight.norm() / expected[0]).item() ** 2, rel=1e-4)
        assert 1 <= spectrum.stable_rank <= spectrum.effective_rank <= min(weight.shape)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_tied_output_is_counted_once(folder, scheme):
    model = build(folder)
    tie(model)
    if scheme:
        quantize_model(model, scheme)
    names = [spectrum.name for spectrum in spectra(model)]
    assert len(names) == 2 * 7 + 1 and "output.weight" not in names


def test_quantization_errors_are_those_of_loading_quantized(model):
    found = {error.name: error for error in quantization_errors(model, "int4:group=32", "layers.1.*")}
    assert len(found) == 7
    for name, error in found.items():
        weight = model.get_parameter(name)
        rounded = quantized(Scheme.parse("int4:group=32"), name, weight, weight.dtype).dequantize()
        assert error.relative == pytest.approx(((rounded - weight).norm() / weight.norm()).item())
        assert error.largest == pytest.approx((rounded - weight).abs().max().item())
        assert error.bits_per_weight == 5
    finer = {error.name: error for error in quantization_errors(model, "int8", "layers.1.*")}
    assert all(finer[name].relative < found[name].relative / 5 for name in found)


# ---- tokens as text, and invalid requests


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b" Paris", "␣Paris"),
        (b"\n\t", "\\n\\t"),
        ("한국".encode(), "한국"),
        ("👍".encode(), "👍"),
        ("한".encode()[:1], "<0xED>"),
        (b"a\xff\xed\x95 ", "a<0xFF><0xED><0x95>␣"),
        (b"\x1b[31m\x00\x7f", "\\x1b[31m\\x00\\x7f"),
        ("\u202e\u00a0".encode(), "\\u202e\\xa0"),
    ],
)
def test_a_token_is_shown_on_one_line_and_harmless(text, shown):
    assert readable(text) == shown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: logit_lens(model, []), "tokens is empty"),
        (lambda model: logit_lens(model, "abc"), "tokens is 'abc', expected token ids"),
        (lambda model: logit_lens(model, [[1], [2]]), "tokens are 2 sequences, expected one.*logit_lenses"),
        (lambda model: attribute(model, [512], 1), "tokens contains 512; the vocabulary has 0 to 511"),
        (lambda model: residual_stream(model, [1.5]), r"tokens is \[1.5\], expected token ids"),
        (lambda model: logit_lens(model.args, [1]), "model is of type ModelArgs, expected a llama_ref Transformer"),
        (lambda model: logit_lens(model, [1], target=512), "token 512"),
        (lambda model: logit_lens(model, [1], top=0), "top is 0, expected a whole number from 1 to 512"),
        (lambda model: logit_lens(model, [1], positions=[1]), "position is 1, expected 0"),
        (lambda model: logit_lens(model, [1], positions=[]), "positions is empty"),
        (lambda model: logit_lens(model, [1], positions=3), "positions is 3, expected a list of them"),
        (lambda model: logit_lenses(model, [[1], [2, 3]], positions=[1]), "position is 1, expected 0"),
        (lambda model: logit_lenses(model, [[1], [2, 3]], targets=[1]), "targets has 1 values, expected one for each of the 2"),
        (lambda model: list(spectra(model, 5)), "names is 5, expected a matrix's name or a glob"),
        (lambda model: patch_grid(model, [1], [2], "x"), "metric is 'x', expected logit_difference"),
        (
            lambda model: logit_lens(model, [1], points=["layers.2.residual_mid"]),
            "points contains 'layers.2.residual_mid', expected",
        ),
        (lambda model: logit_lens(model, [1], points=["layers.0.residual_mid", "embedding"]), "points is .*, in this order"),
        (lambda model: logit_lens(model, [1], points=["embedding"] * 2), "points is .*, in this order"),
        (lambda model: logit_lens(model, [1], points=[]), r"points is \[\], expected some of embedding, layers.0.residual_mid"),
        (lambda model: logit_lens(model, [1], points="embedding"), "points is 'embedding', expected some of"),
        (lambda model: attribute(model, [1], True), "token True"),
        (lambda model: attribute(model, [1], 2, position=1), "position is 1, expected 0"),
        (lambda model: attention_pattern(model, [1], 2, 0), "layer is 2, expected a whole number from 0 to 1"),
        (lambda model: attention_pattern(model, [1], 0, 4), "head is 4, expected a whole number from 0 to 3"),
        (lambda model: repeated_tokens(model, 1), "n_tokens is 1"),
        (lambda model: repeated_tokens(model, ids=[]), "ids is empty"),
        (lambda model: repeated_tokens(model, ids=["a", "b"]), r"ids is \['a', 'b'\], expected a list of the ids"),
        (lambda model: next(spectra(model, "bogus")), "no matrix is called 'bogus'; the names are tok_embeddings.weight, "),
        (lambda model: next(quantization_errors(model, "int3")), "quantize is 'int3'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(model, call, message):
    with pytest.raises(RequestError, match=message):
        call(model)


def test_a_quantized_model_has_spectra_but_nothing_left_to_round(folder):
    model = build(folder)
    quantize_model(model, "int8")
    assert len(list(spectra(model, "layers.0.*"))) == 7
    with pytest.raises(RequestError, match="already quantized"):
        next(quantization_errors(model, "int8"))
