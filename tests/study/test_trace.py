"""Traces: values equal those of other implementations and hand computation; models stay unchanged."""

import gc
import json
import re
import threading
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from folders import tiny_folder
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cpu import compile_decode
from llama_ref.compiled.cuda import FastForward, FastHidden, FastPasses
from llama_ref.decoding.drafting import PassTime
from llama_ref.decoding.prompt_lookup import PromptLookup
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer, rope_frequencies, rope_rotations, rotate
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.apply import quantize_model
from llama_ref.study import names
from llama_ref.study.names import all_names, axes, matching
from parity.oracles import hugging_faces_model
from random_models import random_model
from study.leftovers import state_of

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
VISION_ARGS = ModelArgs.from_dict(
    {key: getattr(ARGS, key) for key in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")}
    | {"vision_num_cross_attention_layers": 2, "vision_chunk_size": 28, "vision_n_layers": 2, "vision_n_global_layers": 2}
    | {"vision_kept_layers": [1]}
)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(ARGS.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


# ---- names


def test_every_name_has_its_documented_shape(model):
    sizes = {"batch": 2, "position": 5, "key_position": 5, "dim": 64, "head_dim": 8, "ffn_dim": ARGS.ffn_dim, "vocab": 512}
    traced = study.trace(model, ids(2, 5))
    assert list(traced) == all_names(ARGS)
    for name, value in traced.items():
        heads = {"head": 2 if name.rsplit(".", 1)[-1] in ("k", "v", "k_unrotated") else 8}
        assert value.shape == tuple((sizes | heads)[axis] for axis in axes(name)), name


LETTERS = {
    "batch": "B",
    "position": "T",
    "key_position": "S",
    "dim": "D",
    "head_dim": "hd",
    "ffn_dim": "F",
    "vocab": "V",
    "image": "I",
    "vision_dim": "W",
    "vision_ffn_dim": "4W",
    "feature": "C",
}


def test_the_table_of_names_is_what_there_is():
    rows = re.findall(r"^\| `(\S+)` \| \((.*?)\) \|", names.__doc__, re.MULTILINE)
    others = [(name.replace("layers", "global"), shape) for name, shape in rows if name.startswith("vision.layers.")]
    numbered = {name.replace(".i.", f".{i}.") for name, _ in rows + others for i in range(2)}
    assert len(rows) == 56 and numbered == set(all_names(VISION_ARGS)) and set(all_names(ARGS)) < numbered
    for name, shape in rows:
        of_image = name.startswith("vision.")
        heads = "A" if of_image else "K" if name.endswith((".k", ".v", ".k_unrotated")) else "H"
        tokens = "E" if name.startswith("vision.layers.") else "M" if of_image else "N"
        letters = LETTERS | {"head": heads, "vision_position": tokens, "vision_key_position": tokens}
        assert shape == ", ".join(letters[axis] for axis in axes(name.replace(".i.", ".0."))), name


@given(st.sets(st.sampled_from(all_names(ARGS)), min_size=1), st.randoms())
def test_names_in_any_order_come_back_in_the_models(chosen, random):
    asked = sorted(chosen)
    random.shuffle(asked)
    assert matching(ARGS, asked) == [name for name in all_names(ARGS) if name in chosen]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layers.*.attention.pattern", ["layers.0.attention.pattern", "layers.1.attention.pattern"]),
        ("layers.[13].ffn.?p", ["layers.1.ffn.up"]),
        (["norm", "embedding"], ["embedding", "norm"]),
    ],
)
def test_globs_choose_names(glob, expected):
    assert matching(ARGS, glob) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("layers.0.attention.patern", "did you mean layers.0.attention.pattern"),
        ("layers.7.residual_post", "the model has layers 0 to 1"),
        ("resid", "names.py has the table"),
        (["norm", 3], "expected a name or glob"),
        (None, "expected a name or glob"),
        ("", "no activation is called ''"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_what_is_near(model, asked, message):
    with pytest.raises(RequestError, match=message):
        study.trace(model, [1, 2], asked)


def test_a_trace_says_what_it_was_not_asked_for(model):
    traced = study.trace(model, [1, 2, 3], ["norm", "logits"])
    assert "embedding" not in traced and traced.get("embedding") is None
    assert traced.tokens.tolist() == [[1, 2, 3]] and traced.positions.tolist() == [[0, 1, 2]] and traced.model_args is ARGS
    with pytest.raises(RequestError, match="'embedding' was not traced: add it to names"):
        traced["embedding"]
    with pytest.raises(RequestError, match="no activation is called 'embeddings'"):
        traced["embeddings"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("text", "expected token ids"),
        ([], "tokens is empty"),
        ([[1, 2], []], "text 1 of tokens is empty"),
        ([[1, 2], 3], "expected token ids"),
        ([1, 512], "contains 512; the vocabulary has 0 to 511"),
        ([-1], "contains -1"),
        ([10**30], "expected token ids"),
        ([True], "expected token ids"),
        (torch.zeros(2), "float32"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"\(1, 1, 1\)"),
    ],
)
def test_tokens_that_are_none_are_refused(model, tokens, message):
    with pytest.raises(RequestError, match=message):
        study.trace(model, tokens)


