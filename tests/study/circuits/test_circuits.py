"""Edges and circuits, compared with a transformer in plain PyTorch that has a gate on every edge."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ref import Llama, study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.model import rope_frequencies, rope_rotations
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.circuits.graph import edge_mask, receiver_names, sender_names
from random_models import grouped_model, random_model

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
CLEAN, CORRUPTED = [1, 2, 3, 4], [1, 9, 8, 4]
METRIC = study.logit_difference(3, 4)


def gated(model, embedded, gates, corrupted=None):
    """Logits after the last token, and the output of every sender (senders, T, D).

    A receiver reads gate · own + (1 − gate) · corrupted of each sender before it; without `corrupted`,
    only own.
    """
    w, args, hd, T = model.state_dict(), model.args, model.args.head_dim, len(embedded)
    cos, sin = (x[0, :, 0] for x in rope_rotations(torch.arange(T)[None], rope_frequencies(args)))
    turn = torch.complex(cos, sin)
    written, receiver = [embedded], 0

    def read(weight):
        nonlocal receiver
        x = 0
        for i, own in enumerate(written):
            gate = gates[receiver, i]
            x = x + (own if corrupted is None else gate * own + (1 - gate) * corrupted[i])
        receiver += 1
        return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * weight

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for layer in range(args.n_layers):
        own = {key.removeprefix(f"layers.{layer}."): value for key, value in w.items() if key.startswith(f"layers.{layer}.")}
        q, k, v = (
            [read(own["attention_norm.weight"]) @ part.T for part in own[f"attention.{name}.weight"].split(hd)]
            for name in ("wq", "wk", "wv")
        )
        group = args.n_heads // args.n_kv_heads
        heads = []
        for h in range(args.n_heads):
            scores = rotated(q[h]) @ rotated(k[h // group]).T / hd**0.5 + torch.full((T, T), -torch.inf).triu(1)
            heads.append(scores.softmax(-1) @ v[h // group] @ own["attention.wo.weight"].split(hd, 1)[h].T)
        written += heads
        x = read(own["ffn_norm.weight"])
        hidden = F.silu(x @ own["feed_forward.w1.weight"].T) * (x @ own["feed_forward.w3.weight"].T)
        written.append(hidden @ own["feed_forward.w2.weight"].T)
    return read(w["norm.weight"])[-1] @ w["output.weight"].T, torch.stack(written)


def ends(model, *texts):
    return [F.embedding(torch.tensor(text), model.tok_embeddings.weight) for text in texts]


def gate_gradients(model, clean, corrupted):
    """The metric's gradient by every gate, with all gates open: the definition of an edge's score."""
    ours, theirs = ends(model, clean, corrupted)
    gates = edge_mask(model.args).float().requires_grad_()
    _, other = gated(model, theirs, gates)
    logits, _ = gated(model, ours, gates, other.detach())
    return torch.autograd.grad(METRIC(logits[None]).sum(), gates)[0]


@settings(max_examples=8, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 2), length=st.integers(1, 4),
    scaled=st.booleans(), tied=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_are_gradients_by_gates_and_circuits_are_closed_gates(groups, kv_heads, layers, length, scaled, tied, seed):
    model = grouped_model(groups, kv_heads, layers, scaled=scaled, tied=tied, seed=seed)
    clean, corrupted = torch.randint(30, (2, length), generator=torch.Generator().manual_seed(seed)).tolist()
    scores = study.attribute_edges(model, clean, corrupted, METRIC)
    torch.testing.assert_close(scores.scores, gate_gradients(model, clean, corrupted), atol=2e-3, rtol=1e-2)
    ours, theirs = ends(model, clean, corrupted)
    _, other = gated(model, theirs, scores.mask)
    for share in (0.2, 0.8):
        mask = (torch.rand(scores.mask.shape, generator=torch.Generator().manual_seed(seed)) < share) & scores.mask
        logits, _ = gated(model, ours, mask.float(), other)
        found = study.run_circuit(model, clean, corrupted, METRIC, mask)
        assert found == pytest.approx(METRIC(logits[None]).item(), abs=2e-3)


def test_with_all_edges_or_none_a_circuit_is_one_of_the_texts():
    model = random_model(ARGS, seed=0)
    scores = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC)
    for mask, text, stated in (
        (scores.mask, CLEAN, scores.clean), (torch.zeros_like(scores.mask), CORRUPTED, scores.corrupted)
    ):  # fmt: skip
        expected = METRIC(model(torch.tensor([text]))[:, -1]).item()
        assert study.run_circuit(model, CLEAN, CORRUPTED, METRIC, mask) == pytest.approx(expected, abs=1e-4)
        assert stated == pytest.approx(expected, abs=1e-4)
    before = model(torch.tensor([CLEAN]))
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(torch.tensor([CLEAN])), before)


def test_a_node_left_out_is_a_patch_of_its_output():
    model = random_model(ARGS, seed=0)
    scores = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC)
    mask = scores.mask.clone()
    mask[:, scores.senders.index("layers.0.heads.2")] = False
    mask[:, scores.senders.index("layers.1.ffn")] = False
    other = study.swap_from(study.trace(model, CORRUPTED))
    with study.patch(model, {"layers.0.attention.head_output": other.at(heads=2), "layers.1.ffn.output": other}):
        expected = METRIC(model(torch.tensor([CLEAN]))[:, -1]).item()
    assert study.run_circuit(model, CLEAN, CORRUPTED, METRIC, mask) == pytest.approx(expected, abs=1e-4)


def test_integrated_scores_of_the_embedding_add_up_to_the_gap():
    """Every receiver reads the embedding, so the sum over its edges is the whole difference."""
    scores = study.attribute_edges(random_model(ARGS, seed=0), CLEAN, CORRUPTED, METRIC, steps=64)
    assert scores.nodes["embedding"] == pytest.approx(scores.clean - scores.corrupted, abs=0.01)


def test_several_pairs_and_seeds_are_means():
    model = random_model(ARGS, seed=0)
    texts, noises = [CLEAN, [5, 6]], [study.noise(1, seeds=2), study.noise(0, seeds=[3])]
    both = study.attribute_edges(model, texts, noises, METRIC, steps=2)
    each = [study.attribute_edges(model, *pair, METRIC, steps=2) for pair in zip(texts, noises, strict=True)]
    torch.testing.assert_close(both.scores, (each[0].scores + each[1].scores) / 2, atol=1e-4, rtol=1e-3)
    mask = both.keep_edges(20)
    alone = [study.run_circuit(model, *pair, METRIC, mask) for pair in zip(texts, noises, strict=True)]
    assert study.run_circuit(model, texts, noises, METRIC, mask) == pytest.approx(sum(alone) / 2, abs=1e-4)


def test_a_quantized_model_has_the_scores_of_its_weights():
    model = random_model(ARGS, seed=0)
    expected = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC).scores.flatten()
    quantize_model(model, "int8")
    found = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC)
    assert F.cosine_similarity(found.scores.flatten(), expected, dim=0) > 0.95
    assert study.run_circuit(model, CLEAN, CORRUPTED, METRIC, found.mask) == pytest.approx(found.clean, abs=0.02)


def test_top_edges_are_saved_as_json_and_dot(tmp_path):
    scores = study.attribute_edges(random_model(ARGS, seed=0), CLEAN, CORRUPTED, METRIC)
    top = scores.top(5)
    every = sorted((abs(edge.score) for edge in scores.top(int(scores.mask.sum()))), reverse=True)
    assert [abs(edge.score) for edge in top] == every[:5]
    scores.save(tmp_path / "edges.json", 5)
    found = json.loads((tmp_path / "edges.json").read_text())
    assert found["edges"] == [{"from": edge.sender, "to": edge.receiver, "score": edge.score} for edge in top]
    assert [node["name"] for node in found["nodes"]] == sender_names(ARGS)
    scores.save(tmp_path / "edges.dot", 5)
    lines = (tmp_path / "edges.dot").read_text().splitlines()
    assert lines[0] == "digraph circuit {" and lines[-1] == "}" and sum("->" in line for line in lines) == 5
    for path, message in (("edges.png", "expected .json or .dot"), ("no/edges.dot", "cannot write")):
        with pytest.raises(RequestError, match=message):
            scores.save(tmp_path / path)


def test_edges_lead_forwards():
    mask, senders, receivers = edge_mask(ARGS), sender_names(ARGS), receiver_names(ARGS)
    assert mask.shape == (len(receivers), len(senders))

    def is_edge(sender, receiver):
        return bool(mask[receivers.index(receiver), senders.index(sender)])

    assert is_edge("embedding", "layers.0.heads.0.q") and is_edge("layers.0.heads.3", "layers.0.ffn")
    assert is_edge("layers.0.ffn", "layers.1.groups.1.k") and is_edge("layers.1.ffn", "logits")
    assert not is_edge("layers.0.heads.0", "layers.0.groups.0.v") and not is_edge("layers.1.ffn", "layers.1.ffn")


def test_few_of_the_demos_edges_suffice(demo_folder):
    """The finding: a twentieth of the edges, or 60 of 301 nodes, carry most of "Paris"."""
    llama = Llama.build(demo_folder, dtype="float32", device="cpu")
    texts = [llama.encode(f"The capital of {country} is") for country in ("France", "Italy")]
    metric = study.logit_difference(*(llama.encode(city)[-1] for city in (" Paris", " Rome")))
    scores = study.attribute_edges(llama.model, *texts, metric, steps=2)
    for mask in (scores.keep_edges(int(scores.mask.sum()) // 20), scores.keep_nodes(60)):
        found = study.run_circuit(llama.model, *texts, metric, mask)
        assert (found - scores.corrupted) / (scores.clean - scores.corrupted) > 0.5


def test_curves_are_runs_of_the_top_edges_and_of_all_others():
    model = random_model(ARGS, seed=0)
    scores = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC)
    for of, keep in (("edges", scores.keep_edges), ("nodes", scores.keep_nodes)):
        curve = study.circuit_curve(model, CLEAN, CORRUPTED, METRIC, scores, [0, 3, len(scores.senders)], of=of)
        masks = [keep(n) for n in curve.sizes]
        assert curve.kept == [study.run_circuit(model, CLEAN, CORRUPTED, METRIC, mask) for mask in masks]
        rest = [study.run_circuit(model, CLEAN, CORRUPTED, METRIC, scores.mask & ~mask) for mask in masks]
        assert curve.removed == rest
        assert (curve.faithfulness[0], curve.completeness[0]) == pytest.approx((0, 0), abs=1e-4)
    assert (curve.faithfulness[-1], curve.completeness[-1]) == pytest.approx((1, 1), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model, scores: study.run_circuit(model, CLEAN, CORRUPTED, METRIC, torch.ones(2, 2)),
            r"mask is \(2, 2\), expected",
        ),
        (lambda model, scores: scores.top(-1), "n is -1, expected a number of edges from 0 to"),
        (lambda model, scores: scores.keep_nodes(99), "n is 99, expected a number of nodes from 0 to 11"),
        (lambda model, scores: curve_of(model, scores, of="heads"), "of is 'heads', expected edges or nodes"),
        (
            lambda model, scores: study.circuit_curve(model, CLEAN, CORRUPTED, METRIC, scores, 100),
            r"sizes is 100, expected a list of sizes, such as \[10",
        ),
        (lambda model, scores: study.attribute_edges(model, CLEAN, CORRUPTED, METRIC, steps=0), "steps is 0"),
        (lambda model, scores: study.attribute_edges(model, CLEAN, [1], METRIC), "of the same length"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    model = random_model(ARGS, seed=0)
    scores = study.attribute_edges(model, CLEAN, CORRUPTED, METRIC)
    with pytest.raises(RequestError, match=message):
        make(model, scores)


def curve_of(model, scores, **options):
    return study.circuit_curve(model, CLEAN, CORRUPTED, METRIC, scores, [1], **options)
