"""Path patching, compared with two passes of a transformer in plain PyTorch with hooks, and with circuits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.circuits.graph import edge_mask, receiver_names, sender_names
from random_models import grouped_model, random_model
from study.circuits.plain import forward, rms

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
CLEAN, CORRUPTED = [1, 2, 3, 4], [1, 9, 8, 4]
METRIC = study.logit_difference(3, 4)


@pytest.fixture(scope="module")
def model():
    return random_model(ARGS, seed=0)


def seen(model, ids):
    """All values of a run, by the hooks' names."""
    out = {}
    forward(model, ids, lambda name, value: out.setdefault(name, value))
    return out


def two_passes(model, sender, receiver, positions, through_ffn):
    """The metric by the papers' definition; a sender is (layer, head) or (layer, None) for a feed-forward."""
    clean, corrupted, read = seen(model, CLEAN), seen(model, CORRUPTED), {}

    def frozen(name, value):
        layer, part = name.split(".") if "." in name else ("", name)
        own = clean[name].clone() if part == "heads" or (part == "ffn" and not through_ffn) else value.clone()
        if name == "embedding" and sender == "embedding":
            own[positions] = corrupted[name][positions]
        if part == "heads" and sender == (int(layer), "head"):
            own[positions, 1] = corrupted[name][positions, 1]
        if part == "ffn" and sender == (int(layer), "ffn"):
            own[positions] = corrupted[name][positions]
        read[name] = own
        return own

    forward(model, CLEAN, frozen)
    w, eps = model.state_dict(), model.args.norm_eps
    layer, port, index = receiver

    def patched(name, value):
        if name != f"{layer}.{port}":
            return value
        if port == "post":
            return read[name]
        if port == "read":
            return rms(read[f"{layer}.mid"], w[f"layers.{layer}.ffn_norm.weight"], eps)
        before = read[f"{layer - 1}.post"] if layer else read["embedding"]
        normed = rms(before, w[f"layers.{layer}.attention_norm.weight"], eps)
        value = value.clone()
        value[:, index] = (normed @ w[f"layers.{layer}.attention.w{port}.weight"].T).view_as(value)[:, index]
        return value

    return METRIC(forward(model, CLEAN, patched)[None]).item()


SENDERS = {
    "embedding": "embedding",
    "layers.0.heads.1": (0, "head"),
    "layers.0.ffn": (0, "ffn"),
    "layers.1.heads.1": (1, "head"),
}
RECEIVERS = {
    "layers.2.heads.3.q": (2, "q", 3), "layers.2.groups.1.k": (2, "k", 1), "layers.2.groups.0.v": (2, "v", 0),
    "layers.1.ffn": (1, "read", None), "logits": (2, "post", None),
}  # fmt: skip


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("through_ffn", [False, True])
def test_a_path_is_two_passes_with_hooks(model, receiver, through_ffn):
    for positions in (None, [1], [-1, 2]):
        found = study.patch_path(
            model, CLEAN, CORRUPTED, METRIC, sender=list(SENDERS), receivers=receiver, positions=positions,
            through_ffn=through_ffn,
        )  # fmt: skip
        at = list(range(4)) if positions is None else positions
        expected = [two_passes(model, sender, RECEIVERS[receiver], at, through_ffn) for sender in SENDERS.values()]
        torch.testing.assert_close(found.values, torch.tensor(expected), atol=2e-5, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 2), length=st.integers(1, 4),
    scaled=st.booleans(), tied=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_paths_are_a_circuit_without_these_edges(groups, kv_heads, layers, length, scaled, tied, seed):
    model = grouped_model(groups, kv_heads, layers, scaled=scaled, tied=tied, seed=seed)
    clean, corrupted = torch.randint(30, (2, length), generator=torch.Generator().manual_seed(seed)).tolist()
    generator = torch.Generator().manual_seed(seed)
    receivers = [name for name in receiver_names(model.args)[:-1] if torch.rand(1, generator=generator) < 0.4] + ["logits"]
    found = study.patch_path(model, clean, corrupted, METRIC, sender="layers.0.heads.*", receivers=receivers)
    senders, mask = sender_names(model.args), edge_mask(model.args)
    for r, receiver in enumerate(receiver_names(model.args)):
        for s, sender in enumerate(senders):
            if receiver in receivers and sender.startswith("layers.0.heads."):
                mask[r, s] = False
    assert found.values.item() == pytest.approx(study.run_circuit(model, clean, corrupted, METRIC, mask), abs=2e-3)


def test_all_paths_of_the_embedding_together_are_the_corrupted_text(model):
    found = study.patch_path(model, CLEAN, CORRUPTED, METRIC, sender="embedding", receivers="*")
    assert found.clean == pytest.approx(METRIC(forward(model, CLEAN)[None]).item(), abs=1e-5)
    assert found.values.item() == pytest.approx(found.corrupted, abs=1e-4) and found.shares.item() == pytest.approx(1, abs=1e-3)


def test_without_a_name_all_senders_before_a_receiver_are_patched(model):
    found = study.patch_path(model, CLEAN, CORRUPTED, METRIC, receivers="layers.1.heads.0.q")
    assert found.senders == ["embedding", *(f"layers.0.heads.{head}" for head in range(4)), "layers.0.ffn"]
    name, change = found.top(1)[0]
    assert abs(change) == (found.values - found.clean).abs().max() and found.top(99)[0] == (name, change)


def test_pairs_are_averaged_and_passes_may_be_small(model, monkeypatch):
    others = [5, 6, 7], [5, 8, 7]
    both = study.patch_path(model, [CLEAN, others[0]], [CORRUPTED, others[1]], METRIC, receivers="logits")
    each = [study.patch_path(model, *texts, METRIC, receivers="logits") for texts in ((CLEAN, CORRUPTED), others)]
    torch.testing.assert_close(both.values, (each[0].values + each[1].values) / 2)
    monkeypatch.setattr("llama_ref.study.circuits.paths.tokens_that_fit", lambda *args: 5)
    small = study.patch_path(model, CLEAN, CORRUPTED, METRIC, receivers="logits")
    torch.testing.assert_close(small.values, each[0].values)


def test_quantized_models_and_noise_work():
    model = random_model(ARGS, seed=1)
    quantize_model(model, "int8")
    before = model(torch.tensor([CLEAN]))
    noisy = study.patch_path(model, CLEAN, study.noise(1, seeds=2), METRIC, sender="embedding", receivers="*")
    assert noisy.values.item() == pytest.approx(noisy.corrupted, abs=2e-2)
    assert torch.equal(model(torch.tensor([CLEAN])), before)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"receivers": "layers.9.ffn"}, "no receiver is called 'layers.9.ffn'; names are .*logits"),
        ({"receivers": "logits", "sender": "layers.0.mlp"}, "no sender is called 'layers.0.mlp'"),
        ({"receivers": "layers.1.ffn", "sender": "layers.2.ffn"}, "no path leads from 'layers.2.ffn'.*layers.1.heads.3"),
        ({"receivers": "logits", "sender": []}, r"sender is \[\], expected a name such as"),
        ({"receivers": "logits", "sender": 5}, "sender is 5, expected a name such as"),
        ({"receivers": []}, r"receiver is \[\], expected a name such as"),
        ({"receivers": "logits", "positions": 4}, "a position is 4, expected a whole number from 0 to 3"),
    ],
)
def test_names_and_positions_that_do_not_fit_are_refused(model, asked, error):
    with pytest.raises(RequestError, match=error):
        study.patch_path(model, CLEAN, CORRUPTED, METRIC, **asked)