def test_a_cache_that_does_not_fit_is_refused(model):
    for cache in (new_cache(model, 2, 8), new_cache(model, 1, 8)):
        with pytest.raises(RequestError, match="the cache has"):
            study.trace(model, ids(1, 200), "norm", cache=cache)


# ---- values


def test_values_are_transformers_hidden_states_and_attentions(model):
    reference = hugging_faces_model(model)
    reference.set_attn_implementation("eager")
    tokens = ids(2, 12)
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True, output_attentions=True)
    traced = study.trace(model, tokens)
    *hidden, normed = expected.hidden_states
    found = [traced[f"layers.{i}.residual_pre"] for i in range(2)]
    for ours, theirs in zip([*found, traced["norm"], traced["logits"]], [*hidden, normed, expected.logits], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for i, theirs in enumerate(expected.attentions):
        torch.testing.assert_close(traced[f"layers.{i}.attention.pattern"], theirs, atol=1e-4, rtol=1e-4)


def test_values_are_those_computed_by_hand(model):
    """Layer 0 on one sequence, head by head, from the weights."""
    tokens, layer = ids(1, 6), model.layers[0]
    traced = study.trace(model, tokens)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = model.tok_embeddings.weight[tokens]
    h = rms(x, layer.attention_norm.weight)
    q, k, v = ((h @ w.weight.T).view(1, 6, -1, 8) for w in (layer.attention.wq, layer.attention.wk, layer.attention.wv))
    turn = rope_rotations(torch.arange(6)[None], rope_frequencies(ARGS))
    expected = {"attention.norm": h, "attention.q_unrotated": q, "attention.k_unrotated": k, "attention.v": v}
    q, k = rotate(q, *turn), rotate(k, *turn)
    scores = torch.stack([q[:, :, head] @ k[:, :, head // 4].transpose(1, 2) / 8**0.5 for head in range(8)], dim=1)
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    pattern = scores.softmax(-1)
    mixed = torch.stack([pattern[:, head] @ v[:, :, head // 4] for head in range(8)], dim=2)
    shares = torch.stack([mixed[:, :, i] @ layer.attention.wo.weight[:, 8 * i : 8 * i + 8].T for i in range(8)], dim=2)
    expected |= {"attention.q": q, "attention.k": k, "attention.scores": scores, "attention.pattern": pattern}
    expected |= {"attention.head_output": mixed, "attention.head_result": shares, "attention.output": shares.sum(2)}
    mid = x + shares.sum(2)
    h = rms(mid, layer.ffn_norm.weight)
    gate, up = h @ layer.feed_forward.w1.weight.T, h @ layer.feed_forward.w3.weight.T
    down = (F.silu(gate) * up) @ layer.feed_forward.w2.weight.T
    expected |= {"residual_pre": x, "residual_mid": mid, "ffn.norm": h, "ffn.gate": gate, "ffn.up": up}
    expected |= {"ffn.hidden": F.silu(gate) * up, "ffn.output": down, "residual_post": mid + down}
    assert set(expected) == {name.removeprefix("layers.0.") for name in traced if name.startswith("layers.0.")}
    for name, value in expected.items():
        torch.testing.assert_close(traced[f"layers.0.{name}"], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheme", [None, "int8", "int4:group=32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_shares_add_up_to_attentions_output(dtype, scheme):
    model = random_model(ARGS, seed=1).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    traced = study.trace(model, ids(2, 5), "layers.*.attention.*")
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for i in range(2):
        shares, output = traced[f"layers.{i}.attention.head_result"], traced[f"layers.{i}.attention.output"]
        torch.testing.assert_close(shares.float().sum(2), output.float(), atol=tolerance, rtol=tolerance)


# ---- the model stays unchanged


@torch.no_grad()
def logits_of_prompt_and_steps(model: Transformer, batch: int) -> list[Tensor]:
    """Logits without a cache, and with one: a prompt, steps, rows of different lengths."""
    cache = new_cache(model, batch, 20)
    out = [model(ids(batch, 9)), model(ids(batch, 6), cache)]
    out += [model(ids(batch, 1), cache) for _ in range(2)]
    cache.truncate([8 - row for row in range(batch)])
    return [*out, model(ids(batch, 3), cache)]


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_bit_for_bit_while_everything_is_recorded(dtype, batch, scheme):
    model = random_model(ARGS, seed=2).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    before, expected = state_of(model), logits_of_prompt_and_steps(model, batch)
    with study.recording(model, "*") as recorded:
        assert state_of(model) != before
        found = logits_of_prompt_and_steps(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert state_of(model) == before
    assert len(recorded.traces) == 2
    assert torch.equal(recorded.traces[0]["logits"], expected[0])
    with torch.inference_mode():
        assert torch.equal(study.trace(model, ids(batch, 9), "logits")["logits"], expected[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_after_an_error_in_a_pass(model, error):
    before = state_of(model)

    def fail(value: Tensor) -> Tensor:
        raise error

    with pytest.raises(error), study.recording(model, ["embedding", "norm"]) as recorded:
        model(ids(1, 3))
        with study.patch(model, {"layers.1.ffn.up": fail}):
            model(ids(1, 3))
    assert state_of(model) == before
    assert torch.equal(recorded.trace["norm"], model.hidden(ids(1, 3))), "the complete pass is kept"


def test_a_broken_pass_leaves_no_trace_where_more_follow(model):
    cache = new_cache(model, 1, 8)
    with study.recording(model, ["embedding", "norm"]) as recorded:
        model(ids(1, 3), cache)
        with pytest.raises(RequestError), study.patch(model, {"layers.1.ffn.up": lambda value: None}):
            model(ids(1, 2), cache)
        model(ids(1, 1), cache)
    assert recorded.trace.tokens.tolist() == [[*ids(1, 3)[0].tolist(), *ids(1, 1)[0].tolist()]]
    assert [len(value[0]) for value in recorded.trace.values()] == [4, 4]


def test_blocks_may_end_in_any_order(model):
    before, contexts = state_of(model), [study.recording(model, name) for name in ("norm", "embedding", "logits")]
    records = [context.__enter__() for context in contexts]
    for i in (0, 2, 1):
        model(ids(1, 4))
        contexts[i].__exit__(None, None, None)
    assert state_of(model) == before
    assert [len(record.traces) for record in records] == [1, 3, 2]


def test_the_norm_used_outside_of_a_pass_is_none_of_it(model):
    with study.recording(model, ["norm", "logits"]) as recorded:
        model(ids(1, 4))
        model.logits(model.norm(torch.ones(1, 4, 64)))
    assert torch.equal(recorded.trace["logits"], model(ids(1, 4)))


def test_another_threads_passes_are_not_seen(model):
    outcome = []
    with study.patch(model, {"layers.*.residual_post": study.zero()}), study.recording(model, "norm") as recorded:
        thread = threading.Thread(target=lambda: outcome.append(model(ids(1, 4))))
        thread.start()
        thread.join()
    assert torch.equal(outcome[0], model(ids(1, 4))) and recorded.traces == []
    with pytest.raises(RequestError, match="nothing was recorded"):
        _ = recorded.trace


def test_one_name_costs_its_own_bytes():
    """A trace of any single name owns its storage: it is not a view of a larger tensor."""
    model = random_model(ARGS, seed=3).bfloat16()
    for name in all_names(ARGS):
        (value,) = study.trace(model, ids(2, 16), name).values()
        assert value.untyped_storage().nbytes() == value.nbytes, name
    with study.recording(model.requires_grad_(), "*") as recorded:  # as in training
        assert model(ids(2, 16)).requires_grad
    assert not any(value.requires_grad for value in recorded.trace.values())


@pytest.mark.parametrize("name", ["layers.0.attention.scores", "layers.2.ffn.up", "layers.3.attention.head_result"])
def test_other_names_are_gone_before_the_pass_ends(name):
    model = random_model(replace(ARGS, n_layers=8), seed=3)
    counted: list[int] = []

    def count(*args) -> None:
        tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.layout == torch.strided]
        counted.append(sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values()))

    model.norm.register_forward_hook(count)
    tokens = ids(2, 16)
    with torch.no_grad():
        model.hidden(tokens)
    traced = study.trace(model, tokens, name)
    assert traced[name].nbytes <= counted[1] - counted[0] <= traced[name].nbytes + 1024  # ids and positions


# ---- texts of different lengths

RAGGED = [[5, 6, 7, 8, 9], [1], [11, 12, 13]]


@pytest.fixture
def ran() -> tuple[Transformer, list[int]]:
    """A model of four layers, and a list of the layers that run."""
    model, numbers = random_model(replace(ARGS, n_layers=4), seed=0), []
    for i, block in enumerate(model.layers):
        block.attention.wq.register_forward_hook(lambda *_, i=i: numbers.append(i))
    return model, numbers


@pytest.mark.parametrize(
    ("names", "n_layers"),
    [
        ("embedding", 0),
        ("layers.0.ffn.up", 1),
        (["layers.2.residual_pre", "layers.1.attention.pattern"], 3),
        ("layers.*.attention.v", 4),
        (["embedding", "norm"], 4),
        ("logits", 4),
    ],
)
@pytest.mark.parametrize("lengths", [[5, 5], [4, 7]], ids=["one length", "padded"])
def test_layers_after_the_last_name_are_not_run(ran, names, n_layers, lengths):
    model, numbers = ran
    texts = [ids(1, length)[0] for length in lengths]
    found = study.trace(model, texts, names)
    assert numbers == list(range(n_layers))
    whole = study.trace(model, texts)
    assert numbers[n_layers:] == [0, 1, 2, 3]
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_a_last_layer_of_which_only_attention_is_watched_runs_no_feed_forward(ran):
    model, numbers = ran
    for i, block in enumerate(model.layers):
        block.feed_forward.w2.register_forward_hook(lambda *_, i=i: numbers.append(-i))
    for wanted, last in (("layers.*.attention.pattern", []), ("layers.*.residual_mid", [-3]), ("layers.3.ffn.norm", [-3])):
        numbers.clear()
        found = study.trace(model, RAGGED, wanted)
        assert numbers == [0, 0, 1, -1, 2, -2, 3, *last]
        whole = study.trace(model, RAGGED)
        assert all(torch.equal(found[name], whole[name]) for name in found)


def test_what_others_watch_is_run_too(ran):
    model, numbers = ran
    with study.recording(model, "layers.2.ffn.up") as others:
        study.trace(model, ids(1, 5), "embedding")
    assert others.trace["layers.2.ffn.up"].shape[1] == 5
    shown = []
    with study.patch(model, {"layers.1.residual_post": lambda value: shown.append(value) or value}):
        study.trace(model, ids(1, 5), "embedding")
    assert len(shown) == 1
    assert numbers == [0, 1, 2, 0, 1]


def test_a_text_that_goes_on_is_run_through_all_layers(ran):
    model, _ = ran
    cache = new_cache(model, 1, 20)
    study.trace(model, ids(1, 5), "embedding", cache=cache)
    following = torch.cat([ids(1, 5), ids(1, 3)], 1)
    torch.testing.assert_close(model(ids(1, 3), cache), model(following)[:, 5:])


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_of_different_lengths_are_as_each_alone(dtype, scheme):
    model = random_model(ARGS, seed=1).to(dtype)
    model.tok_embeddings.weight[[0, 500]] = torch.nan  # ids of no text
    if scheme:
        quantize_model(model, scheme)
    together = study.trace(model, RAGGED)
    assert together.tokens.tolist() == [RAGGED[0], [1, -1, -1, -1, -1], [11, 12, 13, -1, -1]]
    assert together.positions.tolist() == [[0, 1, 2, 3, 4], [0, -1, -1, -1, -1], [0, 1, 2, -1, -1]]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for i, text in enumerate(RAGGED):
        own, alone = together.row(i), study.trace(model, torch.tensor(text))
        assert own.tokens.equal(alone.tokens) and own.positions.equal(alone.positions) and list(own) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(own[name], value, atol=tolerance, rtol=tolerance, msg=name)
    for name, value in together.items():
        by_position = value.transpose(1, 2) if axes(name) == names.SCORES else value
        padding = by_position[together.positions < 0]
        assert (padding == (-torch.inf if name.endswith(".scores") else 0)).all(), name
    assert repr(together.row(-1)) == repr(alone) == f"Trace({len(alone)} activations of 1 × 3 tokens)"
    with pytest.raises(RequestError, match="row is 3, expected a whole number from 0 to 2"):
        together.row(3)


def test_many_texts_are_traced_in_turn_a_few_in_memory(model, monkeypatch):
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", 40)
    texts = [[(7 * i + j) % ARGS.vocab_size for j in range(1 + i * 5 % 13)] for i in range(30)]
    kept, most = [], 0
    for text, traced in zip(texts, study.trace_each(model, texts, "layers.*.residual_post"), strict=True):
        assert traced.tokens.tolist() == [text]
        torch.testing.assert_close(dict(traced), dict(study.trace(model, text, "layers.*.residual_post")))
        kept.append(weakref.ref(traced["layers.0.residual_post"].untyped_storage()))
        most = max(most, len({id(storage) for ref in kept if (storage := ref()) is not None}))
    assert most <= 2, "a pass and the one before"


def test_texts_of_different_lengths_go_on_from_a_cache(model):
    """Two pieces of each text equal the whole text, also in a recording around them."""
    cache, pieces = new_cache(model, 3, 12), [[20, 21], [22, 23, 24], [25]]
    with study.recording(model, ["*.scores", "norm"]) as recorded:
        study.trace(model, RAGGED, "norm", cache=cache)
        second = study.trace(model, pieces, "norm", cache=cache)
    assert cache.lengths.tolist() == [7, 4, 4] and second.positions.tolist() == [[5, 6, -1], [1, 2, 3], [3, -1, -1]]
    for i, (begin, end) in enumerate(zip(RAGGED, pieces, strict=True)):
        alone = study.trace(model, begin + end, ["*.scores", "norm"])
        whole = recorded.trace.row(i)
        assert whole.tokens.equal(alone.tokens)
        for name, value in alone.items():
            torch.testing.assert_close(whole[name], value, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second.row(i)["norm"], alone["norm"][:, len(begin) :], atol=1e-4, rtol=1e-4)


def test_gradients_of_texts_of_different_lengths_are_those_of_each_alone(model):
    def gradients(tokens: list, row: int, last: int) -> list[Tensor]:
        traced = study.trace(model, tokens, requires_grad=True)
        return torch.autograd.grad(traced["logits"][row, last, 7], [traced["embedding"], traced["layers.1.attention.pattern"]])

    embedding, pattern = gradients(RAGGED, 2, 2)
    alone, pattern_alone = gradients([RAGGED[2]], 0, 2)
    torch.testing.assert_close(embedding[2, :3], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pattern[2, :, :3, :3], pattern_alone[0], atol=1e-5, rtol=1e-4)
    assert not embedding[:2].any() and not embedding[2, 3:].any()


# ---- arrays and files


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_become_arrays_exactly(dtype):
    traced = study.trace(random_model(ARGS, seed=1).to(dtype), ids(2, 4), ["*.ffn.up", "logits"], requires_grad=True)
    arrays = traced.numpy()
    assert list(arrays) == list(traced) and {array.dtype.name for array in arrays.values()} == {"float32"}
    assert all(torch.equal(torch.from_numpy(array).to(traced[name]), traced[name]) for name, array in arrays.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_trace_comes_back_and_others_can_open_it(dtype, tmp_path):
    path = tmp_path / "new" / "trace.safetensors"
    traced = study.trace(random_model(ARGS, seed=1).to(dtype), RAGGED)
    traced.save(path)
    traced.save(str(path))  # again: it is replaced
    found = study.Trace.load(path)
    assert found.model_args == ARGS and list(found) == list(traced)
    assert found.tokens.equal(traced.tokens) and found.positions.equal(traced.positions)
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in traced.items())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {*traced, "tokens", "positions"} and torch.equal(file.get_tensor("norm"), traced["norm"])
        assert json.loads(file.metadata()["model_args"])["n_kv_heads"] == 2
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"hidden_dim": 96},
        {"head_dim": 16, "use_scaled_rope": False, "ffn_dim_multiplier": 1.3},
        {"rope_scaling_factor": 4.0, "quantization_args": {"scheme": "int8"}, "of_another": [1, 2]},
    ],
)
def test_a_saved_traces_model_args_are_what_they_were(given, tmp_path):
    params = {
        "dim": 32,
        "n_layers": 1,
        "n_heads": 4,
        "vocab_size": 9,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "use_scaled_rope": True,
    }
    args = ModelArgs.from_dict(params | ({} if "hidden_dim" in given else {"multiple_of": 8}) | given)
    tokens = torch.tensor([[1, 2]])
    study.Trace({"norm": torch.ones(1, 2, 32)}, tokens, tokens, args).save(tmp_path / "a")
    assert study.Trace.load(tmp_path / "a").model_args == args


def test_files_that_hold_no_trace_are_refused(model, tmp_path):
    path, tokens = tmp_path / "a.safetensors", torch.tensor([[1, 2]])

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            study.Trace.load(path)
        assert "fetch it again" not in str(caught.value)

    refused("cannot read .*a.safetensors: No such file")
    save_file({"norm": torch.ones(1, 2, 64)}, path)
    refused("is not a trace, expected a file that Trace.save wrote")
    save_file({"tokens": tokens, "positions": tokens.clone()}, path, {"model_args": "[]"})
    refused("its model_args are damaged")
    study.Trace({"norm": torch.ones(1, 2)}, tokens, tokens, ARGS).save(path)
    refused(r"norm \(1, 2\), which is not an activation of its model")
    study.Trace({"norm": torch.ones(1, 2, 64)}, tokens, tokens[0], ARGS).save(path)
    refused(r"positions \(2,\), expected two")
    path.write_bytes(path.read_bytes()[:-1])
    refused("bytes, but its header describes")


@pytest.mark.parametrize("path", [None, 3, "a\0b", "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be_is_refused(model, path):
    traced = study.trace(model, [1], "norm")
    for use in (traced.save, study.Trace.load):
        with pytest.raises(RequestError, match=r"path is .*expected a file such as 'trace.safetensors'"):
            use(path)
    with pytest.raises(RequestError, match="cannot write /proc/x"):
        traced.save("/proc/x")


# ---- gradients


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_every_activation_and_change_no_logit(frozen):
    model = random_model(ARGS, seed=4).requires_grad_(not frozen)
    with torch.inference_mode():  # callers may be in it
        traced = study.trace(model, ids(1, 5), requires_grad=True)
    with torch.no_grad():
        assert torch.equal(traced["logits"], model(ids(1, 5)))
    gradients = torch.autograd.grad(traced["logits"][0, -1, 7], list(traced.values()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not model.norm.weight.grad


@pytest.mark.parametrize(
    "name", ["embedding", "attention.scores", "attention.pattern", "attention.head_result", "attention.q", "ffn.hidden"]
)
def test_a_gradient_is_what_a_small_change_makes(name):
    model = random_model(ARGS, seed=5).double()
    name = name if name == "embedding" else f"layers.0.{name}"
    traced = study.trace(model, ids(1, 4), [name, "logits"], requires_grad=True)
    (gradient,) = torch.autograd.grad(traced["logits"][0, -1, 7], traced[name])
    direction = gradient / gradient.norm()
    step = 1e-2
    ends = []
    for sign in (1, -1):
        with study.patch(model, {name: lambda value, sign=sign: value + sign * step * direction}):
            ends.append(study.trace(model, ids(1, 4), "logits")["logits"][0, -1, 7])
    assert (ends[0] - ends[1]).item() / (2 * step) == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_gradients_that_cannot_be_are_refused(model):
    with pytest.raises(RequestError, match="a cache is for inference"):
        study.trace(model, [1], cache=new_cache(model, 1, 8), requires_grad=True)


# ---- generation


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Llama:
    folder = tiny_folder(tmp_path_factory.mktemp("study") / "tiny")
    return Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32", verify="never")


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]])
def test_a_recorded_generation_is_the_whole_text_at_once(tiny_llama, prompts):
    plain = tiny_llama.generate(prompts, max_gen_len=6, temperature=0)
    with study.recording(tiny_llama.model) as recorded:
        assert tiny_llama.generate(prompts, max_gen_len=6, temperature=0) == plain
    traced = recorded.trace
    for row, (prompt, answer) in enumerate(zip(prompts, plain[0], strict=True)):
        text = (prompt + answer)[:-1]  # the last token is not run
        n = len(text)
        assert traced.tokens[row, :n].tolist() == text and traced.positions[row, :n].tolist() == list(range(n))
        assert (traced.tokens[row, n:] == -1).all() and (traced.positions[row, n:] == -1).all()
        whole = study.trace(tiny_llama.model, text)
        for name, expected in whole.items():
            found = traced[name][row, :, :n, :n] if "key_position" in axes(name) else traced[name][row, :n]
            torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4, msg=name)
    padding = traced["layers.0.attention.pattern"].sum(-1)[:, 0]
    assert torch.equal(padding.round(), (traced.positions >= 0).float())


def test_padding_is_not_recorded_and_a_reset_cache_is_another_text(model):
    cache = new_cache(model, 2, 8)
    with study.recording(model, "norm") as recorded:
        model(ids(2, 3), cache)
        cache.truncate([0, 0])
        model(ids(2, 5), cache)
        cache.truncate([4, 2])
    first, second = recorded.traces
    assert first.positions.tolist() == [[0, 1, 2]] * 2 and torch.equal(first["norm"], model.hidden(ids(2, 3)))
    assert second.positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert second.tokens[1].tolist() == [*ids(2, 5)[1, :2].tolist(), -1, -1]
    assert not second["norm"][1, 2:].any() and torch.equal(second["norm"][0], model.hidden(ids(2, 5))[0, :4])


def test_guesses_that_the_model_refused_leave_no_trace(tiny_llama):
    """With speculation a pass has several tokens, some of which are rejected."""
    guessing = Llama(tiny_llama.model, tiny_llama.tokenizer, max_seq_len=64, speculation=PromptLookup(PassTime(1.0, 0.0)))
    prompt = [5, 6, 7, 5, 6, 7, 5, 6, 7]
    with study.recording(guessing.model, ["*.residual_post", "*.scores"]) as recorded:
        (answer,), _ = guessing.generate([prompt], max_gen_len=20, temperature=0)
    traced = recorded.trace
    text = (prompt + answer)[: traced.tokens.shape[1]]
    assert traced.tokens.tolist() == [text] and len(text) >= len(prompt + answer) - 1
    for name, expected in study.trace(guessing.model, text, list(traced)).items():
        torch.testing.assert_close(traced[name], expected, atol=1e-4, rtol=1e-4, msg=name)


def test_a_conversation_that_goes_on_is_traced_from_its_new_tokens_on(tiny_llama):
    cache = new_cache(tiny_llama.model, 1, 40)
    first = tiny_llama.stream([5, 6, 7], 4, temperature=0, cache=cache)
    "".join(first)
    text = [5, 6, 7, *first.tokens, 9, 10]
    known = cache.longest
    with study.recording(tiny_llama.model, "*.pattern") as recorded:
        "".join(tiny_llama.stream(text, 1, temperature=0, cache=cache))
    traced = recorded.trace
    assert traced.positions.tolist() == [list(range(known, len(text)))] and traced.tokens.tolist() == [text[known:]]
    whole = study.trace(tiny_llama.model, text, "*.pattern")
    for name, value in traced.items():
        torch.testing.assert_close(value, whole[name][:, :, known:], atol=1e-4, rtol=1e-4)


def test_a_trace_with_a_cache_is_of_the_new_tokens(model):
    whole, cache = study.trace(model, ids(2, 9)), new_cache(model, 2, 9)
    study.trace(model, ids(2, 9)[:, :5], "norm", cache=cache)
    rest = study.trace(model, ids(2, 9)[:, 5:], cache=cache)
    assert rest.positions.tolist() == [[5, 6, 7, 8]] * 2 and cache.longest == 9
    for name, value in rest.items():
        expected = whole[name][:, :, 5:] if "key_position" in axes(name) else whole[name][:, 5:]
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4, msg=name)


# ---- other models


def for_the_cpu(model: Transformer) -> None:
    compile_decode(model)


def for_cuda(model: Transformer) -> None:
    fast = FastPasses(model, lambda step, *inputs: lambda: step(*inputs))
    model.hidden, model.forward = FastHidden(fast), FastForward(fast)


@pytest.mark.parametrize("make_fast", [for_the_cpu, for_cuda])
def test_a_compiled_model_is_studied_on_its_plain_path(make_fast, monkeypatch):
    """The compiler itself is mocked: what it installs on a model must be restored."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    fast, plain = random_model(ARGS, seed=6), random_model(ARGS, seed=6)
    make_fast(fast)
    before = [dict(vars(module)) for module in fast.modules()]
    with study.recording(fast, "*") as recorded, torch.inference_mode():
        found = logits_of_prompt_and_steps(fast, 1)
    assert [dict(vars(module)) for module in fast.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(found, logits_of_prompt_and_steps(plain, 1), strict=True))
    assert len(recorded.traces[1]) == len(all_names(ARGS))


def test_what_cannot_be_studied_is_refused_and_left_as_it_was(model):
    with pytest.raises(RequestError, match="expected a llama_ref Transformer"):
        study.trace(object(), [1])
    divided = random_model(ARGS, seed=0)
    divided.layers[0].attention.wo = RowParallelLinear(divided.layers[0].attention.wo, None)
    with pytest.raises(RequestError, match="split across processes"), study.recording(divided):
        pass
    strange = random_model(ARGS, seed=0)
    forward = strange.layers[1].forward = lambda *args: args[0]
    with pytest.raises(RequestError, match="has its own forward"):
        study.trace(strange, [1])
    assert vars(strange.layers[1])["forward"] is forward and "forward" not in vars(strange.layers[0])


def test_a_llama_is_told_from_its_model(tiny_llama):
    with pytest.raises(RequestError, match=r"expected a llama_ref Transformer: pass its \.model"):
        study.trace(tiny_llama, [1])
